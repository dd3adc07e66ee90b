"""Expected counts of a hidden Markov model with categorical observations, in one pass over the sequences.

The recursions of ``chain_scaled`` where the emission of a step is a row of one table, and the expectations of a step go
straight into the counts, so that no array of the size of the data is kept. ``count``: exponentials are taken once a
symbol and not once a step; for EM on much data. ``differentiate``: with the certificate, and the weights, of each row.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.chain_scaled import (
    FAST,
    LEAST_SUM,
    TINY,
    allowance,
    backward_block,
    by_falling_length,
    forward_block,
    set_out,
    some_tiny,
)
from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import WIDE
from probllm.math.kernels.tiles import add_outer, product1, product4
from probllm.math.kernels.vectors import add_scaled, ahead, behind, multiply, scale

SPOILED = 8  # a row was found too small when some of its counts were already added
OUTSIDE = 16  # a symbol is none


@compiled(error_model="numpy")
def count(  # type: ignore[no-untyped-def]
    symbols, lengths, order, first_table, forth, back, table, offset, symbol_offsets, zeros,
    log_z, flags, initial, transition, emission, first, step,
):  # fmt: skip
    """One share of the blocks of four rows of ``symbols`` [B, T]; ``order`` [B]: rows by falling length.

    first_table [P], forth and back [K, P] (transposed), table [V, P]: probabilities up to a factor, padded with 0
    from K to P
    offset: logarithm of the factor of ``forth``; symbol_offsets [V]; that of ``first_table`` is the caller's
    zeros: some are 0, so look out for underflow; a row found too small is flagged TINY, or SPOILED
    log_z [B] and flags [B] are set; initial [N, P], transition [N, K, P] (to be multiplied by ``forth``) and emission
    [N, V, P] are added to at N = ``first``
    """
    rows, steps = symbols.shape
    k, width = forth.shape
    one = forth.dtype.type(1)
    x, y = np.zeros((4, width), forth.dtype), np.zeros((4, width), forth.dtype)
    alpha = np.empty((4, steps, width), forth.dtype)
    sums = np.empty((4, steps), forth.dtype)
    gamma, weights = np.empty(width, forth.dtype), np.empty(width, forth.dtype)
    inverse, totals, product = np.empty(4, forth.dtype), np.empty(2, forth.dtype), np.empty(4)
    which, until = np.zeros(4, np.int64), np.zeros(4, np.int64)
    pairs, emitted = transition[first], emission[first]
    for block in range(first, (rows + 3) // 4, step):
        size = min(4, rows - 4 * block)
        longest = 0
        for r in range(size):
            b = which[r] = order[4 * block + r]
            until[r] = lengths[b]
            longest = max(longest, until[r])
            log_z[b], flags[b] = 0.0, 0
            product[r], inverse[r] = 1.0, one
            y[r] = first_table
        for t in range(longest):
            if t:
                if size == 1:
                    product1(x, forth, y, k)
                else:
                    product4(x, forth, y, k)
            for r in range(size):
                if t >= until[r]:
                    continue
                b = which[r]
                c = ahead(y[r], inverse[r], table[symbols[b, t]], 0, x[r], width)
                if zeros and (c < LEAST_SUM or some_tiny(x[r], k)):
                    flags[b], until[r] = TINY, 0
                    continue
                log_z[b] += symbol_offsets[symbols[b, t]] + (offset if t else 0.0)
                inverse[r] = one / c
                sums[r, t] = c
                scale(x[r], one / c, alpha[r, t], width)
                product[r] *= c
                if product[r] < 1e-200 or product[r] > 1e200:
                    log_z[b] += math.log(product[r])
                    product[r] = 1.0
        for r in range(size):
            log_z[which[r]] += math.log(product[r])
        for t in range(longest - 1, -1, -1):
            for r in range(size):
                n = until[r]
                if t >= n:
                    continue
                b = which[r]
                if t == n - 1:
                    inverse[r] = one
                    for j in range(width):
                        y[r, j] = one if j < k else one * 0
                by = inverse[r]
                symbol = symbols[b, t]
                behind(y[r], by, table[symbol], 0, x[r], alpha[r, t], totals, width)
                d, z = totals[0], totals[1]
                if zeros and (z < LEAST_SUM or d < LEAST_SUM or some_tiny(x[r], k)):
                    flags[b], until[r] = SPOILED, 0
                    continue
                multiply(alpha[r, t], y[r], one / z * by, gamma, width)
                add_scaled(gamma, one, emitted[symbol], width)
                if t == 0:
                    add_scaled(gamma, one, initial[first], width)
                else:
                    scale(x[r], one / (z * sums[r, t]), weights, width)
                    before = alpha[r, t - 1]
                    for i in range(k):
                        add_scaled(weights, before[i], pairs[i], width)
                inverse[r] = one / d
            if t:
                if size == 1:
                    product1(x, back, y, k)
                else:
                    product4(x, back, y, k)


@compiled(fastmath=FAST)
def differentiate(  # type: ignore[no-untyped-def]
    symbols, lengths, row_weights, initial, emission, both, numbers, span, log_z, flags, first_counts, pairs, emitted,
    first, step,
):  # fmt: skip
    """log p(x) of one share of the blocks of four rows of ``symbols`` [B, T], and its derivatives.

    lengths, row_weights [B]; initial [K], emission [K, V]: log probabilities
    both [2, 1, 1, K, P] and numbers [3, 1, 1]: of the transitions, from ``chain_scaled.tables``, without zeros
    span: at least T, steps from the room of a row to that of the next
    log_z [B] and flags [B] are set: WIDE in all rows if the scores are not all finite or span too much, OUTSIDE for a
        row with a symbol that is not from 0 to V - 1
    first_counts [N, K], pairs [N, K, K] and emitted [N, K, V] are set at N = ``first`` to the expected counts times the
        weights of their rows, summed over the rows that are not flagged
    """
    rows, steps = symbols.shape
    k, size = emission.shape
    width, dtype = both.shape[4], both.dtype
    one = dtype.type(1)
    table, offsets = np.ones((size + 1, width), dtype), np.empty(size + 1)
    widest = 0.0
    for v in range(size):  # exp around the maximum, once a symbol
        widest = max(widest, _exponentials(emission[:, v], table[v], offsets, v))
    widest += _exponentials(initial, table[size], offsets, size)
    order = by_falling_length(lengths, 1, steps)
    if not widest <= allowance(numbers[:, 0], False, k):
        for place in range(4 * first, rows, 4 * step):
            for b in order[place : place + 4]:
                log_z[b], flags[b] = 0.0, WIDE
        first_counts[first], pairs[first], emitted[first] = 0, 0, 0
        return
    q, alpha = np.empty(4 * span * width, dtype), np.empty(4 * span * width, dtype)
    sums, tags = np.empty((4, span), dtype), np.zeros(4 * steps * k + width, dtype)  # read in whole vectors
    steps_of_tags = tags[: 4 * steps * k].reshape(4, steps, k)
    x, y, total = np.zeros((4, width), dtype), np.zeros((4, width), dtype), np.zeros((width, width), dtype)
    inverse, totals, by = np.empty(4, dtype), np.empty(4, dtype), np.zeros(4, dtype)
    found, bits, which, until = np.empty(4), np.zeros(4, np.int64), np.zeros(4, np.int64), np.zeros(4, np.int64)
    here, places = np.arange(4), np.arange(4) * span
    begun, counted = np.zeros(width, dtype), np.zeros((size, width), dtype)  # behind the first k anything
    for block in range(first, (rows + 3) // 4, step):
        count = set_out(lengths, order, 4 * block, rows, which, until, y, inverse, k)
        for r in range(count):
            n, found[r] = until[r], offsets[size]
            by[r], bits[r] = row_weights[which[r]], 0
            for t in range(n):
                symbol = symbols[which[r], t]
                if symbol < 0 or symbol >= size:
                    bits[r], until[r] = OUTSIDE, 0
                    break
                found[r] += offsets[symbol]
                scale(table[symbol], one, q[(places[r] + t) * width :], width)
            at = places[r] * width
            for j in range(k):
                q[at + j] *= table[size, j]
        forward_block(
            both[0, 0], numbers[:, 0], False, True, places, places, q, sums, alpha, found, bits, here, until, count, x,
            y, inverse, totals,
        )  # fmt: skip
        backward_block(
            q, sums, alpha, both[1, 0], False, by, places, steps_of_tags, bits, here, until, count, x, y, inverse,
            totals,
        )  # fmt: skip
        for r in range(count):
            b, n, at = which[r], until[r], places[r] * width
            log_z[b], flags[b] = found[r], bits[r]
            for t in range(n):
                add_scaled(tags[(r * steps + t) * k :], one, counted[symbols[b, t]], width)
            if n:
                add_scaled(tags[r * steps * k :], one, begun, width)
            if n > 1:
                add_outer(alpha, at, q, at + width, n - 1, by[r], total, k)
    first_counts[first] = begun[:k]
    for i in range(k):
        for j in range(k):
            pairs[first, i, j] = total[i, j] * both[0, 0, 0, i, j]
        for v in range(size):
            emitted[first, i, v] = counted[v, i]


@compiled()
def _exponentials(scores, found, offsets, at):  # type: ignore[no-untyped-def]
    """found[:K] = exp(scores [K] - offsets[at]), their maximum. Returns their range, or inf if one is not finite."""
    low, high, total = scores[0], scores[0], 0.0
    for score in scores:
        low, high, total = min(low, score), max(high, score), total + score
    offsets[at] = high
    if not math.isfinite(total):
        return math.inf
    for j in range(scores.size):
        found[j] = math.exp(scores[j] - high)
    return high - low
