"""Binary trees over spans, compiled: inside and outside, the best tree, and draws.

Fast path: beta in probability space, beta'(i, j) = beta(i, j) exp(h - sum of c over i..j), with c the score of a leaf
plus ln 4 + h and h the log mean of exp of the other scores. Factors of leaves cancel, so the recursion stays

    beta'(i, j) = exp(s(i, j) - h) sum_k beta'(i, k) beta'(k + 1, j)

sums of products, of eight rows of the batch at once (``lanes``). Its certificate: values below ``FLOOR`` are raised to
it, which adds at most the mass that the outside pass finds on the raised spans (the sum is increasing in each); where
that is above ``LOST``, or a value beyond ``CEILING``, the row is done again in log space. Forbidden spans are exact
zeros on both paths.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.chain_scaled import by_falling_length
from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential
from probllm.math.kernels.exponentials import BROKEN
from probllm.math.kernels.lanes import LANES, from_lanes, to_lanes
from probllm.math.kernels.logarithm import logarithm
from probllm.math.kernels.span_labels import UNEVEN, WIDE, log_gradient, log_total, shares_of, totals_of
from probllm.math.kernels.span_lanes import CEILING, FLOOR, RAISED, inside, outside

LOST = 1e-13
_LEAST = math.log(RAISED)
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # nothing here is -inf or NaN where sums are reordered


def room_for(size: int) -> int:
    """How many doubles the tables take for eight sentences of up to ``size`` words."""
    return 4 * size * int(wide_of.py_func(size)) * LANES


@compiled()
def wide_of(size):  # type: ignore[no-untyped-def]
    """The columns of a table's row: odd, and a vector behind the last."""
    return (size + LANES) | 1


@compiled(fastmath=_FAST)
def _sum(x, n):  # type: ignore[no-untyped-def]
    total = 0.0
    for q in range(n):
        total += x[q]
    return total


@compiled(fastmath={"nnan", "nsz"})
def _highest_sum(x, y, first, last):  # type: ignore[no-untyped-def]
    """The greatest x[k] + y[k + 1] over first <= k < last; -inf may be among them."""
    high = -math.inf
    for k in range(first, last):
        v = x[k] + y[k + 1]
        high = v if v > high else high
    return high


@compiled()
def _logs(sums, n, both, starts, ends, totals, marginals):  # type: ignore[no-untyped-def]
    """log Z of a sentence of n words by log sums over labels [T, T]; marginals [T, T] if ``both``. The log of beta is
    left in starts [T, T]."""
    buffer = np.empty(n)
    for j in range(n):
        starts[j, j] = ends[j, j] = sums[j, j]
        for i in range(j - 1, -1, -1):
            starts[i, j] = ends[j, i] = -math.inf
            high = _highest_sum(starts[i], ends[j], i, j)
            if high > -math.inf and sums[i, j] > -math.inf:
                for k in range(i, j):
                    buffer[k - i] = exponential(starts[i, k] + ends[j, k + 1] - high)
                totals[i, j] = _sum(buffer, j - i)
                starts[i, j] = ends[j, i] = sums[i, j] + high + math.log(totals[i, j])
    log_z = starts[0, n - 1]
    marginals[:n, :n] = 0.0
    if not both or log_z == -math.inf:
        return log_z
    marginals[0, n - 1] = 1.0
    for j in range(n - 1, -1, -1):
        for i in range(j):
            if marginals[i, j] > 0.0:
                high = _highest_sum(starts[i], ends[j], i, j)
                for k in range(i, j):
                    buffer[k - i] = exponential(starts[i, k] + ends[j, k + 1] - high)
                by = marginals[i, j] / totals[i, j]
                for k in range(i, j):
                    marginals[i, k] += by * buffer[k - i]
                    marginals[k + 1, j] += by * buffer[k - i]
    return log_z


@compiled()
def _scale(totals, n, last, m, every, wide):  # type: ignore[no-untyped-def]
    """(c, what log Z owes) of a sentence by the totals of its n words' spans, of which the wider sum to ``every``.

    c makes these 1 on average; a factor of 4 c for each word cancels in beta. Totals become 0 behind the sentence.
    """
    offset = 0.0
    for j in range(n):
        offset += logarithm(np.float64(totals[j * wide + j]))
    for i in range(last + 1 if n <= last else 0):
        totals[i * wide + max(i, n) : i * wide + last + 1] = 0
    c = 0.5 * n * (n - 1) / every if every > 0.0 else 1.0
    unit = m * math.log(2.0)
    return c, offset + n * (unit + math.log(4.0)) + (n - 1) * (unit - math.log(c))


@compiled()
def _rescale(ratios, n, totals, lane, wide):  # type: ignore[no-untyped-def]
    """Brings the totals of a lane that are in scales of their own to the others', or to ``RAISED``: then the ratios say
    how far, and it returns True."""
    raised = False
    for i in range(n):
        for j in range(i + 1, n):
            if ratios[i, j] > 0.0:
                at = (i * wide + j) * LANES + lane
                total = totals[at]
                if total * ratios[i, j] < RAISED:
                    raised, ratios[i, j] = True, RAISED / total if total > 0.0 else 1.0
                    totals[at] = RAISED
                else:
                    totals[at] = total * ratios[i, j]
    return raised


@compiled()
def _unscale(ratios, n, rates, lane, shares, wide):  # type: ignore[no-untyped-def]
    """The shares of a lane's totals, from rates, where the totals are in scales of their own."""
    for i in range(n):
        for j in range(i + 1, n):
            if ratios[i, j] > 0.0:
                shares[i * wide + j] = rates[(i * wide + j) * LANES + lane] * ratios[i, j]


@compiled()
def _label_logs(spans, n, totals, wide, m, below, flag, ratios, log_sums):  # type: ignore[no-untyped-def]
    """log_sums [T, T] over the labels of spans [T, T, K], by what ``totals_of`` found."""
    for i in range(n):
        for j in range(i, n):
            if flag == WIDE or (below < 0.0 if i == j else flag == UNEVEN and ratios[i, j] > 0.0):
                log_sums[i, j] = log_total(spans[i, j])
            else:
                log_sums[i, j] = m * math.log(2.0) + logarithm(np.float64(totals[i * wide + j]))


@compiled()
def _shared(marginals, n, totals, wide, shares):  # type: ignore[no-untyped-def]
    """shares = marginals [T, T] over totals; returns whether there is a total wherever there is a marginal."""
    every = True
    for i in range(n):
        for j in range(i, n):
            total = totals[i * wide + j]
            every &= total > 0.0 or marginals[i, j] == 0.0
            shares[i * wide + j] = marginals[i, j] / total if total > 0.0 else 0.0
    return every


@compiled()
def sums(  # type: ignore[no-untyped-def]
    spans, lengths, mode, tables, gradient, log_sums, chart, log_z, good, first, step
):
    """log_z [B] of spans [B, T, T, K], eight sentences at a time; ``good`` [B] is False where one has a NaN or +inf.

    mode: 0 log Z alone; 1 with gradient [B, T, T, K]; 2 with log_sums [B, T, T] over labels and chart [B, T, T], log
    beta up to a factor of each leaf. tables: room for ``room_for`` doubles a share.
    """
    rows, size, _, k = spans.shape
    width, wide = size * k, wide_of(size)
    volume, apart = size * wide * LANES, wide * size + LANES  # of a table, and from one lane's totals to the next's
    room = tables[first]
    betas, by, totals, rates = (
        room[:volume],
        room[volume : 2 * volume],
        room[2 * volume : 3 * volume],
        room[3 * volume :],
    )
    each, shares = np.zeros(LANES * apart, spans.dtype), np.empty(LANES * apart, spans.dtype)
    flat, out = spans.reshape(spans.size), gradient.reshape(gradient.size)
    out = out if mode == 1 else np.empty(width, spans.dtype)
    roots, extremes, lost = np.zeros((size + 1) * LANES), np.empty(2 * LANES), np.empty(LANES)
    times, offsets, ms, belows = np.empty((4, LANES))
    n, flags, ratios = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty((LANES, size, size))
    starts, ends, inner, marginals, logs = np.empty((5, size, size))
    order = by_falling_length(lengths, 1, size)
    for group in range(first, (rows + LANES - 1) // LANES, step):
        members = order[group * LANES : (group + 1) * LANES]
        last = lengths[members[0]] - 1
        for lane in range(LANES):
            times[lane], n[lane] = 1.0, 0
            here = each[lane * apart : (lane + 1) * apart]
            if lane < len(members):
                b = members[lane]
                at, words = b * size * width, lengths[b]
                place, stride = (at, width + k) if mode == 1 else (0, 0)
                ms[lane], every, belows[lane], flags[lane] = totals_of(
                    flat, at, width + k, words, k, out, place, stride, here, wide, ratios[lane]
                )
                good[b] = flags[lane] != BROKEN
                if flags[lane] == 0 or flags[lane] == UNEVEN:
                    n[lane] = words
                    times[lane], offsets[lane] = _scale(here, words, last, ms[lane], every, wide)
            if n[lane] == 0:
                here[:] = 0
        for i in range(last + 1):
            to_lanes(each, i * wide + i, apart, last + 1 - i, times, totals, (i * wide + i) * LANES)
        raised, lost[:] = False, 0.0
        for lane in range(len(members)):
            if n[lane] > 0 and flags[lane] == UNEVEN:
                raised |= _rescale(ratios[lane], n[lane], totals, lane, wide)
        inside(totals, times, last, wide, betas, rates, extremes)
        for lane in range(LANES):
            raised |= extremes[lane] <= FLOOR
        if mode == 1 or raised:
            for lane in range(LANES):
                root = betas[(n[lane] - 1) * LANES + lane] if n[lane] > 0 else 0.0
                if root > 0.0:
                    roots[(n[lane] - 1) * LANES + lane] = 1.0 / root
            outside(betas, totals, rates, by, roots, lost, last, wide)
            roots[:] = 0.0
        for i in range(last + 1 if mode == 1 else 0):
            from_lanes(rates, (i * wide + i) * LANES, last + 1 - i, shares, i * wide + i, apart)
        for lane in range(len(members)):
            b = members[lane]
            if not good[b]:
                continue
            at, words, flag, ratio = b * size * width, lengths[b], flags[lane], ratios[lane]
            here, own = each[lane * apart : (lane + 1) * apart], shares[lane * apart : (lane + 1) * apart]
            certain = n[lane] > 0 and extremes[LANES + lane] < CEILING and lost[lane] < LOST
            if mode == 2 or not certain:
                _label_logs(spans[b], words, here, wide, ms[lane], belows[lane], flag, ratio, logs)
            if certain:
                top = betas[(words - 1) * LANES + lane]
                log_z[b] = offsets[lane] + belows[lane] + math.log(top) if top > 0.0 else -math.inf
                if mode == 1 and flag == UNEVEN:
                    _unscale(ratio, words, rates, lane, own, wide)
                for i in range(words if mode == 2 else 0):
                    for j in range(i, words):
                        beta = betas[(i * wide + j) * LANES + lane]
                        starts[i, j] = math.log(beta) if beta > 0.0 else -math.inf
            else:
                log_z[b] = _logs(logs, words, mode == 1, starts, ends, inner, marginals)
                if mode == 1 and not (flag != WIDE and _shared(marginals, words, here, wide, own)):
                    log_gradient(spans[b], words, marginals, gradient[b])
                    continue
            if mode == 1:
                shares_of(out, at, at + size * width, width + k, words, k, shares, lane * apart, wide)
            for i in range(words if mode == 2 else 0):
                log_sums[b, i, i:words], chart[b, i, i:words] = logs[i, i:words], starts[i, i:words]


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
def draw(chart, spans, sums, lengths, log_z, uniforms, trees, first, step):  # type: ignore[no-untyped-def]
    """trees [N, B, T, T] (0 on entry) drawn by chart and log_z of ``sums`` and the label's scores spans
    [B, T, T, K]; -1 if none.

    uniforms: [N, B, 4 T], from 0 to 1. Shares divide the draws.
    """
    count, rows, size, _ = trees.shape
    k_all = spans.shape[3]
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
                    p = exponential(spans[b, i, j, k] - sums[b, i, j])
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
