"""The compiled recursions over a batch of chains, in the narrowest arithmetic that is certified for each row.

Float32 scores start in float32, in probability space. Rows that are not certified there go on to float64, still in
probability space and now with forbidden states; what is left goes to log space, which is right for every score. A
``Pass`` is the way forward: it holds log Z and what each tier left behind, and goes the way back, to the expectations,
when it is asked.
"""

from __future__ import annotations

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
    """Rows done in probability space: what ``chain_scaled.forward`` left behind."""

    rows: np.ndarray | None  # [N] of the batch, None for all
    lengths: np.ndarray  # [N]
    flags: np.ndarray  # [N] 0: certified, and here; else left to the next tier
    zeros: bool  # some scores may be -inf
    tables: Tables
    q: np.ndarray  # [N, T P]
    sums: np.ndarray  # [N, T]
    alpha: np.ndarray  # [N, T, P]

    def expectations(self, row_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tags ``[N, T, K]``, transitions ``[G, S, K, K]``, and flags [N] of rows whose expectations are not here."""
        n, steps, width = self.alpha.shape
        _, groups, times, k, _ = self.tables.both.shape
        pieces, cost = groups if groups > 1 else (n + 3) // 4, 0.03 * n * steps * k * (k + 32)
        shares = shares_of(pieces, cost)
        weights = room.empty((4 * shares if times == 1 else n, steps, width), self.alpha.dtype)
        tags = room.empty((n, steps, k), row_weights.dtype)
        pairs: np.ndarray = np.empty((groups if groups > 1 else shares, k, k), self.alpha.dtype)
        flags = self.flags.copy() if self.zeros else self.flags  # without zeros the way back flags nothing
        arguments = (
            self.q, self.sums, self.alpha, self.lengths, self.tables.both, self.zeros, row_weights, tags, weights,
            pairs, flags,
        )  # fmt: skip
        run_shares(chain_scaled.backward, arguments, pieces, cost)
        if times != 1:
            before, after = (
                torch.from_numpy(x).unflatten(0, (groups, n // groups)) for x in (self.alpha[:, :-1], weights[:, 1:])
            )
            sums = torch.matmul(before.permute(0, 2, 3, 1), after.permute(0, 2, 1, 3)).numpy()
            return tags, sums[..., :k, :k] * self.tables.both[0, ..., :k], flags
        if groups == 1 and len(pairs) > 1:
            pairs = pairs.sum(0)
        return tags, pairs.reshape(groups, 1, k, k), flags


class LogPart(NamedTuple):
    """Rows done in log space."""

    log_z: np.ndarray  # [N]
    alpha: np.ndarray  # [N, T, K] logarithms
    back: np.ndarray  # [G, S, K, K]: transposed transitions in float64
    tags: np.ndarray  # [N, T, K]: expectations
    pairs: np.ndarray  # [N, S, K, K]


@dataclass(slots=True)
class Pass:
    """The result of ``forward``: log Z, and what the way back needs."""

    log_z: np.ndarray  # [B] float64
    scores: list[np.ndarray]  # emissions [B, T, K], start and end [B, K], lengths [B]
    transitions: np.ndarray  # [G, S, K, K]
    scaled: list[ScaledPart]
    left: np.ndarray | None = None  # rows for log space

    def expectations(self, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Expected tags of each row ``[B, T, K]`` and transitions ``[G, S, K, K]``, summed over the rows of a group,
        times the weights of the rows."""
        by = row_weights.contiguous().numpy()
        if len(self.scaled) == 1 and self.left is None:
            tags, pairs, flags = self.scaled[0].expectations(by)
            if not (self.scaled[0].zeros and flags.any()):
                pairs = pairs if pairs.dtype == by.dtype else pairs.astype(by.dtype)
                return torch.from_numpy(tags), torch.from_numpy(pairs)
        tags, pairs = np.zeros(self.scores[0].shape, by.dtype), np.zeros(self.transitions.shape)
        groups = len(pairs)
        group = np.arange(len(by)) // (len(by) // groups)
        left = [] if self.left is None else [self.left]
        for part in self.scaled:
            rows = np.arange(len(by)) if part.rows is None else part.rows
            its_tags, its_pairs, flags = part.expectations(by[rows])
            tags[rows[flags == 0]] = its_tags[flags == 0]
            if part.rows is None or groups == 1:
                pairs += its_pairs
            else:
                np.add.at(pairs, group[rows], its_pairs)
            left.append(rows[flags > part.flags])  # too small on the way back
        rows = np.concatenate(left)
        if rows.size:
            log = self.in_log_space(rows, 2)
            tags[rows] = log.tags * by[rows, None, None]
            np.add.at(pairs, group[rows], log.pairs * by[rows, None, None, None])
        return torch.from_numpy(tags), torch.from_numpy(pairs.astype(by.dtype))

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
        arguments = (*self.scores, table, back, rows, backward, alpha, tags, pairs, part.log_z)
        run_shares(chain_log.forward_backward, arguments, n, 20.0 * n * steps * k * k)
        return part


def forward(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, keep: bool = True
) -> Pass:
    """Runs the recursions on CPU tensors in the shapes of ``chain.Chain``, of at least one row.

    Args:
        keep: whether the way back, or samples, will be asked for.
    Raises:
        ValueError: for scores that are NaN or +inf.
    """
    scores = [(x.detach() if x.requires_grad else x).contiguous().numpy() for x in (emissions, start, end, lengths)]
    table = transitions.detach().contiguous().numpy()
    dtype: type = scores[0].dtype.type
    tables = _tables(table, dtype)
    if dtype is np.float32 and tables.forbids:
        dtype, tables = np.float64, _tables(table, np.float64)
    log_z, part = _scaled(scores, tables, keep)
    done = Pass(log_z, scores, table, [part])
    left = part.flags.nonzero()[0]
    if not left.size:
        return done
    if (part.flags == BROKEN).any():
        raise ValueError(
            f"emissions, start or end: a score of row {(part.flags == BROKEN).argmax()} of the batch is NaN or +inf "
            "(-inf forbids)"
        )
    if dtype is np.float32:
        tables, groups, in_group = _tables(table, np.float64), len(table), len(log_z) // len(table)
        if groups > 1:  # what is left of a group need not be as much as of another: a group each
            both, numbers = (np.ascontiguousarray(x[:, left // in_group]) for x in tables[:2])
            tables = Tables(both, numbers, tables.forbids)
        log_z[left], part = _scaled([x[left] for x in scores], tables, keep)
        part.rows = left
        done.scaled.append(part)
        left = left[part.flags != 0]
    if left.size:
        done.left = left
        log_z[left] = done.in_log_space(left, 0).log_z
    return done


def _tables(transitions: np.ndarray, dtype: type) -> Tables:
    groups, times, k, _ = transitions.shape
    both = room.empty((2, groups, times, k, padded(k)), dtype)
    numbers: np.ndarray = np.empty((3, groups, times))
    run_shares(chain_scaled.tables, (transitions, both, numbers), groups * times, 2.0 * transitions.size)
    seen = numbers.item(-1) if numbers.size == 3 else numbers[2].max(initial=0.0)
    if seen == BROKEN:
        raise ValueError("transitions: scores must not be NaN or +inf (-inf forbids)")
    return Tables(both, numbers, seen > 0)


def _scaled(scores: list[np.ndarray], tables: Tables, keep: bool) -> tuple[np.ndarray, ScaledPart]:
    """log Z [N] and what else the way forward in probability space gives, in the precision of the tables."""
    rows, steps, k = scores[0].shape
    groups, width, dtype = tables.both.shape[1], tables.both.shape[4], tables.both.dtype
    zeros = dtype == np.float64
    log_z, flags = np.empty(rows), np.empty(rows, np.int64)
    pieces, cost = groups * ((rows // groups + 3) // 4), 0.02 * rows * steps * k * (k + 32)
    kept = rows if keep else 4 * shares_of(pieces, cost)
    q, alpha = room.empty((2, kept, steps * width), dtype)
    sums = room.empty((kept, steps), dtype)
    alpha = alpha.reshape(kept, steps, width)
    arguments = (
        *scores, tables.both, tables.numbers, zeros, keep, q, sums, alpha, log_z, flags,
    )  # fmt: skip
    run_shares(chain_scaled.forward, arguments, pieces, cost)
    return log_z, ScaledPart(None, scores[3], flags, zeros, tables, q, sums, alpha)
