"""What laws over dependency trees share: their parts, the score of a tree, and which heads are a tree.

    p(heads) = exp(sum_d arcs[head_d, d]) / Z        over trees in which each word has one head, a word or the root

Both scores stand in one table: ``arcs[h, d]`` for word h as the head of word d, and on its diagonal, which no word as
its own head needs, the root's. A structure is heads ``[T]``: 0 is the root, words count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math.eisner import heads_of
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import Recursion
from probllm.math.shapes import broadcast_shapes
from probllm.math.tree_search import best_trees, search_trees


class DependencyTreeLaw(InsideDistribution):
    """A subclass sets what stands below without a value."""

    _dims: ClassVar[dict[str, int]] = {"arcs": 2}
    _projective: ClassVar[bool]
    _recursions: ClassVar[tuple[Recursion, Recursion]]  # with one root, and with any number
    _sampler: ClassVar[Callable[..., Tensor]]  # draws as ``tree_search.search_trees`` asks for them, given single_root

    def __init__(
        self,
        arcs: Tensor,
        root: Tensor,
        single_root: bool = True,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        for name, x in (("arcs", arcs), ("root", root)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            if not x.is_floating_point():
                raise TypeError(f"{name}: expected floating-point scores, got {x.dtype}")
        if arcs.dim() < 2 or arcs.shape[-1] == 0 or arcs.shape[-1] != arcs.shape[-2]:
            raise ValueError(f"arcs: expected shape [..., T, T] with T at least 1, got {list(arcs.shape)}")
        words = arcs.shape[-1]
        if root.dim() < 1 or root.shape[-1] != words:
            raise ValueError(f"root: expected shape [..., {words}], got {list(root.shape)}")
        if root.device != arcs.device:
            raise ValueError(f"root: expected device {arcs.device} as arcs, got {root.device}")
        try:
            batch = broadcast_shapes(arcs.shape[:-2], root.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"batch shapes do not broadcast: arcs {list(arcs.shape[:-2])}, root {list(root.shape[:-1])}"
            ) from None
        self.single_root = bool(single_root)
        self._recursion = self._recursions[0 if self.single_root else 1]
        if arcs.shape[:-2] != batch:  # a view would be one more step of the gradient, here and below
            arcs = arcs.expand(*batch, words, words)
        root = root.to(arcs.dtype)
        if root.shape[:-1] != batch:
            root = root.expand(*batch, words)
        # scattered: the graph keeps no tensor, so that two results of one law can be differentiated one after the other
        table = torch.diagonal_scatter(arcs, root, 0, -2, -1)
        self._set_up({"arcs": table}, lengths, words, (words,))

    def _with(self, **parts: Tensor) -> Self:
        arcs = {**self.parts, **parts}["arcs"]
        return type(self)(arcs, arcs.diagonal(0, -2, -1), self.single_root, self.lengths)

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        return self._real(heads_of(used["arcs"]))

    def _greatest(self) -> int:
        return int(self.parts["arcs"].shape[-1])

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        heads, real = torch.broadcast_tensors(torch.where(real, value, 0), real)
        words = heads.shape[-1]
        row = torch.where(heads == 0, torch.arange(words, device=heads.device), heads - 1)
        table = self.parts["arcs"].double().expand(*heads.shape, words)
        own = table.gather(-2, row.unsqueeze(-2)).squeeze(-2)
        total = torch.where(real, own, 0.0).sum(-1)
        return torch.where(is_tree(heads, real, self.single_root, self._projective), total, -math.inf)

    def _best(self) -> Tensor:
        return self._k_best(1)[0]

    def _k_best(self, k: int) -> Tensor:
        scores = self._flat("arcs", False)
        search = partial(best_trees, single_root=self.single_root, projective=self._projective)
        found = search_trees(search, scores, self._flat_lengths(), scores.new_empty(k, scores.shape[0]))
        return found.reshape(k, *self._own_shape, *self.event_shape)

    def _draw(self, n: int) -> Tensor:
        scores = self._flat("arcs", False)
        seeds = torch.randint(-(2**63), 2**63 - 1, (n, scores.shape[0]))
        search = partial(self._sampler, single_root=self.single_root)
        found = search_trees(search, scores, self._flat_lengths(), seeds)
        return found.reshape(n, *self._own_shape, *self.event_shape)

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if other.single_root != self.single_root:
            raise ValueError(f"q: expected a law with single_root={self.single_root}, got {other.single_root}")
        return super()._matching(other)


def is_tree(heads: Tensor, real: Tensor, single_root: bool, projective: bool) -> Tensor:
    """Whether heads ``[..., T]`` (0 where not ``real``) are a tree over the real words, ``[...]``."""
    words = heads.shape[-1]
    count = real.sum(-1, keepdim=True)
    inside = (heads <= count).all(-1)
    above = torch.cat([torch.zeros_like(heads[..., :1]), heads], -1)  # the root is its own head
    for _ in range(max(1, words.bit_length())):  # after i rounds: the word 2^i steps up
        above = above.gather(-1, above)
    tree: Tensor = inside & (above == 0).all(-1)
    if single_root:
        tree = tree & (((heads == 0) & real).sum(-1) == 1)
    if projective:
        tree = tree & ~_some_cross(heads, real)
    return tree


def _some_cross(heads: Tensor, real: Tensor) -> Tensor:
    """Whether two arcs cross, ``[...]``; those of the root come from before the first word."""
    word = torch.arange(1, heads.shape[-1] + 1, device=heads.device).expand_as(heads)
    low = torch.where(real, torch.minimum(heads, word), 0)
    high = torch.where(real, torch.maximum(heads, word), 0)
    a, b, c, d = low.unsqueeze(-1), high.unsqueeze(-1), low.unsqueeze(-2), high.unsqueeze(-2)
    return ((a < c) & (c < b) & (b < d)).flatten(-2).any(-1)
