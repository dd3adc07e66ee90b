"""A law over projective dependency trees (no two arcs cross), exact by Eisner's algorithm.

    p(heads) = exp(sum_d arcs[head_d, d]) / Z,        arcs[0, d] = root[d]

Eisner (1996), "Three new probabilistic models for dependency parsing". See ``probllm.math.eisner`` for the recursion.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from probllm.distributions.dependency_tree import DependencyTreeLaw
from probllm.math import eisner
from probllm.math.tree_search import search_trees


class ProjectiveDependencyTree(DependencyTreeLaw):
    """A law over heads ``[T]``: 0 is the root, words count from 1; 0 at padding.

    Args:
        arcs: ``[*batch, T, T]`` scores of an arc, ``[head, dependent]``, words counting from 0 here; the diagonal does
            not count; ``-inf`` forbids, here and below.
        root: ``[..., T]`` scores of a word as a child of the root.
        single_root: whether the root has just one child.
        lengths: ``[...]`` long, each from 1 to T; all T if None. Leading dimensions broadcast to the batch.
    Its one part ``arcs`` and ``marginals`` are ``[*batch, T, T]`` with the roots' on the diagonal.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, lengths out of range, and NaN or +inf among the scores (when
            they are summed).
    """

    _projective: ClassVar[bool] = True

    def __init__(
        self,
        arcs: Tensor,
        root: Tensor,
        single_root: bool = True,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(arcs, root, single_root, lengths, validate_args)
        self._recursion = eisner.ONE_ROOT if self.single_root else eisner.MANY_ROOTS

    def _draw(self, n: int) -> Tensor:
        scores = self._flat("arcs", False)
        search = partial(eisner.sample_trees, single_root=self.single_root)
        seeds = torch.randint(-(2**63), 2**63 - 1, (n, scores.shape[0]))
        found = search_trees(search, scores, self._flat_lengths(), seeds)
        return found.reshape(n, *self._own_shape, *self.event_shape)
