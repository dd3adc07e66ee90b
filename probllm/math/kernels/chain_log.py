"""Forward-backward of a linear chain in log space and float64: slower than the scaled recursion and right for every
score.

    a_t(j) = e_t(j) + log sum_i exp(a_{t-1}(i) + A(i, j)) - m_t        m_t: the maximum, taken out so that digits stay
    b_{t-1}(i) = log sum_j exp(A(i, j) + e_t(j) + b_t(j)) - d_t        log Z = sum_t m_t + log sum_j exp(a_T(j))

-inf forbids. A row in which nothing is allowed has log Z = -inf and expectations 0. Marginals are normalised at each
step by the sum over that step, so they keep their digits however large log Z is.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled


@compiled()
def _shift(x, k):  # type: ignore[no-untyped-def]
    """Takes the maximum out of x in place and returns it (-inf if nothing is allowed)."""
    high = -math.inf
    for j in range(k):
        high = max(high, x[j])
    if high > -math.inf:
        for j in range(k):
            x[j] -= high
    return high


@compiled()
def _log_product(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """out[j] = log sum_i exp(x[i] + matrix[i, j]), column by column around its own maximum."""
    high = np.full(k, -math.inf)
    for i in range(k):
        if x[i] > -math.inf:
            for j in range(k):
                high[j] = max(high[j], x[i] + matrix[i, j])
    for j in range(k):
        out[j] = 0.0
    for i in range(k):
        if x[i] > -math.inf:
            for j in range(k):
                v = x[i] + matrix[i, j]
                if v > -math.inf:
                    out[j] += math.exp(v - high[j])
    for j in range(k):
        out[j] = math.log(out[j]) + high[j] if out[j] > 0 else -math.inf


@compiled()
def forward_backward(  # type: ignore[no-untyped-def]
    emissions, start, end, lengths, transitions, transposed, which, backward, alpha, marginals, pairs, log_z, first,
    step
):  # fmt: skip
    """One share of the rows ``which`` of the batch.

    emissions [B, T, K], start, end [B, K], lengths [B]; transitions [G, S, K, K] and transposed; which [N]: rows of
    the batch.
    backward: 0 log Z alone; 1 log Z and alpha; 2 everything
    alpha [N, T, K] float64: log filtered scores, each step's maximum 0
    marginals [N, T, K]; pairs [N, S, K, K]: expected transitions, summed over the steps where S = 1; log_z [N]
    """
    rows, _, k = emissions.shape
    times = transitions.shape[1]
    in_group = rows // transitions.shape[0]
    e, x, y, step_pairs = np.empty(k), np.empty(k), np.empty(k), np.empty((k, k))
    for index in range(first, which.size, step):
        b = which[index]
        n, g = lengths[b], b // in_group
        maxima = np.empty(n)
        a = np.empty((n if backward else 1, k))
        total = 0.0
        for t in range(n):
            for j in range(k):
                e[j] = emissions[b, t, j]
            if t == 0:
                for j in range(k):
                    x[j] = e[j] + start[b, j]
            else:
                _log_product(x, transitions[g, t - 1 if times > 1 else 0], y, k)
                for j in range(k):
                    x[j] = y[j] + e[j]
            if t == n - 1:
                for j in range(k):
                    x[j] += end[b, j]
            maxima[t] = _shift(x, k)
            total += maxima[t]
            if maxima[t] == -math.inf:
                break
            if backward:
                a[t] = x
        if total == -math.inf:
            log_z[index] = -math.inf
            if backward:
                alpha[index] = -math.inf
            if backward == 2:
                marginals[index] = 0
                pairs[index] = 0
            continue
        last = 0.0
        for j in range(k):
            last += math.exp(x[j])
        log_z[index] = total + math.log(last)
        if backward:
            alpha[index, :n] = a
            alpha[index, n:] = -math.inf
        if backward < 2:
            continue
        pairs[index] = 0
        marginals[index, n:] = 0
        for j in range(k):
            y[j] = 0.0
        for t in range(n - 1, -1, -1):
            mass = 0.0
            high = -math.inf
            for j in range(k):
                high = max(high, a[t, j] + y[j])
            for j in range(k):
                x[j] = math.exp(a[t, j] + y[j] - high)
                mass += x[j]
            for j in range(k):
                marginals[index, t, j] = x[j] / mass
            if t == 0:
                break
            s = t - 1 if times > 1 else 0
            for j in range(k):
                x[j] = emissions[b, t, j] + y[j]
            if t == n - 1:
                for j in range(k):
                    x[j] += end[b, j]
            # all pairs of this step sum to exp(maxima[t] + high) * mass, but for the rounding of large scores
            norm = maxima[t] + high + math.log(mass)
            mass = 0.0
            for i in range(k):
                for j in range(k):
                    step_pairs[i, j] = math.exp(a[t - 1, i] + transitions[g, s, i, j] + x[j] - norm)
                    mass += step_pairs[i, j]
            for i in range(k):
                for j in range(k):
                    pairs[index, s, i, j] += step_pairs[i, j] / mass
            _log_product(x, transposed[g, s], y, k)
            _shift(y, k)
