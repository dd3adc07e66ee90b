"""The compiled recursions over a batch of chains, in the narrowest arithmetic that is certified for each row.

Float32 scores start in float32, in probability space. Rows that are not certified there go on to float64, still in
probability space and now with forbidden states; what is left goes to log space, which is right for every score.
``forward`` gives log Z and the filtered probabilities; ``expectations`` goes both ways at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.kernels import chain_log, chain_scaled
from probllm.math.kernels.exponentials import BROKEN
from probllm.math.kernels.threads import run_shares, shares_of
from probllm.math.kernels.vectors import padded


class Tables(NamedTuple):
    """Exponentials of the transitions, from ``chain_scaled.tables``."""

    both: np.ndarray  # [2, G, S, K, P]: as they are and transposed, padded with 0 from K to whole vectors
    numbers: np.ndarray  # [3, G, S]: their maxima, their range in nats, flags
    forbids: bool  # some are -inf


@dataclass(slots=True)
class ScaledPart:
    """Rows done in probability space."""

    tables: Tables
    log_z: np.ndarray  # [N]
    flags: np.ndarray  # [N] 0: certified, and here; else left to the next tier
    alpha: np.ndarray  # [N, T, P], or room
    tags: np.ndarray | None = None  # [N, T, K]: expectations, where they were asked for
    pairs: np.ndarray | None = None  # [G, S, K, K]
    rows: np.ndarray | None = None  # [N] of the batch, None for all


class LogPart(NamedTuple):
    """Rows done in log space."""

    log_z: np.ndarray  # [N]
    alpha: np.ndarray  # [N, T, K] logarithms
    back: np.ndarray  # [G, S, K, K]: transposed transitions in float64
    tags: np.ndarray  # [N, T, K]: expectations
    pairs: np.ndarray  # [N, S, K, K]


@dataclass(slots=True)
class Pass:
    """What the tiers of probability space gave, and what they left."""

    log_z: np.ndarray  # [B] float64, without the rows that are left
    scores: list[np.ndarray]  # emissions [B, T, K], start and end [B, K], lengths [B], and weights of the rows
    transitions: np.ndarray  # [G, S, K, K]
    scaled: list[ScaledPart]
    left: np.ndarray | None = None  # rows for log space

    def in_log_space(self, rows: np.ndarray, backward: int) -> LogPart:
        """Does some rows in log space: log Z alone for ``backward`` 0, alpha too for 1, everything for 2."""
        _, steps, k = self.scores[0].shape
        n, times = rows.size, self.transitions.shape[1]
        table = self.transitions.astype(np.float64)
        back = np.ascontiguousarray(table.swapaxes(-1, -2))
        alpha = room.empty((n, steps if backward else 0, k))
        tags = np.empty((n, steps if backward == 2 else 0, k))
        pairs = np.empty((n, times if backward == 2 else 0, k, k))
        part = LogPart(np.empty(n), alpha, back, tags, pairs)
        arguments = (*self.scores[:4], table, back, rows, backward, alpha, tags, pairs, part.log_z)
        run_shares(chain_log.forward_backward, arguments, n, 20.0 * n * steps * k * k)
        return part


def forward(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, keep: bool = True
) -> Pass:
    """Runs the recursions forward on CPU tensors in the shapes of ``chain.Chain``, of at least one row.

    Args:
        keep: whether alpha is wanted.
    Raises:
        ValueError: for scores that are NaN or +inf.
    """
    done = _tiers([emissions, start, end, lengths], transitions, lambda scores, tables: _forward(scores, tables, keep))
    if done.left is not None:
        done.log_z[done.left] = done.in_log_space(done.left, 0).log_z
    return done


def expectations(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    lengths: Tensor,
    row_weights: Tensor | None = None,
) -> tuple[np.ndarray, Tensor, Tensor]:
    """log Z ``[B]``, and each row's weight (1 where missing) times its expected tags ``[B, T, K]`` and transitions
    ``[G, S, K, K]``, the latter summed over the rows of a group. Arguments and errors as in ``forward``."""
    given = [emissions, start, end, lengths] + ([] if row_weights is None else [row_weights])
    done = _tiers(given, transitions, _both_ways)
    first, dtype = done.scaled[0], done.scores[0].dtype
    if done.left is None and len(done.scaled) == 1:
        assert first.tags is not None
        assert first.pairs is not None
        return done.log_z, torch.from_numpy(first.tags), torch.from_numpy(first.pairs.astype(dtype, copy=False))
    tags, pairs = np.zeros(done.scores[0].shape, dtype), np.zeros(done.transitions.shape)
    groups = len(pairs)
    group = np.arange(len(tags)) // (len(tags) // groups)
    for part in done.scaled:
        rows = np.arange(len(tags)) if part.rows is None else part.rows
        assert part.tags is not None
        assert part.pairs is not None
        tags[rows[part.flags == 0]] = part.tags[part.flags == 0]
        if part.rows is None or groups == 1:
            pairs += part.pairs
        else:
            np.add.at(pairs, group[rows], part.pairs)
    if done.left is not None:
        rows = done.left
        log = done.in_log_space(rows, 2)
        by = np.ones(len(rows)) if row_weights is None else done.scores[4][rows]
        done.log_z[rows] = log.log_z
        tags[rows] = log.tags * by[:, None, None]
        np.add.at(pairs, group[rows], log.pairs * by[:, None, None, None])
    return done.log_z, torch.from_numpy(tags), torch.from_numpy(pairs.astype(dtype))


def _tiers(given: list[Tensor], transitions: Tensor, run: Callable[[list[np.ndarray], Tables], ScaledPart]) -> Pass:
    """Runs the rows in float32, and those that are not certified there in float64.

    Args:
        given: emissions, start, end, lengths, and what else there is of each row.
        run: does rows in the precision of the tables.
    """
    scores = [(x.detach() if x.requires_grad else x).contiguous().numpy() for x in given]
    table = transitions.detach().contiguous().numpy()
    dtype: type = scores[0].dtype.type
    tables = make_tables(table, dtype)
    if dtype is np.float32 and tables.forbids:
        dtype, tables = np.float64, make_tables(table, np.float64)
    part = run(scores, tables)
    done = Pass(part.log_z, scores, table, [part])
    left = part.flags.nonzero()[0]
    if not left.size:
        return done
    if (part.flags == BROKEN).any():
        raise ValueError(
            f"emissions, start or end: a score of row {(part.flags == BROKEN).argmax()} of the batch is NaN or +inf "
            "(-inf forbids)"
        )
    if dtype is np.float32:
        tables, groups, in_group = make_tables(table, np.float64), len(table), len(done.log_z) // len(table)
        if groups > 1:  # what is left of a group need not be as much as of another: a group each
            both, numbers = (np.ascontiguousarray(x[:, left // in_group]) for x in tables[:2])
            tables = Tables(both, numbers, tables.forbids)
        part = run([x[left] for x in scores], tables)
        part.rows = left
        done.log_z[left] = part.log_z
        done.scaled.append(part)
        left = left[part.flags != 0]
    if left.size:
        done.left = left
    return done


def make_tables(transitions: np.ndarray, dtype: type) -> Tables:
    """The exponentials of transitions ``[G, S, K, K]``.

    Raises:
        ValueError: for scores that are NaN or +inf.
    """
    groups, times, k, _ = transitions.shape
    both = room.empty((2, groups, times, k, padded(k)), dtype)
    numbers: np.ndarray = np.empty((3, groups, times))
    run_shares(chain_scaled.tables, (transitions, both, numbers), groups * times, 2.0 * transitions.size)
    seen = numbers.item(-1) if numbers.size == 3 else numbers[2].max(initial=0.0)
    if seen == BROKEN:
        raise ValueError("transitions: scores must not be NaN or +inf (-inf forbids)")
    return Tables(both, numbers, seen > 0)


def _forward(scores: list[np.ndarray], tables: Tables, keep: bool) -> ScaledPart:
    rows, steps, k = scores[0].shape
    groups, width, dtype = tables.both.shape[1], tables.both.shape[4], tables.both.dtype
    zeros = dtype == np.float64
    log_z, flags = np.empty(rows), np.empty(rows, np.int64)
    pieces, cost = groups * ((rows // groups + 3) // 4), 0.02 * rows * steps * k * (k + 32)
    block = 4 * shares_of(pieces, cost)
    span = apart(steps, width * dtype.itemsize)
    q, sums = room.empty((block * span * width,), dtype), np.empty((block, span), dtype)
    alpha = room.empty((rows, steps, width) if keep else (block, 1, width), dtype)
    arguments = (*scores, tables.both, tables.numbers, zeros, keep, q, sums, alpha.reshape(-1), log_z, flags)
    run_shares(chain_scaled.forward, arguments, pieces, cost)
    return ScaledPart(tables, log_z, flags, alpha)


def _both_ways(scores: list[np.ndarray], tables: Tables) -> ScaledPart:
    rows, steps, k = scores[0].shape
    _, groups, times, _, width = tables.both.shape
    dtype = tables.both.dtype
    zeros = dtype == np.float64
    weights = scores[4] if len(scores) > 4 else np.ones(rows, scores[0].dtype)
    log_z, flags = np.empty(rows), np.empty(rows, np.int64)
    pieces, cost = groups if groups > 1 else (rows + 3) // 4, 0.05 * rows * steps * k * (k + 32)
    shares = shares_of(pieces, cost)
    n = 4 * (shares - 1) + min(4, rows // groups) if times == 1 else rows
    span = apart(steps, width * dtype.itemsize) if times == 1 else steps
    q, alpha = room.empty((2, n * span * width), dtype)
    sums: np.ndarray = np.empty((n, span), dtype)
    tags = room.empty((rows, steps, k), scores[0].dtype)
    pairs: np.ndarray = np.empty((groups if groups > 1 else shares, k, k), dtype)
    arguments = (
        *scores[:4], weights, tables.both, tables.numbers, zeros, q, sums, alpha, log_z, flags, tags, pairs,
    )  # fmt: skip
    run_shares(chain_scaled.both_ways, arguments, pieces, cost)
    if times != 1:
        before, after = (torch.from_numpy(x.reshape(groups, n // groups, steps, width)) for x in (alpha, q))
        sums = torch.matmul(before[:, :, :-1].permute(0, 2, 3, 1), after[:, :, 1:].permute(0, 2, 1, 3)).numpy()
        pairs = sums[..., :k, :k] * tables.both[0, ..., :k]
    else:
        pairs = (pairs.sum(0) if groups == 1 and len(pairs) > 1 else pairs).reshape(groups, 1, k, k)
    return ScaledPart(tables, log_z, flags, alpha, tags, pairs)


def apart(steps: int, size: int) -> int:
    """At least that many steps of so many bytes, such that rows do not begin in the same places of the cache: a step of
    several rows, in several arrays, would not fit in it."""
    return next((n for n in range(steps, steps + 17) if 256 <= n * size % 4096 <= 3840), steps)
