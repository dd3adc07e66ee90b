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

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probllm.math import room
from probllm.math.kernels import eisner as kernels
from probllm.math.kernels import eisner_lanes
from probllm.math.kernels.lanes import LANES
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import LOG, SAMPLING, Semiring

DRAWS_AT_ONCE = 64  # samples in one run of the recursion in torch operations


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


def _forward(
    parts: tuple[Tensor, ...], lengths: Tensor, keep: bool, *, single_root: bool
) -> tuple[Tensor, Tensor | None]:
    """log Z ``[B]`` and, if they are kept, the marginals ``[B, T, T]``."""
    arcs, rows, words = parts[0].detach(), len(lengths), parts[0].shape[-1]
    arcs = (arcs if arcs.dtype in (torch.float32, torch.float64) else arcs.double()).expand(rows, words, words)
    scores = arcs.contiguous().numpy()
    n = lengths.long().contiguous().numpy()
    log_z, good = np.empty(rows), np.empty(rows, np.bool_)
    marginals = room.zeros((rows if keep else 0, words, words), scores.dtype)
    arguments = (scores, n, np.argsort(-n, kind="stable"), single_root, keep, log_z, marginals, good)
    groups = -(-rows // LANES)
    run_shares(eisner_lanes.sums, arguments, groups, (1.6 if keep else 0.7) * groups * words**3)
    value, used = torch.from_numpy(log_z), torch.from_numpy(marginals)
    if not good.all():  # something ranges too widely: in log space
        wide = torch.from_numpy(~good)
        found, gradient = _by_gradient(LOG, arcs[wide].double(), lengths[wide], single_root)
        value[wide] = found
        if keep:
            used[wide] = gradient.to(used.dtype)
    return value, used if keep else None


def _by_gradient(semiring: Semiring, arcs: Tensor, lengths: Tensor, single_root: bool) -> tuple[Tensor, Tensor]:
    """The semiring's sum ``[*lead]`` and its gradient in the arcs, by the recursion in torch operations."""
    with torch.enable_grad():
        leaf = arcs.detach().requires_grad_()
        value = inside(semiring, (semiring.lift(leaf),), lengths, single_root).squeeze(0)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def _backward(kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    return (kept * weights.to(kept.dtype)[:, None, None],)


def sample_trees(scores: Tensor, lengths: Tensor, seeds: Tensor, *, single_root: bool) -> Tensor:
    """Exact samples of heads ``[N, B, T]``: 0 at padding, -1 where no tree is allowed.

    Args:
        scores: ``[B, T, T]`` float64 on the CPU, the roots' on the diagonal.
        lengths: ``[B]`` long.
        seeds: ``[N, B]`` long, one for each sample.
    """
    count, rows, words = len(seeds), len(lengths), scores.shape[-1]
    heads, good = torch.zeros(count, rows, words, dtype=torch.long), torch.empty(rows, dtype=torch.bool)
    arguments = (scores.contiguous().numpy(), lengths.numpy(), single_root, seeds.numpy(), heads.numpy(), good.numpy())
    run_shares(kernels.sample, arguments, rows, 0.3 * rows * words**3 + 2.0 * count * rows * words**2)
    if not bool(good.all()):
        wide, sizes = scores[~good], lengths[~good]
        for one in range(0, count, DRAWS_AT_ONCE):
            draws = heads[one : one + DRAWS_AT_ONCE]
            copies = wide.expand(len(draws), *wide.shape)
            value, used = _by_gradient(SAMPLING, copies, sizes, single_root)
            draws[:, ~good] = torch.where((value == -math.inf).unsqueeze(-1), -1, heads_of(used))
    return heads


def heads_of(used: Tensor) -> Tensor:
    """Heads ``[..., T]`` of trees whose arcs are 1 in ``[..., T, T]``, the roots' on the diagonal; not at padding."""
    row = used.argmax(-2)
    return torch.where(row == torch.arange(row.shape[-1], device=row.device), 0, row + 1)


def _inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor, *, single_root: bool) -> Tensor:
    return inside(semiring, parts, lengths, single_root)


ONE_ROOT, MANY_ROOTS = (
    Recursion(partial(_inside, single_root=single), partial(_forward, single_root=single), _backward)
    for single in (True, False)
)
