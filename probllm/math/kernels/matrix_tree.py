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
from probllm.math.kernels.rows import LANES, add

TINY = 1e-100  # what is lost to underflow, below 1e-308, is nothing beside this


@compiled(error_model="numpy")
def log_partitions(weights, lengths, single, log_z, good, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of the weights, without the maxima taken out."""
    rows, words, _ = weights.shape
    wide = words + LANES
    table = np.zeros((words + 1, wide))  # [head, dependent], the root last
    for b in range(first, rows, step):
        n, total, fine = lengths[b], 0.0, True
        for h in range(n):
            table[words, h] = weights[b, h, h]
            for d in range(n):
                table[h, d] = weights[b, h, d]
        for v in range(n - 1, -1, -1):
            pivot = table[words, v] if v == 0 or not single else 0.0
            for h in range(v):
                pivot += table[h, v]
            if not pivot >= TINY:
                fine = False
                break
            total += math.log(pivot)
            inverse = 1.0 / pivot
            add(table[words, v] * inverse, table, v * wide, table, words * wide, v)
            for h in range(v):
                add(table[h, v] * inverse, table, v * wide, table, h * wide, v)
        log_z[b], good[b] = total, fine


@compiled(error_model="numpy")
def _eliminate(walk, v, low, high, n, single):  # type: ignore[no-untyped-def]
    """Takes word v out; ``low``..``high`` stay. walk is [to, from], the root last. False if that may lose digits."""
    root, wide = walk.shape[0] - 1, walk.shape[1]
    pivot = 0.0 if single else walk[root, v]
    for c in range(low, high):
        pivot += walk[c, v]
    if not pivot >= TINY:
        return False
    inverse = 1.0 / pivot
    for c in range(low, high):
        add(walk[c, v] * inverse, walk, v * wide, walk, c * wide, n)
    add(walk[root, v] * inverse, walk, v * wide, walk, root * wide, n)
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
    walks = np.zeros((depth, words + 1, words + LANES))
    todo = np.empty((2 * depth, 5), np.int64)  # the words to keep, the level, and the words that its parent kept
    for b in range(first, rows, step):
        n, fine = lengths[b], good[b]
        for d in range(n):
            walks[0, words, d] = weights[b, d, d]
            for h in range(n):
                walks[0, h, d] = weights[b, h, d] if h != d else 0.0
        todo[0] = 0, n, 0, 0, n
        size = 1
        while size > 0 and fine:
            size -= 1
            low, high, level, parent_low, parent_high = todo[size]
            walk = walks[level]
            if level > 0:
                walk[parent_low:parent_high] = walks[level - 1, parent_low:parent_high]
                walk[words] = walks[level - 1, words]
                for v in range(parent_high - 1, high - 1, -1):
                    fine = fine and _eliminate(walk, v, parent_low, v, n, single)
                for v in range(parent_low, low):
                    fine = fine and _eliminate(walk, v, v + 1, parent_high, n, single)
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
                        reach = walk[d, h] if single else walk[d, h] + walk[words, h]
                        fine = fine and reach > 0.0
                        share = weights[b, h, d] * (walk[words, h] / reach)
                        total += share
                    out[b, h, d] = share
                fine = fine and total >= TINY
                for h in range(n):
                    out[b, h, d] /= total
        good[b] = fine
