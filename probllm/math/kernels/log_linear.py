"""Log-linear mixtures of categorical laws whose weights are learned as outcomes come in, compiled.

    p(v) = exp(sum_m w_m x_m(v)) / Z,       x_m = log p_m,       d log p(v) / d w_m = x_m(v) - E_p[x_m]

w is the sum of three rows of weights: one for all places, one of the token before, one of how sure the surest law is.
All three move along the gradient when v is read.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

LOWEST = -100.0  # what is less probable counts as this
LEVELS = 8  # of how sure the surest law is


@compiled()
def rows_of(laws, before, size, rows):  # type: ignore[no-untyped-def]
    """rows [3]: the weights that hold for these laws [M, size] after this token (size at the beginning)."""
    top = LOWEST
    for m in range(laws.shape[0]):
        for v in range(size):
            top = max(top, laws[m, v])
    # halves the chance of another token from level to level
    level = min(int(-math.log2(max(1.0 - math.exp(top), 1e-9))), LEVELS - 1)
    rows[0], rows[1], rows[2] = 0, 1 + before, 2 + size + level


@compiled()
def mixed(laws, rows, weights, sums, found):  # type: ignore[no-untyped-def]
    """found [size]: the log of the mixture of laws [M, size]. sums [M]: room."""
    count, size = laws.shape
    for m in range(count):
        sums[m] = weights[rows[0], m] + weights[rows[1], m] + weights[rows[2], m]
    found[:] = 0.0
    for m in range(count):
        for v in range(size):
            found[v] += sums[m] * max(laws[m, v], LOWEST)
    top = -math.inf
    for v in range(size):
        top = max(top, found[v])
    total = 0.0
    for v in range(size):
        total += math.exp(found[v] - top)
    top += math.log(total)
    for v in range(size):
        found[v] -= top


@compiled()
def learn(token, laws, law, rows, rate, slowing, weights, seen, sums, gradient):  # type: ignore[no-untyped-def]
    """Moves the weights along the gradient of log p(token), by steps that get shorter as 1 / sqrt(1 + n / slowing), n
    the tokens that a row has seen, and that are bounded however steep the gradient is; sums [rows, M] adds up the
    weights after each of these tokens, unless it has no rows. gradient [M]: room."""
    steepness, step = 0.0, 0.0
    for m in range(laws.shape[0]):
        expected = 0.0
        for v in range(laws.shape[1]):
            expected += math.exp(law[v]) * max(laws[m, v], LOWEST)
        gradient[m] = max(laws[m, token], LOWEST) - expected
        steepness += gradient[m] * gradient[m]
    for k in range(3):
        step += rate / math.sqrt(1.0 + seen[rows[k]] / slowing)
    for k in range(3):
        row = rows[k]
        pace = rate / math.sqrt(1.0 + seen[row] / slowing) / (1.0 + step * steepness)
        seen[row] += 1.0
        for m in range(laws.shape[0]):
            weights[row, m] += pace * gradient[m]
            if len(sums):
                sums[row, m] += weights[row, m]


@compiled()
def read(tokens, real, laws, rate, slowing, before, last, law, weights, seen, sums, found, first, step):  # type: ignore[no-untyped-def]
    """Reads tokens [B, L], where they are real: found [B, L, size] has the log of the mixture after each.

    laws [B, L, M, size]: those after each token. before [B]: the token before, last [B, M, size] the laws after it and
    law [B, size] their mixture; weights [B, rows, M], seen [B, rows] and sums [B, rows or 0, M]: all of these move on.
    rate 0: weights stay.
    """
    count, size = last.shape[1:]
    rows, room = np.empty(3, np.int64), np.empty(count)
    for b in range(first, tokens.shape[0], step):
        for t in range(tokens.shape[1]):
            if real[b, t]:
                if rate > 0:
                    rows_of(last[b], before[b], size, rows)
                    learn(tokens[b, t], last[b], law[b], rows, rate, slowing, weights[b], seen[b], sums[b], room)
                before[b] = tokens[b, t]
                last[b] = laws[b, t]
                rows_of(last[b], before[b], size, rows)
                mixed(last[b], rows, weights[b], room, law[b])
            found[b, t] = law[b]


@compiled()
def begin(before, laws, law, weights):  # type: ignore[no-untyped-def]
    """law [B, size]: the log of the mixture of laws [B, M, size], nothing being read; the others as of ``read``."""
    count, size = laws.shape[1:]
    rows, room = np.empty(3, np.int64), np.empty(count)
    for b in range(len(before)):
        rows_of(laws[b], before[b], size, rows)
        mixed(laws[b], rows, weights[b], room, law[b])
