"""Exact sums over segmentations: a sequence cut into labelled segments of at most D steps.

    score(x) = start(k_1) + sum_i segments[t_i, d_i, k_i] + sum_{i>1} transitions[k_{i-1}, k_i] + end(k_m)
    alpha[t, k] = logsumexp_d (enter[t - d, k] + segments[t - d, d - 1, k])        enter[0] = start
    enter[t, k] = logsumexp_j (alpha[t, j] + transitions[j, k])                    log Z = logsumexp_k (alpha[n] + end)

alpha[t, k] sums over the segmentations of the first t steps whose last segment is labelled k, so that a position costs
K (D + K) and not K^2 D (Sarawagi and Cohen 2004; Yu 2010, "Hidden semi-Markov models"). Where a segment's score is the
sum of its steps' emissions and of a duration's score (``ADDITIVE``), nothing of size T D K is made: memory is linear in
the length. On the CPU all runs compiled, in float64; on a GPU, for second derivatives and in other semirings, by
``inside``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math.kernels import semimarkov as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring
from probllm.math.untraced import untraced


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
        last = alpha if t == 1 else torch.where((lengths == t).unsqueeze(-1), alpha, last)
        if t < steps:
            enter.append(semiring.dot(alpha.unsqueeze(-1), transitions, -2))
    return semiring.dot(last, end, -1)


def _by_end(segments: Tensor) -> tuple[Tensor, ...]:
    """For each step, the segments ``[..., D, K]`` that end with it, the shortest first (anything if before step 0)."""
    steps, longest, _ = segments.shape[-3:]
    duration = torch.arange(longest, device=segments.device)
    start = (torch.arange(steps, device=segments.device).unsqueeze(-1) - duration).clamp_min(0)
    flat = segments.flatten(-3, -2).index_select(-2, (start * longest + duration).flatten())
    ends: tuple[Tensor, ...] = flat.unflatten(-2, (steps, longest)).unbind(-3)
    return ends


def inside_additive(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """``inside`` where segments score the sum of their steps' emissions and of their duration.

    Args:
        parts: lifted emissions ``[width, *lead, T, K]``, durations ``[..., D, K]``, those of the last segment
            ``[..., D, K]``, transitions ``[..., K, K]`` and start ``[..., K]``.
        lengths: ``[*lead]`` long.
    """
    emissions, durations, last, transitions, start = parts
    segments = segment_scores(semiring, emissions, durations, last, lengths)
    return inside(semiring, (segments, transitions, start, semiring.ones(start.shape[1:], start[0])), lengths)


def segment_scores(semiring: Semiring, emissions: Tensor, durations: Tensor, last: Tensor, lengths: Tensor) -> Tensor:
    """The segments ``[width, *lead, T, D, K]`` of additive parts (see ``inside_additive``), for ``inside`` to take.

    What does not fit into T steps is not looked at, and may be anything.
    """
    steps, longest = emissions.shape[-2], durations.shape[-2]
    sums = [emissions]
    for d in range(1, longest):  # the emissions of t .. t + d, with no difference of running sums: -inf stays -inf
        sums.append(semiring.times(sums[-1], emissions.roll(-d, -2)))
    first = torch.arange(steps, device=lengths.device)
    stops = first.unsqueeze(-1) + torch.arange(1, longest + 1, device=lengths.device)
    is_last = (stops == lengths[..., None, None]).unsqueeze(-1)
    return semiring.times(torch.stack(sums, -2), torch.where(is_last, last.unsqueeze(-3), durations.unsqueeze(-3)))


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


class Kept(NamedTuple):
    """What the forward kernel leaves for the others; arrays ``[B, ...]``, or ``[1, ...]`` for what all rows share."""

    scores: tuple[Any, ...]  # segments, emissions, durations, last, as the kernels take them
    transitions: Any
    start: Any
    end: Any
    lengths: Any
    alpha: Any  # [B, T + 1, K]
    enter: Any  # [B, T, K]
    log_z: Any  # [B]


def _array(x: Tensor) -> Any:
    return x.detach().double().contiguous().numpy()


def _arrays(parts: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Any, Any, Any, int]:
    """Parts of either sort as the kernels take them, and T."""
    if len(parts) == 4:
        segments, transitions, start, end = parts
        k, steps = segments.shape[-1], segments.shape[-3]
        narrow = segments.detach() if segments.dtype in (torch.float32, torch.float64) else segments.detach().float()
        none = np.empty((1, 0, k))
        scores = (narrow.contiguous().numpy(), none, none, none)
        return scores, _array(transitions), _array(start), _array(end), steps
    emissions, durations, last, transitions, start = parts
    k, steps = emissions.shape[-1], emissions.shape[-2]
    scores = (np.empty((1, 0, 0, 0)), _array(emissions), _array(durations), _array(last))
    return scores, _array(transitions), _array(start), np.zeros((1, k)), steps


def _exponentials(transitions: Any) -> tuple[Any, Any]:
    """exp(transitions - peaks) and the peaks ``[B]``, 0 where all is forbidden."""
    peaks = transitions.max((1, 2))
    peaks = np.where(peaks == -np.inf, 0.0, peaks)
    return np.exp(transitions - peaks[:, None, None]), peaks


def _cost(rows: int, steps: int, scores: tuple[Any, ...], k: int) -> float:
    """About how many nanoseconds a pass takes."""
    longest = int(max(scores[0].shape[2], scores[2].shape[1]))
    return 5.0 * rows * steps * k * (longest + 1) + 1.0 * rows * steps * k * k


def forward(parts: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Kept | None]:
    """log Z ``[B]`` in float64 of either sort of parts, and what ``backward`` and ``sample`` need."""
    scores, transitions, start, end, steps = _arrays(parts)
    rows, k = len(lengths), start.shape[1]
    n = lengths.long().contiguous().numpy()
    held = rows if keep else min(rows, torch.get_num_threads())
    alpha, enter, log_z = np.empty((held, steps + 1, k)), np.empty((held, steps, k)), np.empty(rows)
    table, peaks = _exponentials(transitions)
    arguments = (*scores, transitions, table, peaks, start, end, n, alpha, enter, log_z)
    run_shares(kernels.forward, arguments, rows, _cost(rows, steps, scores, k))
    kept = Kept(scores, transitions, start, end, n, alpha, enter, log_z) if keep else None
    return torch.from_numpy(log_z), kept


def backward(kept: Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """The sum over rows of weights * gradient of log Z in each part, in the parts' shapes."""
    rows, steps, k = len(kept.lengths), kept.enter.shape[1], kept.start.shape[1]
    shares = torch.get_num_threads()
    table, _ = _exponentials(kept.transitions)

    def zeros(like: Any) -> Any:
        own = len(like) == rows
        return np.zeros((rows if own else shares, *like.shape[1:]), like.dtype)

    found = [zeros(x) for x in (*kept.scores, kept.transitions, kept.start, kept.end)]
    scores = (*kept.scores, kept.transitions, table, kept.start, kept.end)
    arguments = (*scores, kept.lengths, kept.alpha, kept.enter, kept.log_z)
    weights_array = weights.detach().double().contiguous().numpy()
    run_shares(kernels.backward, (*arguments, weights_array, *found), rows, 2 * _cost(rows, steps, kept.scores, k))
    given = (*kept.scores, kept.transitions, kept.start, kept.end)
    summed = [x if len(like) == rows else x.sum(0, keepdims=True) for x, like in zip(found, given, strict=True)]
    segments, emissions, durations, last, pairs, start, end = (torch.from_numpy(x) for x in summed)
    if segments.shape[1]:
        return segments, pairs, start, end
    return emissions, durations, last, pairs, start


@untraced
def viterbi(parts: tuple[Tensor, ...], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The best score ``[B]``, float64, and one best segmentation ``[B, T]``: 0 at padding, -1 where none is allowed.

    Args:
        parts: as ``inside`` or ``inside_additive`` take them, not lifted, ``[B, ...]`` or ``[1, ...]``; on the CPU.
        lengths: ``[B]`` long.
    """
    scores, transitions, start, end, steps = _arrays(parts)
    rows, k = len(lengths), start.shape[1]
    best, path = torch.empty(rows, dtype=torch.float64), torch.zeros(rows, steps, dtype=torch.long)
    n = lengths.long().contiguous().numpy()
    arguments = (*scores, transitions, start, end, n, best.numpy(), path.numpy())
    run_shares(kernels.viterbi, arguments, rows, _cost(rows, steps, scores, k) / 4)
    return best, torch.where((best == -torch.inf).unsqueeze(-1), -1, path)


@untraced
def sample(parts: tuple[Tensor, ...], lengths: Tensor, count: int) -> Tensor:
    """Exact draws ``[count, B, T]``; arguments, padding and -1 as in ``viterbi``."""
    kept = forward(parts, lengths, True)[1]
    assert kept is not None
    rows, steps, k = len(lengths), kept.enter.shape[1], kept.start.shape[1]
    path = torch.zeros(count, rows, steps, dtype=torch.long)
    uniforms = torch.rand(count, rows, steps, 2, dtype=torch.float64)
    transposed = np.ascontiguousarray(kept.transitions.swapaxes(1, 2))
    arguments = (*kept.scores, transposed, kept.end, kept.lengths, kept.alpha, kept.enter, kept.log_z)
    work = 5.0 * count * rows * steps * (k + max(kept.scores[0].shape[2], kept.scores[2].shape[1]))
    run_shares(kernels.sample, (*arguments, uniforms.numpy(), path.numpy()), count * rows, work)
    return torch.where(torch.from_numpy(kept.log_z == -np.inf).unsqueeze(-1), -1, path)


RECURSION = Recursion(inside, forward, backward)
ADDITIVE = Recursion(inside_additive, forward, backward)
