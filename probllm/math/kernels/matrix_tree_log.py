"""The matrix-tree theorem without subtraction, compiled, in log space: right for every score, and some ten times slower
than ``matrix_tree``, whose steps these are.

Numbers are leading terms exp(log) epsilon^order of series in epsilon, which is the weight that each root has beside its
own where there must be one root alone (see ``probllm.math.matrix_tree``).
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled


@compiled()
def _plus(log, order, other, other_order):  # type: ignore[no-untyped-def]
    """The leading term of a sum."""
    if other == -math.inf or (log > -math.inf and order < other_order):
        return log, order
    if log == -math.inf or other_order < order:
        return other, other_order
    high, low = max(log, other), min(log, other)
    return high + math.log1p(math.exp(low - high)), order


@compiled()
def _eliminate(log, order, v, low, high, n):  # type: ignore[no-untyped-def]
    """Takes word v out of log, order [to, from], the root last; ``low``..``high`` stay. The pivot's log and order."""
    root = log.shape[0] - 1
    pivot, rank = log[root, v], order[root, v]
    for c in range(low, high):
        pivot, rank = _plus(pivot, rank, log[c, v], order[c, v])
    if pivot == -math.inf:
        return pivot, rank
    for i in range(low, high + 1):
        c = i if i < high else root
        if log[c, v] == -math.inf:
            continue
        share, share_rank = log[c, v] - pivot, order[c, v] - rank
        for d in range(n):
            if log[v, d] > -math.inf:
                log[c, d], order[c, d] = _plus(log[c, d], order[c, d], share + log[v, d], share_rank + order[v, d])
    return pivot, rank


@compiled()
def sums(scores, lengths, single, keep, log_z, out, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of scores [B, T, T], the roots' on the diagonal; out alike, 0 on entry, the marginals if ``keep``."""
    rows, words, _ = scores.shape
    depth = 2
    while 1 << (depth - 2) < words:
        depth += 1
    logs, orders = np.empty((depth, words + 1, words)), np.empty((depth, words + 1, words), np.int64)
    todo = np.empty((2 * depth, 5), np.int64)  # the words to keep, the level, and the words that its parent kept
    shares, ranks = np.empty(words), np.empty(words, np.int64)
    for b in range(first, rows, step):
        n = lengths[b]
        total, total_rank = 0.0, 0
        orders[0] = 0
        for d in range(n):
            peak = -math.inf
            for h in range(n):
                peak = max(peak, scores[b, h, d])
            if peak == -math.inf:
                peak = 0.0
            total += peak
            for h in range(n):
                logs[0, h, d] = scores[b, h, d] - peak if h != d else -math.inf
            logs[0, words, d] = scores[b, d, d] - peak
            orders[0, words, d] = 1 if single else 0
        logs[1], orders[1] = logs[0], orders[0]
        for v in range(n - 1, -1, -1):
            pivot, rank = _eliminate(logs[1], orders[1], v, 0, v, v)
            total, total_rank = total + pivot, total_rank + rank
            if pivot == -math.inf:
                break
        possible = total > -math.inf and total_rank == (1 if single else 0)
        log_z[b] = total if possible else -math.inf
        if not possible or not keep:
            continue
        todo[0] = 0, n, 0, 0, n
        size = 1
        while size > 0:
            size -= 1
            low, high, level, parent_low, parent_high = todo[size]
            log, order = logs[level], orders[level]
            if level > 0:
                log[parent_low:parent_high], log[words] = (
                    logs[level - 1, parent_low:parent_high],
                    logs[level - 1, words],
                )
                order[parent_low:parent_high] = orders[level - 1, parent_low:parent_high]
                order[words] = orders[level - 1, words]
                for v in range(parent_high - 1, high - 1, -1):
                    _eliminate(log, order, v, parent_low, v, n)
                for v in range(parent_low, low):
                    _eliminate(log, order, v, v + 1, parent_high, n)
            if high - low > 1:
                middle = (low + high) // 2
                todo[size] = low, middle, level + 1, low, high
                todo[size + 1] = middle, high, level + 1, low, high
                size += 2
                continue
            d = low
            whole, whole_rank = -math.inf, 0
            for h in range(n):
                # the arc's weight, times the chance to meet the root before d from the head
                shares[h], ranks[h] = (logs[0, h, d], 0) if h != d else (logs[0, words, d], orders[0, words, d])
                if h != d and shares[h] > -math.inf:
                    reach, rank = _plus(log[words, h], order[words, h], log[d, h], order[d, h])
                    shares[h] = shares[h] + (log[words, h] - reach) if log[words, h] > -math.inf else -math.inf
                    ranks[h] = order[words, h] - rank
                whole, whole_rank = _plus(whole, whole_rank, shares[h], ranks[h])
            for h in range(n):
                if ranks[h] == whole_rank and shares[h] > -math.inf:
                    out[b, h, d] = math.exp(shares[h] - whole)
