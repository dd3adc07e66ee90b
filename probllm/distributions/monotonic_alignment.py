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
from probllm.math import alignment, ctc
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import log_partition
from probllm.math.shapes import broadcast_shapes


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
    _labelled: tuple[Tensor, Tensor] | None = None  # CTC: log probabilities, and its labels as ``ctc.pack`` gives them

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
        if not emissions.is_floating_point():
            raise TypeError(f"emissions: expected floating-point scores, got {emissions.dtype}")
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
        if not log_probs.is_floating_point():
            raise TypeError(f"log_probs: expected floating-point scores, got {log_probs.dtype}")
        frames, size = log_probs.shape[-2:]
        if not 0 <= blank < size:
            raise ValueError(f"blank: expected from 0 to {size - 1}, got {blank}")
        if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
            raise TypeError(f"targets: expected integers, got {targets.dtype}")
        if targets.dim() < 1:
            raise ValueError("targets: expected shape [..., U], got a scalar")
        given = (log_probs, targets, *(x for x in (lengths, target_lengths) if x is not None))
        for name, x in (("lengths", lengths), ("target_lengths", target_lengths)):
            if x is not None and (not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool):
                raise TypeError(f"{name}: expected a tensor of integers, got {getattr(x, 'dtype', type(x))}")
        shapes = [log_probs.shape[:-2], targets.shape[:-1], *(x.shape for x in given[2:])]
        try:
            batch = shapes[0] if all(shape == shapes[0] for shape in shapes) else broadcast_shapes(*shapes)
        except RuntimeError:
            raise ValueError(
                "log_probs, targets, lengths and target_lengths: batch shapes do not broadcast: "
                f"{[list(shape) for shape in shapes]}"
            ) from None
        packed = None
        if all(x.device.type == "cpu" and not is_wrapped(x) for x in given):
            packed = ctc.pack_checked(targets, lengths, target_lengths, blank, (frames, size), batch)
        if packed is None:  # elsewhere, or something is out of range
            packed = _packed(targets, lengths, target_lengths, blank, log_probs, batch)
        law = cls.__new__(cls)
        law._labelled = (log_probs, packed)
        law._own_shape, law.lengths, law._kept = batch, packed[..., 0], {}
        super(InsideDistribution, law).__init__(batch, torch.Size([frames]), validate_args=False)
        return law

    # CTC's lattice is built when its parts are asked for; log Z comes straight from the log probabilities

    @property
    def parts(self) -> dict[str, Tensor]:
        if self._labelled is None:
            return self._given
        log_probs, packed = self._labelled

        def make() -> dict[str, Tensor]:
            wide = log_probs.expand(*self._own_shape, *log_probs.shape[-2:])
            return dict(zip(self._dims, (ctc.emissions_of(wide, packed), *ctc.frame(packed, wide.dtype)), strict=True))

        found: dict[str, Tensor] = self._keep("lattice", make)
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return self._given["emissions"].dtype if self._labelled is None else self._labelled[0].dtype

    @property
    def _requires_grad(self) -> bool:
        return super()._requires_grad if self._labelled is None else self._labelled[0].requires_grad

    def _log_z(self) -> Tensor:
        if self._labelled is None or 0 in self._own_shape:
            return super()._log_z()
        log_probs, packed = self._labelled
        if log_probs.device.type != "cpu" and not bool(log_probs.detach().amax() < math.inf):
            raise ValueError("log_probs: scores must not be NaN or +inf (-inf forbids)")
        event = log_probs.shape[-2:]
        if math.prod(log_probs.shape[:-2]) == 1:
            flat = log_probs.reshape(1, *event)
        else:
            flat = log_probs.expand(*self._own_shape, *event).reshape(-1, *event)
        found = log_partition(ctc.RECURSION, (flat,), packed.reshape(-1, packed.shape[-1]))
        return found.reshape(self._own_shape)

    def _with(self, **parts: Tensor) -> Self:
        given = {**self.parts, **parts}
        return type(self)(given["emissions"], given["steps"], given["start"], given["end"], self.lengths)

    def _greatest(self) -> int:
        return self.parts["emissions"].shape[-1] - 1

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        return self._real(used["emissions"].argmax(-1))

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        shape = broadcast_shapes(value.shape, real.shape)
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


def _packed(
    targets: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
    log_probs: Tensor,
    batch: torch.Size,
) -> Tensor:
    """``ctc.pack`` over the batch, on any device and under transforms, with checks that say what is out of range."""
    (frames, size), count, device = log_probs.shape[-2:], targets.shape[-1], log_probs.device
    lengths = torch.tensor(frames) if lengths is None else lengths
    target_lengths = torch.tensor(count) if target_lengths is None else target_lengths
    check_lengths(lengths, frames)
    if not is_wrapped(target_lengths) and target_lengths.numel():
        low, high = (int(x) for x in target_lengths.aminmax())
        if low < 0 or high > count:
            raise ValueError(f"target_lengths: expected values from 0 to {count}, got values from {low} to {high}")
    targets, lengths, target_lengths = (x.to(device, torch.long) for x in (targets, lengths, target_lengths))
    target_lengths = target_lengths.expand(batch)
    packed = ctc.pack(targets.expand(*batch, count), lengths.expand(batch), target_lengths, blank)
    labels = packed[..., 3:]
    if not is_wrapped(packed) and labels.numel():
        low, high = (int(x) for x in labels.aminmax())
        blanks = torch.arange(count, device=device) >= target_lengths.unsqueeze(-1)
        if low < 0 or high >= size or bool(((labels == blank) != blanks).any()):
            raise ValueError(f"targets: expected labels from 0 to {size - 1} other than the blank, {blank}")
    return packed


MOST_STEPS = 64  # how far a step may skip, less one


def _only(state: Tensor, like: Tensor) -> Tensor:
    """Scores ``[..., S]`` that allow one state ``[...]`` alone."""
    at = torch.arange(like.shape[-1], device=like.device)
    return torch.zeros(at.shape, dtype=like.dtype, device=like.device).masked_fill(at != state.unsqueeze(-1), -math.inf)
