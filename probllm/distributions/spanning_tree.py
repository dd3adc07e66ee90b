"""A law over all dependency trees, crossing arcs included, exact by the matrix-tree theorem.

    p(heads) = exp(sum_d arcs[head_d, d]) / Z,        arcs[0, d] = root[d]

Koo et al. (2007), "Structured prediction models via the matrix-tree theorem". log Z and marginals by an elimination
that never subtracts (``probllm.math.matrix_tree``); the best trees by Chu-Liu-Edmonds and Lawler's partition; samples
by Wilson's algorithm.
"""

from __future__ import annotations

from typing import ClassVar

from probllm.distributions.dependency_tree import DependencyTreeLaw
from probllm.math import matrix_tree
from probllm.math.recursion import Recursion


class SpanningTree(DependencyTreeLaw):
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

    _projective: ClassVar[bool] = False
    _recursions: ClassVar[tuple[Recursion, Recursion]] = (matrix_tree.ONE_ROOT, matrix_tree.MANY_ROOTS)
    _sampler = staticmethod(matrix_tree.sample_trees)
