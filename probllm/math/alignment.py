"""Sums over monotone alignments: paths through a left-to-right lattice of S states, one state at each of T steps.

    score(s) = start[s_1] + sum_t emissions[t, s_t] + sum_{t>1} steps[s_t - s_{t-1}, s_t] + end[s_n]
    alpha_t(s) = emissions[t, s] + logsumexp_d (alpha_{t-1}(s - d) + steps[d, s]),      0 <= d < D

D = 2 is the alignment of a left-to-right hidden Markov model (stay or advance by one; Rabiner 1989, section IV.C), and
CTC is D = 3 over the labels with blanks between (Graves et al. 2006, section 4.1). T S D work, by the kernels in
``kernels.alignment`` on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.kernels import alignment as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring

Arrays = tuple[Any, Any, Any, Any]  # emissions [B, T, S]; steps [1 or B, D, S]; start, end [1 or B, S]; float64


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The sum over all paths: emissions ``[..., T, S]``, steps ``[..., D, S]``, start and end ``[..., S]``."""
    emissions, steps, start, end = parts
    states = emissions.shape[-1]
    alpha = semiring.times(start, emissions[..., 0, :])
    for t in range(1, emissions.shape[-2]):
        ways = []
        for d in range(min(steps.shape[-2], states)):
            none = semiring.zeros((*alpha.shape[1:-1], d), alpha)
            ways.append(semiring.times(torch.cat([none, alpha[..., : states - d]], -1), steps[..., d, :]))
        step = semiring.times(semiring.plus(*ways), emissions[..., t, :])
        alpha = torch.where((t < lengths).unsqueeze(-1), step, alpha)
    return semiring.sum(semiring.times(alpha, end), -1)


def sums(arrays: Arrays, lengths: Any, keep: bool, steps: bool = True) -> tuple[Any, Any, Any]:
    """log Z ``[B]``, and where ``keep`` the expected states ``[B, T, S]`` and, where ``steps`` too, the expected steps
    ``[B, D, S]`` of each row."""
    (rows, longest, states), moves = arrays[0].shape, arrays[1].shape[1]
    marginals = room.zeros((rows, longest, states)) if keep else np.zeros((0, 0, 0))
    arrivals = np.zeros((rows, moves, states) if keep and steps else (0, 0, 0))
    log_z = np.empty(rows)
    arguments = (*arrays, lengths, keep, marginals, arrivals, log_z)
    run_shares(kernels.sums, arguments, rows, 8.0 * rows * longest * states)
    return log_z, marginals, arrivals


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Any]:
    """log Z ``[B]``, and what ``backward`` needs."""
    found = sums(_arrays(scores, lengths), _ints(lengths), keep)
    log_z, marginals, arrivals = map(torch.from_numpy, found)
    return log_z, (marginals, arrivals, lengths, log_z, scores) if keep else None


def backward(kept: Any, weights: Tensor) -> tuple[Tensor, ...]:
    """Expected parts, each row of the batch times its weight."""
    marginals, arrivals, lengths, log_z, scores = kept
    w = torch.where(log_z > -math.inf, weights.double(), 0.0)
    tags = marginals * w[:, None, None]
    last = tags.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, tags.shape[-1])).squeeze(1)
    found = (tags, arrivals * w[:, None, None], tags[:, 0], last)
    return tuple(x if s.shape[0] == len(x) else x.sum(0, keepdim=True) for x, s in zip(found, scores, strict=True))


def best(scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """A path of the highest score ``[B, T]``: 0 at padding, -1 where every path is forbidden."""
    arrays = _arrays(scores, lengths)
    paths = torch.zeros(arrays[0].shape[:2], dtype=torch.long)
    run_shares(kernels.best, (*arrays, _ints(lengths), paths.numpy()), len(paths), 3.0 * arrays[0].size)
    return paths


def sample(scores: tuple[Tensor, ...], lengths: Tensor, count: int) -> Tensor:
    """``[count, B, T]`` exact draws; padding and -1 as in ``best``."""
    arrays = _arrays(scores, lengths)
    paths = torch.zeros((count, *arrays[0].shape[:2]), dtype=torch.long)
    uniforms = torch.rand(paths.shape, dtype=torch.float64).numpy()
    arguments = (*arrays, _ints(lengths), uniforms, paths.numpy())
    run_shares(kernels.sample, arguments, paths.shape[1], 40.0 * arrays[0].size + 20.0 * paths.numel())
    return paths


def _arrays(scores: tuple[Tensor, ...], lengths: Tensor) -> Arrays:
    emissions, steps, start, end = (x.detach().double().contiguous().numpy() for x in scores)
    if emissions.shape[0] != len(lengths):
        emissions = np.broadcast_to(emissions, (len(lengths), *emissions.shape[1:]))
        emissions = np.ascontiguousarray(emissions)
    return emissions, steps, start, end


def _ints(lengths: Tensor) -> Any:
    return lengths.long().contiguous().numpy()


RECURSION = Recursion(inside, forward, backward)
