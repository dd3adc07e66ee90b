"""Exact samples of dependency trees by Wilson's algorithm, compiled, and by elimination where its walks are long.

A walk goes from each word to a head drawn by weight, and on until it meets the tree; the way without its loops joins
the tree (Wilson 1996, "Generating random spanning trees more quickly than the cover time"). One root: it is drawn from
its marginals first (Zmigrod, Vieira and Cotterell 2021, "Efficient sampling of dependency structures").

The tree is independent of the loops that were walked, so giving up on long walks is no bias, provided that the whole
tree is drawn again. That is then done word by word: the head h of d has a probability proportional to A[h, d] esc(h, d)
(see ``probllm.math.matrix_tree``), and d merges with its head; in log space and T^4, whatever the scores.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.splitmix import uniform


@compiled()
def _pick(logs, count, state):  # type: ignore[no-untyped-def]
    """An index drawn by exp(logs[:count]); 0 if all are -inf."""
    high = -math.inf
    for i in range(count):
        high = max(high, logs[i])
    if high == -math.inf:
        return 0
    total = 0.0
    for i in range(count):
        total += math.exp(logs[i] - high)
    left, found = uniform(state) * total, 0
    for i in range(count):
        mass = math.exp(logs[i] - high)
        if mass > 0.0:
            found = i
            left -= mass
            if left < 0.0:
                break
    return found


@compiled()
def _log_add(x, y):  # type: ignore[no-untyped-def]
    if x < y:
        x, y = y, x
    if y == -math.inf:
        return x
    return x + math.log1p(math.exp(y - x))


@compiled()
def _walk(sums, n, root, budget, state, heads):  # type: ignore[no-untyped-def]
    """Wilson's algorithm: heads [n] of words, -1 for the root, root's own is left. False: it took too many steps.

    sums [T, T + 1]: of each word, running sums of the weights of its heads, the root's last.
    """
    reached = np.zeros(n, np.bool_)
    if root >= 0:
        reached[root] = True
    for word in range(n):
        x = word
        while x >= 0 and not reached[x]:
            if budget == 0:
                return False
            budget -= 1
            u = uniform(state) * sums[x, n]
            heads[x] = np.searchsorted(sums[x, : n + 1], u, "right")  # never one of weight 0
            if heads[x] == n:
                heads[x] = -1
            x = heads[x]
        x = word
        while x >= 0 and not reached[x]:
            reached[x] = True
            x = heads[x]
    return True


@compiled()
def _escape(table, root, words, m, out):  # type: ignore[no-untyped-def]
    """out [m]: log chance, from each of the words, to meet the root before the last of them."""
    # walk[i, j]: from the i-th word to the j-th; the m-th stands for the root
    walk, pivots = np.empty((m, m + 1)), np.empty(m)
    for i in range(m):
        for j in range(m):
            walk[i, j] = table[words[j], words[i]] if i != j else -math.inf
        walk[i, m] = root[words[i]]
    for v in range(m - 1):
        pivot = -math.inf
        for j in range(v + 1, m + 1):
            pivot = _log_add(pivot, walk[v, j])
        pivots[v] = pivot
        if pivot == -math.inf:
            continue
        for i in range(v + 1, m):
            if walk[i, v] > -math.inf:
                for j in range(v + 1, m + 1):
                    walk[i, j] = _log_add(walk[i, j], walk[i, v] + (walk[v, j] - pivot))
    out[m - 1] = -math.inf
    for v in range(m - 2, -1, -1):
        total = walk[v, m]
        for j in range(v + 1, m - 1):
            total = _log_add(total, walk[v, j] + out[j])
        out[v] = total - pivots[v] if pivots[v] > -math.inf else -math.inf


@compiled()
def _word_by_word(scores, n, root, state, heads):  # type: ignore[no-untyped-def]
    """As ``_walk``, from scores [T, T] of head and dependent, the root's on the diagonal."""
    table, to_root = np.empty((n, n)), np.empty(n)
    words, cluster = np.empty(n, np.int64), np.arange(n)  # the word that a word has merged with, -1 for the root
    m = 0
    for d in range(n):
        to_root[d] = scores[d, d] if root < 0 else scores[root, d]
        for h in range(n):
            table[h, d] = scores[h, d]
        if d != root:
            words[m] = d
            m += 1
        else:
            cluster[d] = -1
    choices, members, logs = np.empty(n + 1), np.empty(n + 1, np.int64), np.empty(n + 1)
    while m > 0:
        d = words[m - 1]
        _escape(table, to_root, words, m, choices)
        for i in range(m - 1):
            choices[i] += table[words[i], d]
        choices[m - 1] = to_root[d]
        i = _pick(choices, m, state)
        head = words[i] if i < m - 1 else -1
        # which of the words that merged into the head it is
        count = 0
        for y in range(n):
            if cluster[y] == head:
                members[count], logs[count] = y, scores[y, d]
                count += 1
        if head < 0 and root < 0:
            members[count], logs[count] = -1, scores[d, d]
            count += 1
        heads[d] = members[_pick(logs, count, state)]
        m -= 1
        for j in range(m):
            x = words[j]
            if head >= 0:
                table[head, x] = _log_add(table[head, x], table[d, x])
            else:
                to_root[x] = _log_add(to_root[x], table[d, x])
        for y in range(n):
            if cluster[y] == d:
                cluster[y] = head


@compiled()
def sample(scores, lengths, single, roots, seeds, patience, heads, first, step):  # type: ignore[no-untyped-def]
    """heads [M, B, T], 0 on entry, of rows that allow a tree.

    roots [B, T]: the marginals of the roots if there is one alone; seeds [M, B]; patience: steps of a walk, in n^2.
    """
    draws, rows, words = heads.shape
    sums, state = np.empty((words, words + 1)), np.empty(1, np.uint64)
    found, running = np.empty(words, np.int64), np.empty(words)
    for b in range(first, rows, step):
        n, table = lengths[b], scores[b]
        for d in range(n):
            high = -math.inf
            for h in range(n):
                if h != d or not single:
                    high = max(high, table[h, d])
            total = 0.0
            for h in range(n):
                if h != d and table[h, d] > -math.inf:
                    total += math.exp(table[h, d] - high)
                sums[d, h] = total
            if not single and table[d, d] > -math.inf:
                total += math.exp(table[d, d] - high)
            sums[d, n] = total
        total = 0.0
        for d in range(n):
            total += roots[b, d]
            running[d] = total
        for m in range(draws):
            state[0] = np.uint64(seeds[m, b])
            root = -1
            if single:
                root = np.searchsorted(running[:n], uniform(state) * running[n - 1], "right")
            if not _walk(sums, n, root, patience * n * n, state, found):
                _word_by_word(table, n, root, state, found)
            for d in range(n):
                heads[m, b, d] = found[d] + 1 if d != root else 0
