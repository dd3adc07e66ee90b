"""Sums over the binary trees on T leaves whose spans carry labels: CKY over a semiring, and what a set of spans says.

    beta(i, i) = s(i, i),   beta(i, j) = s(i, j) * sum_{i <= k < j} beta(i, k) * beta(k + 1, j),   s = sum over labels
    Z = beta(1, n)

Labels do not see each other, so they are summed before the trees: O(T^2 K + T^3). A tree over n leaves has 2n - 1
spans, those of one leaf among them. Source: Stern, Andreas and Klein (2017); the recursion is the inside algorithm of
Baker (1979).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.kernels import span_trees as kernels
from probllm.math.kernels.lanes import LANES
from probllm.math.kernels.threads import run_shares, shares_of
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring
from probllm.math.untraced import untraced


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Z ``[width, *lead]`` of scores ``[width, *lead, T, T, K]``, one launch for all spans of a width."""
    chart = semiring.sum(parts[0], -1)
    leaves = chart.diagonal(dim1=-2, dim2=-1)
    total = leaves[..., 0]
    # spans by their first leaf with the narrowest first, and by their last leaf with the widest first: a span of width
    # w joins those of widths (1, w - 1), ..., (w - 1, 1), which then stand side by side
    by_first = by_last = leaves.unsqueeze(-1)
    for width in range(2, chart.shape[-1] + 1):
        joined = semiring.dot(by_first[..., :-1, :], by_last[..., 1:, :], -1)
        beta = semiring.times(joined, chart.diagonal(width - 1, dim1=-2, dim2=-1))
        by_first = torch.cat([by_first[..., :-1, :], beta.unsqueeze(-1)], -1)
        by_last = torch.cat([beta.unsqueeze(-1), by_last[..., 1:, :]], -1)
        total = torch.where(lengths == width, beta[..., 0], total)
    return semiring.sum(total.unsqueeze(-1), -1)  # a sum of nothing but zero sends no gradient back, a product would


def split_points(present: Tensor) -> Tensor:
    """Where each span of a tree splits: the last leaf of its left child.

    Args:
        present: bool ``[..., T, T]``, True at (first, last) of the tree's spans.
    Returns:
        ``[..., T, T]`` long: the last leaf of the widest narrower span that begins at the same leaf; -1 if none does.
    """
    size = present.shape[-1]
    last = torch.where(present, torch.arange(size, device=present.device), -1)
    widest = last.cummax(-1).values
    return torch.cat([torch.full_like(last[..., :1], -1), widest[..., :-1]], -1)


def are_trees(present: Tensor, lengths: Tensor) -> Tensor:
    """Whether the spans are those of one binary tree over leaves 0 to n - 1, ``[...]`` bool.

    They are if there are 2n - 1, (0, n - 1) among them, and each of more than one leaf splits into two of them: the
    spans that splitting reaches are then a tree of 2n - 1.

    Args:
        present: bool ``[..., T, T]``, spans at (first, last), none at padding.
        lengths: ``[...]`` long.
    """
    size = present.shape[-1]
    split = split_points(present)
    rows = torch.arange(size, device=present.device)
    after = (split + 1).clamp_max(size - 1)  # the right child begins there; a split before the last leaf is in range
    right = present.transpose(-1, -2).gather(-1, after.transpose(-1, -2)).transpose(-1, -2)
    one = rows.unsqueeze(-1) == rows
    splits = one | ((split >= rows.unsqueeze(-1)) & right)
    upper = rows.unsqueeze(-1) <= rows
    sound = (~present | (splits & upper)).flatten(-2).all(-1)
    top = present[..., 0, :].gather(-1, (lengths - 1).unsqueeze(-1).expand(*present.shape[:-2], 1)).squeeze(-1)
    return sound & top & (present.flatten(-2).sum(-1) == 2 * lengths - 1)


def within_lengths(lengths: Tensor, size: int) -> Tensor:
    """``[..., T, T]`` bool: the spans (first, last) with first <= last < length."""
    leaves = torch.arange(size, device=lengths.device)
    return (leaves.unsqueeze(-1) <= leaves) & (leaves < lengths[..., None, None])


_NOTHING = np.empty((1, 1, 1))  # where nothing is asked for


class _Kept(NamedTuple):
    """What the backward pass needs."""

    scores: Any  # [B, T, T, K]
    lengths: Any  # [B]
    marginals: list[Any]  # [B, T, T, K], until they have been given away


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, _Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, K]`` by the kernels: there and back while a sentence is in the cache.

    Raises:
        ValueError: for scores within a sentence that are NaN or +inf.
    """
    given, n = _scores(scores[0]), _ints(lengths)
    if not keep:
        return torch.from_numpy(_sums(given, n, 0)), None
    marginals = room.empty(given.shape, given.dtype)
    return torch.from_numpy(_sums(given, n, 1, marginals)), _Kept(given, n, [marginals])


def backward(kept: _Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights * the marginals of spans ``[B, T, T, K]``."""
    if kept.marginals:
        marginals = kept.marginals.pop()  # they become the gradient, so they are given once
    else:
        marginals = room.empty(kept.scores.shape, kept.scores.dtype)
        _sums(kept.scores, kept.lengths, 1, marginals)
    spans, by = torch.from_numpy(marginals), weights.numpy()
    weight = by.item(0)
    if by.strides[0] and not (by == weight).all():
        spans.mul_(weights.to(spans.dtype)[:, None, None, None])
    elif weight != 1:  # a sum over the batch leaves them as they are
        spans.mul_(weight)
    return (spans,)


def _sums(
    scores: Any, lengths: Any, mode: int, marginals: Any = None, log_sums: Any = _NOTHING, chart: Any = _NOTHING
) -> Any:
    """log Z ``[B]``; marginals ``[B, T, T, K]`` are written if ``mode`` is 1, log sums and the chart if it is 2."""
    rows, size, _, k = scores.shape
    groups, nanoseconds = -(-rows // LANES), rows * size * size * (0.4 * k + 0.03 * size)
    log_z, good = np.empty(rows), np.empty(rows, np.bool_)
    marginals = np.empty((1, 1, 1, 1), scores.dtype) if marginals is None else marginals
    work = room.empty((shares_of(groups, nanoseconds), kernels.room_for(size)))
    arguments = (scores, lengths, mode, work, marginals, log_sums, chart, log_z, good)
    run_shares(kernels.sums, arguments, groups, nanoseconds)
    if 0 in good.tobytes():
        raise ValueError(
            f"spans: scores must not be NaN or +inf (-inf forbids), as in row {good.argmin()} of the batch"
        )
    return log_z


@untraced
def best(spans: Tensor, lengths: Tensor) -> Tensor:
    """The best trees ``[B, T, T]`` of spans ``[B, T, T, K]``, as ``SpanTree`` has them, by the kernels."""
    sums, labels = spans.detach().max(-1)
    rows, size = sums.shape[:2]
    trees = np.zeros((rows, size, size), np.int64)
    arguments = (sums.double().contiguous().numpy(), labels.contiguous().numpy(), _ints(lengths), trees)
    run_shares(kernels.best, arguments, rows, 0.2 * rows * size**3)
    return torch.from_numpy(trees)


@untraced
def draw(spans: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Exact samples ``[count, B, T, T]``, by the kernels."""
    scores, n = _scores(spans), _ints(lengths)
    rows, size, _, _ = scores.shape
    sums, chart = np.empty((rows, size, size)), np.full((rows, size, size), -np.inf)
    log_z = _sums(scores, n, 2, None, sums, chart)
    trees = np.zeros((count, rows, size, size), np.int64)
    uniforms = torch.rand(count, rows, 4 * size, dtype=torch.float64).numpy()
    arguments = (chart, scores, sums, n, log_z, uniforms, trees)
    run_shares(kernels.draw, arguments, count, 20.0 * count * rows * size**1.5)
    return torch.from_numpy(trees)


def _scores(spans: Tensor) -> Any:
    """``[B, T, T, K]``, float32 or float64."""
    wide = spans if spans.dtype in (torch.float32, torch.float64) else spans.float()
    return wide.detach().contiguous().numpy()


def _ints(lengths: Tensor) -> Any:
    return lengths.long().contiguous().numpy()


RECURSION = Recursion(inside, forward, backward, checks=True)
