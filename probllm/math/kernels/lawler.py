"""The k best dependency trees, projective or all, compiled, from whatever finds the best one.

What is left after a tree falls into sets in which the words before d have their heads in it, and d another head than in
it; the best of each set waits until it is the best of all (Lawler 1972, "A procedure for computing the k best solutions
to discrete optimization problems"; Murty 1968). No tree is found twice.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels import arborescence, eisner
from probllm.math.kernels.compiled import compiled

_best_of_all, _best_projective = arborescence.best_tree, eisner.best_tree
_space_of_all, _space_projective = arborescence.space_for, eisner.space_for


@compiled()
def _keep_head(left, table, d, head, n):  # type: ignore[no-untyped-def]
    """Leaves word d one head of those in the table."""
    row = d if head == 0 else head - 1
    for h in range(n):
        left[h, d] = table[h, d] if h == row else -math.inf


@compiled()
def _ban(left, table, d, banned, n):  # type: ignore[no-untyped-def]
    """Leaves word d the heads in the table but those that are banned [T + 1]."""
    for row in range(n):
        left[row, d] = -math.inf if banned[0 if row == d else row + 1] else table[row, d]


@compiled()
def k_best(tables, lengths, single, projective, heads, first, step):  # type: ignore[no-untyped-def]
    """heads [k, B, T], -1 on entry: the best trees, best first, 0 at padding; -1 where there are fewer.

    tables [B, T, T] of head and dependent, the roots' scores on the diagonal. Rows first, first + step, ...
    """
    k, rows, words = heads.shape
    one, other = _space_projective(words if projective else 1), _space_of_all(1 if projective else words)
    most = 1 + (k - 1) * words
    trees, scores = np.zeros((most, words), np.int64), np.empty(most)
    starts, banned = np.empty(most, np.int64), np.empty((most, words + 1), np.bool_)
    now, left = np.empty(words + 1, np.bool_), np.empty((words, words))
    for b in range(first, rows, step):
        n, table = lengths[b], tables[b]
        now[:] = False
        count, parent, start = 0, 0, 0
        for rank in range(k):
            # the first time, all trees; then the sets that the tree found last leaves of its own set
            left[:] = table
            for d in range(start if rank > 0 else 0):
                _keep_head(left, table, d, trees[parent, d], n)
            for at in range(start, n if rank > 0 else 1):
                if rank > 0:
                    if at == start:
                        now[:] = banned[parent]
                    else:
                        now[:] = False
                        _keep_head(left, table, at - 1, trees[parent, at - 1], n)
                    now[trees[parent, at]] = True
                    _ban(left, table, at, now, n)
                if projective:
                    found = _best_projective(left, n, single, one, trees[count])
                else:
                    found = _best_of_all(left, n, single, other, trees[count])
                if found:
                    total = 0.0
                    for d in range(n):
                        h = trees[count, d]
                        total += table[d if h == 0 else h - 1, d]
                    scores[count], starts[count] = total, at
                    banned[count] = now
                    count += 1
            parent = -1
            for i in range(count):
                if scores[i] > -math.inf and (parent < 0 or scores[i] > scores[parent]):
                    parent = i
            if parent < 0:
                break
            heads[rank, b, :n] = trees[parent, :n]
            heads[rank, b, n:] = 0
            start = starts[parent]
            scores[parent] = -math.inf  # it has been found
