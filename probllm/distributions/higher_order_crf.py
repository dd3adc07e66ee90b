"""A chain whose step scores look n tags back: the law of an n-gram tagger, exact in K^(n+1) work a step.

    p(z) = exp(sum_{t<=n} start_t[z_1, ..., z_t] + sum_{t>n} transitions[z_{t-n}, ..., z_t] + sum_t e_t[z_t]) / Z

Order 1 is ``LinearChainCRF``, which is far faster and has transitions by step; order 2 is compiled
(``probllm.math.second_order``), the others run in torch (``probllm.math.higher_order``). With rows of log
probabilities and no emissions it is a Markov chain of order n (Z = 1); with a hidden Markov model's emission scores,
the posterior of its states, and Z the probability of what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import higher_order, second_order
from probllm.math.masks import mask_from_lengths


class HigherOrderCRF(InsideDistribution):
    """A law over tag sequences ``[T]`` with scores of n + 1 tags in a row.

    Args:
        emissions: ``[*batch, T, K]`` scores of each tag at each position; ``-inf`` forbids, here and below.
        transitions: ``[..., K, ..., K]`` scores of a tag after the n before it, the oldest first.
        starts: n tensors, ``[..., K]`` scores of the first tag, ``[..., K, K]`` of the second after the first, and so
            on to the n-th; their number is the order n >= 1.
        lengths: ``[...]`` long, each from 1 to T; all T where missing.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, no starts, lengths out of range, and NaN or +inf among the
            scores (when they are summed).
    """

    _one_tag_a_step = True
    _recursion = higher_order.RECURSION

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        starts: Sequence[Tensor],
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.order = len(starts)
        if not self.order:
            raise ValueError("starts: expected at least one tensor, got none")
        if emissions.dim() < 2 or 0 in emissions.shape[-2:]:
            raise ValueError(f"emissions: expected shape [..., T, K], got {list(emissions.shape)}")
        steps, k = emissions.shape[-2:]
        parts = {"emissions": emissions, "transitions": transitions}
        parts |= {f"start{t}": x for t, x in enumerate(starts, 1)}
        dims = {"emissions": 2, "transitions": self.order + 1, **{f"start{t + 1}": t + 1 for t in range(self.order)}}
        self._dims = dims  # type: ignore[misc]  # as many parts as the order says
        for name, x in parts.items():
            if name != "emissions" and x.shape[-dims[name] :] != (k,) * dims[name]:
                raise ValueError(
                    f"{name}: expected shape [..., {', '.join([str(k)] * dims[name])}], got {list(x.shape)}"
                )
        if self.order == 2:
            self._recursion = second_order.RECURSION
        self._set_up(parts, lengths, steps, (steps,))
        self._validate_args = validate_args is not False

    def _with(self, **parts: Tensor) -> Self:
        emissions, transitions, *starts = {**self.parts, **parts}.values()
        return type(self)(emissions, transitions, starts, self.lengths)

    def _best(self) -> Tensor:
        scores = self._flat_parts()
        if self.order != 2 or 0 in self._own_shape or not second_order.is_compilable(*scores):
            return super()._best()
        return self._grown(second_order.best(scores, self._flat_lengths()))

    def _draw(self, n: int) -> Tensor:
        if self.order != 2 or 0 in self._own_shape:
            return super()._draw(n)
        return self._grown(second_order.draw(self._flat_parts(), self._flat_lengths(), n), (n,))

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        return self._real(used["emissions"].argmax(-1))

    def _greatest(self) -> int:
        return self.parts["emissions"].shape[-1] - 1

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        value, real = torch.broadcast_tensors(torch.where(real, value, 0), real)
        emissions, transitions, *starts = self.parts.values()
        n, k = self.order, emissions.shape[-1]
        steps = [starts[t].flatten(-t - 1) for t in range(min(n, value.shape[-1]))]
        scores = emissions.double().expand(*value.shape, k).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        code = torch.zeros_like(value[..., :0])
        found = []
        for t, table in enumerate(steps):
            code = value[..., : t + 1] @ _powers(k, t + 1).to(value.device)
            found.append(_look_up(table, code.unsqueeze(-1)))
        if value.shape[-1] > n:
            code = value.unfold(-1, n + 1, 1) @ _powers(k, n + 1).to(value.device)
            found.append(_look_up(transitions.flatten(-n - 1), code))
        return torch.where(real, scores + torch.cat(found, -1), 0.0).sum(-1)

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if other.order != self.order:
            raise ValueError(f"q: expected a law of order {self.order}, got {other.order}")
        return super()._matching(other)


def _powers(k: int, n: int) -> Tensor:
    """What turns n tags, the oldest first, into the index of a flat table."""
    return torch.tensor([k ** (n - 1 - j) for j in range(n)])


def _look_up(scores: Tensor, index: Tensor) -> Tensor:
    """``scores[..., index]``, float64; leading dimensions of scores ``[..., N]`` broadcast to those of the index."""
    if scores.dim() == 1:
        return scores.double()[index]
    return scores.double().expand(*index.shape[:-1], scores.shape[-1]).gather(-1, index)
