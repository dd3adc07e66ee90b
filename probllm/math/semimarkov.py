"""Exact sums over segmentations: a sequence cut into labelled segments of at most D steps.

    score(x) = start(k_1) + sum_i segments[t_i, d_i, k_i] + sum_{i>1} transitions[k_{i-1}, k_i] + end(k_m)
    alpha[t, k] = logsumexp_d (enter[t - d, k] + segments[t - d, d - 1, k])         enter[0] = start
    enter[t, k] = logsumexp_j (alpha[t, j] + transitions[j, k])                      log Z = logsumexp_k (alpha[n] + end)

alpha[t, k] sums over the segmentations of the first t steps whose last segment is labelled k, so that a position costs
K (D + K) and not K^2 D (Sarawagi and Cohen 2004; Yu 2010, "Hidden semi-Markov models").
"""

from __future__ import annotations

import torch
from torch import Tensor

from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The semiring's sum ``[width, *lead]`` over segmentations.

    Args:
        parts: lifted segments ``[width, *lead, T, D, K]``, transitions ``[..., K, K]``, start and end ``[..., K]``.
        lengths: ``[*lead]`` long.
    """
    segments, transitions, start, end = parts
    steps, longest, _ = segments.shape[-3:]
    ends = _by_end(segments)
    enter, last = [start], start
    for t in range(1, steps + 1):
        window = torch.stack(torch.broadcast_tensors(*enter[: -longest - 1 : -1]), -2)  # the shortest segment first
        alpha = semiring.dot(window, ends[t - 1][..., : window.shape[-2], :], -2)
        last = alpha if t == 1 else torch.where((t == lengths).unsqueeze(-1), alpha, last)
        if t < steps:
            enter.append(semiring.dot(alpha.unsqueeze(-1), transitions, -2))
    return semiring.dot(last, end, -1)


def _by_end(segments: Tensor) -> tuple[Tensor, ...]:
    """For each step, the segments ``[..., D, K]`` that end with it, the shortest first; what starts before 0: anything."""
    steps, longest, _ = segments.shape[-3:]
    duration = torch.arange(longest, device=segments.device)
    start = (torch.arange(steps, device=segments.device).unsqueeze(-1) - duration).clamp_min(0)
    flat = segments.flatten(-3, -2).index_select(-2, (start * longest + duration).flatten())
    return flat.unflatten(-2, (steps, longest)).unbind(-3)


def step_labels(segmentation: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The label of each step, ``[..., T]`` long, of segmentations ``[..., T]``; 0 at padding, -1 where they are -1.

    Args:
        segmentation: 0 continues a segment, 1 + k starts one labelled k.
        lengths: ``[...]``, all T if None.
    """
    steps = segmentation.shape[-1]
    starts = torch.where(segmentation > 0, torch.arange(steps, device=segmentation.device), 0)
    labels = segmentation.gather(-1, starts.cummax(-1).values) - 1
    labels = torch.where(segmentation < 0, -1, labels)
    return labels if lengths is None else torch.where(mask_from_lengths(lengths, steps) | (labels < 0), labels, 0)


RECURSION = Recursion(inside)
