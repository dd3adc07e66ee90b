"""Labels from the frames of connectionist temporal classification: by the best path, and by prefix beam search.

    p(prefix) = b + l,      b: mass of its paths that end in a blank, l: in its last label
    b' = (b + l) p(blank),      l' = l p(last label) + (mass of the prefix without its last label) p(last label)

where the shorter prefix gives all its mass, or only b if it ends in the same label (Graves et al. 2006, section 3.2;
Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional recurrent DNNs").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probllm.distributions.ctc_labels import CTCLabels
from probllm.math.kernels import ctc as kernels
from probllm.math.kernels.threads import run_shares


def ctc_greedy(log_probs: Tensor, lengths: Tensor | None = None, blank: int = 0) -> Tensor:
    """The labels of the most probable path: without repeats, then without blanks.

    Args:
        log_probs: ``[*batch, T, V]`` log probabilities of the labels and the blank at each frame.
        lengths: ``[*batch]`` frames, each from 1 to T; all T if None.
    Returns:
        ``[*batch, T]`` labels, then blanks.
    """
    return CTCLabels(log_probs, lengths, blank).best_path()


def ctc_beam(
    log_probs: Tensor, lengths: Tensor | None = None, beam: int = 16, count: int = 1, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """The most probable labels that a prefix beam search finds; equal prefixes are merged exactly.

    With a beam as wide as there are label sequences it is exact; else the log probabilities are lower bounds of the
    sequences' own, ``CTCLabels(log_probs, lengths, blank).log_prob(labels)``.

    Args:
        log_probs: ``[*batch, T, V]`` log probabilities of the labels and the blank at each frame.
        lengths: ``[*batch]`` frames, each from 1 to T; all T if None.
        beam: prefixes that go on from each frame.
        count: label sequences that are wanted, at most ``beam``.
    Returns:
        log probabilities ``[count, *batch]``, best first, and labels ``[count, *batch, T]``, then blanks; -inf and
        blanks where there are fewer. On the CPU, without gradients.
    Raises:
        TypeError, ValueError: for scores, lengths or a blank that do not fit, NaN, a beam below 1 or a count above it.
    """
    law = CTCLabels(log_probs, lengths, blank)
    if beam < 1:
        raise ValueError(f"beam: expected at least 1, got {beam}")
    if not 1 <= count <= beam:
        raise ValueError(f"count: expected from 1 to the beam, {beam}, got {count}")
    if bool(log_probs.isnan().any()):
        raise ValueError("log_probs: must not be NaN")
    frames, size = log_probs.shape[-2:]
    rows = log_probs.detach().cpu().double().expand(*law.batch_shape, frames, size).reshape(-1, frames, size)
    each = law.lengths.cpu().long().expand(law.batch_shape).reshape(-1).contiguous()
    labels = torch.full((count, len(rows), frames), blank, dtype=torch.long)
    scores = torch.full((count, len(rows)), -math.inf, dtype=torch.float64)
    arguments = (rows.contiguous().numpy(), each.numpy(), blank, beam, labels.numpy(), scores.numpy())
    run_shares(kernels.search, arguments, len(rows), 20.0 * beam * rows.numel())
    shape = (count, *law.batch_shape)
    device = log_probs.device
    return scores.reshape(shape).to(device, log_probs.dtype), labels.reshape(*shape, frames).to(device)
