"""Sums over alignments of two sequences: monotone paths from corner to corner of a grid of (U + 1) x (W + 1) nodes.

    alpha(i, j) = logsumexp_m (alpha(i - a_m, j - b_m) + scores[i, j, m]),      alpha(0, 0) = 0, log Z = alpha(n, w)

Move m takes a_m of the source and b_m of the target, and its score stands at the node where it arrives. With the moves
(1, 1), (1, 0), (0, 1) this is the edit distance over maxima (Wagner and Fischer 1974), and over sums the stochastic
transducer of Ristad and Yianilos (1998); with chunks of several letters it is the joint multigram of Bisani and Ney
(2008). Kernels on the CPU: ``kernels.pair_alignment``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math.kernels import pair_alignment as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring

Moves = tuple[tuple[int, int], ...]


def inside(moves: Moves, semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The sum over all paths: scores ``[..., U + 1, W + 1, M]``, lengths ``[..., 2]``.

    Nodes of one diagonal i + j depend on earlier diagonals alone, and are done at once.
    """
    (scores,) = parts
    rows, columns = scores.shape[-3:-1]
    device = scores.device
    i = torch.arange(rows, device=device)
    j = torch.arange(rows + columns - 1, device=device).unsqueeze(-1) - i  # [diagonals, I]
    within = (j >= 0) & (j < columns)
    zero = semiring.zeros((), scores).reshape(-1, *(1,) * (scores.dim() - 1))
    skewed = torch.where(within.unsqueeze(-1), scores[..., i.expand_as(j), j.clamp(0, columns - 1), :], zero)
    lead = scores.shape[1:-3]
    corner = (i == 0).expand(*lead, rows)
    alphas = [torch.where(corner, semiring.ones((*lead, rows), scores), semiring.zeros((*lead, rows), scores))]
    for diagonal in range(1, len(j)):
        ways = [semiring.zeros((*lead, rows), scores)]
        for m, (a, b) in enumerate(moves):
            if a + b <= diagonal and a < rows:
                before = alphas[diagonal - a - b][..., : rows - a]
                moved = torch.cat([semiring.zeros((*lead, a), scores), before], -1)
                ways.append(semiring.times(moved, skewed[..., diagonal, :, m]))
        alphas.append(semiring.plus(*ways))
    last = lengths.sum(-1, keepdim=True) * rows + lengths[..., :1]
    reached = torch.stack(alphas, -2).flatten(-2)
    return reached.gather(-1, last.expand(*reached.shape[:-1], 1)).squeeze(-1)


@cache
def recursion(moves: Moves) -> Recursion:
    """The recursion of these moves."""
    table = np.array(moves, dtype=np.int64)

    def sums(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
        return inside(moves, semiring, parts, lengths)

    def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Any]:
        log_z, *rest = _forward(scores[0], table, lengths)
        return torch.from_numpy(log_z), (*rest, scores[0].shape[0]) if keep else None

    def backward(kept: Any, weights: Tensor) -> tuple[Tensor, ...]:
        array, n, alpha, own = kept
        expected = np.zeros((len(n), *array.shape[1:]))
        arguments = (array, table, n, alpha, weights.double().contiguous().numpy(), expected)
        run_shares(kernels.backward, arguments, len(n), 20.0 * expected.size)
        found = torch.from_numpy(expected)
        return (found if own == len(n) else found.sum(0, keepdim=True),)

    return Recursion(sums, forward, backward)


def best(moves: Moves, scores: Tensor, lengths: Tensor) -> Tensor:
    """The moves, plus one, of a path of the highest score ``[B, U + W]``: 0 behind the path, -1 if all is forbidden.

    Args:
        scores: ``[1 or B, U + 1, W + 1, M]``.
        lengths: ``[B, 2]``.
    """
    array, n = _array(scores), _ints(lengths)
    paths = torch.zeros((len(n), sum(array.shape[1:3]) - 2), dtype=torch.long)
    arguments = (array, np.array(moves, dtype=np.int64), n, paths.numpy())
    run_shares(kernels.best, arguments, len(n), 3.0 * len(n) * array[0].size)
    return paths


def sample(moves: Moves, scores: Tensor, lengths: Tensor, count: int) -> Tensor:
    """``[count, B, U + W]`` exact draws, written as in ``best``."""
    table = np.array(moves, dtype=np.int64)
    _, array, n, alpha = _forward(scores, table, lengths)
    paths = torch.zeros((count, len(n), sum(array.shape[1:3]) - 2), dtype=torch.long)
    uniforms = torch.rand(paths.shape, dtype=torch.float64).numpy()
    arguments = (array, table, n, alpha, uniforms, paths.numpy())
    run_shares(kernels.sample, arguments, len(n), 20.0 * len(moves) * paths.numel())
    return paths


def _forward(scores: Tensor, table: Any, lengths: Tensor) -> tuple[Any, Any, Any, Any]:
    """log Z, and what it was made of: scores, lengths and alpha."""
    array, n = _array(scores), _ints(lengths)
    alpha, log_z = np.full((len(n), *array.shape[1:3]), -math.inf), np.empty(len(n))
    run_shares(kernels.forward, (array, table, n, alpha, log_z), len(n), 20.0 * len(n) * array[0].size)
    return log_z, array, n, alpha


def _array(scores: Tensor) -> Any:
    return scores.detach().double().contiguous().numpy()


def _ints(lengths: Tensor) -> Any:
    return lengths.long().contiguous().numpy()
