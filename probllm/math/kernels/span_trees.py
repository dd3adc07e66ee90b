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

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential, exponentials
from probllm.math.kernels.lanes import LANES, aligned, join, split

FLOOR, CEILING, LOST = 1e-140, 1e140, 1e-13
_WIDEST = 600.0  # the greatest |exponent| of a single score
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # nothing here is -inf or NaN where sums are reordered


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
def _factors(sums, rows, n, longest, factor, offsets, leasts, shifts):  # type: ignore[no-untyped-def]
    """factor [T, T, 8] = exp(sums of the eight rows - shifts), 1 on the diagonal, 0 where forbidden; offsets: what log
    Z owes; leasts: the factors that are no greater were raised."""
    size = sums.shape[1]
    for lane in range(LANES):
        greatest = -math.inf
        b = rows[lane]
        for i in range(longest):
            for j in range(i, longest):
                s = sums[b, i, j] if j < n[lane] else -math.inf
                factor[(i * size + j) * LANES + lane] = s
                if j > i:
                    greatest = s if s > greatest else greatest
        shifts[lane] = greatest if greatest > -math.inf else 0.0
    totals = np.zeros(LANES)
    for i in range(longest - 1):
        row = factor[(i * size + i + 1) * LANES : (i * size + longest) * LANES]
        for k in range(longest - 1 - i):
            for lane in range(LANES):
                s = row[k * LANES + lane]
                v = s - shifts[lane]
                row[k * LANES + lane] = (v if v > -_WIDEST else -_WIDEST) if s > -math.inf else -math.inf
        exponentials(row, row.size)
        for k in range(longest - 1 - i):
            for lane in range(LANES):
                totals[lane] += row[k * LANES + lane]
    times = np.empty(LANES)
    for lane in range(LANES):
        count = n[lane] * (n[lane] - 1) / 2
        times[lane] = count / totals[lane] if totals[lane] > 0.0 else 1.0
        shifts[lane] -= math.log(times[lane])
        offsets[lane] = -shifts[lane]
        leasts[lane] = times[lane] * math.exp(1 - _WIDEST)
        for j in range(n[lane]):
            offsets[lane] += factor[(j * size + j) * LANES + lane] + math.log(4.0) + shifts[lane]
    for i in range(longest):
        for lane in range(LANES):
            at = (i * size + i) * LANES + lane
            factor[at] = 1.0 if factor[at] > -math.inf else 0.0
        for j in range(i + 1, longest):
            for lane in range(LANES):
                factor[(i * size + j) * LANES + lane] *= times[lane]


@compiled()
def _inside(size, longest, factor, starts, ends):  # type: ignore[no-untyped-def]
    """starts [T, T, 8] and ends, its transpose: beta', raised to ``FLOOR``."""
    for j in range(longest):
        at = (j * size + j) * LANES
        for lane in range(LANES):
            starts[at + lane] = ends[at + lane] = 0.25 * factor[at + lane]
        for i in range(j - 1, -1, -1):
            join(
                starts, (i * size + i) * LANES, ends, (j * size + i + 1) * LANES, j - i, factor,
                (i * size + j) * LANES, (j * size + i) * LANES, FLOOR,
            )  # fmt: skip


@compiled()
def _outside(size, longest, n, factor, starts, ends, to_starts, to_ends, mass):  # type: ignore[no-untyped-def]
    """mass [T, T, 8]: the marginals; of a span by the wider ones that begin or end with it."""
    for i in range(longest):
        for q in range((i * size + i) * LANES, (i * size + longest) * LANES):
            mass[q] = 0.0
    for lane in range(LANES):
        at = (n[lane] - 1) * LANES + lane
        if n[lane] > 0 and starts[at] > 0.0:
            mass[at] = 1.0 / starts[at]
    for j in range(longest - 1, -1, -1):
        for i in range(j + 1):
            split(
                starts, ends, to_starts, to_ends, factor, mass, (i * size + j) * LANES, (j * size + i) * LANES,
                (i * size + j + 1) * LANES, ((j + 1) * size + j + 1) * LANES, longest - 1 - j,
                j * size * LANES, (i - 1) * size * LANES, i,
            )  # fmt: skip


@compiled()
def _logs(sums, n, mode, chart, marginals, b, plain):  # type: ignore[no-untyped-def]
    """log Z of row b in log space, with its marginals or chart as ``inside_outside``."""
    starts, ends, totals, mass = plain
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
    if mode == 2:
        for i in range(n):
            chart[b, i, i:n] = starts[i, i:n]
    if mode != 1 or log_z == -math.inf:
        return log_z
    mass[:n, :n] = 0.0
    mass[0, n - 1] = 1.0
    for j in range(n - 1, -1, -1):
        for i in range(j):
            if mass[i, j] > 0.0:
                high = _highest_sum(starts[i], ends[j], i, j)
                for k in range(i, j):
                    buffer[k - i] = exponential(starts[i, k] + ends[j, k + 1] - high)
                by = mass[i, j] / totals[i, j]
                for k in range(i, j):
                    mass[i, k] += by * buffer[k - i]
                    mass[k + 1, j] += by * buffer[k - i]
    for i in range(n):
        marginals[b, i, i:n] = mass[i, i:n]
    return log_z


@compiled()
def inside_outside(sums, lengths, order, mode, chart, marginals, log_z, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of sums [B, T, T], eight rows at a time in the order given, of similar lengths best.

    mode: 0 log Z alone; 1 with marginals [B, T, T] (0 on entry); 2 with chart [B, T, T], log beta up to a factor of
    each leaf.
    """
    size = sums.shape[1]
    volume = size * size * LANES
    factor, starts, ends = aligned(volume), aligned(volume), aligned(volume)
    to_starts, to_ends, mass = aligned(volume), aligned(volume), aligned(volume)
    rows, n = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    offsets, leasts, shifts = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    raised, over, lost = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    plain = (np.empty((size, size)), np.empty((size, size)), np.empty((size, size)), np.empty((size, size)))
    for group in range(first, (len(order) + LANES - 1) // LANES, step):
        longest = 0
        for lane in range(LANES):
            at = group * LANES + lane
            rows[lane] = order[min(at, len(order) - 1)]
            n[lane] = lengths[rows[lane]] if at < len(order) else 0
            longest = max(longest, n[lane])
        _factors(sums, rows, n, longest, factor, offsets, leasts, shifts)
        _inside(size, longest, factor, starts, ends)
        raised[:], over[:], lost[:] = 0.0, 0.0, 0.0
        for i in range(longest):
            for j in range(i + 1, longest):
                for lane in range(LANES):
                    beta = starts[(i * size + j) * LANES + lane]
                    low = beta == FLOOR or (beta > 0.0 and factor[(i * size + j) * LANES + lane] <= leasts[lane])
                    raised[lane] = 1.0 if low else raised[lane]
                    over[lane] = over[lane] if beta < CEILING else 1.0
        if mode == 1 or raised.max() > 0.0:
            _outside(size, longest, n, factor, starts, ends, to_starts, to_ends, mass)
            if raised.max() > 0.0:
                for i in range(longest):
                    for j in range(i + 1, longest):
                        for lane in range(LANES):
                            at = (i * size + j) * LANES + lane
                            low = starts[at] == FLOOR or factor[at] <= leasts[lane]
                            lost[lane] += mass[at] if low else 0.0
        for lane in range(LANES):
            if n[lane] == 0:
                continue
            b = rows[lane]
            if over[lane] > 0.0 or not lost[lane] < LOST:
                log_z[b] = _logs(sums[b], n[lane], mode, chart, marginals, b, plain)
                continue
            top = starts[(n[lane] - 1) * LANES + lane]
            log_z[b] = offsets[lane] + math.log(top) if top > 0.0 else -math.inf
            if mode == 1:
                for i in range(n[lane]):
                    for j in range(i, n[lane]):
                        marginals[b, i, j] = mass[(i * size + j) * LANES + lane]
            if mode == 2:
                for i in range(n[lane]):
                    for j in range(i, n[lane]):
                        beta = starts[(i * size + j) * LANES + lane]
                        chart[b, i, j] = math.log(beta) if beta > 0.0 else -math.inf


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
    """trees [N, B, T, T] (0 on entry) drawn by chart and log_z of ``inside_outside`` and the label's scores spans
    [B, T, T K]; -1 if none.

    uniforms: [N, B, 4 T], from 0 to 1. Shares divide the draws.
    """
    count, rows, size, _ = trees.shape
    k_all = spans.shape[2] // size
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
                    p = exponential(spans[b, i, j * k_all + k] - sums[b, i, j])
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
