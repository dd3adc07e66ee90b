"""Second-order chains, compiled: Viterbi, and forward-backward in probability space, scaled at every step.

    alpha_t(j, k) = q_t(k) sum_i alpha_{t-1}(i, j) P(i, j, k) / c_t,     q = exp(emissions - their maximum at the step)
    beta_{t-1}(i, j) = sum_k P(i, j, k) q_t(k) beta_t(j, k) / c_t

in float64, with the c that makes alpha sum to 1; log Z is the sum of log c and of what was taken out. One row of the
batch after another, K^3 multiply-adds a step, vector code over k. The caller certifies that nothing underflows (see
``probllm.math.second_order``). Each kernel does the rows first, first + step, first + 2 step, ...
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

_FAST = {"contract", "reassoc", "nsz", "arcp"}  # nothing here is -inf or NaN where sums are reordered


@compiled()
def viterbi(emissions, start, second, transitions, lengths, score, path, first, step):  # type: ignore[no-untyped-def]
    """score [B] and path [B, T] (0 on entry) of the best sequences; the scores may be -inf."""
    rows, steps, k_all = emissions.shape
    back = np.empty((steps, k_all, k_all), np.int16)
    delta, best = np.empty((k_all, k_all)), np.empty((k_all, k_all))
    for b in range(first, rows, step):
        n = lengths[b]
        score[b] = -math.inf
        if n == 1:
            for k in range(k_all):
                if start[k] + emissions[b, 0, k] > score[b]:
                    score[b] = start[k] + emissions[b, 0, k]
                    path[b, 0] = k
            continue
        for j in range(k_all):
            for k in range(k_all):
                delta[j, k] = start[j] + emissions[b, 0, j] + second[j, k] + emissions[b, 1, k]
        for t in range(2, n):
            best[:] = -math.inf
            back[t] = 0
            for i in range(k_all):
                for j in range(k_all):
                    for k in range(k_all):
                        s = delta[i, j] + transitions[i, j, k]
                        better = s > best[j, k]
                        best[j, k] = s if better else best[j, k]
                        back[t, j, k] = i if better else back[t, j, k]
            for j in range(k_all):
                for k in range(k_all):
                    delta[j, k] = best[j, k] + emissions[b, t, k]
        before, last = 0, 0
        for j in range(k_all):
            for k in range(k_all):
                if delta[j, k] > score[b]:
                    score[b] = delta[j, k]
                    before, last = j, k
        path[b, n - 1], path[b, n - 2] = last, before
        for t in range(n - 1, 1, -1):
            path[b, t - 2] = back[t, path[b, t - 1], path[b, t]]


@compiled(fastmath=_FAST)
def _products(alpha, table, total):  # type: ignore[no-untyped-def]
    """total(j, k) = sum_i alpha(i, j) table(i, j, k)."""
    k_all = alpha.shape[0]
    total[:] = 0.0
    for i in range(k_all):
        for j in range(k_all):
            a = alpha[i, j]
            for k in range(k_all):
                total[j, k] += a * table[i, j, k]


@compiled(fastmath=_FAST)
def _products_back(alpha, table, g, beta, pairs):  # type: ignore[no-untyped-def]
    """beta(i, j) = sum_k table(i, j, k) g(j, k), and pairs(i, j, k) += alpha(i, j) g(j, k)."""
    k_all = alpha.shape[0]
    for i in range(k_all):
        for j in range(k_all):
            a = alpha[i, j]
            s = 0.0
            for k in range(k_all):
                s += table[i, j, k] * g[j, k]
                pairs[i, j, k] += a * g[j, k]
            beta[i, j] = s


@compiled()
def forward(emissions, start, second, table, lengths, q, alpha, scales, log_z, first, step):  # type: ignore[no-untyped-def]
    """alpha [B, T, K, K] from the second step on, scales and q [B, T] and [B, T, K]; log_z [B] of P = table.

    start and second are exponentials of scores from which the caller has taken their maxima.
    """
    rows, _, k_all = emissions.shape
    for b in range(first, rows, step):
        n = lengths[b]
        log_z[b] = 0.0
        for t in range(n):
            peak = -math.inf
            for k in range(k_all):
                peak = max(peak, emissions[b, t, k])
            if peak == -math.inf:  # no tag is allowed here
                log_z[b] = -math.inf
                break
            log_z[b] += peak
            for k in range(k_all):
                q[b, t, k] = math.exp(emissions[b, t, k] - peak)
        if log_z[b] == -math.inf:
            continue
        if n == 1:
            total = 0.0
            for k in range(k_all):
                total += start[k] * q[b, 0, k]
            scales[b, 0] = total
            log_z[b] += math.log(total)
            continue
        for t in range(1, n):
            now = alpha[b, t]
            if t == 1:
                for j in range(k_all):
                    for k in range(k_all):
                        now[j, k] = start[j] * q[b, 0, j] * second[j, k]
            else:
                _products(alpha[b, t - 1], table, now)
            total = 0.0
            for j in range(k_all):
                for k in range(k_all):
                    now[j, k] *= q[b, t, k]
                    total += now[j, k]
            for j in range(k_all):
                for k in range(k_all):
                    now[j, k] /= total
            scales[b, t] = total
            log_z[b] += math.log(total)


@compiled()
def backward(  # type: ignore[no-untyped-def]
    start, table, lengths, q, alpha, scales, weights, tags, firsts, seconds, triples, first, step
):
    """The expected parts, each row of the batch times its weight (0 for a row without mass).

    tags [B, T, K] (0 on entry) by row; firsts, seconds and triples, one ``[K]``, ``[K, K]``, ``[K, K, K]`` a share (0
    on entry), summed over rows, the last without the factor ``table``.
    """
    rows, k_all = len(lengths), len(start)
    beta, g = np.empty((k_all, k_all)), np.empty((k_all, k_all))
    for b in range(first, rows, step):
        n, w = lengths[b], weights[b]
        if w == 0.0:
            continue
        if n == 1:
            for k in range(k_all):
                p = w * start[k] * q[b, 0, k] / scales[b, 0]
                tags[b, 0, k] = p
                firsts[first, k] += p
            continue
        beta[:] = w
        for t in range(n - 1, 0, -1):
            for j in range(k_all):
                for k in range(k_all):
                    p = alpha[b, t, j, k] * beta[j, k]
                    tags[b, t, k] += p
                    if t == 1:
                        seconds[first, j, k] += p
                        tags[b, 0, j] += p
                        firsts[first, j] += p
                    g[j, k] = q[b, t, k] * beta[j, k] / scales[b, t]
            if t > 1:
                _products_back(alpha[b, t - 1], table, g, beta, triples[first])
