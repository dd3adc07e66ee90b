"""A chain whose step scores look two tags back: the law of a second-order tagger, exact in K^3 work a position.

    p(z) = exp(start[z1] + second[z1, z2] + sum_{t>2} transitions[z_{t-2}, z_{t-1}, z_t] + sum_t emissions[t, z_t]) / Z

With rows of log probabilities and no emissions it is a second-order Markov chain (Z = 1); with a hidden Markov model's
emission scores, the posterior of its states, and Z the probability of what was seen. See ``probllm.math.second_order``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probllm.math import second_order
from probllm.math.masks import mask_from_lengths


class SecondOrderCRF(TorchDistribution):  # type: ignore[misc]
    """A law over tag sequences ``[T]`` with scores of three tags in a row.

    Args:
        emissions: ``[*batch, T, K]`` scores of each tag at each position; ``-inf`` forbids, here and below.
        transitions: ``[..., K, K, K]`` scores of a tag after the two before it, ``[two back, one back, tag]``.
        second: ``[..., K, K]`` scores of the second tag after the first.
        start: ``[..., K]`` scores of the first tag. Leading dimensions broadcast to the batch.
        lengths: ``[*batch]`` long, each from 1 to T; all T if None.
    Raises:
        ValueError: for shapes that do not fit together, or lengths out of range.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)  # type: ignore[no-untyped-call]
    has_enumerate_support = False

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        second: Tensor,
        start: Tensor,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if emissions.ndim < 2:
            raise ValueError(f"emissions must be [*batch, length, tags], got shape {list(emissions.shape)}")
        length, tags = emissions.shape[-2:]
        for name, scores, order in (("transitions", transitions, 3), ("second", second, 2), ("start", start, 1)):
            if scores.shape[-order:] != (tags,) * order:
                raise ValueError(f"{name} must end in {[tags] * order} for {tags} tags, got {list(scores.shape)}")
        batch = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            emissions.shape[:-2], transitions.shape[:-3], second.shape[:-2], start.shape[:-1],
            () if lengths is None else lengths.shape,
        )  # fmt: skip
        if lengths is None:
            lengths = torch.full(batch, length, device=emissions.device)
        elif lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= length:
            raise ValueError(f"lengths must lie from 1 to {length}, got {int(lengths.min())} to {int(lengths.max())}")
        self.emissions = emissions.expand(*batch, length, tags)
        self.transitions, self.second, self.start = transitions, second, start
        self.lengths = lengths.expand(batch)
        super().__init__(batch, torch.Size([length]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        batch_shape = torch.Size(batch_shape)
        return type(self)(
            self.emissions.expand(*batch_shape, *self.emissions.shape[-2:]),
            self.transitions, self.second, self.start, self.lengths.expand(batch_shape),
        )  # fmt: skip

    @property
    def log_partition(self) -> Tensor:
        """Log Z, ``[*batch]``, in nats; ``-inf`` where every sequence is forbidden."""
        if "_log_partition" not in self.__dict__:
            self._log_partition = second_order.log_partition(*self._scores(self.emissions))
        return self._log_partition

    @property
    def marginals(self) -> Tensor:
        """Probability of each tag at each position, ``[*batch, T, K]``: the gradient of log Z in the emissions."""
        create_graph = torch.is_grad_enabled() and self.log_partition.requires_grad
        emissions = self.emissions if self.emissions.requires_grad else self.emissions.detach().requires_grad_()
        with torch.enable_grad():
            total = second_order.log_partition(*self._scores(emissions)).sum()
        return torch.autograd.grad(total, emissions, create_graph=create_graph)[0]

    @property
    def mode(self) -> Tensor:
        """A most probable sequence, ``[*batch, T]``: 0 at padding, -1 where every sequence is forbidden."""
        return second_order.viterbi(*self._scores(self.emissions))[1]

    def score(self, value: Tensor) -> Tensor:
        """Unnormalised log probability of tag sequences ``[..., *batch, T]``; padding does not count."""
        real = mask_from_lengths(self.lengths, value.shape[-1])
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        value = torch.where(real, value, 0).expand(*batch, -1)
        before, two_back = value[..., 1:-1], value[..., :-2]
        tags = self.emissions.shape[-1]
        parts = self.emissions.expand(*batch, -1, -1).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        steps = _look_up(self.start, value[..., :1])
        if value.shape[-1] > 1:
            steps = torch.cat([steps, _look_up(self.second.flatten(-2), value[..., :1] * tags + value[..., 1:2])], -1)
        if value.shape[-1] > 2:
            triples = (two_back * tags + before) * tags + value[..., 2:]
            steps = torch.cat([steps, _look_up(self.transitions.flatten(-3), triples)], -1)
        return torch.where(real, parts + steps, 0.0).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        score = self.score(value)
        possible = self.log_partition > -torch.inf
        return torch.where(possible, score - torch.where(possible, self.log_partition, 0.0), -torch.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        drawn = second_order.sample(*self._scores(self.emissions), count=shape.numel())
        return drawn.reshape(*shape, *self.batch_shape, *self.event_shape)

    def condition(self, allowed: Tensor) -> Self:
        """The scores with the tags forbidden where ``allowed`` (bool ``[*batch, T, K]``) is False, not renormalised.

        ``condition(allowed).log_partition - log_partition`` is the log probability of ``allowed``.
        """
        emissions = self.emissions.masked_fill(~allowed, -torch.inf)
        return type(self)(emissions, self.transitions, self.second, self.start, self.lengths)

    def log_prob_partial(self, allowed: Tensor) -> Tensor:
        """Log probability that every tag is an allowed one, ``[*batch]``."""
        return self.condition(allowed).log_partition - self.log_partition

    def _scores(self, emissions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return emissions, self.start, self.second, self.transitions, self.lengths


def _look_up(scores: Tensor, index: Tensor) -> Tensor:
    """``scores[..., index]`` for scores ``[..., N]`` of fewer leading dimensions, or sizes 1, than the index has."""
    if scores.ndim == 1:
        return scores[index]
    return scores.expand(*index.shape[:-1], scores.shape[-1]).gather(-1, index)
