"""The laws of a hidden Markov tagger's story, for chains of the first and of the second order.

    p(tags, symbols) = p(tags) prod_t p(symbol_t | tag_t)

``chain`` is p(tags), and p(tags | symbols) once the symbols' scores are its emissions; ``SymbolsOfTags`` is
p(symbols | tags), and ``SymbolsOfChain`` p(symbols), the tags summed out exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints

from probllm.distributions.higher_order_crf import HigherOrderCRF
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math.masks import mask_from_lengths


class Rows(NamedTuple):
    """One number for each step of the story: log probabilities, counts, or Dirichlet concentrations."""

    initial: Tensor
    """``[..., K]``: the first tag."""
    second: Tensor | None
    """``[..., K, K]``: the second tag after the first; None for the first order."""
    transition: Tensor
    """``[..., K, K]`` (from, to) for the first order, ``[..., K, K, K]`` (two back, one back, tag) for the second."""
    emission: Tensor
    """``[..., K, S]``: the symbol of each tag."""


def chain(rows: Rows, emissions: Tensor, lengths: Tensor) -> LinearChainCRF | HigherOrderCRF:
    """The law of the tags ``[*batch, T]`` under log probabilities ``rows`` and emission scores ``[*batch, T, K]``."""
    emissions = emissions.to(rows.initial.dtype)  # the emissions' is the precision of the law
    if rows.second is not None:
        return HigherOrderCRF(emissions, rows.transition, [rows.initial, rows.second], lengths)
    transition = rows.transition.unsqueeze(-3) if rows.transition.ndim > 2 else rows.transition
    return LinearChainCRF(emissions, transition, rows.initial, lengths=lengths)


def emission_scores(emission: Tensor, symbols: Tensor) -> Tensor:
    """``[*batch, T, K]``: the score of each symbol ``[*batch, T]`` under each tag, ``[K, S]`` or ``[*batch, K, S]``."""
    columns = emission.transpose(-1, -2)
    if columns.ndim == 2:
        return columns[symbols]
    batch = torch.broadcast_shapes(columns.shape[:-2], symbols.shape[:-1])
    index = symbols.expand(*batch, symbols.shape[-1]).unsqueeze(-1).expand(*batch, symbols.shape[-1], columns.shape[-1])
    return columns.expand(*batch, *columns.shape[-2:]).gather(-2, index)


class _Symbols(TorchDistribution):  # type: ignore[misc]
    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_enumerate_support = False


class SymbolsOfTags(_Symbols):
    """Symbols ``[T]`` given the tags: each is drawn from its tag's row.

    Args:
        emission: ``[K, S]`` log probabilities, or ``[..., 1, K, S]``.
        tags: ``[*batch, T]``.
        real: ``[*batch, T]`` bool, False at padding.
    """

    def __init__(self, emission: Tensor, tags: Tensor, real: Tensor) -> None:
        self.emission, self.real = emission, real
        self.tags = torch.where(real, tags, 0)
        super().__init__(self.tags.shape[:-1], self.tags.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        shape = (*batch_shape, *self.event_shape)
        return type(self)(self.emission, self.tags.expand(shape), self.real.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        scores = emission_scores(self.emission, torch.where(self.real, value, 0))
        scores = scores.expand(*torch.broadcast_shapes(scores.shape[:-1], self.tags.shape), -1)
        own = scores.gather(-1, self.tags.expand(scores.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.real, own, 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        emission = self.emission.expand(*self.tags.shape[:-1], *self.emission.shape[-2:])
        rows = emission.gather(-2, self.tags.unsqueeze(-1).expand(*self.tags.shape, emission.shape[-1]))
        drawn = Categorical(logits=rows, validate_args=False).sample(sample_shape)
        return torch.where(self.real, drawn, 0)


class SymbolsOfChain(_Symbols):
    """Symbols ``[T]`` of a hidden chain, its tags summed out.

    Args:
        rows: log probabilities; leading dimensions as for ``SymbolsOfTags``.
        allowed: ``[*batch, T, K]`` scores, 0 for the tags that a position may have, ``-inf`` for others.
        lengths: ``[*batch]``.
    """

    def __init__(self, rows: Rows, allowed: Tensor, lengths: Tensor) -> None:
        self.rows, self.allowed, self.lengths = rows, allowed, lengths
        self.tags = chain(rows, allowed, lengths)
        super().__init__(self.tags.batch_shape, self.tags.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        allowed = self.allowed.expand(*batch_shape, *self.allowed.shape[-2:])
        return type(self)(self.rows, allowed, self.lengths.expand(batch_shape))

    def posterior(self, value: Tensor) -> LinearChainCRF | HigherOrderCRF:
        """The law of the tags given the symbols."""
        real = mask_from_lengths(self.lengths, value.shape[-1])
        scores = emission_scores(self.rows.emission, torch.where(real, value, 0))
        return chain(self.rows, self.allowed + scores, self.lengths)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.posterior(value).log_partition - self.tags.log_partition

    def sample(self, sample_shape: Any = ()) -> Tensor:
        tags = self.tags.sample(sample_shape)
        real = mask_from_lengths(self.lengths, tags.shape[-1]).expand(tags.shape)
        return SymbolsOfTags(self.rows.emission, tags, real).sample()
