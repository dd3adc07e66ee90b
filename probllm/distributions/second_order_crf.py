"""A chain whose step scores look two tags back: the law of a second-order tagger, exact in K^3 work a position.

    p(z) = exp(start[z1] + second[z1, z2] + sum_{t>2} transitions[z_{t-2}, z_{t-1}, z_t] + sum_t emissions[t, z_t]) / Z

With rows of log probabilities and no emissions it is a second-order Markov chain (Z = 1); with a hidden Markov model's
emission scores, the posterior of its states, and Z the probability of what was seen. See ``probllm.math.second_order``.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from probllm.distributions.structure import StructuredDistribution, masked
from probllm.math import second_order
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.chain_paths import top_k
from probllm.math.masks import mask_from_lengths
from probllm.math.shapes import broadcast_shapes

_ORDERS = {"emissions": 2, "transitions": 3, "second": 2, "start": 1}  # dimensions beside the batch's


class SecondOrderCRF(StructuredDistribution):
    """A law over tag sequences ``[T]`` with scores of three tags in a row.

    Args:
        emissions: ``[*batch, T, K]`` scores of each tag at each position; ``-inf`` forbids, here and below.
        transitions: ``[..., K, K, K]`` scores of a tag after the two before it, ``[two back, one back, tag]``.
        second: ``[..., K, K]`` scores of the second tag after the first.
        start: ``[..., K]`` scores of the first tag.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, lengths out of range, and NaN or +inf among the scores (when
            they are summed).
    """

    _one_tag_a_step = True

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        second: Tensor,
        start: Tensor,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if emissions.ndim < 2 or 0 in emissions.shape[-2:]:
            raise ValueError(f"emissions must be [*batch, length, tags], got shape {list(emissions.shape)}")
        length, tags = emissions.shape[-2:]
        self.emissions, self.transitions, self.second, self.start = emissions, transitions, second, start
        for name, order in _ORDERS.items():
            scores = getattr(self, name)
            if not scores.is_floating_point():
                raise TypeError(f"{name}: expected floating-point scores, got {scores.dtype}")
            if name != "emissions" and scores.shape[-order:] != (tags,) * order:
                raise ValueError(f"{name} must end in {[tags] * order} for {tags} tags, got {list(scores.shape)}")
        if lengths is None:
            lengths = torch.tensor(length, device=emissions.device)
        check_lengths(lengths, length)
        leading = {name: getattr(self, name).shape[:-order] for name, order in _ORDERS.items()}
        try:
            self._own_shape = broadcast_shapes(*leading.values(), lengths.shape)
        except RuntimeError:
            shapes = {name: list(shape) for name, shape in (*leading.items(), ("lengths", lengths.shape))}
            raise ValueError(f"batch shapes do not broadcast: {shapes}") from None
        self.lengths = lengths.long().expand(self._own_shape)
        self._kept = {}
        super().__init__(self._own_shape, torch.Size([length]), validate_args=False)
        self._validate_args = validate_args is not False

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _ORDERS}

    @property
    def marginals(self) -> Tensor:
        """Probability of each tag at each position, ``[*batch, T, K]``; 0 at padding."""
        return self._grow(self._keep("marginals", lambda: self._gradient(self._rows("emissions"))[0]))

    def condition(self, allowed: Tensor) -> Self:
        """The law given that the tags are among the allowed ones (bool ``[..., T, K]``), its mass kept."""
        return self._conditioned(emissions=masked("allowed", self.emissions, allowed, _ORDERS["emissions"]))

    # What the base derives the rest from.

    def _with(self, **parts: Tensor) -> Self:
        given = {**self.parts, **parts}
        return type(self)(given["emissions"], given["transitions"], given["second"], given["start"], self.lengths)

    def _greatest(self) -> int:
        return self.emissions.shape[-1] - 1

    def _rows(self, name: str) -> Tensor:
        """A part of its own for each row."""
        return self._expand_to(self._own_shape, name, self.parts[name])

    def _expand_part(self, name: str, x: Tensor) -> Tensor:
        return self._expand_to(self.batch_shape, name, x)

    @staticmethod
    def _expand_to(batch: torch.Size, name: str, x: Tensor) -> Tensor:
        return x.expand(*batch, *x.shape[x.ndim - _ORDERS[name] :])

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if bool((self.lengths != other.lengths).any()):
            raise ValueError("q: expected a law with the same lengths")
        return other.parts

    def _scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._keep("checked", self._check_scores)
        return self._rows("emissions"), self.start, self.second, self.transitions

    def _check_scores(self) -> bool:
        for name, scores in self.parts.items():
            if not is_wrapped(scores) and scores.numel() and not bool(scores.detach().amax() < math.inf):
                raise ValueError(f"{name}: scores must not be NaN or +inf (-inf forbids)")
        return True

    def _log_z(self) -> Tensor:
        emissions, start, second, transitions = self._scores()
        return second_order.log_partition(emissions.double(), start, second, transitions, self.lengths)  # rounded last

    def _gradient(self, emissions: Tensor, *steps: Tensor) -> list[Tensor]:
        """The gradient of log Z in the emissions and, where given, in a start, second and transitions for each row."""
        graph = torch.is_grad_enabled() and any(x.requires_grad for x in (emissions, *self._scores()[1:]))
        scores = [x if graph and x.requires_grad else x.detach().requires_grad_() for x in (emissions, *steps)]
        start, second, transitions = scores[1:] or self._scores()[1:]
        with torch.enable_grad():
            total = second_order.log_partition(scores[0], start, second, transitions, self.lengths).sum()
        found = torch.autograd.grad(total, scores, create_graph=graph, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, scores, strict=True)]

    def _expected(self) -> dict[str, Tensor]:
        names = ("emissions", "start", "second", "transitions")
        return dict(zip(names, self._gradient(*(self._rows(name) for name in names)), strict=True))

    def _best(self) -> Tensor:
        return second_order.viterbi(*self._scores(), self.lengths)[1]

    def _draw(self, n: int) -> Tensor:
        return second_order.sample(*self._scores(), self.lengths, count=n)

    def _k_best(self, k: int) -> Tensor:
        """By the first-order chain of pairs (tag before, tag), the first pair's tag before being 0."""
        emissions = self._scores()[0]
        start, second, transitions = (self._rows(name) for name in ("start", "second", "transitions"))
        length, tags = emissions.shape[-2:]
        first = torch.full_like(second, -math.inf)
        first[..., 0, :] = start
        pairs = emissions.unsqueeze(-2).expand(*emissions.shape[:-1], tags, tags).flatten(-2)
        agree = torch.eye(tags, dtype=torch.bool, device=emissions.device)[:, :, None]  # [j, j', k]
        steps = []
        for scores in (second.unsqueeze(-3).expand_as(transitions), transitions):  # [i, j, k]: from (i, j) to (j, k)
            table = torch.where(agree, scores.unsqueeze(-2), -math.inf)  # [i, j, j', k]
            steps.append(table.flatten(-4, -3).flatten(-2))
        table = (
            torch.stack([steps[0], *[steps[1]] * (length - 2)][: length - 1], -3)
            if length > 1
            else steps[1][..., None, :, :]
        )
        found = top_k(pairs, table, first.flatten(-2), None, self.lengths, k=k)[1]
        return torch.where(found >= 0, found % tags, -1)

    def _real(self, value: Tensor) -> Tensor:
        return torch.where(mask_from_lengths(self.lengths, value.shape[-1]), value, 0)

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        shape = broadcast_shapes(value.shape, real.shape)
        z, tags = torch.where(real, value, 0).expand(shape), self.emissions.shape[-1]
        score = self.emissions.double().expand(*shape, tags).gather(-1, z.unsqueeze(-1)).squeeze(-1)
        steps = [
            _look_up(self.start, z[..., :1]),
            _look_up(self.second.flatten(-2), z[..., :1] * tags + z[..., 1:2]) if shape[-1] > 1 else score[..., :0],
            _look_up(self.transitions.flatten(-3), (z[..., :-2] * tags + z[..., 1:-1]) * tags + z[..., 2:]),
        ]
        return torch.where(real, score + torch.cat(steps, -1), 0.0).sum(-1)

    def _sum_parts(self, name: str, terms: Tensor) -> Tensor:
        return terms.flatten(-_ORDERS[name]).sum(-1)


def _look_up(scores: Tensor, index: Tensor) -> Tensor:
    """``scores[..., index]``, float64; leading dimensions of scores ``[..., N]`` broadcast to those of the index."""
    if scores.ndim == 1:
        return scores.double()[index]
    return scores.double().expand(*index.shape[:-1], scores.shape[-1]).gather(-1, index)
