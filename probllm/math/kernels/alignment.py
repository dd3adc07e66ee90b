"""Monotone alignments, compiled: forward-backward over a left-to-right lattice, its best and its drawn paths.

    alpha_t(s) = q_t(s) sum_d alpha_{t-1}(s - d) w(d, s) / m_t      m_t: the maximum over s, so that alpha is at most 1
    beta_{t-1}(s) = sum_d w(d, s + d) q_t(s + d) beta_t(s + d) / k_t
    c_t = sum_s alpha_t(s) beta_t(s),    P(state s at step t) = alpha_t(s) beta_t(s) / c_t

in probability space and float64 (``scaled``), or in logs (``logs``) for rows that ``scaled`` does not certify. What is
below ``TINY`` becomes 0, which changes no answer as long as every m, k and c is above ``LEAST``: what was dropped at a
step is at most TINY / LEAST of its greatest alpha (or beta), so its share of the probability c_t is at most
S TINY / LEAST^2. Only states that a path can pass at the step are looked at.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

TINY, LEAST = 1e-250, 1e-100
_FAST = {"contract", "reassoc", "nsz"}  # nothing here is infinite or NaN where sums are reordered
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


@compiled(fastmath={"nnan", "reassoc"}, error_model="numpy")
def _highest(x, first, last):  # type: ignore[no-untyped-def]
    high = -math.inf
    for j in range(first, last):
        high = x[j] if x[j] > high else high
    return high


@compiled(fastmath=_FAST, error_model="numpy")
def _dot(x, y, by, first, last):  # type: ignore[no-untyped-def]
    """sum x y."""
    total = 0.0
    for j in range(first, last):
        total += x[j] * y[j]
    return total * by


@compiled()
def _bounds(start, end, reach, n):  # type: ignore[no-untyped-def]
    """(last state in which a path may begin, first and last in which it may end); empty: -1."""
    last_start = first_end = last_end = -1
    for s in range(start.size):
        if start[s] > -math.inf:
            last_start = s
        if end[s] > -math.inf:
            first_end = s if first_end < 0 else first_end
            last_end = s
    return last_start, first_end, last_end


@compiled(fastmath=_FAST, error_model="numpy")
def _ahead(before, w, q, now, edge, low, high):  # type: ignore[no-untyped-def]
    """now(s) = q(s) sum_d before(s - d) w(d, s); returns the maximum. ``edge`` entries stand before state 0."""
    for s in range(low, high):
        now[edge + s] = before[edge + s] * w[0, s]
    for d in range(1, w.shape[0]):
        for s in range(low, high):
            now[edge + s] += before[edge + s - d] * w[d, s]
    most = 0.0
    for s in range(low, high):
        v = now[edge + s] * q[s]
        now[edge + s] = v
        most = v if v > most else most
    return most


@compiled(fastmath=_FAST, error_model="numpy")
def _scale(x, by, first, last):  # type: ignore[no-untyped-def]
    for j in range(first, last):
        v = x[j] * by
        x[j] = v if v > TINY else 0.0


@compiled(fastmath=_FAST, error_model="numpy")
def _behind(w, g, beta, low, high):  # type: ignore[no-untyped-def]
    """beta(s) = sum_d w(d, s + d) g(s + d); returns the maximum."""
    for s in range(low, high):
        beta[s] = g[s] * w[0, s]
    for d in range(1, w.shape[0]):
        for s in range(low, high):
            beta[s] += g[s + d] * w[d, s + d]
    most = 0.0
    for s in range(low, high):
        most = beta[s] if beta[s] > most else most
    return most


@compiled(fastmath=_FAST, error_model="numpy")
def _collect(before, g, by, edge, low, high, arrivals):  # type: ignore[no-untyped-def]
    """arrivals(d, s) += before(s - d) g(s) by."""
    for d in range(arrivals.shape[0]):
        for s in range(low, high):
            arrivals[d, s] += before[edge + s - d] * g[s] * by


@compiled(fastmath=_FAST, error_model="numpy")
def _times(x, y, by, out, edge, low, high):  # type: ignore[no-untyped-def]
    """out(s) = x(s) y(s) by."""
    for s in range(low, high):
        out[s] = x[edge + s] * y[s] * by


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
    beta, g, finish = np.zeros(states), np.zeros(states + edge), np.zeros(states)
    power = np.empty(states)
    bits = power.view(np.int64)
    prepared = -1
    for b in range(first, rows, step):
        n = lengths[b]
        row = b if steps.shape[0] > 1 else 0
        if row != prepared:
            most_step = -math.inf
            for d in range(moves):
                most_step = max(most_step, _highest(steps[row, d], min(d, states), states))
            for d in range(moves):
                for s in range(d, states):
                    w[d, s] = math.exp(steps[row, d, s] - most_step) if most_step > -math.inf else 0.0
            prepared = row
        from_start, to_end = start[b if start.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        last_start, first_end, last_end = _bounds(from_start, to_end, edge, n)
        flags[b] = 0
        log_z[b] = -math.inf
        if last_start < 0 or last_end < 0:
            continue
        most_start, most_end = _highest(from_start, 0, states), _highest(to_end, 0, states)
        total = most_start + most_end + (most_step * (n - 1) if n > 1 else 0.0)
        good = total > -math.inf
        for t in range(n):
            if not good:
                break
            low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
            peak = _highest(emissions[b, t], low, high)
            if high <= low or peak == -math.inf:  # no path passes here
                good = False
                break
            now, p = alpha[t], q[t]
            for s in range(low, high):
                p[s] = emissions[b, t, s] - peak
            _exponentials(p[low:high], power, bits, high - low)
            # what later loops may read beside the band
            now[: edge + low] = 0.0
            now[edge + high :] = 0.0
            p[high:] = 0.0
            if t == 0:
                most = 0.0
                for s in range(low, high):
                    now[edge + s] = math.exp(from_start[s] - most_start) * p[s]
                    most = max(most, now[edge + s])
            else:
                most = _ahead(alpha[t - 1], w, p, now, edge, low, high)
            if not most > LEAST:
                flags[b] = 1
                good = False
                break
            _scale(now, 1.0 / most, edge + low, edge + high)
            total += peak + math.log(most)
        if not good:
            continue
        beta[:] = 0.0
        for s in range(states):
            beta[s] = math.exp(to_end[s] - most_end)
        for t in range(n - 1, -1, -1):
            low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
            factor = 1.0
            if t < n - 1:
                most = _behind(w, g, beta, low, high)
                if not most > LEAST:
                    flags[b] = 1
                    break
                factor = 1.0 / most
                _scale(beta, factor, low, high)
            c = _dot(alpha[t, edge:], beta, 1.0, low, high)
            if not c > LEAST:
                flags[b] = 1
                break
            if t == n - 1:
                log_z[b] = total + math.log(c)
            if keep:
                _times(alpha[t], beta, 1.0 / c, marginals[b, t], edge, low, high)
                if t < n - 1:
                    after = min(last_end, last_start + edge * (t + 1)) + 1
                    before = max(0, first_end - edge * (n - 2 - t))
                    _collect(alpha[t], g, factor / c, edge, before, after, arrivals[b])
            _times(q[t], beta, 1.0, g, 0, low, high)
            g[:low] = 0.0
            g[high:] = 0.0
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
def _forward_logs(emissions, steps, start, n, alpha):  # type: ignore[no-untyped-def]
    """alpha [T, S]: log filtered scores, each step's maximum taken out; returns the sum of the maxima."""
    moves, states = steps.shape
    for s in range(states):
        alpha[0, s] = start[s] + emissions[0, s]
    total = _shift(alpha[0])
    for t in range(1, n):
        for s in range(states):
            high = -math.inf
            for d in range(min(moves, s + 1)):
                high = max(high, alpha[t - 1, s - d] + steps[d, s])
            mass = 0.0
            if high > -math.inf:
                for d in range(min(moves, s + 1)):
                    mass += math.exp(alpha[t - 1, s - d] + steps[d, s] - high)
            alpha[t, s] = high + math.log(mass) + emissions[t, s] if mass > 0 else -math.inf
        total += _shift(alpha[t])
        if total == -math.inf:
            break
    return total


@compiled()
def logs(  # type: ignore[no-untyped-def]
    emissions, steps, start, end, lengths, keep, marginals, arrivals, log_z, flags, first, step
):
    """As ``scaled``, right for every score; only rows whose flag is 1."""
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    alpha, beta, g = np.empty((longest, states)), np.empty(states), np.empty(states)
    pairs = np.empty((moves, states))
    for b in range(first, rows, step):
        if flags[b] == 0:
            continue
        n = lengths[b]
        moved = steps[b if steps.shape[0] > 1 else 0]
        total = _forward_logs(emissions[b], moved, start[b if start.shape[0] > 1 else 0], n, alpha)
        beta[:] = end[b if end.shape[0] > 1 else 0]
        high = -math.inf
        for s in range(states):
            high = max(high, alpha[n - 1, s] + beta[s])
        if total == -math.inf or high == -math.inf:
            log_z[b] = -math.inf
            continue
        mass = 0.0
        for s in range(states):
            mass += math.exp(alpha[n - 1, s] + beta[s] - high)
        log_z[b] = total + high + math.log(mass)
        if not keep:
            continue
        for t in range(n - 1, -1, -1):
            high, mass = -math.inf, 0.0
            for s in range(states):
                high = max(high, alpha[t, s] + beta[s])
            for s in range(states):
                marginals[b, t, s] = math.exp(alpha[t, s] + beta[s] - high)
                mass += marginals[b, t, s]
            for s in range(states):
                marginals[b, t, s] /= mass
            if t == 0:
                break
            for s in range(states):
                g[s] = emissions[b, t, s] + beta[s]
            high, mass = -math.inf, 0.0
            for s in range(states):
                for d in range(min(moves, s + 1)):
                    pairs[d, s] = alpha[t - 1, s - d] + moved[d, s] + g[s]
                    high = max(high, pairs[d, s])
            for s in range(states):
                for d in range(min(moves, s + 1)):
                    pairs[d, s] = math.exp(pairs[d, s] - high)
                    mass += pairs[d, s]
            for s in range(states):
                for d in range(min(moves, s + 1)):
                    arrivals[b, d, s] += pairs[d, s] / mass
            for s in range(states):
                high, mass = -math.inf, 0.0
                for d in range(min(moves, states - s)):
                    high = max(high, moved[d, s + d] + g[s + d])
                if high > -math.inf:
                    for d in range(min(moves, states - s)):
                        mass += math.exp(moved[d, s + d] + g[s + d] - high)
                beta[s] = high + math.log(mass) if mass > 0 else -math.inf
            _shift(beta)


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
    for b in range(first, rows, step):
        n = lengths[b]
        moved, to_end = steps[b if steps.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        total = _forward_logs(emissions[b], moved, start[b if start.shape[0] > 1 else 0], n, alpha)
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
