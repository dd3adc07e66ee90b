"""Exact sums over projective dependency trees: no two arcs cross, the root's coming from before the first word.

    left[i, j], right[i, j]: spans i..j headed by their last, their first word, all other words attached
    arc i -> j:  to_right[i, j] = arcs[i, j] + logsumexp_{i<=k<j} (right[i, k] + left[k+1, j]);  to_left: arcs[j, i]
    right[i, j] = logsumexp_{i<k<=j} (to_right[i, k] + right[k, j])
    left[i, j] = logsumexp_{i<=k<j} (left[i, k] + to_left[k, j])
    one root:   log Z = logsumexp_r (root[r] + left[1, r] + right[r, n])
    many roots: the same items with the root as a word 0 that only heads to its right

(Eisner 1996, "Three new probabilistic models for dependency parsing"; 2000, "Bilexical grammars and their cubic-time
parsing algorithms"): T^3 sums, and each tree is derived once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor, single_root: bool) -> Tensor:
    """The semiring's sum ``[width, *lead]`` over projective trees.

    Args:
        parts: lifted arcs ``[width, *lead, T, T]``, the roots' on the diagonal.
        lengths: ``[*lead]`` long.
    """
    (arcs,) = parts
    words = arcs.shape[-1]
    root = arcs.diagonal(0, -2, -1)
    one = semiring.ones(root.shape[1:], root[0]).unsqueeze(-1)
    # columns by width: rows are first words (ascending) and last words (descending, so that splits meet in order)
    right, left, to_right = one, one, one[..., :0]
    right_end, left_end, to_left_end = one, one, one[..., :0]
    for width in range(1, words):
        n = words - width
        gap = semiring.dot(right[..., :n, :], left_end[..., width:, :], -1)
        ahead = semiring.times(arcs.diagonal(width, -2, -1), gap)
        back = semiring.times(arcs.diagonal(-width, -2, -1), gap)
        to_right = torch.cat([to_right, F.pad(ahead, (0, width)).unsqueeze(-1)], -1)
        to_left_end = torch.cat([F.pad(back, (width, 0)).unsqueeze(-1), to_left_end], -1)
        headed_right = semiring.dot(to_right[..., :n, :], right_end[..., width:, :], -1)
        headed_left = semiring.dot(left[..., :n, :], to_left_end[..., width:, :], -1)
        right = torch.cat([right, F.pad(headed_right, (0, width)).unsqueeze(-1)], -1)
        left = torch.cat([left, F.pad(headed_left, (0, width)).unsqueeze(-1)], -1)
        right_end = torch.cat([F.pad(headed_right, (width, 0)).unsqueeze(-1), right_end], -1)
        left_end = torch.cat([F.pad(headed_left, (width, 0)).unsqueeze(-1), left_end], -1)
    total = _one_root(semiring, root, left, right) if single_root else _many_roots(semiring, root, left_end, right_end)
    last = (lengths - 1).expand(total.shape[1:-1])
    return total.gather(-1, last.unsqueeze(-1).expand(*total.shape[:-1], 1)).squeeze(-1)


def _one_root(semiring: Semiring, root: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``[..., T]``: the sum over the trees of the first n words, for each n."""
    words = root.shape[-1]
    headed = semiring.times(root, left[..., 0, :])
    totals = []
    for n in range(1, words + 1):
        first = torch.arange(n, device=root.device)
        totals.append(semiring.dot(headed[..., :n], right[..., first, n - 1 - first], -1))
    return torch.stack(totals, -1)


def _many_roots(semiring: Semiring, root: Tensor, left_end: Tensor, right_end: Tensor) -> Tensor:
    """As ``_one_root``."""
    words = root.shape[-1]
    done = semiring.ones(root.shape[1:-1], root[0]).unsqueeze(-1)  # [..., n]: the first n words under the root
    headed = root[..., :0]
    for n in range(1, words + 1):
        # the n-th word as a child of the root: its left part goes back to where the children before it end
        child = semiring.times(root[..., n - 1], semiring.dot(done, left_end[..., n - 1, words - n :], -1))
        headed = torch.cat([headed, child.unsqueeze(-1)], -1)
        total = semiring.dot(headed, right_end[..., n - 1, words - n :], -1)
        done = torch.cat([done, total.unsqueeze(-1)], -1)
    return done[..., 1:]


def _inside_one(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    return inside(semiring, parts, lengths, True)


def _inside_many(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    return inside(semiring, parts, lengths, False)


ONE_ROOT, MANY_ROOTS = Recursion(_inside_one), Recursion(_inside_many)
