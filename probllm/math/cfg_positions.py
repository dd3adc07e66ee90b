"""The sums of ``probllm.math.cfg`` by kernels whose vectors hold neighbouring spans, for scores of ordinary range."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.cfg_scaled import finite, log_leaves
from probllm.math.kernels import cfg_positions as kernels
from probllm.math.kernels.positions import row_of
from probllm.math.kernels.threads import run_shares


class Arithmetic(NamedTuple):
    """Numbers of one kind, and what may be asked of them. Products of two numbers of a chart, a rule and a span's score
    do not vanish: ``least`` squared * exp(-nats) * exp(-reach) is a number."""

    dtype: torch.dtype
    array: Any
    least: float  # of a chart, 0 apart
    most: float
    nats: float  # by which rules, roots, or the symbols of a word may differ
    reach: float  # of a wide span's scores
    stray: float  # of the greatest number of a width from 1


SINGLE = Arithmetic(torch.float32, np.float32, 1e-14, 1e12, 18.0, 18.0, 1e4)
DOUBLE = Arithmetic(torch.float64, np.float64, 1e-100, 1e100, 138.0, 90.0, 1e25)


class Kept(NamedTuple):
    """What the backward pass needs."""

    arithmetic: Arithmetic
    scores: tuple[Tensor, ...]
    words: tuple[Tensor, ...]  # [B, T, M] scores of single words, [G, N, P] unary rules and log beta [B, T, M] by them
    leaves: Tensor  # [B, T, M or P], exp of them, scaled
    tables: Tensor  # [G, Np, Mp, Mp], exp(rules - greatest)
    arrays: tuple[Any, ...]  # for the kernel: by_parent, root, lengths, low, side, charts, factors, growth


def forward(
    arithmetic: Arithmetic, scores: tuple[Tensor, ...], lengths: Tensor, keep: bool
) -> tuple[Tensor, Any, Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, M]``, rules, root and unary as in ``cfg_torch.inside``, with 1 or B rows, and
    which rows have none because their scores range too widely, ``[B]``."""
    dtype = arithmetic.dtype
    groups = max(x.shape[0] for x in scores[1:])
    spans, rules, root, unary = (x.to(dtype) for x in scores)
    (rows, size, _, m), n = spans.shape, root.shape[-1]
    words = spans.diagonal(dim1=1, dim2=2).transpose(1, 2)
    graph: tuple[Tensor, ...] = ()
    if float(unary.amax()) == -torch.inf:  # no nonterminal is a word
        low, logs = n, words[..., n:].contiguous()
    else:
        low, words = 0, words.contiguous().requires_grad_(keep)
        unary = unary.expand(groups, *unary.shape[1:]).contiguous().requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            logs = log_leaves(words, unary, n)
        graph, logs = (words, unary, logs), logs.detach()
    scales = finite(logs.amax(-1))
    leaves = logs - scales.unsqueeze(-1)
    greatest, top = finite(rules.amax((-1, -2, -3))), finite(root.amax(-1))
    rules, root = rules - greatest[:, None, None, None], root - top[:, None]
    flags = np.zeros(rows, np.int64)
    for x in (leaves, rules, root):
        flags |= _little(x, -arithmetic.nats)

    side = 5 if -(-n // 5) * 5 < -(-n // 4) * 4 else 4
    padded = -(-n // side) * side
    # preterminals begin a side of their own
    all_padded = max(padded, -(-(n - (n - m) // side * side) // side) * side)
    tables = torch.zeros(groups, padded, all_padded, all_padded, dtype=dtype)
    tables[:, :n, :m, :m] = rules.exp_()
    by_parent = torch.zeros(groups, padded, padded, padded, dtype=dtype)
    by_parent[:, :n, :n, :n] = tables[:, :n, :n, :n]
    volume = size * padded * row_of(size, 64 // dtype.itemsize)
    charts, factors = room.empty((rows, volume), arithmetic.array), room.empty((rows, volume), arithmetic.array)
    growth, log_z = np.empty(rows), np.empty(rows)
    arrays = (
        by_parent.flatten(2).numpy(), root.exp().expand(groups, n).contiguous().numpy(),
        lengths.long().contiguous().numpy(), low, side, charts, factors, growth,
    )  # fmt: skip
    leaves = leaves.exp().contiguous()
    run_shares(
        kernels.inside,
        (
            spans.contiguous().numpy(), leaves.numpy(), scales.contiguous().numpy(), tables.numpy(), arrays[0],
            greatest.expand(groups).contiguous().numpy(), *arrays[1:5],
            (arithmetic.least, arithmetic.most, arithmetic.reach, arithmetic.stray), *arrays[5:], log_z, flags,
        ),
        rows,
        0.004 * dtype.itemsize * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    found = torch.from_numpy(log_z).add_(top)
    return found, flags, Kept(arithmetic, scores, graph, leaves, tables, arrays) if keep else None


def _little(x: Tensor, least: float) -> Any:
    """For each row of ``x``, 1 if an allowed entry is less than that."""
    if float(x.amin()) >= least:
        return 0
    return ((x < least) & (x > -torch.inf)).flatten(1).any(1).long().numpy()


def backward(kept: Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights ``[B]`` * the gradient of log Z in each of the scores, in their shapes; weights are 0 where log Z is -inf
    or was not found."""
    by_parent, root, lengths, low, side, *arrays = kept.arrays
    dtype, array = kept.arithmetic.dtype, kept.arithmetic.array
    rows, size, live = kept.leaves.shape
    m, (groups, n), (_, padded, all_padded, _) = kept.scores[0].shape[-1], root.shape, kept.tables.shape
    lanes = 64 // dtype.itemsize
    parents, last = -(-n // lanes) * lanes, -(-live // lanes) * lanes
    by_pair = torch.zeros(groups, padded * padded, parents, dtype=dtype)
    by_pair[..., :padded] = torch.from_numpy(by_parent).transpose(1, 2)
    shares = groups if groups > 1 else max(1, torch.get_num_threads())
    scale = float(weights.abs().amax()) or 1.0
    mass = room.empty((rows, size, size, m), array)
    to_leaves, to_root = room.zeros((rows, size, live), array), np.zeros((shares, n), array)
    to_left = room.zeros((shares, padded, all_padded, last), array)
    to_right = room.zeros((shares, padded, padded, last), array)
    to_pairs = room.zeros((shares, padded * padded, parents), array)
    run_shares(
        kernels.outside,
        (
            kept.leaves.numpy(), kept.tables.numpy(), by_parent, by_pair.numpy(), root, lengths, low, side, *arrays,
            (weights / scale).numpy(), mass, to_leaves, to_left, to_right, to_pairs, to_root,
        ),
        rows,
        0.01 * dtype.itemsize * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    first, second, both, d_root = (
        x if x.shape[0] == groups else x.sum(0, keepdim=True)
        for x in map(torch.from_numpy, (to_left, to_right, to_pairs, to_root))
    )
    rules = torch.zeros(groups, n, m, m, dtype=dtype)
    rules[:, :, low:] = first[:, :n, :m, :live].transpose(2, 3)
    rules[:, :, :n, low:] += second[:, :n, :n, :live]
    rules[:, :, :n, :n] += both.view(groups, padded, padded, parents)[:, :n, :n, :n].permute(0, 3, 1, 2)
    rules *= kept.tables[:, :n, :m, :m]
    of_leaves, d_spans = torch.from_numpy(to_leaves), torch.from_numpy(mass)
    diagonal = d_spans.diagonal(dim1=1, dim2=2).transpose(1, 2)
    if kept.words:
        words, unary, logs = kept.words
        d_words, d_unary = torch.autograd.grad(logs, (words, unary), of_leaves, retain_graph=True)
        diagonal.add_(d_words)
    else:
        diagonal[..., n:] = of_leaves
        d_unary = torch.zeros(kept.scores[3].shape, dtype=dtype)
    found = (
        g if g.shape == x.shape else g.sum(0, keepdim=True)
        for g, x in zip((d_spans, rules, d_root, d_unary), kept.scores, strict=True)
    )
    return tuple(found) if scale == 1.0 else tuple(g.mul_(scale) for g in found)
