"""The compiled Kalman filter, its gradient and its smoother, called for a flat ``Chain``: rows sorted into groups.

A group is the rows that share parameters and the pattern of missing entries: their covariances are the same, and are
computed once. A block is a part of a group, for one thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.kernels import kalman, kalman_adjoint, kalman_paths
from probllm.math.kernels.threads import SMALL, run_shares

LARGEST_BLOCK = 64  # rows: what a block works on should stay in the first cache
LARGEST_DRAWS = 128  # draws of a block of paths, whose kernel does more calls a step

Array = Any  # numpy.ndarray[..., float64]


class Pass(NamedTuple):
    """What the filter leaves; filtered and scaled as ``kernels.kalman.means`` has them."""

    parameters: list[Array]  # mean, covariance, transition, drift, noise, emission, offset, error
    order: Array  # [B]: the rows in the order of the blocks
    lengths: Array  # [B]
    group: Array | None  # [B]: that of each row; None where there is one
    rows: Array  # [G]: a row of each group
    steps: Array  # [G]: the greatest length in each
    blocks: Array  # [n, 3]: first place, place behind the last, group
    covariance: Array
    gain: Array
    inverse: Array
    half_log_det: Array
    filtered: Array
    scaled: Array
    log_p: Array  # [B, T]
    total: Array  # [B]: the sums of log_p
    cost: float  # nanoseconds of one thread for a pass over the means


def refuse(*_: Any) -> NoReturn:
    """There is no recursion over a semiring."""
    raise NotImplementedError("a linear-Gaussian chain is an integral, not a sum over structures")


def forward(scores: tuple[Tensor, ...], sizes: Tensor, keep: bool) -> tuple[Tensor, Pass | None]:
    """log p ``[B]``, and what ``backward`` needs."""
    run = filter_rows(scores, sizes, alone=keep)
    return torch.from_numpy(run.total), run if keep else None


def filter_rows(scores: tuple[Tensor, ...], sizes: Tensor, by_length: bool = False, alone: bool = False) -> Pass:
    """Runs the filter.

    Args:
        scores: the fields of a flat ``Chain``.
        by_length: rows of different lengths make different groups.
        alone: rows that have parameters of their own stand alone in their blocks, as ``backward`` needs them.
    """
    value, *parameters = (_array(x) for x in scores)
    for i in (1, 4, 7):
        parameters[i] = 0.5 * (parameters[i] + parameters[i].swapaxes(-1, -2))
    n_rows, steps, o = value.shape
    d = parameters[0].shape[-1]
    lengths = sizes[:, 0].contiguous().numpy()
    if sizes.shape[1] > 1:
        seen = sizes[:, 1:].numpy().astype(bool).reshape(n_rows, steps, o)
    else:
        seen = np.zeros((0, 0, 0), bool)
    group = _groups([x for x in parameters if len(x) > 1], seen, lengths if by_length else None, n_rows)
    order, bounds = _sorted(group, n_rows)
    rows = order[[lo for lo, _ in bounds]]
    cost = n_rows * steps * (2.0 * d * (d + 2 * o) + 2 * o * o) * 0.3 + steps * 300
    width = _width(n_rows, cost, LARGEST_BLOCK)
    if alone and any(len(x) > 1 for x in parameters):
        width = 1
    blocks = _blocks(bounds, width)
    group_steps = np.array([lengths[order[lo:hi]].max() for lo, hi in bounds])
    groups = len(rows)
    covariance, gain = np.empty((groups, steps, d, d)), np.empty((groups, steps, o, d))
    inverse, half_log_det = np.empty((groups, steps, o, o)), np.empty((groups, steps))
    mean, covariance_1, transition, drift, noise, emission, offset, error = parameters
    arguments: tuple[Any, ...] = (
        covariance_1, transition, noise, emission, error, seen, rows, group_steps,
        covariance, gain, inverse, half_log_det,
    )  # fmt: skip
    each = d**3 * 4 + 4 * d * d * o + 2 * d * o * o + o**3 + 500
    run_shares(kalman.covariances, arguments, groups, float(group_steps.sum()) * each * 0.7)
    filtered, scaled, log_p = np.empty(n_rows * steps * d), np.empty(n_rows * steps * o), np.empty((n_rows, steps))
    arguments = (
        value, mean, transition, drift, emission, offset, order, lengths, seen, rows, blocks,
        gain, inverse, half_log_det, filtered, scaled, log_p,
    )  # fmt: skip
    run_shares(kalman.means, arguments, len(blocks), cost)
    return Pass(
        parameters, order, lengths, group, rows, group_steps, blocks, covariance, gain, inverse, half_log_det,
        filtered, scaled, log_p, log_p.sum(1), cost,
    )  # fmt: skip


def backward(run: Pass, weights: Tensor) -> tuple[Tensor, ...]:
    """The gradients of sum_b weights_b log p_b in the scores; 0 in a row whose log p is -inf."""
    w = np.where(run.total > -np.inf, weights.detach().double().numpy(), 0.0)
    own = np.array([len(x) > 1 for x in run.parameters])
    places = torch.get_num_threads()
    gradients = [
        np.zeros((len(w) if mine else places, *x.shape[1:])) for x, mine in zip(run.parameters, own, strict=True)
    ]
    (rows, steps), (o, d) = run.log_p.shape, run.gain.shape[2:]
    d_value = np.zeros((rows, steps, o))
    transition, emission = run.parameters[2], run.parameters[5]
    arguments = (
        transition, emission, run.order, run.lengths, run.rows, run.blocks, run.covariance, run.gain,
        run.inverse, run.filtered, run.scaled, w, own, d_value, *gradients,
    )  # fmt: skip
    cost = 2 * run.cost + len(run.blocks) * steps * (d**3 * 8 + 500)
    run_shares(kalman_adjoint.adjoint, arguments, len(run.blocks), cost)
    parts = (x if mine else x.sum(0, keepdims=True) for x, mine in zip(gradients, own, strict=True))
    return torch.from_numpy(d_value), *(torch.from_numpy(x) for x in parts)


def smooth(scores: tuple[Tensor, ...], sizes: Tensor, covariances: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed means ``[B, T, d]``, covariances ``[B, T, d, d]``, cross-covariances ``[B, T - 1, d, d]``.

    Without ``covariances`` these are empty. What stands on padding has no meaning.
    """
    run = filter_rows(scores, sizes, by_length=covariances)
    transition, emission = run.parameters[2], run.parameters[5]
    (rows, steps), d = run.log_p.shape, emission.shape[2]
    mean = torch.from_numpy(_smoothed(run))
    if not covariances:
        return mean, mean.new_zeros(rows, 0, d, d), mean.new_zeros(rows, 0, d, d)
    groups = len(run.rows)
    spread, cross = np.zeros((groups, steps, d, d)), np.zeros((groups, steps - 1, d, d))
    arguments = (transition, emission, run.rows, run.steps, run.covariance, run.gain, run.inverse, spread, cross)
    run_shares(kalman_adjoint.smooth_covariances, arguments, groups, float(run.steps.sum()) * (d**3 * 10 + 500))
    return mean, _by_row(run, spread), _by_row(run, cross)


def _smoothed(run: Pass) -> Array:
    """Smoothed means ``[B, T, d]``."""
    transition, emission = run.parameters[2], run.parameters[5]
    smoothed = np.empty((*run.log_p.shape, emission.shape[2]))
    arguments = (
        transition, emission, run.order, run.lengths, run.rows, run.blocks, run.covariance, run.gain, run.filtered,
        run.scaled, smoothed,
    )  # fmt: skip
    run_shares(kalman_adjoint.smooth_means, arguments, len(run.blocks), run.cost)
    return smoothed


def paths(
    scores: tuple[Tensor, ...],
    sizes: Tensor,
    row_of: Array,
    start: Tensor,
    moves: tuple[Tensor, Tensor],
    errors: tuple[Tensor, Tensor],
) -> Tensor:
    """Paths ``[N, T, d]`` given the observations of row ``row_of [N]``, 0 on padding, in the dtype of the noise.

    Args:
        start: ``[N, d]``: z_1 of the law itself less its mean.
        moves: standard normal numbers ``[N, T - 1 or T, k]`` (of T the first is not used) and their root
            ``[B or 1, ., k, d]``.
        errors: the same for the observations: ``[N, T, l]``, ``[B or 1, ., l, o]``.
    """
    run = filter_rows(scores, sizes)
    (_, steps), (o, d), groups, draws = run.log_p.shape, run.gain.shape[2:], len(run.rows), len(row_of)
    (w, v), roots = (x.contiguous().numpy() for x in (moves[0], errors[0])), [_array(moves[1]), _array(errors[1])]
    sizes_of_maps = (d, d + o), (w.shape[2], d + o), (v.shape[2], d + o), (d, d), (o, d)
    maps = [room.empty((groups, steps, *size)) for size in sizes_of_maps]
    work = sum(n * m for n, m in sizes_of_maps)
    arguments: tuple[Any, ...] = (
        run.parameters[2], run.parameters[5], *roots, w.shape[1] - steps, run.rows, run.steps, run.gain, run.inverse,
        *maps,
    )  # fmt: skip
    run_shares(kalman_paths.path_maps, arguments, groups, float(run.steps.sum()) * (work * d + 500) * 0.7)
    order, bounds = _sorted(None if run.group is None else run.group[row_of], draws)
    cost = draws * steps * (work + d * d + 4.0 * (w.shape[2] + v.shape[2] + d)) * 0.1
    blocks, out = _blocks(bounds, _width(draws, cost, LARGEST_DRAWS)), room.empty((draws, steps, d), v.dtype)
    flat = (x.reshape(len(x), -1) if x.size else np.zeros((len(x), 0), x.dtype) for x in (w, v))
    arguments = (
        *maps, run.covariance, _array(start), *flat, order, row_of, run.lengths, blocks,
        _smoothed(run).reshape(-1, steps * d), out.reshape(draws, -1),
    )  # fmt: skip
    run_shares(kalman_paths.paths, arguments, len(blocks), cost)
    return torch.from_numpy(out)


def filtered(scores: tuple[Tensor, ...], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Filtered means ``[B, T, d]``, covariances ``[B, T, d, d]`` and log densities ``[B, T]`` of each observation."""
    run = filter_rows(scores, sizes)
    (rows, steps), d = run.log_p.shape, run.covariance.shape[-1]
    mean = np.empty((rows, steps, d))
    for lo, hi, _ in run.blocks:
        part = run.filtered[lo * steps * d : hi * steps * d].reshape(steps, d, hi - lo)
        mean[run.order[lo:hi]] = part.transpose(2, 0, 1)
    return torch.from_numpy(mean), _by_row(run, run.covariance), torch.from_numpy(run.log_p)


def recurrence(transition: Tensor, pushes: Tensor) -> Tensor:
    """z_t = z_{t-1} F_t + pushes_t: ``[B or 1, T - 1 or 1, d, d]`` and ``[B, T, d]`` -> ``[B, T, d]``."""
    states = np.empty(pushes.shape)
    arguments = (_array(transition), _array(pushes), states)
    run_shares(kalman_adjoint.recurrence, arguments, len(pushes), states.size * pushes.shape[-1] * 0.5)
    return torch.from_numpy(states)


def _sorted(group: Array | None, rows: int) -> tuple[Array, list[tuple[int, int]]]:
    """The rows in the order of their groups, and where each group begins and ends."""
    if group is None:
        return np.arange(rows), [(0, rows)]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return order, list(zip(starts, [*starts[1:], rows], strict=True))


def _width(rows: int, nanoseconds: float, most: int) -> int:
    """Rows of a block, at most."""
    return min(most, -(-rows // torch.get_num_threads())) if nanoseconds > SMALL else most


def _blocks(bounds: list[tuple[int, int]], width: int) -> Array:
    cuts = [(at, min(at + width, hi), g) for g, (lo, hi) in enumerate(bounds) for at in range(lo, hi, width)]
    return np.array(cuts, np.int64).reshape(-1, 3)


def _by_row(run: Pass, x: Array) -> Tensor:
    """What a group has, for each of its rows."""
    if run.group is None:
        return torch.from_numpy(x).expand(len(run.order), *x.shape[1:])
    return torch.from_numpy(x[run.group])


def _groups(own: list[Array], seen: Array, lengths: Array | None, rows: int) -> Array | None:
    """The group of each row, numbered as they come; None where all are one."""
    tables = [x.reshape(rows, -1) for x in own]
    if len(seen) and (seen[1:] != seen[0]).any():
        tables.append(np.packbits(seen.reshape(rows, -1), axis=1))
    if lengths is not None and (lengths[1:] != lengths[0]).any():
        tables.append(lengths.reshape(rows, 1))
    if not tables or rows == 1:
        return None
    numbers: dict[bytes, int] = {}
    keys = (b"".join(x[row].tobytes() for x in tables) for row in range(rows))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _array(x: Tensor) -> Array:
    return x.detach().double().contiguous().numpy()
