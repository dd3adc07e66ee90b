"""Expected counts of a hidden Markov model with categorical observations, in one pass over the sequences.

The recursions of ``chain_scaled`` where the emission of a step is a row of one table: exponentials are taken once a
symbol and not once a step, and the expectations of a step go straight into the counts, so that no array of the size
of the data is kept.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.chain_scaled import LEAST_SUM, TINY, some_tiny
from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.tiles import product1, product4
from probllm.math.kernels.vectors import add_scaled, ahead, behind, multiply, scale

SPOILED = 8  # a row was found too small when some of its counts were already added


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


@compiled()
def sum_by_symbol(symbols, tags, sums, first, step):  # type: ignore[no-untyped-def]
    """sums [N, V, K] (0 on entry) at N = ``first``: tags [B, T, K] added up by the symbol of their step."""
    rows, steps, k = tags.shape
    own = sums[first]
    for b in range(first, rows, step):
        for t in range(steps):
            symbol = symbols[b, t]
            for j in range(k):
                own[symbol, j] += tags[b, t, j]
