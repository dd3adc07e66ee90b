"""A linear chain intersected with a finite automaton: the law of its tag sequences given that they are accepted.

    p(x) = exp(score(x)) [x is accepted] / Z

A state of the automaton together with the tag that led to it makes a state of a larger chain, in which every accepted
sequence has one path (Allauzen, Byrne and others call it composition; here both machines are deterministic, so nothing
is counted twice). Sums, best sequences and samples are that chain's; pairs that no prefix reaches are never formed.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math.automata import Automaton


def intersect(law: LinearChainCRF, automaton: Automaton) -> ConstrainedChain:
    """The law of a chain's tag sequences given that the automaton accepts them; its log Z keeps the mass of those.

    ``intersect(intersect(law, a), b)`` allows what both accept. Automata: ``probllm.math.automata``.
    """
    if isinstance(law, ConstrainedChain):
        automaton = law.automaton.both(automaton)
    return ConstrainedChain(law.emissions, law.transitions, law.start, law.end, law.lengths, automaton).expand(
        law.batch_shape
    )


class ConstrainedChain(LinearChainCRF):
    """A ``LinearChainCRF`` over the tag sequences that an automaton accepts.

    Args:
        emissions, transitions, start, end, lengths: as for ``LinearChainCRF``.
        automaton: over the same K tags; every sequence where missing. A sequence that ends at its length must end in
            an accepting state.
    Raises:
        TypeError, ValueError: as ``LinearChainCRF``; for an automaton over another number of tags.

    With N pairs of a state and a tag that leads to it, N <= Q K, a step costs N^2.
    """

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor | None = None,
        end: Tensor | None = None,
        lengths: Tensor | None = None,
        automaton: Automaton | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(emissions, transitions, start, end, lengths, validate_args)
        if automaton is None:
            automaton = Automaton(torch.zeros(1, self.num_tags, dtype=torch.long), torch.ones(1, dtype=torch.bool))
        if automaton.num_tags != self.num_tags:
            raise ValueError(f"automaton: expected {self.num_tags} tags, got {automaton.num_tags}")
        self.automaton = automaton

    def _with(self, **parts: Tensor) -> Self:
        plain = super()._with(**parts)
        plain.automaton = self.automaton
        return plain

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """State and tag ``[N]`` of each state of the larger chain; one that nothing reaches where none is left."""
        delta = self.automaton.delta.cpu()
        tags = torch.arange(self.num_tags).expand_as(delta)
        pairs = torch.stack([delta[delta >= 0], tags[delta >= 0]], -1).unique(dim=0)
        if not len(pairs):
            pairs = torch.tensor([[len(delta), 0]])
        device = self.emissions.device
        return pairs[:, 0].to(device), pairs[:, 1].to(device)

    def _larger(self) -> LinearChainCRF:
        """The chain over pairs of a state and a tag; made anew, so that no two results share a graph."""
        state, tag = self._pairs()
        delta, accepting = self.automaton.delta.to(state), self.automaton.accepting.to(state.device)
        after = torch.cat([delta, delta.new_full((1, self.num_tags), -1)])[:, tag]  # [Q + 1, N]
        ends = torch.cat([accepting, accepting.new_zeros(1)])[state]
        zero = self.emissions.new_zeros(self.num_tags)
        return LinearChainCRF(
            self.emissions[..., tag],
            torch.where(after[state] == state, self.transitions[..., tag, :][..., tag], -math.inf),
            torch.where(after[0] == state, (zero if self.start is None else self.start)[..., tag], -math.inf),
            torch.where(ends, (zero if self.end is None else self.end)[..., tag], -math.inf),
            self.lengths,
        )

    def _tags(self, paths: Tensor) -> Tensor:
        """Tags of paths ``[..., *own batch, T]`` of the larger chain; -1 stays."""
        tags = self._pairs()[1][paths.clamp_min(0)]
        return torch.where(paths < 0, paths, self._real(tags))

    def _log_z(self) -> Tensor:
        return self._larger()._log_z()

    def _expected(self) -> dict[str, Tensor]:
        found = self._larger()._expected()
        which = torch.nn.functional.one_hot(self._pairs()[1], self.num_tags).to(found["emissions"].dtype)  # [N, K]
        return {name: which.T @ x @ which if name == "transitions" else x @ which for name, x in found.items()}

    @property
    def pairwise_marginals(self) -> Tensor:
        """P(x_t = i, x_{t+1} = j) as ``[*batch, T - 1, K, K]``; 0 on padding."""
        found = self._larger().pairwise_marginals
        which = torch.nn.functional.one_hot(self._pairs()[1], self.num_tags).to(found.dtype)
        return self._grow(which.T @ found @ which)

    def _best(self) -> Tensor:
        return self._tags(self._larger()._best())

    def _k_best(self, k: int) -> Tensor:
        return self._tags(self._larger()._k_best(k))

    def _draw(self, n: int) -> Tensor:
        return self._tags(self._larger()._draw(n))

    def _score(self, value: Tensor) -> Tensor:
        accepted = self.automaton.accepts(value, self.lengths)
        return torch.where(accepted, super()._score(value), -math.inf)

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self.automaton, other.automaton, strict=True)):
            raise ValueError("q: expected a law over the sequences of the same automaton")
        return super()._matching(other)
