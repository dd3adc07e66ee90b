"""Monotone alignments, compiled: forward-backward over a left-to-right lattice, its best and its drawn paths.

    alpha_t(s) = q_t(s) sum_d alpha_{t-1}(s - d) w(d, s),      w = exp(steps), q = exp(emissions)
    beta_{t-1}(s) = sum_d w(d, s + d) q_t(s + d) beta_t(s + d)
    P(state s at step t) = alpha_t(s) beta_t(s) / sum_s' alpha_t(s') beta_t(s')

States far from the best path are many powers of ten below it, more than a double holds, so every number has an
exponent of its own (``extended``): exact for all scores, and no logarithm is taken inside. Only states that a path can
pass at the step, its band, are looked at.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.extended import (
    LN2,
    NONE,
    add_product,
    highest_exponents,
    join_three,
    multiply,
    power,
    products,
    renew,
    split,
)

RENEW = 16  # steps between renewals of the mantissas


@compiled()
def _least_and_last(scores):  # type: ignore[no-untyped-def]
    """The first and the last entry that is allowed; -1 where none is."""
    first = last = -1
    for s in range(scores.size):
        if scores[s] > -math.inf:
            first = s if first < 0 else first
            last = s
    return first, last


@compiled()
def _prepare(steps, w_m, w_e):  # type: ignore[no-untyped-def]
    """w [D, S + D - 1] = exp(steps [D, S]); 0 where a step would come from, or go, beyond the states."""
    moves, states = steps.shape
    w_m[:], w_e[:] = 0.0, NONE
    for d in range(min(moves, states)):
        split(steps[d, d:], w_m[d, d:states], w_e[d, d:states])


@compiled()
def _forward(emissions, start, end, n, w_m, w_e, q_m, q_e, alpha_m, alpha_e, bands, top, mass):  # type: ignore[no-untyped-def]
    """Whether a path may exist. Sets q and alpha [T, D - 1 + S], alpha behind D - 1 zeros, and bands [T, 2]."""
    edge = w_m.shape[0] - 1
    last_start = _least_and_last(start)[1]
    first_end, last_end = _least_and_last(end)
    if last_start < 0 or last_end < 0:
        return False
    for t in range(n):
        low, high = max(0, first_end - edge * (n - 1 - t)), min(last_end, last_start + edge * t) + 1
        if low >= high:
            return False
        bands[t, 0], bands[t, 1] = low, high
        split(emissions[t, low:high], q_m[t, low:high], q_e[t, low:high])
        alpha_m[t], alpha_e[t] = 0.0, NONE
        now_m, now_e = alpha_m[t, edge + low : edge + high], alpha_e[t, edge + low : edge + high]
        if t == 0:
            split(start[low:high], mass[low:high], top[low:high])
        else:
            if edge == 2:
                join_three(alpha_m[t - 1], alpha_e[t - 1], edge, -1, w_m, w_e, 0, 0, mass, top, low, high)
            else:
                peak, sums = top[low:high], mass[low:high]
                peak[:], sums[:] = 2 * NONE, 0.0
                for d in range(edge + 1):
                    highest_exponents(alpha_e[t - 1, edge + low - d : edge + high - d], w_e[d, low:high], peak)
                for d in range(edge + 1):
                    before = slice(edge + low - d, edge + high - d)
                    add_product(
                        alpha_m[t - 1, before], alpha_e[t - 1, before], w_m[d, low:high], w_e[d, low:high], peak, sums
                    )
        multiply(mass[low:high], top[low:high], q_m[t, low:high], q_e[t, low:high], now_m, now_e)
        if t % RENEW == RENEW - 1:
            renew(now_m, now_e)
    return True


@compiled()
def sums(emissions, steps, start, end, lengths, keep, marginals, arrivals, log_z, first, step):  # type: ignore[no-untyped-def]
    """One share of the rows.

    emissions [B, T, S], steps [1 or B, D, S], start and end [1 or B, S], lengths [B]; log_z [B]; where ``keep``:
    marginals [B, T, S] and, unless it is empty, arrivals [B, D, S], the expected steps; both 0 on entry.
    """
    rows, longest, states = emissions.shape
    moves = steps.shape[1]
    edge = moves - 1
    alpha_m, alpha_e = np.empty((longest, edge + states)), np.empty((longest, edge + states))
    q_m, q_e = np.empty((longest, states)), np.empty((longest, states))
    w_m, w_e = np.empty((moves, states + edge)), np.empty((moves, states + edge))
    g_m, g_e = np.empty(states + edge), np.empty(states + edge)
    beta_m, beta_e, top, mass, p = (
        np.empty(states),
        np.empty(states),
        np.empty(states),
        np.empty(states),
        np.empty(states),
    )
    bands = np.zeros((longest, 2), np.int64)
    prepared = -1
    for b in range(first, rows, step):
        n = lengths[b]
        row = b if steps.shape[0] > 1 else 0
        if row != prepared:
            _prepare(steps[row], w_m, w_e)
            prepared = row
        from_start, to_end = start[b if start.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        log_z[b] = -math.inf
        if not _forward(emissions[b], from_start, to_end, n, w_m, w_e, q_m, q_e, alpha_m, alpha_e, bands, top, mass):
            continue
        for t in range(n - 1, -1, -1):
            low, high = bands[t]
            now_m, now_e = alpha_m[t, edge + low : edge + high], alpha_e[t, edge + low : edge + high]
            b_m, b_e = beta_m[low:high], beta_e[low:high]
            if t == n - 1:
                split(to_end[low:high], b_m, b_e)
            else:
                if moves == 3:
                    join_three(g_m, g_e, 0, 1, w_m, w_e, 0, 1, beta_m, beta_e, low, high)
                else:
                    b_m[:], b_e[:] = 0.0, 2 * NONE
                    for d in range(moves):
                        highest_exponents(g_e[low + d : high + d], w_e[d, low + d : high + d], b_e)
                    for d in range(moves):
                        after = slice(low + d, high + d)
                        add_product(g_m[after], g_e[after], w_m[d, after], w_e[d, after], b_e, b_m)
                if t % RENEW == 0:
                    renew(b_m, b_e)
            share = p[low:high]
            peak, total = products(now_m, now_e, b_m, b_e, share)
            if t == n - 1 and total > 0.0:
                log_z[b] = math.log(total) + peak * LN2
            if not keep or not total > 0.0:
                break
            for s in range(low, high):
                p[s] *= 1.0 / total
                marginals[b, t, s] = p[s]
            if t < n - 1 and arrivals.shape[0] > 0:
                for d in range(moves):
                    for s in range(low, min(high, states - d)):
                        if p[s] > 0.0:
                            part = g_m[s + d] * w_m[d, s + d] / beta_m[s]
                            arrivals[b, d, s + d] += p[s] * part * power(g_e[s + d] + w_e[d, s + d] - beta_e[s])
            g_m[:], g_e[:] = 0.0, NONE
            multiply(b_m, b_e, q_m[t, low:high], q_e[t, low:high], g_m[low:high], g_e[low:high])


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
    edge = moves - 1
    alpha_m, alpha_e = np.empty((longest, edge + states)), np.empty((longest, edge + states))
    q_m, q_e = np.empty((longest, states)), np.empty((longest, states))
    w_m, w_e = np.empty((moves, states + edge)), np.empty((moves, states + edge))
    end_m, end_e, top, mass = np.empty(states), np.empty(states), np.empty(states), np.empty(states)
    bands, ends = np.zeros((longest, 2), np.int64), np.empty(states)
    weights = np.empty(max(states, moves))
    for b in range(first, rows, step):
        n = lengths[b]
        _prepare(steps[b if steps.shape[0] > 1 else 0], w_m, w_e)
        from_start, to_end = start[b if start.shape[0] > 1 else 0], end[b if end.shape[0] > 1 else 0]
        found = 0.0
        if _forward(emissions[b], from_start, to_end, n, w_m, w_e, q_m, q_e, alpha_m, alpha_e, bands, top, mass):
            split(to_end, end_m, end_e)
            found = products(alpha_m[n - 1, edge:], alpha_e[n - 1, edge:], end_m, end_e, ends)[1]
        if not found > 0.0:
            paths[:, b] = -1
            continue
        for i in range(paths.shape[0]):
            state = 0
            for t in range(n - 1, -1, -1):
                total, count = 0.0, states
                if t == n - 1:
                    for s in range(states):
                        total += ends[s]
                        weights[s] = total
                else:
                    count, peak = min(moves, state + 1), 2 * NONE
                    for d in range(count):
                        peak = max(peak, alpha_e[t, edge + state - d] + w_e[d, state])
                    for d in range(count):
                        at = edge + state - d
                        total += alpha_m[t, at] * w_m[d, state] * power(alpha_e[t, at] + w_e[d, state] - peak)
                        weights[d] = total
                threshold = uniforms[i, b, t] * total
                chosen = 0
                while chosen < count - 1 and weights[chosen] <= threshold:
                    chosen += 1
                state = chosen if t == n - 1 else state - chosen
                paths[i, b, t] = state
