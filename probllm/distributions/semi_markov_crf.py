"""The semi-Markov CRF: a law over the ways to cut a sequence into labelled segments.

    p(x) = exp(start[k_1] + sum_i segments[t_i, d_i, k_i] + sum_{i>1} transitions[k_{i-1}, k_i] + end[k_m]) / Z

Segment i holds the steps t_i .. t_i + d_i. Sarawagi and Cohen (2004), "Semi-Markov conditional random fields for
information extraction". See ``probllm.math.semimarkov`` for the recursion.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import semimarkov
from probllm.math.chain import is_wrapped


class SemiMarkovCRF(InsideDistribution):
    """A law over segmentations ``[T]``: 0 continues a segment, 1 + k starts one labelled k.

    Args:
        segments: ``[*batch, T, D, K]`` score of a segment of d + 1 steps that starts at t and is labelled k; ``-inf``
            forbids, here and below. Segments that do not fit into the sequence are none of its parts.
        transitions: ``[..., K, K]`` scores of a label after another, ``[from, to]``; 0 where missing.
        start, end: ``[..., K]`` scores of the first and the last segment's label; 0 where missing.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, lengths out of range, and NaN or +inf among the scores (when
            they are summed).
    """

    _dims: ClassVar[dict[str, int]] = {"segments": 3, "transitions": 2, "start": 1, "end": 1}
    _recursion = semimarkov.RECURSION

    def __init__(
        self,
        segments: Tensor,
        transitions: Tensor | None = None,
        start: Tensor | None = None,
        end: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(segments, Tensor):
            raise TypeError(f"segments: expected a tensor, got {type(segments).__name__}")
        if segments.dim() < 3 or 0 in segments.shape[-3:]:
            raise ValueError(f"segments: expected shape [..., T, D, K], none of them 0, got {list(segments.shape)}")
        steps, _, k = segments.shape[-3:]
        parts = {"segments": segments}
        for name, given in (("transitions", transitions), ("start", start), ("end", end)):
            event = (k,) * self._dims[name]
            scores = segments.new_zeros(event) if given is None else given
            if not isinstance(scores, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(scores).__name__}")
            if scores.dim() < len(event) or scores.shape[scores.dim() - len(event) :] != event:
                raise ValueError(
                    f"{name}: expected shape [..., {', '.join(map(str, event))}], got {list(scores.shape)}"
                )
            parts[name] = scores
        self._set_up(parts, lengths, steps, (steps,))

    @property
    def max_duration(self) -> int:
        """D."""
        return int(self.parts["segments"].shape[-2])

    def _with(self, **parts: Tensor) -> Self:
        given = {**self.parts, **parts}
        return type(self)(given["segments"], given["transitions"], given["start"], given["end"], self.lengths)

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        starts, label = used["segments"].amax(-2).max(-1)
        return torch.where(starts > 0, label + 1, 0)

    def _compilable(self) -> bool:
        return not any(x.device.type != "cpu" or is_wrapped(x) for x in (*self.parts.values(), self.lengths))

    def _scores(self) -> tuple[Tensor, ...]:
        return tuple(self._flat(name, name != "segments") for name in self._dims)

    def _best(self) -> Tensor:
        if not self._compilable():
            return super()._best()
        return semimarkov.viterbi(self._scores(), self._flat_lengths())[1].reshape(*self._own_shape, *self.event_shape)

    def _draw(self, n: int) -> Tensor:
        if not self._compilable():
            return super()._draw(n)
        drawn = semimarkov.sample(self._scores(), self._flat_lengths(), n)
        return drawn.reshape(n, *self._own_shape, *self.event_shape)

    def _greatest(self) -> int:
        return int(self.parts["segments"].shape[-1])

    def _score(self, value: Tensor) -> Tensor:
        lengths, value = torch.broadcast_tensors(self.lengths.unsqueeze(-1), value)
        steps, k = value.shape[-1], self._greatest()
        position = torch.arange(steps, device=value.device)
        starts = (value > 0) & (position < lengths)
        following = torch.where(starts, position, lengths)  # where the next segment starts, or the sequence ends
        following = torch.cat([following[..., 1:], lengths[..., :1]], -1).flip(-1).cummin(-1).values.flip(-1)
        index = following - position - 1
        label = (value - 1).clamp_min(0)
        table = self.parts["segments"].double()
        fits = index < table.shape[-2]
        index = index.clamp(0, table.shape[-2] - 1) * k + label
        table = table.flatten(-2).expand(*value.shape, -1)
        own = table.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        own = torch.where(fits, own, -math.inf)
        before = torch.where(starts, position, -1).cummax(-1).values  # the last start up to and with here
        previous = torch.cat([torch.full_like(before[..., :1], -1), before[..., :-1]], -1)
        pair = label.gather(-1, previous.clamp_min(0)) * k + label
        moves = self._table("transitions", pair)
        first = self._table("start", label[..., :1])
        last = self._table("end", label.gather(-1, before[..., -1:].clamp_min(0)))
        own = own + torch.where(previous >= 0, moves, 0.0)
        total = torch.where(starts, own, 0.0).sum(-1) + first.squeeze(-1) + last.squeeze(-1)
        return torch.where(starts[..., 0], total, -math.inf)

    def _table(self, name: str, index: Tensor) -> Tensor:
        """Scores of a part, flattened, at ``index`` ``[..., N]``."""
        table = self.parts[name].double().flatten(-self._dims[name])
        return table.expand(*index.shape[:-1], -1).gather(-1, index)

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if other.max_duration != self.max_duration:
            raise ValueError(f"q: expected a maximal duration of {self.max_duration}, got {other.max_duration}")
        return super()._matching(other)
