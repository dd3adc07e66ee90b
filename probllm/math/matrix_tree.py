"""Exact sums over all dependency trees, crossing arcs included, without a subtraction.

    Z = det L,  L[d, d] = root[d] + sum_h A[h, d],  L[h, d] = -A[h, d],  A = exp(arcs)          (many roots)

(Tutte's matrix-tree theorem; Koo et al. 2007, "Structured prediction models via the matrix-tree theorem"). A
determinant cancels where scores range widely. Eliminating a word v instead by

    p = root[v] + sum_{h != v} A[h, v];    A[h, d] += A[h, v] A[v, d] / p;    root[d] += root[v] A[v, d] / p

only adds, multiplies and divides, so that each number keeps its digits, and Z is the product of the p (Grassmann,
Taksar and Heyman 1985; Alfa, Xue and Ye 2002, "Accurate computation of the smallest eigenvalue of a diagonally
dominant M-matrix"). One root: give each root the weight epsilon and keep the leading term of each series in epsilon,
as its order beside its logarithm. Z is then of order 1, or no tree has one root alone.

The marginals do not subtract either. Walk from a word to a head drawn by weight, and on. By Wilson's algorithm (1996)

    P(h is the head of d) is proportional to A[h, d] esc(h, d),  esc: the chance to meet the root before d from h

and esc for all pairs is an elimination of half of the words, for each half, then of half of the rest: 2 T^3 in all.
On the CPU all of this runs compiled, in probability space where that is certain to be exact, else in log space.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math.chain_torch import safe_logsumexp
from probllm.math.kernels import matrix_tree as kernels
from probllm.math.kernels import matrix_tree_log as log_kernels
from probllm.math.kernels import wilson
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import Log, Semiring

NO_ORDER = 1 << 20  # that of a term which is 0


class Leading(NamedTuple):
    """Leading terms exp(log) epsilon^order of series in epsilon, of one shape."""

    log: Tensor
    order: Tensor  # long; anything where log is -inf

    def times(self, other: Leading) -> Leading:
        return Leading(self.log + other.log, self.order + other.order)

    def over(self, other: Leading) -> Leading:
        """Divided by what may be 0 only where this is 0 too."""
        return Leading(self.log - finite(other.log), self.order - other.order)

    def sum(self, dim: int) -> Leading:
        order = torch.where(self.log == -math.inf, NO_ORDER, self.order)
        least = order.amin(dim, keepdim=True)
        log = torch.where(order == least, self.log, -math.inf)
        return Leading(safe_logsumexp(log, dim), least.squeeze(dim))

    def plus(self, other: Leading) -> Leading:
        logs = torch.broadcast_tensors(self.log, other.log)
        orders = torch.broadcast_tensors(self.order, other.order)
        return Leading(torch.stack(logs, -1), torch.stack(orders, -1)).sum(-1)

    def at(self, *index: object) -> Leading:
        """Both indexed alike, after all leading dimensions."""
        return Leading(self.log[(..., *index)], self.order[(..., *index)])  # type: ignore[index]


def finite(log: Tensor) -> Tensor:
    return torch.where(log == -math.inf, torch.zeros_like(log), log)


def _weights(arcs: Tensor, lengths: Tensor, single_root: bool) -> tuple[Tensor, Tensor, Leading]:
    """Arcs without the roots ``[*lead, T, T]`` and the roots' weights, -inf outside of the sentences.

    Words at padding become children of the root, without a score and beside the one root of a single-rooted tree.
    """
    words = arcs.shape[-1]
    real = torch.arange(words, device=arcs.device) < lengths.unsqueeze(-1)
    diagonal = torch.eye(words, dtype=torch.bool, device=arcs.device)
    root = torch.where(real, arcs.diagonal(0, -2, -1), torch.zeros_like(arcs[..., 0, :]))
    inner = real.unsqueeze(-1) & real.unsqueeze(-2) & ~diagonal
    arcs = torch.where(inner, arcs, torch.full_like(arcs, -math.inf))
    order = (real & single_root).long().expand(root.shape)
    return arcs, real, Leading(root, order)


def log_partition_torch(arcs: Tensor, lengths: Tensor, single_root: bool) -> Tensor:
    """log Z ``[*lead]`` in torch operations, float64.

    Args:
        arcs: ``[*lead, T, T]``, the roots' scores on the diagonal.
        lengths: ``[*lead]`` long.
    """
    scores, _, root = _weights(arcs.double(), lengths, single_root)
    # of each word: the root's weight, then those of the words
    log = torch.cat([root.log.unsqueeze(-2), scores], -2)
    peak = finite(log.detach().amax(-2, keepdim=True))  # huge scores of a like size keep their digits
    order = torch.cat([root.order.unsqueeze(-2), torch.zeros_like(scores, dtype=torch.long)], -2)
    table = Leading(log - peak, order)
    total, orders = peak.squeeze(-2).sum(-1), torch.zeros_like(lengths)
    for v in range(arcs.shape[-1] - 1, -1, -1):
        into = table.at(slice(0, v + 1), v)
        pivot = into.sum(-1)
        total, orders = total + pivot.log, orders + pivot.order
        if v == 0:
            break
        share = into.over(pivot.at(None)).at(slice(None), None)
        through = share.times(table.at(slice(v + 1, v + 2), slice(0, v)))
        table = table.at(slice(0, v + 1), slice(0, v)).plus(through)
    return torch.where(orders == int(single_root), total, torch.full_like(total, -math.inf))


def marginals_torch(arcs: Tensor, lengths: Tensor, single_root: bool) -> Tensor:
    """The probability of each arc ``[*lead, T, T]``, the roots' on the diagonal, each to its own digits.

    Arguments as for ``log_partition_torch``. Not differentiable; all 0 where no tree is allowed.
    """
    with torch.no_grad():
        return _marginals(arcs.double(), lengths, single_root)


def _marginals(arcs: Tensor, lengths: Tensor, single_root: bool) -> Tensor:
    words = arcs.shape[-1]
    scores, real, root = _weights(arcs, lengths, single_root)
    size = 1 << (words - 1).bit_length()
    device = arcs.device
    # of a walk from a word (row), where it comes first among the words kept (columns) and the root (last column);
    # one table for each set of words kept, all of one size: all words (and some more that nobody meets) at first
    spare = scores.new_full((*scores.shape[:-1], size - words), -math.inf)
    log = torch.cat([scores.transpose(-1, -2), spare, root.log.unsqueeze(-1)], -1)
    log = log - finite(log.amax(-1, keepdim=True))  # what all heads of a word share does not count
    log = torch.cat([log, log.new_full((*log.shape[:-2], size - words, size + 1), -math.inf)], -2)
    order = torch.zeros_like(log, dtype=torch.long)
    order[..., :words, -1] = root.order
    walk = Leading(log.unsqueeze(-3), order.unsqueeze(-3))
    kept = torch.arange(size, device=device).unsqueeze(0)
    while size > 1:
        half = size // 2
        swapped = [*range(half, size), *range(half), size]
        log = torch.stack([walk.log, walk.log[..., swapped]], -3).flatten(-4, -3)
        order = torch.stack([walk.order, walk.order[..., swapped]], -3).flatten(-4, -3)
        kept = torch.stack([kept, kept[:, swapped[:-1]]], 1).flatten(0, 1)
        walk = Leading(log, order)
        table = torch.arange(len(kept), device=device)
        for v in range(size - 1, half - 1, -1):
            rest = [*range(v), v + 1]  # the columns but v's
            leaving = walk.at(table, kept[:, v], slice(None)).at(rest)  # from v itself, [..., tables, columns]
            share = leaving.over(leaving.sum(-1).at(None)).at(None, slice(None))
            walk = walk.at(rest).plus(walk.at(slice(v, v + 1)).times(share))
        kept, size = kept[:, :half], half
    # tables are now one for each word d, in the order of `kept`; columns: d, the root
    of_word = kept.squeeze(-1).argsort()[:words]
    ways = walk.at(of_word, slice(0, words), slice(None))  # [..., d, h, 2]
    escape = ways.at(slice(None), slice(None), 1).over(ways.sum(-1))
    by_head = Leading(scores.transpose(-1, -2), torch.zeros_like(escape.order)).times(escape)
    diagonal = torch.eye(words, dtype=torch.bool, device=device)
    by_head = Leading(
        torch.where(diagonal, root.log.unsqueeze(-1), by_head.log),
        torch.where(diagonal, root.order.unsqueeze(-1), by_head.order),
    )
    total = by_head.sum(-1).at(None)
    share = by_head.over(total)
    found = torch.where(by_head.order == total.order, share.log.exp(), 0.0)
    possible = log_partition_torch(arcs, lengths, single_root) > -math.inf
    found = torch.where((possible.unsqueeze(-1) & real).unsqueeze(-1), found, 0.0)
    return found.transpose(-1, -2)


def scaled_weights(arcs: Tensor, lengths: Tensor, single_root: bool) -> tuple[Tensor, Tensor]:
    """Weights ``[B, T, T]`` of at most 1, the roots' on the diagonal, and the sum of the logs taken out ``[B]``.

    A maximum is taken out of the heads of each word; with one root, that of the words alone, then another of all roots.
    """
    words = arcs.shape[-1]
    real = torch.arange(words) < lengths.unsqueeze(-1)
    scores = arcs.detach().double().masked_fill(~(real.unsqueeze(-1) & real.unsqueeze(-2)), -math.inf)
    if not single_root:
        peak = finite(scores.amax(-2))
        return scores.sub_(peak.unsqueeze(-2)).exp_(), peak.sum(-1)
    root = scores.diagonal(0, -2, -1).clone()
    scores.diagonal(0, -2, -1).fill_(-math.inf)
    peak = finite(scores.amax(-2))
    root -= peak
    best_root = finite(root.amax(-1))
    scores.sub_(peak.unsqueeze(-2)).exp_().diagonal(0, -2, -1).copy_((root - best_root.unsqueeze(-1)).exp_())
    return scores, peak.sum(-1) + best_root


def _forward(
    parts: tuple[Tensor, ...], lengths: Tensor, keep: bool, *, single_root: bool
) -> tuple[Tensor, Tensor | None]:
    """log Z ``[B]`` and, if they are kept, the marginals ``[B, T, T]``."""
    (arcs,) = parts
    rows, words = len(lengths), arcs.shape[-1]
    arcs = arcs.expand(rows, words, words)
    weights, taken = scaled_weights(arcs, lengths, single_root)
    n = lengths.long().contiguous().numpy()
    log_z, good = np.empty(rows), np.empty(rows, np.bool_)
    found: Any = np.zeros((rows, words, words)) if keep else None
    arguments = (weights.numpy(), n, single_root)
    run_shares(kernels.log_partitions, (*arguments, log_z, good), rows, 0.3 * rows * words**3)
    if keep:
        run_shares(kernels.marginals, (*arguments, found, good), rows, 1.0 * rows * words**3)
    total = torch.from_numpy(log_z) + taken
    marginals = torch.from_numpy(found) if keep else None
    if not good.all():
        bad = torch.from_numpy(~good)
        scores, sizes, count = arcs.detach()[bad].double(), lengths[bad].long(), int(bad.sum())
        again = torch.zeros(count, dtype=torch.float64)
        expected = torch.zeros(count if keep else 0, words, words, dtype=torch.float64)
        wide = (scores.numpy(), sizes.numpy(), single_root, keep, again.numpy(), expected.numpy())
        run_shares(log_kernels.sums, wide, count, 30.0 * count * words**3)
        total[bad] = again
        if marginals is not None:
            marginals[bad] = expected
    return total, marginals


def _backward(kept: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    return (kept * weights[:, None, None],)


def _inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor, *, single_root: bool) -> Tensor:
    if not isinstance(semiring, Log) or type(semiring) is not Log:
        raise NotImplementedError(f"a determinant sums over trees in log space alone, not over {type(semiring)}")
    return log_partition_torch(parts[0].squeeze(0), lengths, single_root).unsqueeze(0)


ONE_ROOT, MANY_ROOTS = (
    Recursion(partial(_inside, single_root=single), partial(_forward, single_root=single), _backward)
    for single in (True, False)
)

PATIENCE = 64  # steps of one sample's walks, in T^2, before it is drawn by elimination


def sample_trees(scores: Tensor, lengths: Tensor, seeds: Tensor, *, single_root: bool) -> Tensor:
    """Exact samples of heads ``[N, B, T]``: 0 at padding, -1 where no tree is allowed.

    Args:
        scores: ``[B, T, T]`` float64 on the CPU, the roots' on the diagonal.
        lengths: ``[B]`` long.
        seeds: ``[N, B]`` long, one for each sample.
    """
    log_z, marginals = _forward((scores,), lengths, single_root, single_root=single_root)
    rows, words = len(lengths), scores.shape[-1]
    roots = torch.zeros(rows, words).double() if marginals is None else marginals.diagonal(0, -2, -1)
    possible = log_z > -math.inf
    heads = torch.zeros(len(seeds), int(possible.sum()), words, dtype=torch.long)
    given = (scores[possible].numpy(), lengths[possible].numpy(), single_root, roots[possible].numpy())
    arguments = (*given, seeds[:, possible].numpy(), PATIENCE, heads.numpy())
    run_shares(wilson.sample, arguments, heads.shape[1], 100.0 * heads.numel())
    found = torch.full((len(seeds), rows, words), -1)
    found[:, possible] = heads
    return found
