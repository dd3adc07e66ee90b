"""Gradient of the Kalman filter's log likelihood in all of its parameters, and the smoother, compiled.

    u = e - K r,  r- = r + H u,  N- = A N A' + H S^-1 H';    one step back: r = F r-,  N = F N- F'
    smoothed: z = m + P r,  V = P - P N P,  Cov(z_{t-1}, z_t) = P_{t-1} F A (I - N P)

r is the gradient of log p in the filtered mean, (r r' - N) / 2 that in its covariance; all other gradients are products
of these (de Jong 1989; Koopman 1993, "Disturbance smoother for state space models"), and N, like the covariances, does
not depend on what is observed. Notation, groups and blocks as in ``kernels.kalman``.
"""

from __future__ import annotations

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.kalman import FAST, add_combined, add_congruence, copy, fill, product, symmetrise


@compiled(fastmath=FAST)
def _add_outer(a, b, scale, out):  # type: ignore[no-untyped-def]
    """out [n, m] += scale a b', for a [n, W] and b [m, W]."""
    m, width = b.shape
    for i in range(a.shape[0]):
        y = a[i]
        j = 0
        while j + 4 <= m:
            b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
            x0, x1, x2, x3 = 0.0, 0.0, 0.0, 0.0
            for n in range(width):
                x0 += y[n] * b0[n]
                x1 += y[n] * b1[n]
                x2 += y[n] * b2[n]
                x3 += y[n] * b3[n]
            out[i, j] += scale * x0
            out[i, j + 1] += scale * x1
            out[i, j + 2] += scale * x2
            out[i, j + 3] += scale * x3
            j += 4
        while j < m:
            b0 = b[j]
            x0 = 0.0
            for n in range(width):
                x0 += y[n] * b0[n]
            out[i, j] += scale * x0
            j += 1


@compiled(fastmath=FAST)
def _add_rows(a, out):  # type: ignore[no-untyped-def]
    for i in range(a.shape[0]):
        x = 0.0
        for n in range(a.shape[1]):
            x += a[i, n]
        out[i] += x


@compiled(fastmath=FAST)
def _add_product(a, b, scale, out):  # type: ignore[no-untyped-def]
    """out += scale a b."""
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            s = scale * a[i, k]
            for j in range(b.shape[1]):
                out[i, j] += s * b[k, j]


@compiled()
def _turn(a, out):  # type: ignore[no-untyped-def]
    """out = a'."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            out[j, i] = a[i, j]


@compiled()
def _turned_rest(a, out):  # type: ignore[no-untyped-def]
    """out = (I - a)'."""
    for i in range(a.shape[0]):
        for j in range(a.shape[0]):
            out[j, i] = (1.0 if i == j else 0.0) - a[i, j]


@compiled(fastmath=FAST)
def adjoint(  # type: ignore[no-untyped-def]
    transition, emission, order, lengths, rows, blocks, covariance, gain, inverse, filtered, scaled, weights, own,
    d_value, d_initial, d_initial_cov, d_transition, d_drift, d_noise, d_emission, d_offset, d_error, first, step
):  # fmt: skip
    """d_value [B, T, o] (0 on entry) of sum_b weights_b log p_b; adds the parameters' gradients to the other arrays.

    own [8] says, in the order of the gradients from d_initial on, whether each row has a parameter of its own: then
    its gradient has a place for each row, and every block holds one row; else a place for each share of the work.
    """
    steps, o = d_value.shape[1:]
    d = emission.shape[2]
    a, n_after, n_before = np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
    work, work_o, kn, s = np.empty((d, d)), np.empty((o, d)), np.empty((o, d)), np.empty((o, o))
    kt, ht, ft, rest = np.empty((d, o)), np.empty((o, d)), np.empty((d, d)), np.empty((d, d))
    for block in range(first, len(blocks), step):
        lo, hi, g = blocks[block]
        b = rows[g]
        width = hi - lo
        means_of = filtered[lo * steps * d : hi * steps * d].reshape((steps, d, width))
        scaled_of = scaled[lo * steps * o : hi * steps * o].reshape((steps, o, width))
        r, back, z, wr = np.zeros((d, width)), np.empty((d, width)), np.empty((d, width)), np.empty((d, width))
        u, wu, w = np.empty((o, width)), np.empty((o, width)), np.empty(width)
        longest = 0
        for n in range(width):
            w[n] = weights[order[lo + n]]
            longest = max(longest, lengths[order[lo + n]])
        fill(n_after, 0.0)
        copy(means_of[longest - 1], z)
        for t in range(longest - 1, -1, -1):
            k, p, inv = gain[g, t], covariance[g, t], inverse[g, t]
            h = emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0]
            _turn(k, kt)
            _turn(h, ht)
            total = 0.0
            for n in range(width):
                if t < lengths[order[lo + n]]:
                    total += w[n]
            copy(scaled_of[t], u)
            add_combined(kt, r, -1.0, u)
            for j in range(o):
                for n in range(width):
                    wu[j, n] = u[j, n] * w[n]
            for n in range(width):
                row = d_value[order[lo + n], t]
                for j in range(o):
                    row[j] = -wu[j, n]
            product(k, n_after, kn)
            fill(s, 0.0)
            _add_product(kn, kt, 1.0, s)
            for i in range(o):
                for j in range(o):
                    s[i, j] += total * inv[i, j]
            out = d_error[order[lo] if own[7] else first, t if d_error.shape[1] > 1 else 0]
            for i in range(o):
                for j in range(o):
                    out[i, j] -= 0.5 * s[i, j]
            _add_outer(wu, u, 0.5, out)
            _add_rows(wu, d_offset[order[lo] if own[6] else first, t if d_offset.shape[1] > 1 else 0])
            out = d_emission[order[lo] if own[5] else first, t if d_emission.shape[1] > 1 else 0]
            _add_outer(z, wu, 1.0, out)
            product(p, n_after, a)
            _add_product(a, kt, 1.0, out)
            for i in range(d):
                for j in range(o):
                    out[i, j] -= total * kt[i, j]
            add_combined(ht, u, 1.0, r)  # r-, in the place of r
            for i in range(d):
                for n in range(width):
                    wr[i, n] = r[i, n] * w[n]
            product(h, k, a)
            _turned_rest(a, rest)  # the congruence is with A'
            fill(n_before, 0.0)
            add_congruence(rest, n_after, work, n_before)
            product(inv, ht, work_o)
            _add_product(h, work_o, total, n_before)
            symmetrise(n_before)
            if t == 0:
                out = d_initial_cov[order[lo] if own[1] else first]
                _add_rows(wr, d_initial[order[lo] if own[0] else first])
            else:
                out = d_noise[order[lo] if own[4] else first, t - 1 if d_noise.shape[1] > 1 else 0]
                _add_rows(wr, d_drift[order[lo] if own[3] else first, t - 1 if d_drift.shape[1] > 1 else 0])
            for i in range(d):
                for j in range(d):
                    out[i, j] -= 0.5 * n_before[i, j]
            _add_outer(wr, r, 0.5, out)
            if t == 0:
                continue
            f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
            _turn(f, ft)
            fill(back, 0.0)
            add_combined(ft, r, 1.0, back)
            copy(back, r)  # one step earlier
            copy(means_of[t - 1], z)
            add_combined(covariance[g, t - 1], r, 1.0, z)  # the smoothed mean
            out = d_transition[order[lo] if own[2] else first, t - 1 if d_transition.shape[1] > 1 else 0]
            _add_outer(z, wr, 1.0, out)
            product(f, n_before, work)
            _add_product(covariance[g, t - 1], work, -1.0, out)
            product(work, ft, n_after)
            symmetrise(n_after)


@compiled(fastmath=FAST)
def smooth_means(  # type: ignore[no-untyped-def]
    transition, emission, order, lengths, rows, blocks, covariance, gain, filtered, scaled, smoothed, first, step
):
    """smoothed [B, T, d]; padding is not written to, or has no meaning."""
    steps, d = smoothed.shape[1:]
    o = emission.shape[3]
    kt, ht, ft = np.empty((d, o)), np.empty((o, d)), np.empty((d, d))
    for block in range(first, len(blocks), step):
        lo, hi, g = blocks[block]
        b = rows[g]
        width = hi - lo
        means_of = filtered[lo * steps * d : hi * steps * d].reshape((steps, d, width))
        scaled_of = scaled[lo * steps * o : hi * steps * o].reshape((steps, o, width))
        r, u, z = np.zeros((d, width)), np.empty((o, width)), np.empty((d, width))
        longest = 0
        for n in range(lo, hi):
            longest = max(longest, lengths[order[n]])
        for t in range(longest - 1, -1, -1):
            copy(means_of[t], z)
            add_combined(covariance[g, t], r, 1.0, z)
            for n in range(width):
                row = smoothed[order[lo + n], t]
                for j in range(d):
                    row[j] = z[j, n]
            if t == 0:
                continue
            _turn(gain[g, t], kt)
            _turn(emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0], ht)
            _turn(transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0], ft)
            copy(scaled_of[t], u)
            add_combined(kt, r, -1.0, u)
            add_combined(ht, u, 1.0, r)
            fill(z, 0.0)
            add_combined(ft, r, 1.0, z)
            copy(z, r)


@compiled(fastmath=FAST)
def smooth_covariances(  # type: ignore[no-untyped-def]
    transition, emission, rows, lengths, covariance, gain, inverse, smoothed, cross, first, step
):
    """smoothed V [G, T, d, d] and cross [G, T - 1, d, d]; lengths [G]; both 0 on padding (0 on entry)."""
    o, d = gain.shape[2:]
    a, n_now, work, work_o = np.empty((d, d)), np.empty((d, d)), np.empty((d, d)), np.empty((o, d))
    ht, ft, rest, keep, left = (
        np.empty((o, d)), np.empty((d, d)), np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
    )  # fmt: skip
    for g in range(first, len(rows), step):
        b = rows[g]
        fill(n_now, 0.0)
        for t in range(lengths[g] - 1, -1, -1):
            p = covariance[g, t]
            product(n_now, p, a)
            _turned_rest(a, left)  # I - P N
            product(left, p, smoothed[g, t])
            symmetrise(smoothed[g, t])
            if t == 0:
                continue
            h = emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0]
            f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
            _turn(h, ht)
            _turn(f, ft)
            product(h, gain[g, t], a)
            _turned_rest(a, rest)  # A'
            _turn(rest, keep)
            product(covariance[g, t - 1], f, a)
            product(a, keep, work)
            _turn(left, a)
            product(work, a, cross[g, t - 1])
            product(inverse[g, t], ht, work_o)
            product(h, work_o, a)
            add_congruence(rest, n_now, work, a)  # N-
            product(f, a, work)
            product(work, ft, n_now)
            symmetrise(n_now)


@compiled()
def recurrence(transition, pushes, states, first, step):  # type: ignore[no-untyped-def]
    """states [B, T, d]: z_1 = pushes_1, z_t = z_{t-1} F_t + pushes_t; transition [., ., d, d]."""
    rows, steps, d = pushes.shape
    for b in range(first, rows, step):
        for j in range(d):
            states[b, 0, j] = pushes[b, 0, j]
        for t in range(1, steps):
            f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
            for j in range(d):
                states[b, t, j] = pushes[b, t, j]
            for i in range(d):
                x = states[b, t - 1, i]
                for j in range(d):
                    states[b, t, j] += x * f[i, j]
