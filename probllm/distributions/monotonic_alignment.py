"""A law over monotone alignments: which of S states, left to right, each of T steps belongs to.

    p(s) = exp(start[s_1] + sum_t emissions[t, s_t] + sum_{t>1} steps[s_t - s_{t-1}, s_t] + end[s_n]) / Z

Steps stay (0), advance by one (1), or skip (2 and more), as far as ``steps`` has rows. With the defaults it is the
alignment of text to frames (stay or advance by one, from the first state to the last). ``MonotonicAlignment.ctc`` gives
connectionist temporal classification (Graves et al. 2006): its log Z is the log likelihood of the labels.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import alignment
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.masks import mask_from_lengths


class MonotonicAlignment(InsideDistribution):
    """A law over lattice states ``[T]``, which never go back.

    Args:
        emissions: ``[*batch, T, S]`` scores of each state at each step; ``-inf`` forbids, here and below.
        steps: ``[..., D, S]``: ``steps[d, s]`` scores a step to state s from state s - d. None: 0 for d of 0 and 1.
        start: ``[..., S]`` scores of the first state. None: it is state 0.
        end: ``[..., S]`` scores of the last state. None: it is state S - 1, or that of ``state_lengths``.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
        state_lengths: ``[...]`` long, from 1 to S: how many states a row has; only where ``end`` is None.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, lengths out of range, and NaN or +inf among the scores (when
            they are summed).
    """

    _dims: ClassVar[dict[str, int]] = {"emissions": 2, "steps": 2, "start": 1, "end": 1}
    _recursion = alignment.RECURSION
    _one_tag_a_step = True

    def __init__(
        self,
        emissions: Tensor,
        steps: Tensor | None = None,
        start: Tensor | None = None,
        end: Tensor | None = None,
        lengths: Tensor | None = None,
        state_lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if emissions.dim() < 2 or 0 in emissions.shape[-2:]:
            raise ValueError(f"emissions: expected shape [*batch, T, S], got {list(emissions.shape)}")
        states = emissions.shape[-1]
        if steps is None:
            steps = emissions.new_zeros(2, states)
        elif steps.dim() < 2 or steps.shape[-1] != states or not 1 <= steps.shape[-2] <= MOST_STEPS:
            raise ValueError(
                f"steps: expected shape [..., D, {states}] with D from 1 to {MOST_STEPS}, got {list(steps.shape)}"
            )
        if start is None:
            start = _only(torch.zeros((), dtype=torch.long, device=emissions.device), emissions)
        if end is None:
            last = torch.tensor(states) if state_lengths is None else state_lengths
            check_lengths(last, states)
            end = _only(last.to(emissions.device).long() - 1, emissions)
        elif state_lengths is not None:
            raise ValueError("state_lengths: expected None where end is given")
        for name, scores in (("start", start), ("end", end)):
            if scores.dim() < 1 or scores.shape[-1] != states:
                raise ValueError(f"{name}: expected shape [..., {states}], got {list(scores.shape)}")
        parts = {"emissions": emissions, "steps": steps, "start": start, "end": end}
        self._set_up(parts, lengths, emissions.shape[-2], (emissions.shape[-2],))
        self._validate_args = validate_args is not False

    @classmethod
    def ctc(
        cls,
        log_probs: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        blank: int = 0,
    ) -> Self:
        """The alignments of labels to frames under connectionist temporal classification.

        States are the labels with a blank before, between and behind: state 2u + 1 is ``targets[u]``, even states are
        blanks. ``log_partition`` is the log likelihood of the labels, ``-inf`` (with gradient 0) where the frames are
        too few for them. It equals ``-torch.nn.functional.ctc_loss``, and its gradient is the true one in
        ``log_probs`` too (torch's is right only below a ``log_softmax``).

        Args:
            log_probs: ``[..., T, V]`` log probabilities of the labels and the blank at each frame.
            targets: ``[..., U]`` integers; what stands behind ``target_lengths`` is ignored.
            lengths: ``[...]`` frames, each from 1 to T; all T if None.
            target_lengths: ``[...]`` labels, each from 0 to U; all U if None.
            blank: which of V is the blank.
        Raises:
            ValueError: for shapes that do not fit together, a label that is the blank or not below V, and lengths out
                of range.
        Source: Graves et al. (2006), "Connectionist temporal classification", section 4.1.
        """
        if log_probs.dim() < 2 or 0 in log_probs.shape[-2:]:
            raise ValueError(f"log_probs: expected shape [..., T, V], got {list(log_probs.shape)}")
        frames, size = log_probs.shape[-2:]
        if not 0 <= blank < size:
            raise ValueError(f"blank: expected from 0 to {size - 1}, got {blank}")
        if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
            raise TypeError(f"targets: expected integers, got {targets.dtype}")
        if targets.dim() < 1:
            raise ValueError("targets: expected shape [..., U], got a scalar")
        count = targets.shape[-1]
        if target_lengths is None:
            target_lengths = torch.full((), count, device=targets.device)
        check_lengths(target_lengths + 1, count + 1)  # none is allowed here
        try:
            batch = torch.broadcast_shapes(log_probs.shape[:-2], targets.shape[:-1], target_lengths.shape)
        except RuntimeError:
            raise ValueError(
                f"batch shapes do not broadcast: log_probs {list(log_probs.shape[:-2])}, targets "
                f"{list(targets.shape[:-1])}, target_lengths {list(target_lengths.shape)}"
            ) from None
        targets = targets.to(log_probs.device, torch.long)
        target_lengths = target_lengths.to(log_probs.device, torch.long)
        real = mask_from_lengths(target_lengths, count)
        bad = real & ((targets < 0) | (targets >= size) | (targets == blank))
        if not is_wrapped(bad) and bool(bad.any()):
            raise ValueError(f"targets: expected labels from 0 to {size - 1} other than the blank, {blank}")
        labels = torch.where(real, targets, blank)
        states = 2 * count + 1
        with_blanks = torch.stack([torch.full_like(labels, blank), labels], -1).flatten(-2)
        with_blanks = torch.nn.functional.pad(with_blanks, (0, 1), value=blank)
        emissions = log_probs.expand(*batch, frames, size).gather(
            -1, with_blanks.unsqueeze(-2).expand(*batch, frames, states)
        )
        # from a label to the next one without a blank, unless they are equal
        skips = torch.nn.functional.pad(with_blanks[..., 2:] != with_blanks[..., :-2], (min(2, states), 0))
        skips = skips[..., :states] & (with_blanks != blank)
        at = torch.arange(states, device=log_probs.device)
        zeros = torch.zeros_like(skips, dtype=log_probs.dtype)
        steps = torch.stack([zeros, zeros, zeros.masked_fill(~skips, -math.inf)], -2)
        start = zeros.new_zeros(states).masked_fill(at > 1, -math.inf)
        last = 2 * target_lengths.unsqueeze(-1)
        end = zeros.new_zeros(states).masked_fill((at != last) & (at != last - 1), -math.inf)
        return cls(emissions, steps, start, end, lengths)

    def _with(self, **parts: Tensor) -> Self:
        return type(self)(**{**self.parts, **parts}, lengths=self.lengths)

    def _greatest(self) -> int:
        return self.parts["emissions"].shape[-1] - 1

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        return self._real(used["emissions"].argmax(-1))

    def _real(self, value: Tensor) -> Tensor:
        return torch.where(mask_from_lengths(self.lengths, value.shape[-1]), value, 0)

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        shape = torch.broadcast_shapes(value.shape, real.shape)
        real, s = real.expand(shape), torch.where(real, value, 0).expand(shape)
        emissions, steps, start, end = (x.double() for x in self.parts.values())
        states, moves = emissions.shape[-1], steps.shape[-2]
        here = emissions.expand(*shape, states).gather(-1, s.unsqueeze(-1)).squeeze(-1)
        by = s[..., 1:] - s[..., :-1]
        legal = (by >= 0) & (by < moves)
        table = steps.flatten(-2).expand(*shape[:-1], moves * states)
        moved = table.gather(-1, torch.where(legal, by, 0) * states + s[..., 1:]).masked_fill(~legal, -math.inf)
        last = s.gather(-1, (self.lengths - 1).expand(shape[:-1]).unsqueeze(-1))
        ends = start.expand(*shape[:-1], states).gather(-1, s[..., :1]) + end.expand(*shape[:-1], states).gather(
            -1, last
        )
        along = torch.where(real[..., 1:], moved, 0.0).sum(-1)
        return torch.where(real, here, 0.0).sum(-1) + along + ends.squeeze(-1)

    def _plain(self) -> tuple[Tensor, ...] | None:
        """The scores as the kernels take them, or None where they cannot."""
        scores = tuple(self._flat(name, name != "emissions") for name in self._dims)
        plain = all(x.device.type == "cpu" and not is_wrapped(x) for x in scores)
        return scores if plain and len(scores[0]) else None

    def _best(self) -> Tensor:
        scores = self._plain()
        if scores is None:
            return super()._best()
        return alignment.best(scores, self._flat_lengths()).reshape(self._own_shape + self.event_shape)

    def _draw(self, n: int) -> Tensor:
        scores = self._plain()
        if scores is None:
            return super()._draw(n)
        return alignment.sample(scores, self._flat_lengths(), n).reshape(n, *self._own_shape, *self.event_shape)


MOST_STEPS = 64  # how far a step may skip, less one


def _only(state: Tensor, like: Tensor) -> Tensor:
    """Scores ``[..., S]`` that allow one state ``[...]`` alone."""
    at = torch.arange(like.shape[-1], device=like.device)
    return torch.zeros(at.shape, dtype=like.dtype, device=like.device).masked_fill(at != state.unsqueeze(-1), -math.inf)
