"""Eisner's recursion over projective dependency trees, compiled: see ``probllm.math.eisner``.

Spans i..j stand in six tables, so that every sum runs along two rows:

    right [i, j], right_end [j, i]: headed by i;    left [i, j], left_end [j, i]: headed by j
    ahead [i, j]: i is the head of j, which ends there;    back [j, i]: j is the head of i, which starts there

Samples run in probability space, from weights of at most 1; a row whose sum comes out tiny is for the caller to do
otherwise. The best tree runs over scores. Kernels do the rows first, first + step, ... Sums: see ``eisner_lanes``.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponentials
from probllm.math.kernels.rows import LANES, dot, highest
from probllm.math.kernels.splitmix import uniform

# no sum of weights is above e^MOST, so what underflow loses is less than 1e-308 * 1e109 * T^3
MOST, TINY = 250.0, 1e-150
_LN_TREES = math.log(6.75)  # of n words there are fewer than 6.75^n trees: C(3n, n) / (2n + 1)


@compiled()
def scaled(scores, n, peaks, weights):  # type: ignore[no-untyped-def]
    """weights [T, T] = exp(scores - peaks) of the first n words, at most 1 and so that sums over trees stay below
    e^MOST; returns the sum of the peaks, one for each column (0 where all is forbidden)."""
    peaks[:n] = -math.inf
    for h in range(n):
        for d in range(n):
            v = np.float64(scores[h, d])
            peaks[d] = v if v > peaks[d] else peaks[d]
    taken = 0.0
    for d in range(n):
        peaks[d] = (peaks[d] if peaks[d] > -math.inf else 0.0) + max(_LN_TREES - MOST / n, 0.0)
        taken += peaks[d]
    for h in range(n):
        for d in range(n):
            weights[h, d] = np.float64(scores[h, d]) - peaks[d]
        exponentials(weights[h], n)
    return taken


@compiled(error_model="numpy")
def _tables(words):  # type: ignore[no-untyped-def]
    """Six tables, and one of two rows, wide enough for whole vectors."""
    width = words + LANES
    return np.empty((6, words, width)), np.empty((2, width))


@compiled(error_model="numpy")
def _inside(arcs, n, tables):  # type: ignore[no-untyped-def]
    """Fills the tables of spans from weights [T, T] of head and dependent."""
    tables[:, :n] = 0.0  # beyond a span in its row, where whole vectors reach
    wide = tables.shape[2]
    right, right_end, left, left_end, ahead, back = tables
    for j in range(n):
        right[j, j] = right_end[j, j] = left[j, j] = left_end[j, j] = 1.0
    # by width: a processor waits when it loads a vector into which it has just stored
    for w in range(1, n):
        for i in range(n - w):
            j = i + w
            gap = dot(right, i * wide + i, left_end, j * wide + i + 1, w)
            to_right = dot(ahead, i * wide + i + 1, right_end, j * wide + i + 1, w - 1)
            to_left = dot(left, i * wide + i + 1, back, j * wide + i + 1, w - 1)
            ahead[i, j] = arcs[i, j] * gap
            back[j, i] = arcs[j, i] * gap
            right[i, j] = right_end[j, i] = to_right + ahead[i, j]
            left[i, j] = left_end[j, i] = to_left + back[j, i]


@compiled(error_model="numpy")
def _under_root(arcs, n, single, tables, under):  # type: ignore[no-untyped-def]
    """The sum over all trees. under [2, T + 1]: over those of the first words; with a word as the last child."""
    right_end, left, left_end = tables[1], tables[2], tables[3]
    wide = tables.shape[2]
    under[:] = 0.0
    under[0, 0] = 1.0
    for r in range(n):
        under[1, r] = arcs[r, r] * (left[0, r] if single else dot(under, 0, left_end, r * wide, r + 1))
        under[0, r + 1] = dot(under, wide, right_end, r * wide, r + 1)
    return under[0, n]


@compiled(error_model="numpy")
def _choose(x, i, a, y, j, b, n, state, drawn):  # type: ignore[no-untyped-def]
    """Which k < n: drawn by x[i, a + k] y[j, b + k], or that of the highest x[i, a + k] + y[j, b + k]."""
    found, high, wide = 0, -math.inf, x.shape[1]
    if not drawn:
        for k in range(n):
            s = x[i, a + k] + y[j, b + k]
            if s > high:
                found, high = k, s
        return found
    left = uniform(state) * dot(x, i * wide + a, y, j * wide + b, n)
    for k in range(n):
        p = x[i, a + k] * y[j, b + k]
        if p > 0.0:
            found = k
            left -= p
            if left < 0.0:
                break
    return found


@compiled(error_model="numpy")
def _read(n, single, tables, under, todo, state, drawn, heads):  # type: ignore[no-untyped-def]
    """Writes the heads [n] of one tree, a sum's term being chosen at each span."""
    right, right_end, left, left_end, ahead, back = tables
    size, end = 0, n
    while end > 0:
        r = _choose(under, 1, 0, right_end, end - 1, 0, end, state, drawn)
        heads[r] = 0
        start = 0 if single else _choose(under, 0, 0, left_end, r, 0, r + 1, state, drawn)
        todo[size] = r, end - 1, 1
        todo[size + 1] = start, r, 0
        size += 2
        end = start
    while size > 0:
        size -= 1
        i, j, to_right = todo[size]
        if i == j:
            continue
        if to_right == 1:
            k = i + 1 + _choose(ahead, i, i + 1, right_end, j, i + 1, j - i, state, drawn)
            heads[k] = i + 1
            todo[size] = k, j, 1
            low, high = i, k
        else:
            k = i + _choose(left, i, i, back, j, i, j - i, state, drawn)
            heads[k] = j + 1
            todo[size] = i, k, 0
            low, high = k, j
        m = low + _choose(right, low, low, left_end, high, low + 1, high - low, state, drawn)
        todo[size + 1] = low, m, 1
        todo[size + 2] = m + 1, high, 0
        size += 3


@compiled(error_model="numpy")
def sample(scores, lengths, single, seeds, heads, good, first, step):  # type: ignore[no-untyped-def]
    """heads [M, B, T], 0 on entry, drawn by scores [B, T, T], the roots' on the diagonal; seeds [M, B]."""
    draws, rows, words = heads.shape
    tables, under = _tables(words)
    todo, state = np.empty((4 * words + 4, 3), np.int64), np.empty(1, np.uint64)
    arcs, peaks = np.empty((words, words)), np.empty(words)
    for b in range(first, rows, step):
        n = lengths[b]
        scaled(scores[b], n, peaks, arcs)
        _inside(arcs, n, tables)
        good[b] = _under_root(arcs, n, single, tables, under) >= TINY
        if good[b]:
            for m in range(draws):
                state[0] = np.uint64(seeds[m, b])
                _read(n, single, tables, under, todo, state, True, heads[m, b])


@compiled(error_model="numpy")
def space_for(words):  # type: ignore[no-untyped-def]
    """What ``best_tree`` works in."""
    tables, under = _tables(words)
    return tables, under, np.empty((4 * words + 4, 3), np.int64), np.empty(1, np.uint64)


@compiled(error_model="numpy")
def best_tree(scores, n, single, space, heads):  # type: ignore[no-untyped-def]
    """Writes the heads of a tree of the highest score, by scores [T, T]; False if there is none."""
    tables, under, todo, state = space
    right, right_end, left, left_end, ahead, back = tables
    wide = tables.shape[2]
    tables[:, :n], under[:] = -math.inf, -math.inf
    for j in range(n):
        right[j, j] = right_end[j, j] = left[j, j] = left_end[j, j] = 0.0
    for w in range(1, n):
        for i in range(n - w):
            j = i + w
            gap = highest(right, i * wide + i, left_end, j * wide + i + 1, w)
            to_right = highest(ahead, i * wide + i + 1, right_end, j * wide + i + 1, w - 1)
            to_left = highest(left, i * wide + i + 1, back, j * wide + i + 1, w - 1)
            ahead[i, j] = scores[i, j] + gap
            back[j, i] = scores[j, i] + gap
            right[i, j] = right_end[j, i] = max(to_right, ahead[i, j])
            left[i, j] = left_end[j, i] = max(to_left, back[j, i])
    under[0, 0] = 0.0
    for r in range(n):
        start = left[0, r] if single else highest(under, 0, left_end, r * wide, r + 1)
        under[1, r] = scores[r, r] + start
        under[0, r + 1] = highest(under, wide, right_end, r * wide, r + 1)
    possible = under[0, n] > -math.inf
    if possible:
        _read(n, single, tables, under, todo, state, False, heads)
    return possible
