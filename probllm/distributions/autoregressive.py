"""The law of a sequence that is drawn token by token, each given those before it, whatever gives the probabilities.

p(x) = prod_t p(x_t | x_1 .. x_{t-1}),   t = 1 .. n

n is given, so that the sequences of a length sum to 1, or it is where the token ``end`` first stands, at a given number
at most: all sequences that end, and those that reach the number, sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probllm.math.masks import mask_from_lengths
from probllm.math.shapes import broadcast_shapes


class Autoregressive(TorchDistribution):  # type: ignore[misc]
    """A law over token sequences, written as ``[T]``: the tokens, then padding (0 where it draws).

    Args:
        score: log probability of each token, ``[N, T]`` in nats, from sequences ``[N, T]`` and the number ``[N]`` of
            the row of the batch that each belongs to; what it gives behind a sequence's end does not count.
        draw: as many sequences as there are numbers of rows ``[N]``.
        lengths: ``[*batch]`` tokens, each from 1 to T; with ``end``, so many at most.
        steps: T.
        size: tokens go from 0 to ``size - 1``.
        end: the token that is the last of a sequence.
        known: a value ``[*batch, T]`` and what ``score`` gave for it: a program finds it while its weights are its own.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_enumerate_support = False

    def __init__(
        self,
        score: Callable[[Tensor, Tensor], Tensor],
        draw: Callable[[Tensor], Tensor],
        lengths: Tensor,
        steps: int,
        size: int,
        known: tuple[Tensor, Tensor] | None = None,
        end: int | None = None,
    ) -> None:
        self._score, self._draw, self.lengths, self.size, self._known = score, draw, lengths, size, known
        self.end = end
        self._rows = torch.arange(lengths.numel(), device=lengths.device).view(lengths.shape)
        super().__init__(lengths.shape, torch.Size([steps]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.size - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        shape = torch.Size(batch_shape)
        steps = self.event_shape[0]
        lengths = self.lengths.expand(shape)
        law = Autoregressive(self._score, self._draw, lengths, steps, self.size, self._known, self.end)
        law._rows = self._rows.expand(shape)
        return law

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability ``[...]`` of sequences ``[..., T]``, in nats; whatever stands on padding does not matter.

        Raises:
            ValueError: for another length than T, or a token out of range.
        """
        steps = self.event_shape[0]
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"value: expected shape [..., {steps}], got {list(value.shape)}")
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        mask = self._real(value.expand(*shape, steps))
        if self._known is not None and value is self._known[0]:
            return torch.where(mask, self._known[1], 0.0).sum(-1)
        value = torch.where(mask, value.expand(*shape, steps), 0)
        if value.numel() and not bool(((value >= 0) & (value < self.size)).all()):
            raise ValueError(
                f"value: expected tokens from 0 to {self.size - 1}, got {int(value.min())} to {int(value.max())}"
            )
        found = self._score(value.reshape(-1, steps), self._rows.expand(shape).reshape(-1)).view(*shape, steps)
        return torch.where(mask, found, 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Sequences ``[*sample, *batch, T]``, 0 on padding."""
        shape = (*torch.Size(sample_shape), *self.batch_shape)
        with torch.no_grad():
            drawn = self._draw(self._rows.expand(shape).reshape(-1)).view(*shape, *self.event_shape)
        return torch.where(self._real(drawn), drawn, 0)

    def _real(self, value: Tensor) -> Tensor:
        """Which tokens of values ``[..., T]`` belong to the sequence."""
        mask = mask_from_lengths(self.lengths, self.event_shape[0])
        if self.end is None:
            return mask.expand(value.shape)
        return mask & up_to_end(value, self.end)


def up_to_end(tokens: Tensor, end: int) -> Tensor:
    """``[..., T]`` bool: the tokens of ``[..., T]`` up to the first ``end``, that counted."""
    ends = tokens == end
    return ends.cumsum(-1) - ends.long() == 0
