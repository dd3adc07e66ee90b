"""Connectionist temporal classification: the sum over all ways to spread labels over frames, with blanks between.

States are the labels with a blank before, between and behind: state 2u + 1 is label u, even states are blanks. A path
begins in state 0 or 1, ends in state 2U or 2U - 1, stays, advances by one, or skips a blank between two different
labels; its score is the sum of the log probabilities of its states' labels (Graves et al. 2006, "Connectionist
temporal classification", section 4.1). It is a left-to-right lattice (``math.alignment``); what is here goes from the
log probabilities straight to log Z and its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math import alignment
from probllm.math.kernels import ctc as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring


def pack(targets: Tensor, lengths: Tensor, target_lengths: Tensor, blank: int) -> Tensor:
    """``[B, 3 + U]``: frames, labels, the blank, and the labels themselves, blank where there are none."""
    real = torch.arange(targets.shape[-1], device=targets.device) < target_lengths.unsqueeze(-1)
    head = torch.stack([lengths, target_lengths, torch.full_like(lengths, blank)], -1)
    return torch.cat([head, torch.where(real, targets, blank)], -1)


def pack_checked(
    targets: Tensor, lengths: Tensor | None, counts: Tensor | None, blank: int, sizes: tuple[int, int], batch: Any
) -> Tensor | None:
    """``pack`` of tensors on the CPU over ``batch``, of sizes (T, V); None where a number is out of range."""
    frames, size = sizes
    most, rows = targets.shape[-1], math.prod(batch)
    labels = _rows(targets.numpy(), (*batch, most)).reshape(rows, most)
    n = np.full(rows, frames) if lengths is None else _rows(lengths.numpy(), batch).reshape(rows)
    count = np.full(rows, most) if counts is None else _rows(counts.numpy(), batch).reshape(rows)
    packed = np.empty((rows, 3 + most), np.int64)
    if not kernels.pack(labels, n, count, blank, size, frames, packed):
        return None
    return torch.from_numpy(packed.reshape(*batch, 3 + most))


def _rows(x: Any, shape: tuple[int, ...]) -> Any:
    x = x if x.dtype == np.int64 else x.astype(np.int64)
    return np.ascontiguousarray(x if x.shape == shape else np.broadcast_to(x, shape))


def states_of(packed: Tensor) -> Tensor:
    """The label or blank of each state, ``[*batch, S]`` with S = 2U + 1."""
    blank, labels = packed[..., 2:3], packed[..., 3:]
    pairs = torch.stack([blank.expand_as(labels), labels], -1).flatten(-2)
    return torch.cat([pairs, blank], -1)


def frame(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a lattice allows: steps ``[*batch, 3, S]``, start ``[S]`` and end ``[*batch, S]``, of 0 and ``-inf``."""
    states, count, blank = states_of(packed), packed[..., 1:2], packed[..., 2:3]
    width = states.shape[-1]
    two_back = torch.cat([blank, blank, states], -1)[..., :width]
    skips = (states != two_back) & (states != blank)
    at = torch.arange(width, device=packed.device)
    zeros = torch.zeros_like(states, dtype=dtype)
    steps = torch.stack([zeros, zeros, zeros.masked_fill(~skips | (at < 2), -math.inf)], -2)
    start = torch.zeros_like(at, dtype=dtype).masked_fill(at > 1, -math.inf)
    return steps, start, zeros.masked_fill((at != 2 * count) & (at != 2 * count - 1), -math.inf)


def emissions_of(log_probs: Tensor, packed: Tensor) -> Tensor:
    """``[..., T, S]`` from log probabilities ``[..., T, V]`` over the packed labels' batch or more."""
    states = states_of(packed).unsqueeze(-2)
    return log_probs.gather(-1, states.expand(*log_probs.shape[:-1], states.shape[-1]))


def inside(semiring: Semiring, parts: tuple[Tensor, ...], packed: Tensor) -> Tensor:
    """The sum over all paths from log probabilities ``[*batch, T, V]``."""
    (log_probs,) = parts
    emissions = emissions_of(log_probs, packed)
    rest = (semiring.lift(x) for x in frame(packed, log_probs.dtype))
    return alignment.inside(semiring, (emissions, *rest), packed[..., 0])


def forward(scores: tuple[Tensor, ...], packed: Tensor, keep: bool) -> tuple[Tensor, Any]:
    """log Z ``[B]``, and the expected states."""
    (log_probs,) = scores
    if log_probs.dtype not in (torch.float32, torch.float64):
        log_probs = log_probs.float()
    rows, width = packed.shape
    states, frames = 2 * (width - 3) + 1, log_probs.shape[1]
    labels, emissions = np.empty((rows, states), np.int64), np.empty((rows, frames, states))
    steps, start, end = np.zeros((rows, 3, states)), np.zeros((1, states)), np.zeros((rows, states))
    what, bad = packed.contiguous().numpy(), np.zeros(log_probs.shape[0], bool)
    arguments = (log_probs.contiguous().numpy(), what, labels, emissions, steps, start, end, bad)
    run_shares(kernels.lattice, arguments, rows, 2.0 * emissions.size)
    if bad.any():
        raise ValueError("log_probs: scores must not be NaN or +inf (-inf forbids)")
    log_z, marginals, _ = alignment.sums(
        (emissions, steps, start, end), np.ascontiguousarray(what[:, 0]), keep, steps=False
    )
    return torch.from_numpy(log_z), (marginals, log_z, what, labels, log_probs) if keep else None


def backward(kept: Any, weights: Tensor) -> tuple[Tensor, ...]:
    """The probability of each label at each frame, times the row's weight."""
    marginals, log_z, packed, labels, log_probs = kept
    w = np.where(log_z > -np.inf, weights.double().numpy(), 0.0)
    shared = log_probs.shape[0] != len(packed)
    gradient = torch.zeros((len(packed), *log_probs.shape[1:]), dtype=log_probs.dtype)
    run_shares(kernels.scatter, (marginals, w, packed, labels, gradient.numpy()), len(packed), 3.0 * marginals.size)
    return (gradient.sum(0, keepdim=True) if shared else gradient,)


RECURSION = Recursion(inside, forward, backward)
