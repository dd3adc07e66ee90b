"""The Kalman filter, its adjoint and the smoother, compiled.

Row vectors, matrices [from, to] (see ``probllm.math.gaussian``). Covariances do not depend on what is observed, only on
which entries are: so rows that share the parameters and the pattern of missing entries form a group, for which the
matrix work is done once (``covariances``), and the means of its rows are vector code over a block of them (``means``).

    P- = F' P F + Q,  S = H' P- H + R,  K = S^-1 H' P-,  A = I - H K,  P = A' P- A + K' R K      (Joseph)
    e = S^-1 (x - m- H - c),  m = m- + e H' P-,  log p = -(v e + log det S + n log 2 pi) / 2

No covariance is inverted but S, so that any of the others may be singular. All float64. Each kernel does the pieces
first, first + step, first + 2 step, ...
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

FAST = {"contract", "reassoc", "nsz", "arcp"}
ROUNDING = 1e-15  # times the number of entries: a pivot below this part of its variance is none


@compiled()
def fill(out, x):  # type: ignore[no-untyped-def]
    """A loop: numba takes a second to compile an assignment to a slice."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = x


@compiled()
def copy(a, out):  # type: ignore[no-untyped-def]
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            out[i, j] = a[i, j]


@compiled(fastmath=FAST)
def product(a, b, out):  # type: ignore[no-untyped-def]
    """out = a b."""
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            out[i, j] = 0.0
        for k in range(a.shape[1]):
            s = a[i, k]
            for j in range(b.shape[1]):
                out[i, j] += s * b[k, j]


@compiled(fastmath=FAST)
def add_congruence(a, p, work, out):  # type: ignore[no-untyped-def]
    """out += a' p a; p is symmetric."""
    product(p, a, work)
    for k in range(a.shape[0]):
        for i in range(a.shape[1]):
            s = a[k, i]
            for j in range(a.shape[1]):
                out[i, j] += s * work[k, j]


@compiled(fastmath=FAST)
def symmetrise(p):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        for j in range(i):
            p[i, j] = p[j, i] = 0.5 * (p[i, j] + p[j, i])


@compiled(fastmath=FAST)
def _inverse(s, low, out):  # type: ignore[no-untyped-def]
    """out = s^-1 by Cholesky's factor; returns log det s / 2, infinity if s is not positive definite."""
    n = s.shape[0]
    half = 0.0
    for j in range(n):
        pivot = s[j, j]
        for k in range(j):
            pivot -= low[j, k] * low[j, k]
        if not pivot > ROUNDING * n * s[j, j]:
            return math.inf
        root = math.sqrt(pivot)
        half += math.log(root)
        low[j, j] = 1.0 / root
        for i in range(j + 1, n):
            x = s[i, j]
            for k in range(j):
                x -= low[i, k] * low[j, k]
            low[i, j] = x / root
    for j in range(n):  # the factor's inverse in its place
        for i in range(j + 1, n):
            x = 0.0
            for k in range(j, i):
                x += low[i, k] * low[k, j]
            low[i, j] = -x * low[i, i]
    for i in range(n):
        for j in range(i + 1):
            x = 0.0
            for k in range(i, n):
                x += low[k, i] * low[k, j]
            out[i, j] = out[j, i] = x
    return half


@compiled(fastmath=FAST)
def covariances(  # type: ignore[no-untyped-def]
    initial, transition, noise, emission, error, seen, rows, steps, filtered, gain, inverse, half_log_det, first, step
):
    """filtered P [G, T, d, d], gain K [G, T, o, d], inverse S^-1 [G, T, o, o], half_log_det [G, T].

    initial [., d, d], transition and noise [., ., d, d], emission [., ., d, o], error [., ., o, o]: a first dimension
    of 1 is shared by the rows, a second by the steps. seen [B, T, o] or [0, 0, 0]; rows [G]: a row of each group;
    steps [G]. S^-1 is 0 at missing entries; where S is singular, half_log_det is infinite, K and S^-1 are 0.
    """
    d, o = emission.shape[2:]
    p, s, low, h = np.empty((d, d)), np.empty((o, o)), np.empty((o, o)), np.empty((d, o))
    hp, ph, a, work = np.empty((o, d)), np.empty((d, o)), np.empty((d, d)), np.empty((d, d))
    r, work_r = np.empty((o, o)), np.empty((o, d))
    masked = seen.shape[0] > 0
    for g in range(first, len(rows), step):
        b = rows[g]
        for t in range(steps[g]):
            if t == 0:
                copy(initial[b if initial.shape[0] > 1 else 0], p)
            else:
                q = noise[b if noise.shape[0] > 1 else 0, t - 1 if noise.shape[1] > 1 else 0]
                f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
                copy(q, p)
                add_congruence(f, filtered[g, t - 1], work, p)
            h_all = emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0]
            r_all = error[b if error.shape[0] > 1 else 0, t if error.shape[1] > 1 else 0]
            for i in range(d):
                for j in range(o):
                    h[i, j] = 0.0 if masked and not seen[b, t, j] else h_all[i, j]
            for i in range(o):
                for j in range(o):
                    both = not masked or (seen[b, t, i] and seen[b, t, j])
                    r[i, j] = r_all[i, j] if both else (1.0 if i == j else 0.0)
                    s[i, j] = r[i, j]
            product(p, h, ph)
            for i in range(d):
                for j in range(o):
                    hp[j, i] = ph[i, j]
            for k in range(d):
                for i in range(o):
                    x = h[k, i]
                    for j in range(o):
                        s[i, j] += x * ph[k, j]
            half_log_det[g, t] = _inverse(s, low, inverse[g, t])
            now = filtered[g, t]
            if half_log_det[g, t] == math.inf:
                fill(gain[g, t], 0.0)
                fill(inverse[g, t], 0.0)
                copy(p, now)
                continue
            product(inverse[g, t], hp, gain[g, t])
            k_now = gain[g, t]
            product(h, k_now, a)
            for i in range(d):
                for j in range(d):
                    a[i, j] = (1.0 if i == j else 0.0) - a[i, j]
                    now[i, j] = 0.0
            add_congruence(a, p, work, now)
            add_congruence(k_now, r, work_r, now)
            symmetrise(now)
            if masked:
                for i in range(o):
                    if not seen[b, t, i]:
                        for j in range(o):
                            inverse[g, t, i, j] = inverse[g, t, j, i] = 0.0


@compiled(fastmath=FAST)
def add_combined(a, x, scale, out):  # type: ignore[no-untyped-def]
    """out [m, W] += scale a' x, for a [n, m] and x [n, W]: vector code over W."""
    n_in, n_out = a.shape
    i = 0
    while i + 4 <= n_in:
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(n_out):
            a0, a1, a2, a3 = scale * a[i, j], scale * a[i + 1, j], scale * a[i + 2, j], scale * a[i + 3, j]
            y = out[j]
            for n in range(len(y)):
                y[n] += a0 * x0[n] + a1 * x1[n] + a2 * x2[n] + a3 * x3[n]
        i += 4
    if i + 2 <= n_in:
        x0, x1 = x[i], x[i + 1]
        for j in range(n_out):
            a0, a1 = scale * a[i, j], scale * a[i + 1, j]
            y = out[j]
            for n in range(len(y)):
                y[n] += a0 * x0[n] + a1 * x1[n]
        i += 2
    if i < n_in:
        x0 = x[i]
        for j in range(n_out):
            a0 = scale * a[i, j]
            y = out[j]
            for n in range(len(y)):
                y[n] += a0 * x0[n]


@compiled(fastmath=FAST)
def means(  # type: ignore[no-untyped-def]
    value, initial, transition, drift, emission, offset, order, lengths, seen, rows, blocks,
    gain, inverse, half_log_det, filtered, scaled, log_p, first, step
):  # fmt: skip
    """filtered m [B * T * d], scaled e [B * T * o] (0 where nothing is seen), log_p [B, T] of each step (0 on padding).

    value [B, T, o], finite; initial [., d], drift [., ., d], offset [., ., o]; order [B]: the rows in the order of the
    blocks; lengths [B]; blocks [n, 3]: first place, place behind the last, group. Of a block, filtered and scaled are
    [T, ., width], one block behind the other.
    """
    steps, o = value.shape[1:]
    d = emission.shape[2]
    for block in range(first, len(blocks), step):
        lo, hi, g = blocks[block]
        width = hi - lo
        b = rows[g]
        masked = seen.shape[0] > 0
        means_of = filtered[lo * steps * d : hi * steps * d].reshape((steps, d, width))
        scaled_of = scaled[lo * steps * o : hi * steps * o].reshape((steps, o, width))
        v = np.empty((o, width))
        out = np.empty(width)
        longest = 0
        for n in range(lo, hi):
            longest = max(longest, lengths[order[n]])
        for t in range(longest):
            m = means_of[t]
            if t == 0:
                start = initial[b if initial.shape[0] > 1 else 0]
                for j in range(d):
                    for n in range(width):
                        m[j, n] = start[j]
            else:
                shift = drift[b if drift.shape[0] > 1 else 0, t - 1 if drift.shape[1] > 1 else 0]
                for j in range(d):
                    for n in range(width):
                        m[j, n] = shift[j]
                f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
                add_combined(f, means_of[t - 1], 1.0, m)
            h = emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0]
            c = offset[b if offset.shape[0] > 1 else 0, t if offset.shape[1] > 1 else 0]
            for n in range(width):
                row = value[order[lo + n], t]
                for j in range(o):
                    v[j, n] = row[j] - c[j]
            add_combined(h, m, -1.0, v)
            count = o
            if masked:
                for j in range(o):
                    if not seen[b, t, j]:
                        count -= 1
                        for n in range(width):
                            v[j, n] = 0.0
            e = scaled_of[t]
            fill(e, 0.0)
            add_combined(inverse[g, t], v, 1.0, e)
            add_combined(gain[g, t], v, 1.0, m)
            constant = half_log_det[g, t] + 0.5 * count * math.log(2 * math.pi)
            for n in range(width):
                out[n] = -constant
            for j in range(o):
                for n in range(width):
                    out[n] -= 0.5 * e[j, n] * v[j, n]
            for n in range(width):
                real = t < lengths[order[lo + n]]
                log_p[order[lo + n], t] = out[n] if real else 0.0
                if not real:
                    for j in range(o):
                        e[j, n] = 0.0
        for t in range(longest, steps):
            for n in range(lo, hi):
                log_p[order[n], t] = 0.0
