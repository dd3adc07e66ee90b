"""The law of label sequences that connectionist temporal classification trains: alignments are summed out.

z_t ~ Categorical(log_probs[t])  for t = 1 .. n,     labels = z without repeats, then without blanks
p(labels) = sum over the paths z that collapse to them                          (Graves et al. 2006, equation 3)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from probllm.distributions.monotonic_alignment import MonotonicAlignment
from probllm.distributions.summed_out import SummedOutDistribution
from probllm.math.chain import check_lengths
from probllm.math.masks import mask_from_lengths
from probllm.math.shapes import broadcast_shapes


class CTCLabels(SummedOutDistribution):
    """A law over label sequences, written as ``[T]`` (or shorter, ``[U]``): the labels, then blanks.

    Args:
        log_probs: ``[*batch, T, V]`` log probabilities of the labels and the blank at each frame, normalised.
        lengths: ``[*batch]`` frames, each from 1 to T; all T if None.
        blank: which of V is the blank, and what fills a value behind its labels.
    Raises:
        TypeError, ValueError: for scores that are not floating point, and shapes or lengths that do not fit.
    """

    _of_what = "CTC's labels"
    _because = "every label sequence sums over its alignments; best_path() approximates the mode"

    def __init__(
        self, log_probs: Tensor, lengths: Tensor | None = None, blank: int = 0, validate_args: bool | None = None
    ) -> None:
        if log_probs.dim() < 2 or 0 in log_probs.shape[-2:]:
            raise ValueError(f"log_probs: expected shape [..., T, V], got {list(log_probs.shape)}")
        if not log_probs.is_floating_point():
            raise TypeError(f"log_probs: expected floating-point scores, got {log_probs.dtype}")
        frames, size = log_probs.shape[-2:]
        if not 0 <= blank < size:
            raise ValueError(f"blank: expected from 0 to {size - 1}, got {blank}")
        lengths = torch.tensor(frames, device=log_probs.device) if lengths is None else lengths
        check_lengths(lengths, frames)
        self.log_probs, self.lengths, self.blank = log_probs, lengths, blank
        self._own_shape = broadcast_shapes(log_probs.shape[:-2], lengths.shape)
        super().__init__(self._own_shape, torch.Size([frames]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.log_probs.shape[-1] - 1), 1)

    def posterior(self, value: Tensor) -> MonotonicAlignment:
        """The law of the alignments of labels ``[..., U]`` to the frames; its ``log_partition`` is log p(labels).

        Raises:
            ValueError: for a label behind a blank, or out of range.
        """
        given = value != self.blank
        counts = given.sum(-1)
        if not bool((given == mask_from_lengths(counts, value.shape[-1])).all()):
            raise ValueError(f"value: expected labels, then blanks ({self.blank}) alone; got a label behind a blank")
        return MonotonicAlignment.ctc(self.log_probs, value, self.lengths, counts, self.blank)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(labels) ``[...]``, in nats; -inf for more labels than the frames can hold."""
        found = self.posterior(value).log_partition
        return found.expand(broadcast_shapes(found.shape, self.batch_shape))

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Paths and their labels, ``[*sample, *batch, T]`` each; blank behind a row's frames and labels."""
        with torch.no_grad():
            frames, size = self.log_probs.shape[-2:]
            shape = (*torch.Size(sample_shape), *self.batch_shape, frames)
            law = torch.distributions.Categorical(logits=self.log_probs.expand(*shape, size))
            paths = torch.where(mask_from_lengths(self.lengths, frames), law.sample(), self.blank)
            return paths, collapse(paths, self.blank)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Labels ``[*sample, *batch, T]``, then blanks."""
        return self.sample_joint(sample_shape)[1]

    def best_path(self) -> Tensor:
        """The labels ``[*batch, T]`` of the most probable path: a lower bound of the most probable labels."""
        best = self.log_probs.argmax(-1).expand(*self.batch_shape, self.event_shape[0])
        return collapse(torch.where(mask_from_lengths(self.lengths, self.event_shape[0]), best, self.blank), self.blank)


def collapse(paths: Tensor, blank: int = 0) -> Tensor:
    """Paths ``[..., T]`` without repeats, then without blanks, moved to the left; blank behind."""
    before = torch.cat([torch.full_like(paths[..., :1], blank), paths[..., :-1]], -1)
    kept = (paths != blank) & (paths != before)
    place = torch.where(kept, kept.long().cumsum(-1) - 1, paths.shape[-1])
    found = torch.full((*paths.shape[:-1], paths.shape[-1] + 1), blank, dtype=paths.dtype, device=paths.device)
    return found.scatter(-1, place, paths)[..., :-1]
