"""A law over parse trees in Chomsky normal form whose rules and spans are scored: a grammar's posterior, or a tree CRF.

    p(tree) = exp(root[A_1n] + sum rules[A, X, Y] + sum unary[A, p] + sum spans[i, j, X]) / Z

The sums run over the binary rules A -> X Y and the unary rules A -> p that the tree uses, and over its symbols X with
the words i to j that they cover. Nonterminals are the symbols 0 to N - 1, preterminals N to N + P - 1; a preterminal
covers one word. See ``probllm.math.cfg``. Sources: Baker (1979); Finkel, Kleeman and Manning (2008).
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import cfg, cfg_trees
from probllm.math.span_trees import are_trees, split_points, within_lengths


class GrammarTree(InsideDistribution):
    """A law over parse trees, as charts ``[T, T]``: 0, or 1 + label at (first, last) of a span.

    The label is the symbol, from 0 to N + P - 1. Where a nonterminal A covers one word, by way of a preterminal p, the
    two together are the label N + P + A P + p.

    Args:
        spans: ``[..., T, T, N + P]`` scores of each symbol over the words i to j, both counted; ``-inf`` forbids, here
            and below. Below the diagonal, and for preterminals off it, they are ignored.
        rules: ``[..., N, N + P, N + P]`` scores of binary rules, ``[parent, left child, right child]``.
        root: ``[..., N]`` scores of the topmost symbol.
        unary: ``[..., N, P]`` scores of a nonterminal that is a single preterminal; None forbids them all, and a
            sentence of one word then has no tree.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit, lengths out of range, and NaN or +inf among the scores (when summed).
    """

    _dims: ClassVar[dict[str, int]] = {"spans": 3, "rules": 3, "root": 1, "unary": 2}
    _recursion = cfg.RECURSION

    def __init__(
        self,
        spans: Tensor,
        rules: Tensor,
        root: Tensor,
        unary: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        n, p = check_grammar(root, rules)
        if spans.dim() < 3 or spans.shape[-3] != spans.shape[-2] or spans.shape[-2] < 1 or spans.shape[-1] != n + p:
            raise ValueError(f"spans: expected shape [..., T, T, {n + p}], got {list(spans.shape)}")
        unary = checked_unary(unary, n, p, spans)
        size = spans.shape[-2]
        self._set_up({"spans": spans, "rules": rules, "root": root, "unary": unary}, lengths, size, (size, size))

    @property
    def num_nonterminals(self) -> int:
        """N."""
        return self.parts["unary"].shape[-2]

    @property
    def num_preterminals(self) -> int:
        """P."""
        return self.parts["unary"].shape[-1]

    def _with(self, **parts: Tensor) -> Self:
        given = {**self.parts, **parts}
        return type(self)(given["spans"], given["rules"], given["root"], given["unary"], self.lengths)

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        n, p = self.num_nonterminals, self.num_preterminals
        spans = torch.where(within_lengths(self.lengths, used["spans"].shape[-2]).unsqueeze(-1), used["spans"], 0.0)
        upper, lower = spans[..., :n], spans[..., n:]
        above, below = upper.sum(-1) > 0.5, lower.sum(-1) > 0.5
        nonterminal, preterminal = upper.argmax(-1), lower.argmax(-1)
        both = n + p + nonterminal * p + preterminal
        label = torch.where(above, torch.where(below, both, nonterminal), n + preterminal)
        return torch.where(above | below, 1 + label, 0)

    def _greatest(self) -> int:
        n, p = self.num_nonterminals, self.num_preterminals
        return n + p + n * p

    def _real(self, value: Tensor) -> Tensor:
        return torch.where(within_lengths(self.lengths, value.shape[-1]), value, 0)

    def _best(self) -> Tensor:
        parts = self._plain_parts()
        return super()._best() if parts is None else self._grown(cfg_trees.best(parts, self._flat_lengths()))

    def _draw(self, n: int) -> Tensor:
        parts = self._plain_parts()
        if parts is None:
            return super()._draw(n)
        return self._grown(cfg_trees.draw(parts, self._flat_lengths(), n), (n,))

    def _score(self, value: Tensor) -> Tensor:
        value = self._real(value)
        n, p = self.num_nonterminals, self.num_preterminals
        m, size, lead = n + p, value.shape[-1], value.shape[:-2]
        spans, rules, root, unary = (x.double() for x in self.parts.values())
        lengths = self.lengths.expand(lead)
        present = value > 0
        label = (value - 1).clamp_min(0)
        pair = present & (label >= m)  # a nonterminal and its preterminal
        symbol = torch.where(pair, (label - m) // p, label)
        below = n + (label - m).clamp_min(0) % p
        leaf = torch.eye(size, dtype=torch.bool, device=value.device).expand(value.shape)
        wide = present & ~leaf
        sound = torch.where(wide, label < n, ~present | (label >= n)).flatten(-2).all(-1)
        sound = sound & are_trees(present, lengths)

        split = split_points(present).clamp(0, max(size - 2, 0))
        left = symbol.gather(-1, split)
        after = (split + 1).clamp_max(size - 1)
        right = symbol.transpose(-1, -2).gather(-1, after.transpose(-1, -2)).transpose(-1, -2)
        top = symbol[..., 0, :].gather(-1, (lengths - 1).unsqueeze(-1))
        sound = sound & (top < n).squeeze(-1)
        # what is no tree may hold any number: it is looked up at 0, and does not count
        parent = torch.where(wide, symbol, 0).clamp_max(n - 1)
        rule = torch.where(wide, (parent * m + left.clamp_max(m - 1)) * m + right.clamp_max(m - 1), 0)
        single = torch.where(pair, symbol * p + below - n, 0)

        by_symbol = spans.expand(*lead, size, size, m)
        terms = [
            torch.where(present, by_symbol.gather(-1, symbol.clamp_max(m - 1).unsqueeze(-1)).squeeze(-1), 0.0),
            torch.where(pair, by_symbol.gather(-1, below.unsqueeze(-1)).squeeze(-1), 0.0),
            torch.where(wide, _look_up(rules.flatten(-3), rule), 0.0),
            torch.where(pair, _look_up(unary.flatten(-2), single), 0.0),
        ]
        score = (
            sum(x.flatten(-2).sum(-1) for x in terms) + root.expand(*lead, n).gather(-1, top.clamp_max(n - 1))[..., 0]
        )
        return torch.where(sound, score, torch.full_like(score, -math.inf))


def check_grammar(root: Tensor, rules: Tensor) -> tuple[int, int]:
    """N and P of root ``[..., N]`` and rules ``[..., N, N + P, N + P]``.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if root.dim() < 1 or root.shape[-1] < 1:
        raise ValueError(f"root: expected shape [..., N], got {list(root.shape)}")
    n = root.shape[-1]
    if rules.dim() < 3 or rules.shape[-3] != n or rules.shape[-2] != rules.shape[-1] or rules.shape[-1] <= n:
        raise ValueError(f"rules: expected shape [..., {n}, {n} + P, {n} + P] with P >= 1, got {list(rules.shape)}")
    return n, rules.shape[-1] - n


def checked_unary(unary: Tensor | None, n: int, p: int, like: Tensor) -> Tensor:
    """Unary scores ``[..., N, P]``, all forbidden where None.

    Raises:
        ValueError: for another shape.
    """
    if unary is None:
        dtype = like.dtype if like.is_floating_point() else None  # the check of dtypes comes later
        return torch.full((n, p), -math.inf, dtype=dtype, device=like.device)
    if unary.dim() < 2 or unary.shape[-2:] != (n, p):
        raise ValueError(f"unary: expected shape [..., {n}, {p}], got {list(unary.shape)}")
    return unary


def _look_up(scores: Tensor, index: Tensor) -> Tensor:
    """``scores[..., index]`` of ``[..., S]`` with an index ``[..., T, T]``."""
    flat = index.flatten(-2)
    return scores.expand(*flat.shape[:-1], scores.shape[-1]).gather(-1, flat).view(index.shape)
