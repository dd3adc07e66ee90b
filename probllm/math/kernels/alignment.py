"""Monotone alignments, compiled: forward-backward over a left-to-right lattice, its best and its drawn paths.

    alpha_t(s) = q_t(s) sum_d alpha_{t-1}(s - d) w(d, s) / m_t,      w = exp(steps), q = exp(emissions)
    beta_{t-1}(s) = sum_d w(d, s + d) q_t(s + d) beta_t(s + d) / k_t
    c_t = sum_s alpha_t(s) beta_t(s),    P(state s at step t) = alpha_t(s) beta_t(s) / c_t

in probability space and float64 (``scaled``), or in logs (``logs``) for rows that ``scaled`` does not certify. Only
states that a path can pass at the step are looked at.

Why the certificate holds. Alphas and betas are scaled to a maximum of BIG. What is dropped from either (below TINY, or
by underflow of a product or an exponential) is at most ``lost`` in those units. The paths whose prefix was dropped and
whose suffix was not, or the other way round, have no more than lost * BIG of the mass c_t of their step, which must be
below 1 / SURE. For paths that were dropped in both directions, at t and later at t', no more than
(lost / BIG)^2 / c times the product of r_u / m_u over t < u <= t', where no step multiplies a mass by more
than r_u = max_s sum_d w(d, s + d) q_u(s + d), which is at most D.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

TINY, LEAST, LEAST_EXP, BIG, SURE = 1e-300, 1e-150, 1e-299, 1e140, 1e30
_FAST = {"contract", "reassoc", "nsz", "nnan"}  # nothing here is infinite or NaN where sums are reordered
_TURN = 1.5 * 2.0**52  # added to a number below 2^51, it leaves the nearest integer in the lowest bits


@compiled(fastmath={"contract"}, error_model="numpy")
def _exponentials(x, power, bits, size):  # type: ignore[no-untyped-def]
    """x = exp(x) for entries of 0 and less, -inf too; 0 below e^-690. ``bits`` is ``power`` seen as integers."""
    for j in range(size):
        v = x[j] if x[j] > -690.0 else -690.0
        t = v * 1.4426950408889634 + _TURN
        power[j] = t
        t -= _TURN
        r = (v - t * 0.693147180369123816490) - t * 1.90821492927058770002e-10
        p = r * 2.08767569878681e-9 + 2.505210838544172e-8
        p = p * r + 2.755731922398589e-7
        p = p * r + 2.7557319223985893e-6
        p = p * r + 2.48015873015873e-5
        p = p * r + 1.984126984126984e-4
        p = p * r + 1.3888888888888889e-3
        p = p * r + 8.333333333333333e-3
        p = p * r + 4.1666666666666664e-2
        p = p * r + 1.6666666666666666e-1
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        x[j] = p if x[j] > -690.0 else 0.0
    for j in range(size):
        bits[j] = (bits[j] << 52) + 4607182418800017408  # 1023 << 52
    for j in range(size):
        x[j] *= power[j]


@compiled(fastmath=_FAST, error_model="numpy")
def _highest(x):  # type: ignore[no-untyped-def]
    high = -math.inf
    for s in range(x.size):
        high = x[s] if x[s] > high else high
    return high


@compiled()
def _least_and_last(scores):  # type: ignore[no-untyped-def]
    """The first and the last entry that is allowed; -1 where none is."""
    first = last = -1
    for s in range(scores.size):
        if scores[s] > -math.inf:
            first = s if first < 0 else first
            last = s
    return first, last


@compiled(fastmath=_FAST, error_model="numpy")
def _below(x, peak, out):  # type: ignore[no-untyped-def]
    """out = x - peak; returns how many finite entries are too low for ``_exponentials``."""
    lost = 0
    for s in range(x.size):
        v = x[s] - peak
        out[s] = v
        lost += 1 if (v < -690.0) & (v > -1e300) else 0
    return lost


@compiled(fastmath=_FAST, error_model="numpy")
def _three(x0, x1, x2, w0, w1, w2, q, out):  # type: ignore[no-untyped-def]
    """out = (x0 w0 + x1 w1 + x2 w2) q; returns the maximum."""
    most = 0.0
    for s in range(out.size):
        v = (x0[s] * w0[s] + x1[s] * w1[s] + x2[s] * w2[s]) * q[s]
        out[s] = v
        most = v if v > most else most
    return most


@compiled(fastmath=_FAST, error_model="numpy")
def _add_product(x, w, out):  # type: ignore[no-untyped-def]
    for s in range(out.size):
        out[s] += x[s] * w[s]


@compiled(fastmath=_FAST, error_model="numpy")
def _product(x, w, out):  # type: ignore[no-untyped-def]
    """out = x w; returns the maximum."""
    most = 0.0
    for s in range(out.size):
        v = x[s] * w[s]
        out[s] = v
        most = v if v > most else most
    return most


@compiled(fastmath=_FAST, error_model="numpy")
def _scale(x, by):  # type: ignore[no-untyped-def]
    for s in range(x.size):
        v = x[s] * by
        x[s] = v if v > TINY else 0.0


@compiled(fastmath=_FAST, error_model="numpy")
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = 0.0
    for s in range(x.size):
        total += x[s] * y[s]
    return total


@compiled(fastmath=_FAST, error_model="numpy")
def _add_share(x, y, by, out):  # type: ignore[no-untyped-def]
    """out += x y by, but for what would be slow: shares below 1e-290."""
    least = 1e-290 / by
    for s in range(out.size):
        v = x[s] * y[s]
        v = v if v > least else 0.0
        out[s] += v * by


@compiled()
def scaled(  # type: ignore[no-untyped-def]
    emissions, steps, start, end, lengths, keep, marginals, arrivals, log_z, flags, first, step
):
    """One share of the rows. Outputs of a row whose flag comes out 1 are not certified: ``logs`` does it again.

    emissions [B, T, S], steps [1 or B, D, S], start and end [1 or B, S], lengths [B]; log_z [B], flags [B];
    where ``keep``: marginals [B, T, S] and arrivals [B, D, S], the expected steps; both 0 on entry.
    """
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    edge = moves - 1
    alpha, q = np.zeros((longest, edge + states)), np.zeros((longest, states))
    w = np.zeros((moves, states + edge))
    beta, g, power, scales = np.zeros(states), np.zeros(states + edge), np.empty(states), np.empty(longest)
    spread = math.log(moves)
    bits, ones = power.view(np.int64), np.ones(states)
    prepared, most_step, rough_steps = -1, 0.0, False
    for b in range(first, rows, step):
        n = lengths[b]
        row = b if steps.shape[0] > 1 else 0
        if row != prepared:
            most_step, rough_steps = -math.inf, False
            for d in range(min(moves, states)):
                most_step = max(most_step, _highest(steps[row, d, d:]))
            for d in range(moves):
                for s in range(d, states):
                    w[d, s] = math.exp(steps[row, d, s] - most_step) if most_step > -math.inf else 0.0
                    rough_steps = rough_steps | ((w[d, s] < LEAST_EXP) & (steps[row, d, s] > -math.inf))
            prepared = row
        from_start, to_end = start[b if start.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        last_start = _least_and_last(from_start)[1]
        first_end, last_end = _least_and_last(to_end)
        flags[b] = 0
        log_z[b] = -math.inf
        if last_start < 0 or last_end < 0 or (n > 1 and most_step == -math.inf):
            continue
        most_start, most_end = _highest(from_start), _highest(to_end)
        total = most_start + most_end + (most_step * (n - 1) if n > 1 else 0.0)
        lost = TINY  # the most that was dropped from an alpha or a beta, whose maximum is BIG
        least_mass = BIG * BIG
        rough = rough_steps  # whether an exponential was so small that it was dropped
        for s in range(states):
            g[s] = math.exp(from_start[s] - most_start) * BIG
            beta[s] = math.exp(to_end[s] - most_end) * BIG
            rough = rough | ((g[s] < BIG * LEAST_EXP) & (from_start[s] > -math.inf))
            rough = rough | ((beta[s] < BIG * LEAST_EXP) & (to_end[s] > -math.inf))
        for t in range(n):
            low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
            peak = _highest(emissions[b, t, low:high]) if low < high else -math.inf
            if peak == -math.inf:  # no path passes here
                total = -math.inf
                break
            p = q[t, low:high]
            rough = rough | (_below(emissions[b, t, low:high], peak, p) > 0)
            _exponentials(p, power, bits, high - low)
            # what later loops may read beside the band
            alpha[t, : edge + low] = 0.0
            alpha[t, edge + high :] = 0.0
            now = alpha[t, edge + low : edge + high]
            if t == 0:
                most = _product(g[low:high], p, now)
            elif moves == 3:
                x = alpha[t - 1]
                most = _three(
                    x[2 + low : 2 + high], x[1 + low : 1 + high], x[low:high], w[0, low:high], w[1, low:high],
                    w[2, low:high], p, now,
                )  # fmt: skip
            else:
                now[:] = 0.0
                for d in range(moves):
                    _add_product(alpha[t - 1, edge + low - d : edge + high - d], w[d, low:high], now)
                most = _product(now, p, now)
            if not most > LEAST:
                flags[b] = 1
                break
            _scale(now, BIG / most)
            lost = max(lost, (BIG * LEAST_EXP if rough else TINY) * (BIG / most))
            scales[t] = math.log(most / BIG)
            total += peak + scales[t]
        if flags[b] == 1 or total == -math.inf:
            continue
        g[:] = 0.0
        for t in range(n - 1, -1, -1):
            low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
            now, ending = alpha[t, edge + low : edge + high], beta[low:high]
            factor = 1.0
            if t < n - 1:
                if moves == 3:
                    most = _three(
                        g[low:high], g[1 + low : 1 + high], g[2 + low : 2 + high], w[0, low:high],
                        w[1, 1 + low : 1 + high], w[2, 2 + low : 2 + high], ones[low:high],
                        ending,
                    )  # fmt: skip
                else:
                    ending[:] = 0.0
                    for d in range(moves):
                        _add_product(g[low + d : high + d], w[d, low + d : high + d], ending)
                    most = _highest(ending)
                if not most > LEAST:
                    flags[b] = 1
                    break
                factor = BIG / most
                _scale(ending, factor)
                lost = max(lost, (BIG * LEAST_EXP if rough else TINY) * factor)
            c = _dot(now, ending)
            least_mass = min(least_mass, c)
            if not c > lost * BIG * SURE:
                flags[b] = 1
                break
            if t == n - 1:
                log_z[b] = total + (math.log(c) - 2 * math.log(BIG))
            if keep:
                _add_share(now, ending, 1.0 / c, marginals[b, t, low:high])
                if t < n - 1:
                    after, before = (
                        min(last_end, last_start + edge * (t + 1)) + 1,
                        max(0, first_end - edge * (n - 2 - t)),
                    )
                    for d in range(moves):
                        _add_share(
                            alpha[t, edge + before - d : edge + after - d], g[before:after], factor / c,
                            arrivals[b, d, before:after],
                        )  # fmt: skip
            _product(q[t, low:high], ending, g[low:high])
            g[:low] = 0.0
            g[high:] = 0.0
        if flags[b] == 0:
            room = math.log(least_mass) - 2 * math.log(lost) - math.log(SURE)
            if spread * (n - 1) - scales[1:n].sum() > room:
                growth = -scales[1:n].sum()
                for t in range(1, n):
                    low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
                    g[:] = 0.0
                    g[low:high] = q[t, low:high]
                    beta[:] = 0.0
                    for d in range(moves):
                        _add_product(g[d : d + states], w[d, d : d + states], beta)
                    growth += math.log(_highest(beta))
                flags[b] = 1 if growth > room else 0
        if flags[b] == 1:
            log_z[b] = -math.inf
            if keep:
                marginals[b] = 0.0
                arrivals[b] = 0.0
        elif keep:
            for d in range(moves):
                for s in range(states):
                    arrivals[b, d, s] *= w[d, s]


@compiled()
def _shift(x):  # type: ignore[no-untyped-def]
    """Takes the maximum out of x in place and returns it (-inf: nothing is allowed, and x stays)."""
    high = -math.inf
    for s in range(x.size):
        high = max(high, x[s])
    if high > -math.inf:
        for s in range(x.size):
            x[s] -= high
    return high


@compiled()
def _sums(x, high, mass, power, bits):  # type: ignore[no-untyped-def]
    """x [D, S] = exp(x - high), high [S] its maximum over D (0 for -inf), mass [S] the sum over D."""
    moves, states = x.shape
    high[:] = x[0]
    for d in range(1, moves):
        for s in range(states):
            high[s] = x[d, s] if x[d, s] > high[s] else high[s]
    for s in range(states):
        high[s] = high[s] if high[s] > -math.inf else 0.0
    for d in range(moves):
        for s in range(states):
            x[d, s] -= high[s]
    _exponentials(x.reshape(x.size), power, bits, x.size)
    mass[:] = x[0]
    for d in range(1, moves):
        for s in range(states):
            mass[s] += x[d, s]


@compiled()
def _forward_logs(emissions, steps, start, n, alpha, x, high, mass, power, bits):  # type: ignore[no-untyped-def]
    """alpha [T, S]: log filtered scores, each step's maximum taken out; returns the sum of the maxima.

    x [D, S], high and mass [S], power and bits [D S] are room for the work.
    """
    moves, states = steps.shape
    for s in range(states):
        alpha[0, s] = start[s] + emissions[0, s]
    total = _shift(alpha[0])
    for t in range(1, n):
        if total == -math.inf:
            break
        for d in range(moves):
            x[d, : min(d, states)] = -math.inf
            for s in range(d, states):
                x[d, s] = alpha[t - 1, s - d] + steps[d, s]
        _sums(x, high, mass, power, bits)
        for s in range(states):
            alpha[t, s] = high[s] + math.log(mass[s]) + emissions[t, s] if mass[s] > 0 else -math.inf
        total += _shift(alpha[t])
    return total


@compiled()
def logs(  # type: ignore[no-untyped-def]
    emissions, steps, start, end, lengths, keep, marginals, arrivals, log_z, flags, first, step
):
    """As ``scaled``, right for every score; only rows whose flag is 1."""
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    alpha, beta, p = np.empty((longest, states)), np.empty(states), np.empty(states)
    x, high, mass, power = np.empty((moves, states)), np.empty(states), np.empty(states), np.empty(moves * states)
    bits = power.view(np.int64)
    for b in range(first, rows, step):
        if flags[b] == 0:
            continue
        n = lengths[b]
        moved = steps[b if steps.shape[0] > 1 else 0]
        from_start = start[b if start.shape[0] > 1 else 0]
        log_z[b] = total = _forward_logs(emissions[b], moved, from_start, n, alpha, x, high, mass, power, bits)
        if total == -math.inf:
            continue
        beta[:] = end[b if end.shape[0] > 1 else 0]
        for t in range(n - 1, -1, -1):
            if t < n - 1:
                for d in range(moves):
                    for s in range(states - d):
                        x[d, s] = moved[d, s + d] + (emissions[b, t + 1, s + d] + beta[s + d])
                    x[d, max(0, states - d) :] = -math.inf
                _sums(x, high, mass, power, bits)
                for s in range(states):
                    beta[s] = high[s] + math.log(mass[s]) if mass[s] > 0 else -math.inf
                _shift(beta)
            for s in range(states):
                p[s] = alpha[t, s] + beta[s]
            peak = _shift(p)
            if peak == -math.inf:
                log_z[b] = -math.inf
                break
            _exponentials(p, power, bits, states)
            here = p.sum()
            if t == n - 1:
                log_z[b] = total + peak + math.log(here)
            if not keep:
                break
            for s in range(states):
                p[s] /= here
                marginals[b, t, s] = p[s]
            if t < n - 1:
                for d in range(moves):
                    for s in range(states - d):
                        if x[d, s] > 0.0:
                            arrivals[b, d, s + d] += p[s] * (x[d, s] / mass[s])


@compiled()
def best(emissions, steps, start, end, lengths, paths, first, step):  # type: ignore[no-untyped-def]
    """paths [B, T] (0 on entry): a path of the highest score; -1 in a row where every path is forbidden."""
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    delta, after, back = np.empty(states), np.empty(states), np.empty((longest, states), np.int8)
    for b in range(first, rows, step):
        n = lengths[b]
        moved = steps[b if steps.shape[0] > 1 else 0]
        from_start, to_end = start[b if start.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        for s in range(states):
            delta[s] = from_start[s] + emissions[b, 0, s]
        for t in range(1, n):
            after[:] = delta + moved[0]
            back[t] = 0
            for d in range(1, moves):
                for s in range(d, states):
                    v = delta[s - d] + moved[d, s]
                    better = v > after[s]
                    after[s] = v if better else after[s]
                    back[t, s] = d if better else back[t, s]
            for s in range(states):
                delta[s] = after[s] + emissions[b, t, s]
        high, state = -math.inf, -1
        for s in range(states):
            if delta[s] + to_end[s] > high:
                high, state = delta[s] + to_end[s], s
        if state < 0:
            paths[b] = -1
            continue
        for t in range(n - 1, -1, -1):
            paths[b, t] = state
            state -= back[t, state] if t > 0 else 0


@compiled()
def sample(emissions, steps, start, end, lengths, uniforms, paths, first, step):  # type: ignore[no-untyped-def]
    """paths [N, B, T] (0 on entry), drawn with the numbers uniforms [N, B, T] in [0, 1); -1 where all is forbidden."""
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    alpha, weights = np.empty((longest, states)), np.empty(max(states, moves))
    x, high_of, mass_of = np.empty((moves, states)), np.empty(states), np.empty(states)
    power = np.empty(moves * states)
    bits = power.view(np.int64)
    for b in range(first, rows, step):
        n = lengths[b]
        moved, to_end = steps[b if steps.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        from_start = start[b if start.shape[0] > 1 else 0]
        total = _forward_logs(emissions[b], moved, from_start, n, alpha, x, high_of, mass_of, power, bits)
        high = -math.inf
        if total > -math.inf:
            for s in range(states):
                high = max(high, alpha[n - 1, s] + to_end[s])
        if high == -math.inf:
            paths[:, b] = -1
            continue
        for i in range(paths.shape[0]):
            state, count, peak = 0, states, high
            for t in range(n - 1, -1, -1):
                if t < n - 1:
                    count, peak = min(moves, state + 1), -math.inf
                    for d in range(count):
                        peak = max(peak, alpha[t, state - d] + moved[d, state])
                mass = 0.0
                for d in range(count):
                    score = alpha[t, d] + to_end[d] if t == n - 1 else alpha[t, state - d] + moved[d, state]
                    mass += math.exp(score - peak)
                    weights[d] = mass
                threshold = uniforms[i, b, t] * mass
                chosen = 0
                while chosen < count - 1 and weights[chosen] <= threshold:
                    chosen += 1
                state = chosen if t == n - 1 else state - chosen
                paths[i, b, t] = state
