"""Paths of the states given observations, compiled: simulation smoothing (Durbin and Koopman 2002) without its means.

A path of the law less its own smoothed mean is as far from it as a path given x from the smoothed mean of x. That
difference needs no mean, only the filter's errors delta (before the step: delta-) under fresh noise w and v:

    delta-_t = delta_{t-1} F + w_t,    e = S^-1 (delta- H + v_t),    delta = delta- A - v K
    back in time  r_{t-1} = F (A r_t + H e_t),    path = smoothed mean + delta - P r

Notation and groups as in ``kernels.kalman``. The draws of a group share all matrices: those of a step are multiplied
with each other first (``path_maps``), then a step is two products of a matrix with the vectors of a block each way.
"""

from __future__ import annotations

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.kalman import FAST, add_combined, copy, fill, product

TILE = 16  # steps of noise and paths that are turned at once: whole cache lines of each draw


@compiled()
def path_maps(  # type: ignore[no-untyped-def]
    transition, emission, move_root, error_root, shift, rows, steps, gain, inverse, kept, moved, noised, back, told,
    first, step,
):  # fmt: skip
    """What adds to (delta_t, e_t): kept [G, T, d, d + o] times delta_{t-1} (delta- at the first step), moved
    [G, T, k, d + o] and noised [G, T, l, d + o] times the standard normal numbers of the step. What adds to r_{t-1}:
    back [G, T, d, d] times r_t, told [G, T, o, d] times e_t.

    move_root [., ., k, d], error_root [., ., l, o]: w and v are numbers times a root; step t's move has root t + shift.
    """
    o, d = gain.shape[2:]
    seen, error, hk, hs = np.empty((d, d + o)), np.empty((o, d + o)), np.empty((d, d)), np.empty((d, o))
    for g in range(first, len(rows), step):
        b = rows[g]
        for t in range(steps[g]):
            h = emission[b if emission.shape[0] > 1 else 0, t if emission.shape[1] > 1 else 0]
            product(h, gain[g, t], hk)
            product(h, inverse[g, t], hs)
            for i in range(d):
                for j in range(d):
                    seen[i, j] = (1.0 if i == j else 0.0) - hk[i, j]
                for j in range(o):
                    seen[i, d + j] = hs[i, j]
            for i in range(o):
                for j in range(d):
                    error[i, j] = -gain[g, t, i, j]
                for j in range(o):
                    error[i, d + j] = inverse[g, t, i, j]
            at = t if error_root.shape[1] > 1 else 0
            product(error_root[b if error_root.shape[0] > 1 else 0, at], error, noised[g, t])
            if t == 0:
                copy(seen, kept[g, t])
                fill(moved[g, t], 0.0)
                continue
            f = transition[b if transition.shape[0] > 1 else 0, t - 1 if transition.shape[1] > 1 else 0]
            product(f, seen, kept[g, t])
            at = t + shift if move_root.shape[1] > 1 else 0
            product(move_root[b if move_root.shape[0] > 1 else 0, at], seen, moved[g, t])
            product(f, h, hs)
            for i in range(d):
                for j in range(d):
                    back[g, t, j, i] = kept[g, t, i, j]
                for j in range(o):
                    told[g, t, j, i] = hs[i, j]


@compiled()
def _turn_in(x, at, skip, order, lo, out):  # type: ignore[no-untyped-def]
    """out [skip:, W] = x [order[lo:], at:] turned, as far as both go; four rows at once are stored as one vector."""
    width = out.shape[1]
    count = min(out.shape[0] - skip, x.shape[1] - at)
    end = width - width % 4
    for n in range(0, end, 4):
        x0, x1 = x[order[lo + n], at : at + count], x[order[lo + n + 1], at : at + count]
        x2, x3 = x[order[lo + n + 2], at : at + count], x[order[lo + n + 3], at : at + count]
        for i in range(count):
            y = out[skip + i]
            y[n], y[n + 1], y[n + 2], y[n + 3] = x0[i], x1[i], x2[i], x3[i]
    for n in range(end, width):
        for i in range(count):
            out[skip + i, n] = x[order[lo + n], at + i]


@compiled()
def _turn_out(z, mean, row_of, order, lo, at, counts, out):  # type: ignore[no-untyped-def]
    """out [order[lo:], at:] = mean [row_of[order[lo:]], at:] + z [., W] turned, the first ``counts [W]`` entries."""
    width = z.shape[1]
    n = 0
    while n < width:
        o0, count = order[lo + n], counts[n]
        if n + 4 <= width and count == counts[n + 1] == counts[n + 2] == counts[n + 3]:
            o1, o2, o3 = order[lo + n + 1], order[lo + n + 2], order[lo + n + 3]
            x0, x1, x2, x3 = out[o0, at:], out[o1, at:], out[o2, at:], out[o3, at:]
            m0, m1, m2, m3 = mean[row_of[o0], at:], mean[row_of[o1], at:], mean[row_of[o2], at:], mean[row_of[o3], at:]
            for i in range(count):
                y = z[i]
                x0[i], x1[i], x2[i], x3[i] = m0[i] + y[n], m1[i] + y[n + 1], m2[i] + y[n + 2], m3[i] + y[n + 3]
            n += 4
        else:
            for i in range(count):
                out[o0, at + i] = mean[row_of[o0], at + i] + z[i, n]
            n += 1


@compiled()
def _rows(x, first, count):  # type: ignore[no-untyped-def]
    """Rows of a matrix; numba does not see that x[first : first + count] is contiguous."""
    return x.ravel()[first * x.shape[1] : (first + count) * x.shape[1]].reshape((count, x.shape[1]))


@compiled(fastmath=FAST)
def paths(  # type: ignore[no-untyped-def]
    kept, moved, noised, back, told, covariance, start, moves, errors, order, row_of, lengths, blocks, smoothed, out,
    first, step,
):  # fmt: skip
    """out [N, T * d], 0 on padding: a path of row ``row_of`` [N] each.

    start [N, d]: delta- of the first step; moves [N, (T - 1) * k or T * k], of T the first is not used, and errors
    [N, T * l]: standard normal numbers; lengths [B]; order [N]: the draws in the order of the blocks; smoothed
    [B, T * d].
    """
    steps, k, d = moved.shape[1], moved.shape[2], covariance.shape[3]
    l, o = noised.shape[2], told.shape[2]
    shift = moves.shape[1] - steps * k
    widest = 1
    for block in range(first, len(blocks), step):
        widest = max(widest, blocks[block, 1] - blocks[block, 0])
    room = np.empty(steps * (d + o) * widest)
    for block in range(first, len(blocks), step):
        lo, hi, g = blocks[block]
        width = hi - lo
        found = room[: steps * (d + o) * width].reshape((steps * (d + o), width))  # delta and e of each step
        w, v, z = np.empty((TILE * k, width)), np.empty((TILE * l, width)), np.empty((TILE * d, width))
        before, earlier, r = np.empty((d, width)), np.empty((d, width)), np.zeros((d, width))
        ends, counts = np.empty(width, np.int64), np.empty(width, np.int64)
        longest, shortest = 0, steps
        for n in range(width):
            ends[n] = lengths[row_of[order[lo + n]]]
            longest, shortest = max(longest, ends[n]), min(shortest, ends[n])
            for j in range(d):
                before[j, n] = start[order[lo + n], j]
        fill(w, 0.0)
        for t in range(longest):
            at = t % TILE
            if at == 0:
                first_move = t * k + shift
                _turn_in(moves, max(first_move, 0), max(-first_move, 0), order, lo, w)
                _turn_in(errors, t * l, 0, order, lo, v)
            now = _rows(found, t * (d + o), d + o)
            fill(now, 0.0)
            add_combined(kept[g, t], before, 1.0, now)
            add_combined(moved[g, t], _rows(w, at * k, k), 1.0, now)
            add_combined(noised[g, t], _rows(v, at * l, l), 1.0, now)
            before = _rows(found, t * (d + o), d)
            if t >= shortest:
                for n in range(width):
                    if t >= ends[n]:
                        for j in range(d, d + o):
                            now[j, n] = 0.0
        for t in range(longest - 1, -1, -1):
            at = t % TILE
            path = _rows(z, at * d, d)
            copy(_rows(found, t * (d + o), d), path)
            add_combined(covariance[g, t], r, -1.0, path)
            if t > 0:
                fill(earlier, 0.0)
                add_combined(back[g, t], r, 1.0, earlier)
                add_combined(told[g, t], _rows(found, t * (d + o) + d, o), 1.0, earlier)
                copy(earlier, r)
            if at == 0:
                for n in range(width):
                    counts[n] = max(min(ends[n] - t, TILE), 0) * d
                _turn_out(z, smoothed, row_of, order, lo, t * d, counts, out)
        if shortest < steps:
            for n in range(width):
                own = out[order[lo + n]]
                for i in range(ends[n] * d, steps * d):
                    own[i] = 0.0
