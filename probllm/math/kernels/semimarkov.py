"""Semi-Markov recursions, compiled: log Z, expected parts, the best segmentation and draws, in log space and float64.

    alpha[t, k] = logsumexp_d (enter[t - d, k] + score(t - d, d, k))   enter[t, k] = logsumexp_j (alpha[t, j] + A[j, k])

A segment's score is read from a table ``segments[t, d - 1, k]``, or, where that has no steps, summed up as the window
grows: ``emissions[t, k] + .. + emissions[t + d - 1, k] + durations[d - 1, k]`` (``last`` for the segment that ends the
sequence). Then nothing has more than O(T K) entries. Arrays with a leading dimension of 1 are shared by all rows.
Each kernel does the pieces first, first + step, first + 2 step, ...
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

TINY = 1e-200  # what a sum loses by underflow is below 1e-300, so that above this it is exact


@compiled()
def _ending(t, n, enter, segments, emissions, durations, last, sums, v):  # type: ignore[no-untyped-def]
    """v[d - 1, k] = enter[t - d, k] + score(t - d, d, k) of the segments that end before t; returns their number."""
    m, k_all = min(v.shape[0], t), v.shape[1]
    if segments.shape[0] > 0:
        for d in range(m):
            for k in range(k_all):
                v[d, k] = enter[t - 1 - d, k] + segments[t - 1 - d, d, k]
    else:
        table = last if t == n else durations
        sums[:] = 0.0
        for d in range(m):
            for k in range(k_all):
                sums[k] += emissions[t - 1 - d, k]
                v[d, k] = enter[t - 1 - d, k] + sums[k] + table[d, k]
    return m


@compiled(fastmath={"contract"})
def _exp(x, count, bits):  # type: ignore[no-untyped-def]
    """x[:count] becomes its exponential, each being at most 0; below exp(-708) it is 0. In vectors, to 2e-16.

    exp(x) = 2^m exp(r), where adding 1.5 * 2^52 rounds x / ln 2 to m and leaves it in the lowest bits; r by its series.
    """
    scale = bits.view(np.float64)
    for i in range(count):
        y = max(x[i], -708.0)
        t = y * 1.4426950408889634 + 6755399441055744.0
        scale[i] = t
        m = t - 6755399441055744.0
        r = y - m * 0.6931471805598903 - m * 5.497923018708371e-14
        p = 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        x[i] = p if x[i] > -708.0 else 0.0
    for i in range(count):
        bits[i] = (bits[i] + 1023) << 52
    for i in range(count):
        x[i] *= scale[i]


@compiled()
def _exponentials(v, m, high, mass, bits):  # type: ignore[no-untyped-def]
    """v[:m] becomes exp(v - high), high[k] being the column's maximum (0 if that is -inf); mass[k] is its sum."""
    k_all = v.shape[1]
    high[:] = -math.inf
    for d in range(m):
        for k in range(k_all):
            high[k] = v[d, k] if v[d, k] > high[k] else high[k]
    for k in range(k_all):
        high[k] = 0.0 if high[k] == -math.inf else high[k]
    for d in range(m):
        for k in range(k_all):
            v[d, k] -= high[k]
    _exp(v.reshape(-1), m * k_all, bits)
    mass[:] = 0.0
    for d in range(m):
        for k in range(k_all):
            mass[k] += v[d, k]


@compiled()
def _through(x, scores, table, peak, out):  # type: ignore[no-untyped-def]
    """out[k] = log sum_j exp(x[j] + scores[j, k]), where table = exp(scores - peak).

    By products of exponentials where none that counts can have underflowed, else by the column's own maximum.
    """
    k_all = len(x)
    high = -math.inf
    for j in range(k_all):
        high = max(high, x[j])
    if high == -math.inf:
        out[:] = -math.inf
        return
    for k in range(k_all):
        out[k] = 0.0
    for j in range(k_all):
        a = math.exp(x[j] - high)
        for k in range(k_all):
            out[k] += a * table[j, k]
    for k in range(k_all):
        if out[k] > TINY:
            out[k] = math.log(out[k]) + high + peak
            continue
        top, total = -math.inf, 0.0
        for j in range(k_all):
            top = max(top, x[j] + scores[j, k])
        if top > -math.inf:
            for j in range(k_all):
                total += math.exp(x[j] + scores[j, k] - top)
        out[k] = top + math.log(total) if total > 0.0 else -math.inf


@compiled()
def forward(  # type: ignore[no-untyped-def]
    segments, emissions, durations, last, transitions, table, peaks, start, end, lengths, alpha, enter, log_z, first,
    step
):  # fmt: skip
    """log_z [B], and alpha [B, T + 1, K] and enter [B, T, K] (one for each share, where they have not B rows).

    segments [B, T, D, K], or [1, 0, 0, 0] with emissions [B, T, K], durations and last [B, D, K]; transitions
    [B, K, K], table = exp(transitions - peaks) with peaks [B] their maxima; start, end [B, K].
    """
    rows, k_all = len(lengths), start.shape[1]
    longest = segments.shape[2] if segments.shape[1] > 0 else durations.shape[1]
    v = np.empty((longest, k_all))
    high, mass, sums = np.empty(k_all), np.empty(k_all), np.empty(k_all)
    bits = np.empty(v.size, np.int64)
    for b in range(first, rows, step):
        n = lengths[b]
        own = b if alpha.shape[0] == rows else first
        to, into = alpha[own], enter[own]
        seg = segments[b if segments.shape[0] == rows else 0]
        emit = emissions[b if emissions.shape[0] == rows else 0]
        dur = durations[b if durations.shape[0] == rows else 0]
        fin = last[b if last.shape[0] == rows else 0]
        g = b if transitions.shape[0] == rows else 0
        begin = start[b if start.shape[0] == rows else 0]
        finish = end[b if end.shape[0] == rows else 0]
        into[0] = begin
        for t in range(1, n + 1):
            m = _ending(t, n, into, seg, emit, dur, fin, sums, v)
            _exponentials(v, m, high, mass, bits)
            for k in range(k_all):
                to[t, k] = high[k] + math.log(mass[k]) if mass[k] > 0.0 else -math.inf
            if t < n:
                _through(to[t], transitions[g], table[g], peaks[g], into[t])
        top, total = -math.inf, 0.0
        for k in range(k_all):
            top = max(top, to[n, k] + finish[k])
        if top > -math.inf:
            for k in range(k_all):
                total += math.exp(to[n, k] + finish[k] - top)
        log_z[b] = top + math.log(total) if total > 0.0 else -math.inf


@compiled()
def _shared_back(x, scores, table, into, a, share, pairs, from_):  # type: ignore[no-untyped-def]
    """Shares into[k] out over j in proportion to exp(x[j] + scores[j, k]); adds that to pairs[j, k] and from_[j]."""
    k_all = len(x)
    high = -math.inf
    for j in range(k_all):
        high = max(high, x[j])
    if high == -math.inf:
        return
    for k in range(k_all):
        share[k] = 0.0
    for j in range(k_all):
        a[j] = math.exp(x[j] - high)
        for k in range(k_all):
            share[k] += a[j] * table[j, k]
    for k in range(k_all):
        if share[k] > TINY:
            share[k] = into[k] / share[k]
            continue
        share[k] = 0.0
        if into[k] == 0.0:
            continue
        top, total = -math.inf, 0.0
        for j in range(k_all):
            top = max(top, x[j] + scores[j, k])
        for j in range(k_all):
            total += math.exp(x[j] + scores[j, k] - top)
        for j in range(k_all):
            p = into[k] * math.exp(x[j] + scores[j, k] - top) / total
            pairs[j, k] += p
            from_[j] += p
    for j in range(k_all):
        for k in range(k_all):
            p = a[j] * table[j, k] * share[k]
            pairs[j, k] += p
            from_[j] += p


@compiled()
def backward(  # type: ignore[no-untyped-def]
    segments, emissions, durations, last, transitions, table, start, end, lengths, alpha, enter, log_z, weights,
    by_segment, by_emission, by_duration, by_last, by_transition, by_start, by_end, first, step
):  # fmt: skip
    """The expected parts, each row times its weight (0 for a row without mass), in arrays that are 0 on entry.

    The probability that a segment ends somewhere is shared out over where it starts, and that over the label before:
    shares add up to one exactly, so that parts keep their digits however large log Z is. What all rows share is summed
    in one array for each share. Other arguments as for ``forward``.
    """
    rows, k_all = len(lengths), end.shape[1]
    whole = segments.shape[1] > 0
    longest = segments.shape[2] if whole else durations.shape[1]
    steps = enter.shape[1]
    v, ends, starts = np.empty((longest, k_all)), np.empty((steps + 1, k_all)), np.empty((steps + 1, k_all))
    high, mass, sums, a = np.empty(k_all), np.empty(k_all), np.empty(k_all), np.empty(k_all)
    bits = np.empty(v.size, np.int64)
    for b in range(first, rows, step):
        n, w = lengths[b], weights[b]
        if w == 0.0 or log_z[b] == -math.inf:
            continue
        seg = segments[b if segments.shape[0] == rows else 0]
        emit = emissions[b if emissions.shape[0] == rows else 0]
        dur = durations[b if durations.shape[0] == rows else 0]
        fin = last[b if last.shape[0] == rows else 0]
        g = b if transitions.shape[0] == rows else 0
        finish = end[b if end.shape[0] == rows else 0]
        to_segment = by_segment[b if segments.shape[0] == rows else first]
        to_emission = by_emission[b if emissions.shape[0] == rows else first]
        to_duration = by_duration[b if durations.shape[0] == rows else first]
        to_last = by_last[b if last.shape[0] == rows else first]
        to_pair = by_transition[b if transitions.shape[0] == rows else first]
        to_start = by_start[b if start.shape[0] == rows else first]
        to_end = by_end[b if end.shape[0] == rows else first]
        ends[: n + 1] = 0.0
        starts[:n] = 0.0
        top, total = -math.inf, 0.0
        for k in range(k_all):
            top = max(top, alpha[b, n, k] + finish[k])
        for k in range(k_all):
            ends[n, k] = math.exp(alpha[b, n, k] + finish[k] - top)
            total += ends[n, k]
        for k in range(k_all):
            ends[n, k] *= w / total
            to_end[k] += ends[n, k]
        for t in range(n, 0, -1):
            m = _ending(t, n, enter[b], seg, emit, dur, fin, sums, v)
            _exponentials(v, m, high, mass, bits)
            for k in range(k_all):
                mass[k] = ends[t, k] / mass[k] if mass[k] > 0.0 else 0.0
            if whole:
                for d in range(m):
                    for k in range(k_all):
                        p = v[d, k] * mass[k]
                        to_segment[t - 1 - d, d, k] += p
                        starts[t - 1 - d, k] += p
            else:
                to_table = to_last if t == n else to_duration
                sums[:] = 0.0
                for d in range(m - 1, -1, -1):  # a step belongs to all segments that reach back to it
                    for k in range(k_all):
                        p = v[d, k] * mass[k]
                        starts[t - 1 - d, k] += p
                        to_table[d, k] += p
                        sums[k] += p
                        to_emission[t - 1 - d, k] += sums[k]
            if t > 1:
                _shared_back(alpha[b, t - 1], transitions[g], table[g], starts[t - 1], a, high, to_pair, ends[t - 1])
        for k in range(k_all):
            to_start[k] += starts[0, k]


@compiled()
def viterbi(  # type: ignore[no-untyped-def]
    segments, emissions, durations, last, transitions, start, end, lengths, score, path, first, step
):
    """score [B] and path [B, T] (0 on entry) of the best segmentations: 1 + k where a segment labelled k starts."""
    rows, k_all = len(lengths), start.shape[1]
    steps = path.shape[1]
    longest = segments.shape[2] if segments.shape[1] > 0 else durations.shape[1]
    v, enter, delta, sums = np.empty((longest, k_all)), np.empty((steps, k_all)), np.empty(k_all), np.empty(k_all)
    duration, before = np.empty((steps + 1, k_all), np.int32), np.empty((steps, k_all), np.int32)
    for b in range(first, rows, step):
        n = lengths[b]
        seg = segments[b if segments.shape[0] == rows else 0]
        emit = emissions[b if emissions.shape[0] == rows else 0]
        dur = durations[b if durations.shape[0] == rows else 0]
        fin = last[b if last.shape[0] == rows else 0]
        move = transitions[b if transitions.shape[0] == rows else 0]
        finish = end[b if end.shape[0] == rows else 0]
        enter[0] = start[b if start.shape[0] == rows else 0]
        for t in range(1, n + 1):
            m = _ending(t, n, enter, seg, emit, dur, fin, sums, v)
            delta[:] = -math.inf
            duration[t] = 1
            for d in range(m):
                for k in range(k_all):
                    better = v[d, k] > delta[k]
                    delta[k] = v[d, k] if better else delta[k]
                    duration[t, k] = d + 1 if better else duration[t, k]
            if t < n:
                enter[t] = -math.inf
                before[t] = 0
                for j in range(k_all):
                    for k in range(k_all):
                        s = delta[j] + move[j, k]
                        better = s > enter[t, k]
                        enter[t, k] = s if better else enter[t, k]
                        before[t, k] = j if better else before[t, k]
        score[b], label = -math.inf, 0
        for k in range(k_all):
            if delta[k] + finish[k] > score[b]:
                score[b], label = delta[k] + finish[k], k
        if score[b] == -math.inf:
            continue
        t = n
        while t > 0:
            t -= duration[t, label]
            path[b, t] = 1 + label
            label = before[t, label] if t > 0 else 0


@compiled()
def _drawn(weights, count, total, u):  # type: ignore[no-untyped-def]
    """The index at which the running sum of the weights passes u times their total; one of weight 0 never."""
    running, chosen = 0.0, 0
    for i in range(count):
        if weights[i] > 0.0:
            chosen = i
            running += weights[i]
            if u * total < running:
                break
    return chosen


@compiled()
def _weights(v, count, out):  # type: ignore[no-untyped-def]
    """out = exp(v - max); returns its sum, 0 if all are -inf."""
    top, total = -math.inf, 0.0
    for i in range(count):
        top = max(top, v[i])
    if top == -math.inf:
        return total
    for i in range(count):
        out[i] = math.exp(v[i] - top)
        total += out[i]
    return total


@compiled()
def sample(  # type: ignore[no-untyped-def]
    segments, emissions, durations, last, transposed, end, lengths, alpha, enter, log_z, uniforms, path, first, step
):
    """path [N, B, T] (0 on entry), drawn backward: the last label, how long its segment is, the label before, and on.

    uniforms [N, B, T, 2]: at a segment's last step, one for its duration and one for its label.
    """
    draws, rows = path.shape[:2]
    k_all = end.shape[1]
    longest = segments.shape[2] if segments.shape[1] > 0 else durations.shape[1]
    size = max(longest, k_all)
    scores, weights = np.empty(size), np.empty(size)
    for piece in range(first, draws * rows, step):
        i, b = piece // rows, piece % rows
        if log_z[b] == -math.inf:
            continue
        seg = segments[b if segments.shape[0] == rows else 0]
        emit = emissions[b if emissions.shape[0] == rows else 0]
        move = transposed[b if transposed.shape[0] == rows else 0]
        finish = end[b if end.shape[0] == rows else 0]
        n = lengths[b]
        for k in range(k_all):
            scores[k] = alpha[b, n, k] + finish[k]
        total = _weights(scores, k_all, weights)
        label = _drawn(weights, k_all, total, uniforms[i, b, n - 1, 1])
        t = n
        while t > 0:
            m = min(longest, t)
            if seg.shape[0] > 0:
                for d in range(m):
                    scores[d] = enter[b, t - 1 - d, label] + seg[t - 1 - d, d, label]
            else:
                source = last if t == n else durations
                table = source[b if source.shape[0] == rows else 0]
                emitted = 0.0
                for d in range(m):
                    emitted += emit[t - 1 - d, label]
                    scores[d] = enter[b, t - 1 - d, label] + emitted + table[d, label]
            total = _weights(scores, m, weights)
            t -= 1 + _drawn(weights, m, total, uniforms[i, b, t - 1, 0])
            path[i, b, t] = 1 + label
            if t > 0:
                for j in range(k_all):
                    scores[j] = alpha[b, t, j] + move[label, j]
                total = _weights(scores, k_all, weights)
                label = _drawn(weights, k_all, total, uniforms[i, b, t - 1, 1])
