"""Single tag sequences of a linear chain: the best (Viterbi 1967), the k best, and exact samples.

    v_t(j) = e_t(j) + max_i v_{t-1}(i) + A(i, j)                    best: no back-pointers are kept; the way back asks again which i
                                                                    reached v_t(x_t), which is K comparisons a step
    samples: x_n ~ alpha_n, then x_t ~ alpha_t(i) A(i, x_{t+1})     (forward filtering, backward sampling; Fruhwirth-Schnatter 1994)

-inf forbids; where nothing is allowed a sequence is -1 throughout. Padding is 0.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from probllm.math.kernels.vectors import best4

FAR, BROKEN = 1, 4
# a step's scores further apart than this (in nats) lose digits in float32
SPAN32 = 2000.0


@njit(cache=True, nogil=True, error_model="numpy")
def _step_scores(emissions, start, end, t, n, out, k):  # type: ignore[no-untyped-def]
    """out[j] += scores of step t; returns the largest."""
    high = -math.inf
    for j in range(k):
        v = emissions[t, j]
        if t == 0:
            v += start[j]
        if t == n - 1:
            v += end[j]
        out[j] += v
        high = out[j] if out[j] > high else high
    return high


@njit(cache=True, nogil=True)
def _check(emissions, start, end, n, k, narrow):  # type: ignore[no-untyped-def]
    low, high = math.inf, -math.inf
    for t in range(n):
        for j in range(k):
            v = emissions[t, j] + (start[j] if t == 0 else 0) + (end[j] if t == n - 1 else 0)
            if v != v or v == math.inf:
                return BROKEN
            if v != -math.inf:
                low, high = min(low, v), max(high, v)
    return FAR if narrow and high - low > SPAN32 else 0


@njit(cache=True, nogil=True, error_model="numpy")
def best(emissions, start, end, lengths, forth, back, order, paths, flags, first, step):  # type: ignore[no-untyped-def]
    """One share of the blocks of four rows.

    forth and back [G, S, K, P]: transitions and their transposes, padded with -inf from K to whole vectors
    order: rows of the batch, four a block, all of one group; -1 is an empty place
    paths [B, T]; flags [B]: 0, FAR (do the row again in float64) or BROKEN (NaN or +inf)
    """
    rows, steps, k = emissions.shape
    times, width = forth.shape[1], forth.shape[3]
    in_group = rows // forth.shape[0]
    x, y = np.full((4, width), -np.inf, forth.dtype), np.full((4, width), -np.inf, forth.dtype)
    seen = np.empty((4, steps, k), forth.dtype)
    until = np.zeros(4, np.int64)
    b_of = np.zeros(4, np.int64)
    blocks = order.size // 4
    for block in range(first, blocks, step):
        longest, g = 0, 0
        x[:] = -np.inf
        for r in range(4):
            b = b_of[r] = order[4 * block + r]
            until[r] = 0
            if b < 0:
                continue
            g = b // in_group
            flags[b] = _check(emissions[b], start[b], end[b], lengths[b], k, forth.itemsize == 4)
            if flags[b] == 0:
                until[r] = lengths[b]
                longest = max(longest, until[r])
        for t in range(longest):
            if t:
                best4(x, forth[g, t - 1 if times > 1 else 0], y, k)
            else:
                y[:, :k] = 0
            for r in range(4):
                if t >= until[r]:
                    continue
                high = _step_scores(emissions[b_of[r]], start[b_of[r]], end[b_of[r]], t, until[r], y[r], k)
                if high == -math.inf:
                    paths[b_of[r]] = -1
                    until[r] = -1
                    continue
                for j in range(k):
                    x[r, j] = y[r, j] - high
                    seen[r, t, j] = x[r, j]
        for r in range(4):
            n = until[r]
            if n <= 0:
                continue
            path = paths[b_of[r]]
            path[n:] = 0
            tag = 0
            for j in range(1, k):
                if seen[r, n - 1, j] > seen[r, n - 1, tag]:
                    tag = j
            path[n - 1] = tag
            for t in range(n - 2, -1, -1):
                column = back[g, t if times > 1 else 0, tag]
                tag = 0
                high = seen[r, t, 0] + column[0]
                for i in range(1, k):
                    v = seen[r, t, i] + column[i]
                    if v > high:
                        tag, high = i, v
                path[t] = tag


@njit(cache=True, nogil=True)
def k_best(emissions, start, end, lengths, transitions, n_best, paths, scores, first, step):  # type: ignore[no-untyped-def]
    """The n_best highest sequences of each row, in float64: paths [n_best, B, T] and scores [n_best, B] (-inf where there are fewer)."""
    rows, steps, k = emissions.shape
    in_group = rows // transitions.shape[0]
    times = transitions.shape[1]
    came = np.empty((steps, k, n_best), np.int32)
    before, after = np.empty((k, n_best)), np.empty((k, n_best))
    for b in range(first, rows, step):
        n, g = lengths[b], b // in_group
        before[:] = -math.inf
        for j in range(k):
            before[j, 0] = np.float64(emissions[b, 0, j]) + start[b, j] + (end[b, j] if n == 1 else 0.0)
        for t in range(1, n):
            table = transitions[g, t - 1 if times > 1 else 0]
            for j in range(k):
                top = after[j]
                top[:] = -math.inf
                for i in range(k):
                    for r in range(n_best):
                        v = before[i, r] + table[i, j]
                        if not v > top[n_best - 1]:
                            break
                        at = n_best - 1
                        while at > 0 and top[at - 1] < v:
                            top[at], came[t, j, at] = top[at - 1], came[t, j, at - 1]
                            at -= 1
                        top[at], came[t, j, at] = v, i * n_best + r
                e = np.float64(emissions[b, t, j]) + (end[b, j] if t == n - 1 else 0.0)
                for r in range(n_best):
                    top[r] += e
            before, after = after, before
        # merge the lists of the last step, each of which is sorted
        at_rank = np.zeros(k, np.int64)
        for m in range(n_best):
            high, tag = -math.inf, -1
            for j in range(k):
                if at_rank[j] < n_best and before[j, at_rank[j]] > high:
                    high, tag = before[j, at_rank[j]], j
            scores[m, b] = high
            path = paths[m, b]
            if tag < 0:
                path[:] = -1
                continue
            rank = at_rank[tag]
            at_rank[tag] += 1
            path[n:] = 0
            path[n - 1] = tag
            for t in range(n - 1, 0, -1):
                source = came[t, tag, rank]
                tag, rank = source // n_best, source % n_best
                path[t - 1] = tag


@njit(cache=True, nogil=True, error_model="numpy")
def sample(alpha, back, lengths, good, uniforms, paths, logarithms, first, step):  # type: ignore[no-untyped-def]
    """Exact samples of one share of the rows, from what the forward recursion left behind.

    alpha [N, T, P]: filtered probabilities, or their logarithms; back [G, S, K, P] the transposed table in the same form
    uniforms [M, N, T] in [0, 1); paths [M, N, T]; rows where ``good`` [N] is False are left alone
    """
    rows, steps = alpha.shape[:2]
    k, times = back.shape[2], back.shape[1]
    in_group = rows // back.shape[0]
    weights = np.empty(k)
    for b in range(first, rows, step):
        if not good[b]:
            continue
        n, g = lengths[b], b // in_group
        for m in range(uniforms.shape[0]):
            path = paths[m, b]
            path[n:] = 0
            tag = 0
            for t in range(n - 1, -1, -1):
                last = t == n - 1
                column = back[g, 0 if last or times == 1 else t, tag]
                total, high = 0.0, -math.inf
                if logarithms:
                    for i in range(k):
                        weights[i] = alpha[b, t, i] + (0.0 if last else column[i])
                        high = max(high, weights[i])
                    for i in range(k):
                        weights[i] = math.exp(weights[i] - high)
                        total += weights[i]
                else:
                    for i in range(k):
                        weights[i] = np.float64(alpha[b, t, i]) * (1.0 if last else column[i])
                        total += weights[i]
                left = uniforms[m, b, t] * total
                tag = -1
                for i in range(k):
                    if weights[i] > 0:
                        tag = i
                        left -= weights[i]
                        if left < 0:
                            break
                path[t] = tag
