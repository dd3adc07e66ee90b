"""The linear-chain conditional random field: a law over tag sequences.

    p(x) = exp( start(x_1) + sum_t e_t(x_t) + sum_t A_t(x_{t-1}, x_t) + end(x_n) ) / Z

Source: Lafferty, McCallum and Pereira (2001).
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from probllm.distributions.structure import StructuredDistribution, masked
from probllm.math.chain import Chain, as_chain, chain_expectations, chain_log_partition
from probllm.math.chain_paths import best_paths, sample_paths, top_k
from probllm.math.masks import mask_from_lengths


class LinearChainCRF(StructuredDistribution):
    """Law over tag sequences ``[T]`` with additive scores of tags and of neighbouring tags.

    Args:
        emissions: ``[..., T, K]`` score of each tag at each step, in nats; ``-inf`` forbids a tag.
        transitions: ``[K, K]``, ``[from, to]``, or ``[..., T - 1, K, K]``, or ``[..., 1, K, K]`` (own for each row,
            shared by its steps).
        start, end: ``[..., K]`` scores of the first and the last tag; 0 where missing.
        lengths: ``[...]`` number of real steps of each row, 1 to T; T where missing.
    Raises:
        TypeError: for scores that are not floating point.
        ValueError: for shapes that do not agree, lengths out of range, and NaN or +inf among the scores (when they are
            summed).
    Source: Lafferty, McCallum and Pereira (2001).

    Scores in bfloat16 or float16 are summed in float32. Batch dimensions broadcast.
    """

    _one_tag_a_step = True

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor | None = None,
        end: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._chain: Chain = as_chain(emissions, transitions, start, end, lengths)
        self.emissions, self.transitions, self.start, self.end, self.lengths = (
            emissions,
            transitions,
            start,
            end,
            lengths,
        )
        self._own_shape = self._chain.batch_shape
        self._kept = {}
        super().__init__(self._own_shape, torch.Size(emissions.shape[-2:-1]), validate_args=False)
        self._validate_args = validate_args is not False

    @property
    def num_tags(self) -> int:
        """K."""
        return self.emissions.shape[-1]

    @property
    def parts(self) -> dict[str, Tensor]:
        found = {"emissions": self.emissions, "transitions": self.transitions}
        if self.start is not None:
            found["start"] = self.start
        if self.end is not None:
            found["end"] = self.end
        return found

    def _with(self, **parts: Tensor) -> Self:
        given = {name: parts.get(name, getattr(self, name)) for name in ("emissions", "transitions", "start", "end")}
        dtype = given["emissions"].dtype
        given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
        return type(self)(**given, lengths=self.lengths)

    def _greatest(self) -> int:
        return self.num_tags - 1

    def _flat(self, x: Tensor, event_dims: int) -> Tensor:
        """[B, ...] -> [*stored batch, ...]."""
        return x.reshape(self._own_shape + x.shape[x.dim() - event_dims :])

    def _log_z(self) -> Tensor:
        return self._flat(chain_log_partition(self._chain), 0)

    def _expected(self) -> dict[str, Tensor]:
        # one group a row, so that expected transitions come row by row
        chain = self._chain
        rows, groups = chain.emissions.shape[0], chain.transitions.shape[0]
        if groups != rows:
            table = (
                chain.transitions.repeat_interleave(rows // groups, 0)
                if groups > 1
                else chain.transitions.expand(rows, -1, -1, -1)
            )
            chain = chain._replace(transitions=table)
        tags, pairs = chain_expectations(chain)
        dtype = self.emissions.dtype
        tags, pairs = self._flat(tags, 2).to(dtype), self._flat(pairs, 3).to(dtype)
        found = {"emissions": tags, "transitions": pairs, "start": tags[..., 0, :]}
        last = (chain.lengths.reshape(self._own_shape) - 1)[..., None, None]
        found["end"] = tags.gather(-2, last.expand(*self._own_shape, 1, self.num_tags)).squeeze(-2)
        return found

    @property
    def pairwise_marginals(self) -> Tensor:
        """P(x_t = i, x_{t+1} = j) as ``[*batch, T - 1, K, K]``; 0 on padding."""

        def make() -> Tensor:
            steps, k = self.emissions.shape[-2:]
            table = self.transitions if self.transitions.dim() > 2 else self.transitions.unsqueeze(0)
            table = (
                table.expand(*self._own_shape, steps - 1, k, k)
                if steps > 1
                else table[..., :0, :, :].expand(*self._own_shape, 0, k, k)
            )
            chain = as_chain(self.emissions, table, self.start, self.end, self.lengths)
            return self._flat(chain_expectations(chain)[1], 3).to(self.emissions.dtype)

        return self._grow(self._keep("pairwise", make))

    def _best(self) -> Tensor:
        return self._flat(best_paths(self._chain), 1)

    def _k_best(self, k: int) -> Tensor:
        return top_k(self.emissions, self.transitions, self.start, self.end, self.lengths, k=k)[1]

    def _draw(self, n: int) -> Tensor:
        return sample_paths(self._chain, n).reshape(n, *self._own_shape, *self.event_shape)

    def _mask(self) -> Tensor | None:
        lengths = self.lengths
        if lengths is None:
            return None
        mask: Tensor = self._keep("mask", lambda: mask_from_lengths(lengths, self.event_shape[0]))
        return mask

    def _real(self, value: Tensor) -> Tensor:
        mask = self._mask()
        return value if mask is None else torch.where(mask, value, torch.zeros_like(value))

    def _score(self, value: Tensor) -> Tensor:
        steps, k = self.emissions.shape[-2:]
        shape = torch.broadcast_shapes(value.shape[:-1], self._own_shape)
        value = value.expand(*shape, steps)
        mask = self._mask()

        def total(scores: Tensor, real: Tensor | None) -> Tensor:
            return (scores if real is None else torch.where(real, scores, torch.zeros_like(scores))).sum(
                -1, dtype=torch.float64
            )

        emissions = self.emissions.expand(*shape, steps, k).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        score = total(emissions, mask)
        if steps > 1:
            pair = value[..., :-1] * k + value[..., 1:]
            if self.transitions.dim() == 2:
                moves = self.transitions.reshape(-1)[pair]
            else:
                table = self.transitions.flatten(-2).expand(*shape, steps - 1, k * k)
                moves = table.gather(-1, pair.unsqueeze(-1)).squeeze(-1)
            score = score + total(moves, None if mask is None else mask[..., 1:])
        if self.start is not None:
            score = score + self.start.expand(*shape, k).gather(-1, value[..., :1]).squeeze(-1)
        if self.end is not None:
            if self.lengths is None:
                last = value[..., -1:]
            else:
                last = value.gather(-1, (self.lengths.long() - 1).unsqueeze(-1).expand(*shape, 1))
            score = score + self.end.expand(*shape, k).gather(-1, last).squeeze(-1)
        return score

    def _sum_parts(self, name: str, terms: Tensor) -> Tensor:
        return terms.sum((-1, -2, -3)[: {"emissions": 2, "transitions": 3, "start": 1, "end": 1}[name]])

    def _expand_part(self, name: str, x: Tensor) -> Tensor:
        if name == "emissions":
            return x.expand(*self.batch_shape, *x.shape[-2:])
        if name == "transitions":
            return x if x.dim() == 2 else x.expand(*self.batch_shape, *x.shape[-3:])
        return x.expand(*self.batch_shape, x.shape[-1])

    def _mean_of(self, scores: dict[str, Tensor]) -> Tensor:
        table = scores.get("transitions")
        steps = self.event_shape[0]
        shared = self.transitions.dim() == 2 or self.transitions.shape[-3] == 1
        if table is None or table.dim() == 2 or table.shape[-3] == 1 or not shared or steps <= 2:
            return super()._mean_of(scores)
        # scores that differ by step need this law's pairs step by step
        rest = super()._mean_of({name: x for name, x in scores.items() if name != "transitions"})
        forbidden = table == -math.inf
        pairs = self.pairwise_marginals.double()
        terms = (pairs * torch.where(forbidden, torch.zeros_like(table), table)).masked_fill(
            forbidden & (pairs > 0), -math.inf
        )
        return rest + terms.sum((-1, -2, -3))

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if self.lengths is not None or other.lengths is not None:
            steps = self.event_shape[0]
            ours = torch.as_tensor(steps) if self.lengths is None else self.lengths
            theirs = torch.as_tensor(steps) if other.lengths is None else other.lengths
            if bool((ours != theirs).any()):
                raise ValueError("q: expected a law with the same lengths")
        return other.parts

    def condition(
        self,
        allowed: Tensor | None = None,
        transitions: Tensor | None = None,
        start: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Self:
        """The law given that the sequence is allowed; its ``log_partition`` keeps the mass of what is left.

        Args:
            allowed: ``[..., T, K]`` bool, tags that each step may take (a partial label).
            transitions: ``[K, K]`` or ``[..., T - 1, K, K]`` bool, pairs that may follow each other (as BIO rules).
            start, end: ``[..., K]`` bool, tags that may come first and last.
        """
        scores: dict[str, Tensor] = {}
        k = self.num_tags
        for name, mask in (("emissions", allowed), ("transitions", transitions), ("start", start), ("end", end)):
            if mask is None:
                continue
            score = getattr(self, name)
            if score is None:
                score = self.emissions.new_zeros(k)
            if name == "transitions" and mask.dim() > 2 and score.dim() == 2:
                score = score.expand(*mask.shape[:-2], k, k)
            shown = "allowed" if name == "emissions" else name
            scores[name] = masked(shown, score, mask, 2 if name in ("emissions", "transitions") else 1)
        return self._conditioned(**scores)
