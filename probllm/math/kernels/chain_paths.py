"""Single tag sequences of a linear chain: the best (Viterbi 1967), the k best, and exact samples.

    best:     v_t(j) = e_t(j) + max_i v_{t-1}(i) + A(i, j); no back-pointers are kept: the way back asks again, in K
              comparisons a step, which i reached v_t(x_t)
    k best:   v_t(j) is a sorted list, merged lazily from the lists of step t - 1 (Huang and Chiang 2005, algorithm 2)
    samples:  x_n ~ alpha_n, then x_t ~ alpha_t(i) A(i, x_{t+1}): forward filtering, backward sampling
              (Fruhwirth-Schnatter 1994)

-inf forbids; where nothing is allowed a sequence is -1 throughout. Padding is 0.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.chain_scaled import by_falling_length
from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import BROKEN, lowest_allowed, outer_steps
from probllm.math.kernels.tiles import best_sums
from probllm.math.kernels.vectors import climb, highest_sum, place_of_highest_sum, reach

FAR = 1
# scores beyond this (in nats) lose digits in float32
SPAN32 = 2000.0
# rows that share a step of ``best``
ROWS = 4


@compiled()
def tables(transitions, forth, back, highest, first, step):  # type: ignore[no-untyped-def]
    """forth and back [N, K, P]: transitions [N, K, K] as they are and transposed, padded with -inf; one share.

    highest [N]: the greatest absolute value of those that are not -inf; NaN if one is NaN or +inf.
    """
    n, k, _ = transitions.shape
    for m in range(first, n, step):
        block = transitions[m].reshape(k * k)
        high = reach(block, k * k)
        if not high < math.inf:
            low, high, broken = lowest_allowed(block, 0, k * k)
            high = math.nan if broken else max(high, -low, 0.0)
        highest[m] = high
        for i in range(k):
            for j in range(k):
                forth[m, i, j] = transitions[m, i, j]
                back[m, j, i] = transitions[m, i, j]
            for j in range(k, forth.shape[2]):
                forth[m, i, j] = back[m, i, j] = -math.inf


@compiled()
def search_flag(emissions, n, ends, narrow):  # type: ignore[no-untyped-def]
    """0, FAR or BROKEN for a row of n steps, whose first and last step are in ``ends`` too."""
    flat = emissions.reshape(emissions.size)
    size = n * emissions.shape[1]
    limit = SPAN32 if narrow else 1e300
    if reach(flat, size) <= limit and reach(ends, ends.size) <= limit:
        return 0
    low, high, broken = lowest_allowed(flat, 0, size)
    low_end, high_end, broken_end = lowest_allowed(ends, 0, ends.size)
    if broken or broken_end:
        return BROKEN
    return FAR if narrow and max(high, high_end, -low, -low_end) > SPAN32 else 0


@compiled()
def best(emissions, start, end, lengths, forth, back, one, paths, flags, first, step):  # type: ignore[no-untyped-def]
    """One share of the blocks of four rows.

    forth and back [G, S, K, P]: from ``tables``; one: 1 in their type (see ``tiles``)
    flags [B]: rows that are not FAR are passed over; left 0, FAR (do the row again in float64) or BROKEN (NaN or +inf)
    paths [B, T]
    """
    rows, steps, k = emissions.shape
    groups, times, _, width = forth.shape
    in_group = rows // groups
    blocks = (in_group + ROWS - 1) // ROWS
    order = by_falling_length(lengths, groups, steps)
    narrow = forth.itemsize == 4
    y = np.empty((ROWS, width), forth.dtype)
    ends = np.empty((ROWS, 2 * width), forth.dtype)  # the first and the last step, with start and end
    seen = np.empty((steps, ROWS, width), forth.dtype)
    by = np.empty(ROWS, forth.dtype)
    until, which = np.zeros(ROWS, np.int64), np.zeros(ROWS, np.int64)
    for block in range(first, groups * blocks, step):
        g, begin = block // blocks, block // blocks * in_group + ROWS * (block % blocks)
        size = min(ROWS, (g + 1) * in_group - begin)
        longest = 0
        y[:] = -np.inf
        y[:, :k] = 0
        seen[0] = -np.inf
        until[:] = 0
        for r in range(size):
            b = which[r] = order[begin + r]
            if flags[b] != FAR:
                continue
            n, by[r] = lengths[b], 0
            outer_steps(emissions[b], start[b], end[b], n, width, ends[r], width if n > 1 else 0)
            flags[b] = search_flag(emissions[b], n, ends[r, : 2 * width if n > 1 else width], narrow)
            if flags[b] == 0:
                until[r] = n
                longest = max(longest, n)
        for t in range(longest):
            if t:
                best_sums(seen[t - 1], forth[g, t - 1 if times > 1 else 0], y, k, one, size)
            for r in range(size):
                n = until[r]
                if t >= n:
                    continue
                there = (ROWS * t + r) * width
                if 0 < t < n - 1:
                    here = (which[r] * steps + t) * k
                    by[r] = climb(y, r * width, by[r], emissions, here, k, seen, there, width)
                else:
                    here = (2 * r + (1 if t else 0)) * width
                    by[r] = climb(y, r * width, by[r], ends, here, width, seen, there, width)
                if by[r] == -np.inf:
                    paths[which[r]] = -1
                    until[r] = 0
        for r in range(size):
            n = until[r]
            if n == 0:
                continue
            b, tag = which[r], 0
            for j in range(1, k):
                if seen[n - 1, r, j] > seen[n - 1, r, tag]:
                    tag = j
            paths[b, n:], paths[b, n - 1] = 0, tag
        # step by step, not row by row: the rows do not wait for each other
        for t in range(longest - 2, -1, -1):
            for r in range(size):
                if t < until[r] - 1:
                    b = which[r]
                    column = back[g, t if times > 1 else 0, paths[b, t + 1]]
                    paths[b, t] = place_of_highest_sum(seen[t, r], column, width)


@compiled()
def k_best(emissions, start, end, lengths, back, n_best, paths, scores, first, step):  # type: ignore[no-untyped-def]
    """The n_best highest sequences of each row, in float64: paths [n_best, B, T] and scores [n_best, B] (-inf where
    there are fewer).

    back [G, S, K, P] float64: transposed transitions, padded with -inf
    """
    rows, steps, k = emissions.shape
    times, width = back.shape[1], back.shape[3]
    in_group = rows // back.shape[0]
    came = np.empty((steps, k, n_best), np.int32)
    before, after = np.empty((k, n_best)), np.empty((k, n_best))
    heads, nothing = np.full(width, -np.inf), np.zeros(width)
    current, rank = np.empty(width), np.zeros(k, np.int64)
    for b in range(first, rows, step):
        n, g = lengths[b], b // in_group
        before[:] = -np.inf
        for j in range(k):
            before[j, 0] = np.float64(emissions[b, 0, j]) + start[b, j] + (end[b, j] if n == 1 else 0.0)
        for t in range(1, n):
            for i in range(k):
                heads[i] = before[i, 0]
            for j in range(k):
                column = back[g, t - 1 if times > 1 else 0, j]
                for i in range(width):
                    current[i] = heads[i] + column[i]
                rank[:] = 0
                e = np.float64(emissions[b, t, j]) + (end[b, j] if t == n - 1 else 0.0)
                for m in range(n_best):
                    high = highest_sum(current, nothing, width)
                    after[j, m] = high + e
                    if high == -np.inf:
                        after[j, m:] = -np.inf
                        break
                    i = 0
                    while current[i] != high:
                        i += 1
                    came[t, j, m] = i * n_best + rank[i]
                    rank[i] += 1
                    current[i] = before[i, rank[i]] + column[i] if rank[i] < n_best else -np.inf
            before, after = after, before
        # merge the lists of the last step, each of which is sorted
        rank[:] = 0
        for m in range(n_best):
            high, tag = -math.inf, -1
            for j in range(k):
                if rank[j] < n_best and before[j, rank[j]] > high:
                    high, tag = before[j, rank[j]], j
            scores[m, b] = high
            path = paths[m, b]
            if tag < 0:
                path[:] = -1
                continue
            place = rank[tag]
            rank[tag] += 1
            path[n:] = 0
            path[n - 1] = tag
            for t in range(n - 1, 0, -1):
                source = came[t, tag, place]
                tag, place = source // n_best, source % n_best
                path[t - 1] = tag


@compiled()
def sample(alpha, back, lengths, good, uniforms, paths, logarithms, first, step):  # type: ignore[no-untyped-def]
    """Exact samples of one share of the rows, from what the forward recursion left behind.

    alpha [N, T, P]: filtered probabilities, or their logarithms; back [G, S, K, P] the transposed table in the same
    form
    uniforms [M, N, T] in [0, 1); paths [M, N, T]; rows where ``good`` [N] is False are left alone
    """
    rows = alpha.shape[0]
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
