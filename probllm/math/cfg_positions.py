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

LITTLE = float(np.log(kernels.SMALL))


class Kept(NamedTuple):
    """What the backward pass needs."""

    scores: tuple[Tensor, ...]
    words: tuple[Tensor, ...]  # [B, T, M] scores of single words, [G, N, P] unary rules and log beta [B, T, M] by them
    leaves: Tensor  # [B, T, M or P], exp of them, scaled
    tables: Tensor  # [G, Np, Mp, Mp], exp(rules - greatest)
    arrays: tuple[Any, ...]  # for the kernel: by_parent, root, lengths, low, side, charts, factors, growth


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Any, Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, M]``, rules, root and unary as in ``cfg_torch.inside``, with 1 or B rows, and
    which rows have none because their scores range too widely, ``[B]``."""
    spans = scores[0] if scores[0].dtype in (torch.float32, torch.float64) else scores[0].double()
    groups = max(x.shape[0] for x in scores[1:])
    rules, root, unary = (x.double().expand(groups, *x.shape[1:]) for x in scores[1:])
    (rows, size, _, m), n = spans.shape, root.shape[-1]
    words = spans.diagonal(dim1=1, dim2=2).transpose(1, 2).double()
    graph: tuple[Tensor, ...] = ()
    if bool((unary == -torch.inf).all()):  # no nonterminal is a word
        low, logs = n, words[..., n:]
    else:
        low, words, unary = 0, words.contiguous().requires_grad_(keep), unary.contiguous().requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            logs = log_leaves(words, unary, n)
        graph, logs = (words, unary, logs), logs.detach()
    scales = logs.amax(-1)
    leaves = logs - finite(scales).unsqueeze(-1)
    greatest, top = finite(rules.amax((-1, -2, -3))), finite(root.amax(-1))
    rules, root = rules - greatest[:, None, None, None], root - top[:, None]
    flags = np.zeros(rows, np.int64)
    for x in (leaves, rules, root):
        flags |= _little(x)

    side = 5 if -(-n // 5) * 5 < -(-n // 4) * 4 else 4
    padded = -(-n // side) * side
    all_padded = max(padded, -(-(n - (n - m) // side * side) // side) * side)  # preterminals begin a side of their own
    tables = torch.zeros(groups, padded, all_padded, all_padded, dtype=torch.float64)
    torch.exp(rules, out=tables[:, :n, :m, :m])
    by_parent = torch.zeros(groups, padded, padded, padded, dtype=torch.float64)
    by_parent[:, :n, :n, :n] = tables[:, :n, :n, :n]
    volume = size * padded * row_of(size)
    charts, factors = room.empty((rows, volume)), room.empty((rows, volume))
    growth, log_z = np.empty(rows), np.empty(rows)
    arrays = (
        by_parent.flatten(2).numpy(), root.exp().numpy(), lengths.long().contiguous().numpy(), low, side, charts,
        factors, growth,
    )  # fmt: skip
    leaves = leaves.exp().contiguous()
    run_shares(
        kernels.inside,
        (
            spans.contiguous().numpy(), leaves.numpy(), finite(scales).contiguous().numpy(), tables.numpy(), arrays[0],
            greatest.numpy(), *arrays[1:], log_z, flags,
        ),
        rows,
        0.03 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    found = torch.from_numpy(log_z).add_(top)
    return found, flags, Kept(scores, graph, leaves, tables, arrays) if keep else None


def _little(x: Tensor) -> Any:
    """For each row of ``x``, 1 if an allowed entry's exponential is too small."""
    if bool(x.amin() >= LITTLE):
        return 0
    return ((x < LITTLE) & (x > -torch.inf)).flatten(1).any(1).long().numpy()


def backward(kept: Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights ``[B]`` * the gradient of log Z in each of the scores, in their shapes; weights are 0 where log Z is -inf
    or was not found."""
    by_parent, root, lengths, low, side, *arrays = kept.arrays
    spans = kept.scores[0]
    rows, size, live = kept.leaves.shape
    m, (groups, n), (_, padded, all_padded, _) = spans.shape[-1], root.shape, kept.tables.shape
    parents, last = -(-n // 8) * 8, -(-live // 8) * 8
    by_pair = torch.zeros(groups, padded * padded, parents, dtype=torch.float64)
    by_pair[..., :padded] = torch.from_numpy(by_parent).transpose(1, 2)
    shares = groups if groups > 1 else max(1, torch.get_num_threads())
    mass = room.zeros((rows, size, size, m), np.float32 if spans.dtype == torch.float32 else np.float64)
    to_leaves, to_root = room.zeros((rows, size, live)), np.zeros((shares, n))
    to_left, to_right = room.zeros((shares, padded, all_padded, last)), room.zeros((shares, padded, padded, last))
    to_pairs = room.zeros((shares, padded * padded, parents))
    run_shares(
        kernels.outside,
        (
            kept.leaves.numpy(), kept.tables.numpy(), by_parent, by_pair.numpy(), root, lengths, low, side, *arrays,
            weights.numpy(), mass, to_leaves, to_left, to_right, to_pairs, to_root,
        ),
        rows,
        0.06 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    first, second, both, d_root = (
        x if groups > 1 else x.sum(0, keepdim=True)
        for x in map(torch.from_numpy, (to_left, to_right, to_pairs, to_root))
    )
    rules = torch.zeros(groups, n, m, m, dtype=torch.float64)
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
        d_unary = torch.zeros(1, n, m - n, dtype=torch.float64).expand(kept.scores[3].shape)
    found = (d_spans, rules, d_root, d_unary)
    return tuple(
        g if g.shape == x.shape else g.sum(0, keepdim=True) for g, x in zip(found, kept.scores, strict=True)
    )
