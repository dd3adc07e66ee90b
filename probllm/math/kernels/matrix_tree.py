"""The matrix-tree theorem without subtraction, compiled, in probability space: see ``probllm.math.matrix_tree``.

Weights [B, T, T] of head and dependent are exponentials of scores whose maximum over the heads of each word was taken
out; the roots' stand on the diagonal. With one root they count apart, with a maximum of their own: weights of words are
of order 0 in epsilon, the roots' of order 1, and so long as no pivot is tiny, each sum has terms of one order alone.
A row in which something may have been lost by underflow is not ``good``. Kernels do the rows first, first + step, ...
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

TINY = 1e-100  # what is lost to underflow, below 1e-308, is nothing beside this


@compiled(fastmath={"contract"}, error_model="numpy")
def _add(x, by, out, n):  # type: ignore[no-untyped-def]
    """out += by * x."""
    for i in range(n):
        out[i] += by * x[i]


@compiled(error_model="numpy")
def log_partitions(weights, lengths, single, log_z, good, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of the weights, without the maxima taken out."""
    rows, words, _ = weights.shape
    table, root = np.empty((words, words)), np.empty(words)
    for b in range(first, rows, step):
        n, total, fine = lengths[b], 0.0, True
        for v in range(n):
            root[v] = weights[b, v, v]
            for d in range(n):
                table[v, d] = weights[b, v, d]
        for v in range(n - 1, -1, -1):
            pivot = root[v] if v == 0 or not single else 0.0
            for h in range(v):
                pivot += table[h, v]
            if not pivot >= TINY:
                fine = False
                break
            total += math.log(pivot)
            onward = table[v]
            _add(onward, root[v] / pivot, root, v)
            for h in range(v):
                _add(onward, table[h, v] / pivot, table[h], v)
        log_z[b], good[b] = total, fine


@compiled(error_model="numpy")
def _eliminate(walk, root, v, low, high, n, single):  # type: ignore[no-untyped-def]
    """Takes word v out; ``low``..``high`` stay. walk is [to, from]. False if that may lose digits."""
    pivot = 0.0 if single else root[v]
    for c in range(low, high):
        pivot += walk[c, v]
    if not pivot >= TINY:
        return False
    for c in range(low, high):
        _add(walk[v], walk[c, v] / pivot, walk[c], n)
    _add(walk[v], root[v] / pivot, root, n)
    return True


@compiled(error_model="numpy")
def marginals(weights, lengths, single, out, good, first, step):  # type: ignore[no-untyped-def]
    """out [B, T, T], 0 on entry: the probability of each head, the root's on the diagonal; good [B] may be cleared."""
    rows, words, _ = weights.shape
    depth = 2
    while 1 << (depth - 2) < words:
        depth += 1
    # at each level of halving, of walks from a word (last axis): where they come first among the words kept, and the
    # root
    walks, roots = np.empty((depth, words, words)), np.empty((depth, words))
    todo = np.empty((2 * depth, 5), np.int64)  # the words to keep, the level, and the words that its parent kept
    for b in range(first, rows, step):
        n, fine = lengths[b], good[b]
        for d in range(n):
            roots[0, d] = weights[b, d, d]
            for h in range(n):
                walks[0, h, d] = weights[b, h, d] if h != d else 0.0
        todo[0] = 0, n, 0, 0, n
        size = 1
        while size > 0 and fine:
            size -= 1
            low, high, level, parent_low, parent_high = todo[size]
            walk, root = walks[level], roots[level]
            if level > 0:
                walk[parent_low:parent_high, :n] = walks[level - 1, parent_low:parent_high, :n]
                root[:n] = roots[level - 1, :n]
                for v in range(parent_high - 1, high - 1, -1):
                    fine = fine and _eliminate(walk, root, v, parent_low, v, n, single)
                for v in range(parent_low, low):
                    fine = fine and _eliminate(walk, root, v, v + 1, parent_high, n, single)
            if high - low > 1:
                middle = (low + high) // 2
                todo[size] = low, middle, level + 1, low, high
                todo[size + 1] = middle, high, level + 1, low, high
                size += 2
            elif fine:
                d = low
                total = weights[b, d, d]
                for h in range(n):
                    share = weights[b, d, d]
                    if h != d:
                        reach = walk[d, h] if single else walk[d, h] + root[h]
                        fine = fine and reach > 0.0
                        share = weights[b, h, d] * (root[h] / reach)
                        total += share
                    out[b, h, d] = share
                fine = fine and total >= TINY
                for h in range(n):
                    out[b, h, d] /= total
        good[b] = fine
