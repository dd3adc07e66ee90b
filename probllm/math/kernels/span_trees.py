"""Binary trees over spans, compiled: inside and outside, the best tree, and draws. One row of the batch after another.

Fast path: beta in probability space, beta'(i, j) = beta(i, j) exp(h - sum of c over i..j), with c the score of a leaf
plus ln 4 + h and h the log mean of exp of the other scores. Factors of leaves cancel, so the recursion stays

    beta'(i, j) = exp(s(i, j) - h) sum_k beta'(i, k) beta'(k + 1, j)

sums of products that vector code runs through. Its certificate: values below ``FLOOR`` are raised to it, which adds at
most the mass that the outside pass finds on the raised spans (the sum is increasing in each); where that is above
``LOST``, or a value beyond ``CEILING``, the row is done again in log space. Forbidden spans are exact zeros on both
paths.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential, exponentials

FLOOR, CEILING, LOST = 1e-140, 1e140, 1e-13
_WIDEST = 600.0  # the greatest |exponent| of a single score
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # nothing here is -inf or NaN where sums are reordered


@compiled()
def label_sums(spans, lengths, soft, sums, keep, first, step):  # type: ignore[no-untyped-def]
    """sums [B, T, T] = log sum over labels of exp(spans [B, T, T, K]); where ``keep``, soft = its gradient (0 on
    entry)."""
    rows, size, _, k_all = spans.shape
    buffer, peaks = np.empty(size * k_all), np.empty(size)
    for b in range(first, rows, step):
        n = lengths[b]
        for i in range(n):
            if k_all == 1:
                for j in range(i, n):
                    s = spans[b, i, j, 0]
                    sums[b, i, j] = s
                    if keep:
                        soft[b, i, j, 0] = 1.0 if s > -math.inf else 0.0
                continue
            for j in range(i, n):
                peak = -math.inf
                for k in range(k_all):
                    s = np.float64(spans[b, i, j, k])
                    peak = s if s > peak else peak
                peaks[j] = peak
                base = peak if peak > -math.inf else 0.0
                for k in range(k_all):
                    buffer[(j - i) * k_all + k] = spans[b, i, j, k] - base
            exponentials(buffer, (n - i) * k_all)
            for j in range(i, n):
                total = 0.0
                for k in range(k_all):
                    total += buffer[(j - i) * k_all + k]
                sums[b, i, j] = peaks[j] + math.log(total) if total > 0 else -math.inf
                if keep:
                    by = 1 / total if total > 0 else 0.0
                    for k in range(k_all):
                        soft[b, i, j, k] = buffer[(j - i) * k_all + k] * by


@compiled(fastmath=_FAST)
def _dot(x, y, first, last):  # type: ignore[no-untyped-def]
    """sum of x[k] y[k + 1] over first <= k < last."""
    total = 0.0
    for k in range(first, last):
        total += x[k] * y[k + 1]
    return total


@compiled(fastmath=_FAST)
def _sum(x, n):  # type: ignore[no-untyped-def]
    total = 0.0
    for q in range(n):
        total += x[q]
    return total


@compiled(fastmath=_FAST)
def _spread(by, x, y, to_x, to_y, first, last):  # type: ignore[no-untyped-def]
    """The gradient of by * _dot(x, y, first, last), added."""
    for k in range(first, last):
        to_x[k] += by * y[k + 1]
        to_y[k + 1] += by * x[k]


@compiled(fastmath={"nnan", "nsz"})
def _highest_sum(x, y, first, last):  # type: ignore[no-untyped-def]
    """The greatest x[k] + y[k + 1] over first <= k < last; -inf may be among them."""
    high = -math.inf
    for k in range(first, last):
        v = x[k] + y[k + 1]
        high = v if v > high else high
    return high


@compiled()
def _scaled(sums, n, wanted, starts, ends, to_starts, to_ends, factor, marginals):  # type: ignore[no-untyped-def]
    """(log Z, whether it is certified) of one row; starts [i, j] and ends [j, i] become beta'."""
    greatest, count, total = -math.inf, 0, 0.0
    for i in range(n):
        for j in range(i + 1, n):
            greatest = max(greatest, sums[i, j])
    h = 0.0
    if greatest > -math.inf:
        for i in range(n):
            for j in range(i + 1, n):
                factor[i, j] = sums[i, j] - greatest
            exponentials(factor[i, i + 1 :], n - i - 1)
            total += _sum(factor[i, i + 1 :], n - i - 1)
            count += n - i - 1
        h = greatest + math.log(total / count)
    growth, raised = math.log(4.0), False
    log_z = -h
    for j in range(n):
        if sums[j, j] == -math.inf:
            return -math.inf, True
        log_z += sums[j, j] + growth + h
        starts[j, j] = ends[j, j] = 0.25
        factor[j, j] = 1.0
    lowest = math.exp(max(greatest - h - 2 * _WIDEST, -_WIDEST)) if greatest > -math.inf else 0.0
    by = math.exp(min(greatest - h, _WIDEST)) if greatest > -math.inf else 0.0
    for i in range(n):
        for j in range(i + 1, n):
            # exp(sums - greatest) by itself is 0 far below the greatest, where a floor must stand
            factor[i, j] = max(factor[i, j] * by, lowest) if sums[i, j] > -math.inf else 0.0
    for j in range(n):
        for i in range(j - 1, -1, -1):
            beta = 0.0
            if factor[i, j] > 0.0:
                pairs = _dot(starts[i], ends[j], i, j)
                if pairs > 0.0:
                    beta = factor[i, j] * pairs
                    raised = raised or beta < FLOOR or factor[i, j] <= lowest
                    beta = max(beta, FLOOR)
                    if not beta < CEILING:
                        return 0.0, False
            starts[i, j] = ends[j, i] = beta
    top = starts[0, n - 1]
    if top == 0.0:
        return -math.inf, True
    log_z += math.log(top)
    if not (wanted or raised):
        return log_z, True
    to_starts[:n, :n] = 0.0
    to_ends[:n, :n] = 0.0
    to_starts[0, n - 1] = 1.0 / top
    lost = 0.0
    for j in range(n - 1, -1, -1):
        for i in range(j):
            beta = starts[i, j]
            d = to_starts[i, j] + to_ends[j, i]
            mass = d * beta
            marginals[i, j] = mass
            if beta == FLOOR or factor[i, j] <= lowest:
                lost += mass
            if mass > 0.0:
                _spread(d * factor[i, j], starts[i], ends[j], to_starts[i], to_ends[j], i, j)
        marginals[j, j] = (to_starts[j, j] + to_ends[j, j]) * starts[j, j]
    return log_z, lost < LOST


@compiled()
def _logs(sums, n, wanted, starts, ends, totals, marginals, buffer):  # type: ignore[no-untyped-def]
    """log Z of one row in log space; starts [i, j] and ends [j, i] become log beta."""
    for j in range(n):
        starts[j, j] = ends[j, j] = sums[j, j]
        for i in range(j - 1, -1, -1):
            high = _highest_sum(starts[i], ends[j], i, j)
            if high > -math.inf and sums[i, j] > -math.inf:
                for k in range(i, j):
                    buffer[k - i] = exponential(starts[i, k] + ends[j, k + 1] - high)
                totals[i, j] = _sum(buffer, j - i)
                starts[i, j] = ends[j, i] = sums[i, j] + high + math.log(totals[i, j])
            else:
                starts[i, j] = ends[j, i] = -math.inf
    log_z = starts[0, n - 1]
    if not wanted:
        return log_z
    marginals[:n, :n] = 0.0
    if log_z == -math.inf:
        return log_z
    marginals[0, n - 1] = 1.0
    for j in range(n - 1, -1, -1):
        for i in range(j):
            mass = marginals[i, j]
            if mass > 0.0:
                high = _highest_sum(starts[i], ends[j], i, j)
                for k in range(i, j):
                    buffer[k - i] = exponential(starts[i, k] + ends[j, k + 1] - high)
                by = mass / totals[i, j]
                for k in range(i, j):
                    marginals[i, k] += by * buffer[k - i]
                    marginals[k + 1, j] += by * buffer[k - i]
    return log_z


@compiled()
def inside_outside(sums, lengths, mode, chart, marginals, log_z, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of sums [B, T, T].

    mode: 0 log Z alone; 1 with marginals [B, T, T] (0 on entry); 2 with chart [B, T, T], log beta up to a factor of
    each leaf.
    """
    rows, size, _ = sums.shape
    starts, ends, to_starts, to_ends = (
        np.empty((size, size)), np.empty((size, size)), np.empty((size, size)), np.empty((size, size))
    )  # fmt: skip
    factor, buffer = np.empty((size, size)), np.empty(size)
    found = np.zeros((size, size))
    for b in range(first, rows, step):
        n = lengths[b]
        wanted = mode == 1
        value, sure = _scaled(sums[b], n, wanted, starts, ends, to_starts, to_ends, factor, found)
        if not sure:
            value = _logs(sums[b], n, wanted, starts, ends, factor, found, buffer)
        log_z[b] = value
        if value == -math.inf:
            continue
        for i in range(n):
            for j in range(i, n):
                if wanted:
                    marginals[b, i, j] = found[i, j]
                elif mode == 2:
                    beta = starts[i, j]
                    chart[b, i, j] = (math.log(beta) if beta > 0.0 else -math.inf) if sure else beta


@compiled()
def best(sums, labels, lengths, trees, first, step):  # type: ignore[no-untyped-def]
    """trees [B, T, T] (0 on entry): 1 + labels [B, T, T] at the best tree's spans by sums [B, T, T]; -1 if none."""
    rows, size, _ = sums.shape
    starts, ends = np.empty((size, size)), np.empty((size, size))
    stack = np.empty((size + 1, 2), np.int64)
    for b in range(first, rows, step):
        n = lengths[b]
        for j in range(n):
            starts[j, j] = ends[j, j] = sums[b, j, j]
            for i in range(j - 1, -1, -1):
                starts[i, j] = ends[j, i] = sums[b, i, j] + _highest_sum(starts[i], ends[j], i, j)
        if starts[0, n - 1] == -math.inf:
            trees[b] = -1
            continue
        stack[0, 0], stack[0, 1], waiting = 0, n - 1, 1
        while waiting > 0:
            waiting -= 1
            i, j = stack[waiting, 0], stack[waiting, 1]
            trees[b, i, j] = 1 + labels[b, i, j]
            if i < j:
                high = _highest_sum(starts[i], ends[j], i, j)
                k = i
                while starts[i, k] + ends[j, k + 1] < high:
                    k += 1
                stack[waiting, 0], stack[waiting, 1] = i, k
                stack[waiting + 1, 0], stack[waiting + 1, 1] = k + 1, j
                waiting += 2


@compiled()
def draw(chart, soft, lengths, log_z, uniforms, trees, first, step):  # type: ignore[no-untyped-def]
    """trees [N, B, T, T] (0 on entry) drawn by chart and log_z of ``inside_outside`` and soft of ``label_sums``; -1 if
    none.

    uniforms: [N, B, 4 T], from 0 to 1. Shares divide the draws.
    """
    count, rows, size, _ = trees.shape
    k_all = soft.shape[3]
    stack, buffer = np.empty((size + 1, 2), np.int64), np.empty(size)
    transposed = np.empty((rows, size, size))
    for b in range(rows):
        for i in range(size):
            for j in range(size):
                transposed[b, j, i] = chart[b, i, j]
    for draws in range(first, count, step):
        for b in range(rows):
            n = lengths[b]
            if log_z[b] == -math.inf:
                trees[draws, b] = -1
                continue
            stack[0, 0], stack[0, 1], waiting, used = 0, n - 1, 1, 0
            while waiting > 0:
                waiting -= 1
                i, j = stack[waiting, 0], stack[waiting, 1]
                left = uniforms[draws, b, used]
                label = -1
                for k in range(k_all):
                    p = soft[b, i, j, k]
                    if p > 0.0:
                        label = k
                        left -= p
                        if left < 0.0:
                            break
                trees[draws, b, i, j] = 1 + label
                if i < j:
                    high = _highest_sum(chart[b, i], transposed[b, j], i, j)
                    for k in range(i, j):
                        buffer[k - i] = exponential(chart[b, i, k] + transposed[b, j, k + 1] - high)
                    left = uniforms[draws, b, used + 1] * _sum(buffer, j - i)
                    split = i
                    for k in range(i, j):
                        if buffer[k - i] > 0.0:
                            split = k
                            left -= buffer[k - i]
                            if left < 0.0:
                                break
                    stack[waiting, 0], stack[waiting, 1] = i, split
                    stack[waiting + 1, 0], stack[waiting + 1, 1] = split + 1, j
                    waiting += 2
                used += 2
