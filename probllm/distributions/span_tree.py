"""A law over binary trees with labelled spans: the tree CRF of span-based constituency parsing.

    p(tree) = exp(sum of spans[i, j, k] over the tree's spans (i, j) with label k) / Z

A tree over n leaves has 2n - 1 spans: each leaf is one, and each wider span is two of the others side by side; so there
are Catalan(n - 1) K^(2n - 1) trees. See ``probllm.math.span_trees``. Source: Stern, Andreas and Klein (2017); Zhang,
Zhou and Li (2020).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import span_trees
from probllm.math.span_trees import are_trees, within_lengths


class SpanTree(InsideDistribution):
    """A law over labelled binary trees, as charts ``[T, T]``: 0, or 1 + label at (first, last) of a span.

    Args:
        spans: ``[..., T, T, K]`` scores of label k on the leaves i to j, both counted, ``spans[i, j, k]``; ``-inf``
            forbids. What lies below the diagonal (j < i) or beyond the length is ignored.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit, lengths out of range, and NaN or +inf among the scores (when summed).
    """

    _dims: ClassVar[dict[str, int]] = {"spans": 3}
    _recursion = span_trees.RECURSION

    def __init__(self, spans: Tensor, lengths: Tensor | None = None, validate_args: bool | None = None) -> None:
        if spans.dim() < 3 or spans.shape[-3] != spans.shape[-2] or 0 in spans.shape[-3:]:
            raise ValueError(f"spans: expected shape [..., T, T, K], got {list(spans.shape)}")
        size = spans.shape[-2]
        self._set_up({"spans": spans}, lengths, size, (size, size))

    def _with(self, **parts: Tensor) -> Self:
        return type(self)(parts["spans"], self.lengths)

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        spans = self._inside(used["spans"])
        return torch.where(spans.sum(-1) > 0.5, 1 + spans.argmax(-1), 0)

    def _inside(self, used: Tensor) -> Tensor:
        """Marks of parts, 0 at padding and below the diagonal."""
        return torch.where(within_lengths(self.lengths, used.shape[-2]).unsqueeze(-1), used, 0.0)

    def _counting(self, name: str, scores: Tensor) -> Tensor:
        return self._inside(scores)

    def _greatest(self) -> int:
        return self.parts["spans"].shape[-1]

    def _real(self, value: Tensor) -> Tensor:
        return torch.where(within_lengths(self.lengths, value.shape[-1]), value, 0)

    def _best(self) -> Tensor:
        parts = self._plain_parts()
        return super()._best() if parts is None else self._grown(span_trees.best(parts[0], self._flat_lengths()))

    def _draw(self, n: int) -> Tensor:
        parts = self._plain_parts()
        if parts is None:
            return super()._draw(n)
        return self._grown(span_trees.draw(parts[0], self._flat_lengths(), n), (n,))

    def _score(self, value: Tensor) -> Tensor:
        value = self._real(value)
        present = value > 0
        spans = self.parts["spans"].double()
        found = spans.expand(*value.shape, spans.shape[-1]).gather(-1, (value - 1).clamp_min(0).unsqueeze(-1))
        score = torch.where(present, found.squeeze(-1), 0.0).flatten(-2).sum(-1)
        trees = are_trees(present, self.lengths.expand(present.shape[:-2]))
        return torch.where(trees, score, torch.full_like(score, -torch.inf))
