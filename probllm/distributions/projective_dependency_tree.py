"""A law over projective dependency trees (no two arcs cross), exact by Eisner's algorithm.

    p(heads) = exp(sum_d arcs[head_d, d]) / Z,        arcs[0, d] = root[d]

Eisner (1996), "Three new probabilistic models for dependency parsing". See ``probllm.math.eisner`` for the recursion.
"""

from __future__ import annotations

from typing import ClassVar

from probllm.distributions.dependency_tree import DependencyTreeLaw
from probllm.math import eisner
from probllm.math.recursion import Recursion


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
    _recursions: ClassVar[tuple[Recursion, Recursion]] = (eisner.ONE_ROOT, eisner.MANY_ROOTS)
    _sampler = staticmethod(eisner.sample_trees)
