"""The sums of ``probllm.math.cfg`` by kernels that give each span a scale of its own, or as trained scores ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.cfg_torch import HardRow, add_hard, hard_rows, inside
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.kernels import cfg as kernels
from probllm.math.kernels.threads import run_shares

SAFE_RANGE = 30.0  # nats between the rules: a symbol or split that underflows then has no probability above 1e-290


def finite(x: Tensor) -> Tensor:
    """``x`` with 0 for -inf."""
    return torch.where(x == -torch.inf, 0.0, x)


class Kept(NamedTuple):
    """What the backward pass needs: tensors in float64, arrays for the kernel, and rows done by the twin."""

    shapes: tuple[torch.Size, ...]
    tables: Tensor  # [G, N, M, M], exp(rules - greatest)
    words: Tensor  # [B, T, M], scores of single words, leaves of a graph
    unary: Tensor  # [G, N, P], another
    logs: Tensor  # [B, T, M], log beta of single words by them
    leaves: Tensor  # [B, T, M], exp of them, scaled
    arrays: tuple[Any, ...]  # left_leaves, right_leaves, tables, transposed, root, lengths, starts, scales, passed
    log_z: Tensor  # [B]
    hard: list[HardRow]


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, M]``, rules, root and unary as in ``inside``, by the kernels."""
    spans, rules, root, unary = grouped(scores)
    words = spans.diagonal(dim1=1, dim2=2).transpose(1, 2).contiguous().requires_grad_(keep)
    unary = unary.contiguous().requires_grad_(keep)
    with torch.set_grad_enabled(keep):
        logs = log_leaves(words, unary, root.shape[-1])
    found, flags, tables, leaves, arrays = scaled_inside(spans, rules, root, logs.detach(), lengths)
    hard = hard_rows(inside, scores, lengths, np.flatnonzero(flags).tolist(), keep)
    for each in hard:
        found[each.row] = each.log_z.detach()
    if not keep:
        return found, None
    shapes = tuple(x.shape for x in scores)
    return found, Kept(shapes, tables, words, unary, logs, leaves, arrays, found, hard)


def grouped(scores: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spans, rules, root and unary in float64, the last three with G rows each: B, or 1 that all rows share."""
    spans, rules, root, unary = (x.detach().double() for x in scores)
    groups = max(x.shape[0] for x in (rules, root, unary))
    return spans, *(x.expand(groups, *x.shape[1:]) for x in (rules, root, unary))  # type: ignore[return-value]


class ScaledInside(NamedTuple):
    """What the kernel makes of scores."""

    log_z: Tensor  # [B]
    flags: Any  # [B], 1 where something may have been lost
    tables: Tensor  # [G, N, M, M], exp(rules - greatest)
    leaves: Tensor  # [B, T, M], exp of log beta of single words, scaled
    arrays: tuple[Any, ...]  # left_leaves, right_leaves, tables, transposed, root, lengths, starts, scales, passed


def scaled_inside(spans: Tensor, rules: Tensor, root: Tensor, logs: Tensor, lengths: Tensor) -> ScaledInside:
    """The inside pass over scores as ``grouped`` gives them, and log beta ``[B, T, M]`` of single words."""
    rows, size, _, m = spans.shape
    groups, n = root.shape
    width, n4 = -(-n // 8) * 8, -(-n // 4) * 4
    scales = logs.amax(-1)
    leaves = torch.where(scales.unsqueeze(-1) > -torch.inf, logs - finite(scales).unsqueeze(-1), -torch.inf)
    greatest = finite(rules.amax((-1, -2, -3)))
    top = finite(root.amax(-1))
    tables = (rules - greatest[:, None, None, None]).exp()
    careful = not (within(rules, SAFE_RANGE) and within(root, SAFE_RANGE))
    flags = np.zeros(rows, np.int64)
    if careful:  # what is not allowed is an exact zero, and nothing else may come near one
        small = kernels.LITTLE
        if bool((finite(rules - greatest[:, None, None, None]) < small).any()) or bool(
            (finite(root - top[:, None]) < small).any()
        ):
            flags[:] = 1
        flags |= (finite(leaves) < small).flatten(1).any(1).numpy()
    leaves = leaves.exp()

    last = torch.zeros(groups, m, m, width, dtype=torch.float64)  # [X, Z, A]
    last[..., :n] = tables.permute(0, 2, 3, 1)
    left_leaves = (leaves.view(groups, -1, m) @ last.flatten(2)).view(rows, size, m, width)
    right_leaves = (leaves.view(groups, -1, m) @ last[:, :n].transpose(1, 2).flatten(2)).view(rows, size, n, width)
    both = torch.zeros(groups, n4, width, width, dtype=torch.float64)
    both[:, :n, :n] = last[:, :n, :n]
    both = both.flatten(1, 2)
    starts, passed = room.zeros((rows, size, size, width)), room.zeros((rows, size, size, width))
    chart_scales, log_z = np.full((rows, size, size), -np.inf), np.empty(rows)
    arrays = (
        left_leaves.numpy(), right_leaves.numpy(), both.numpy(), both.transpose(1, 2).contiguous().numpy(),
        (root - top[:, None]).exp().numpy(), lengths.long().contiguous().numpy(), starts, chart_scales, passed,
    )  # fmt: skip
    run_shares(
        kernels.inside,
        (
            spans.contiguous().numpy(), leaves.contiguous().numpy(), scales.contiguous().numpy(), *arrays[:3],
            greatest.numpy(), *arrays[4:6], careful, starts, chart_scales, passed, log_z, flags,
        ),
        rows,
        0.05 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    found = torch.from_numpy(log_z) + (top if groups == rows else top.expand(rows))
    return ScaledInside(found, flags, tables, leaves, arrays)


def backward(kept: Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights * the gradient of log Z in spans, rules, root and unary, in their shapes; summed over rows that share."""
    left_leaves, right_leaves, both, transposed, root, lengths, starts, scales, passed = kept.arrays
    rows, size, m = kept.leaves.shape
    groups, n = root.shape
    width = starts.shape[-1]
    weights = torch.where(kept.log_z > -torch.inf, weights.detach().double(), 0.0)
    easy = weights.clone()
    for each in kept.hard:
        easy[each.row] = 0.0
    shares = groups if groups > 1 else max(1, torch.get_num_threads())
    mass, to_leaves = room.zeros((rows, size, size, m)), room.zeros((rows, size, m))
    to_left, to_right = room.zeros(left_leaves.shape), room.zeros(right_leaves.shape)
    to_both, to_root = room.zeros((shares, *both.shape[1:])), room.zeros((shares, n))
    run_shares(
        kernels.outside,
        (
            kept.leaves.contiguous().numpy(), left_leaves, right_leaves, both, transposed, root, lengths, starts,
            scales, passed, easy.numpy(), mass, to_leaves, to_left, to_right, to_both, to_root,
        ),
        rows,
        0.1 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    last = torch.zeros(groups, m, m, width, dtype=torch.float64)
    last[..., :n] = kept.tables.permute(0, 2, 3, 1)
    leaves, from_leaves = kept.leaves.view(groups, -1, m), torch.from_numpy(to_leaves).view(groups, -1, m)
    d_left = torch.from_numpy(to_left).view(groups, -1, m * width)
    d_right = torch.from_numpy(to_right).view(groups, -1, n * width)
    by_last = last[:, :n].transpose(1, 2).flatten(2)  # [Z, X A]
    from_leaves = from_leaves + d_left @ last.flatten(2).mT + d_right @ by_last.mT
    d_rules = (leaves.mT @ d_left).view(groups, m, m, width)
    d_rules[:, :n] += (leaves.mT @ d_right).view(groups, m, n, width).transpose(1, 2)
    totals = torch.from_numpy(to_both)
    totals = totals if groups > 1 else totals.sum(0, keepdim=True)
    d_rules[:, :n, :n] += totals.view(groups, -1, width, width)[:, :n, :n]
    rules = d_rules[..., :n].permute(0, 3, 1, 2) * kept.tables
    of_leaves = from_leaves.view(rows, size, m) * kept.leaves
    words, unary = torch.autograd.grad(kept.logs, (kept.words, kept.unary), of_leaves, retain_graph=True)
    spans = torch.from_numpy(mass)
    spans.diagonal(dim1=1, dim2=2).add_(words.transpose(1, 2))
    d_root = torch.from_numpy(to_root)
    found = [spans, rules, d_root if groups > 1 else d_root.sum(0, keepdim=True), unary]
    found = [x if x.shape == s else x.sum(0, keepdim=True) for x, s in zip(found, kept.shapes, strict=True)]
    add_hard(found, kept.hard, weights)
    return tuple(found)


def log_leaves(words: Tensor, unary: Tensor, n: int) -> Tensor:
    """log beta ``[B, T, M]`` of single words, from scores ``[B, T, M]`` and unary rules ``[G, N, P]``."""
    below = words[..., n:]
    if bool((unary == -torch.inf).all()):
        single = torch.full_like(words[..., :n], -torch.inf) + 0 * unary.nan_to_num(neginf=0.0).sum()
    else:
        single = safe_logsumexp(unary.unsqueeze(1) + below.unsqueeze(-2), -1) + words[..., :n]
    return torch.cat([single, below], -1)


def within(x: Tensor, nats: float) -> bool:
    """Whether the greatest and the least lie within a range; -inf lies in none."""
    return bool(x.amax() - x.amin() <= nats)
