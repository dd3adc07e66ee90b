"""Sums over the derivations of sentences by weighted grammars in Chomsky normal form: the inside recursion.

N nonterminals A and P preterminals p, together M = N + P symbols X (nonterminals first), n words:

    beta(i, i, p) = s(i, i, p)                                   beta(i, i, A) = s(i, i, A) sum_p U(A, p) beta(i, i, p)
    beta(i, j, A) = s(i, j, A) sum_{X, Y} R(A, X, Y) sum_{i <= k < j} beta(i, k, X) beta(k + 1, j, Y)
    Z = sum_A root(A) beta(1, n, A)

with U the unary rules (a nonterminal that is a single word) and s the scores of symbols over spans; a grammar that
emits words has the words' probabilities in s(i, i, p). The low-rank form has R(A, X, Y) = sum_r H(A, r) L(r, X) G(r, Y)
and never writes R: O(T^3 R + T^2 M R). Sources: Baker (1979); Lari and Young (1990); Yang, Zhao and Tu (2021), "PCFGs
can do better"; Yang, Liu and Tu (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.kernels import cfg as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion
from probllm.math.semirings import LOG, Semiring

SAFE_RANGE = 30.0  # nats between the rules: a symbol or split that underflows then has no probability above 1e-290


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Z ``[width, *lead]`` of spans ``[width, *lead, T, T, M]``, rules ``[.., N, M, M]``, root ``[.., N]`` and unary
    ``[.., N, P]``; one launch for all spans of a width."""
    spans, rules, root, unary = parts
    flat = rules.flatten(-2).unsqueeze(-3)  # [.., 1, N, M * M]

    def rewrite(left: Tensor, right: Tensor) -> Tensor:
        pairs = semiring.matmul(left.transpose(-1, -2), right)  # [.., spans, M, M]
        return semiring.dot(flat, pairs.flatten(-2).unsqueeze(-2), -1)

    return _inside(semiring, spans, root, unary, lengths, rewrite, None, None)


def low_rank_inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Z ``[width, *lead]`` of spans ``[width, *lead, T, T, M]``, head ``[.., N, R]``, left and right ``[.., R, M]``,
    root ``[.., N]`` and unary ``[.., N, P]``."""
    spans, head, left, right, root, unary = parts

    def rewrite(first: Tensor, second: Tensor) -> Tensor:
        ranks = semiring.dot(first, second, -2)  # [.., spans, R]
        return semiring.dot(head.unsqueeze(-3), ranks.unsqueeze(-2), -1)

    def project(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda beta: semiring.dot(table[..., : beta.shape[-1]].unsqueeze(-3), beta.unsqueeze(-2), -1)

    return _inside(semiring, spans, root, unary, lengths, rewrite, project(left), project(right))


def _inside(
    semiring: Semiring, spans: Tensor, root: Tensor, unary: Tensor, lengths: Tensor,
    rewrite: Callable[[Tensor, Tensor], Tensor], as_left: Callable[[Tensor], Tensor] | None,
    as_right: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """``rewrite``: what children ``[.., spans, splits, X]`` make, ``[.., spans, N]``. ``as_left`` and ``as_right``:
    symbols ``[.., spans, M or N]`` as such children (whose absent preterminals are zeros if None)."""
    size, symbols = spans.shape[-3], spans.shape[-1]
    n = root.shape[-1]
    leaves = spans.diagonal(dim1=-3, dim2=-2).transpose(-1, -2)  # [.., T, M]
    words = leaves[..., n:]
    single = semiring.times(semiring.dot(unary.unsqueeze(-3), words.unsqueeze(-2), -1), leaves[..., :n])
    total = single[..., 0, :]
    beta = torch.cat([single, words], -1)

    def child(make: Callable[[Tensor], Tensor] | None, beta: Tensor) -> Tensor:
        if make is not None:
            return make(beta)
        if beta.shape[-1] == symbols:
            return beta
        return torch.cat([beta, semiring.zeros((*beta.shape[1:-1], symbols - n), beta)], -1)

    # as in ``probllm.math.span_trees``: by first leaf, narrowest first; by last leaf, widest first
    by_first, by_last = child(as_left, beta).unsqueeze(-2), child(as_right, beta).unsqueeze(-2)
    for width in range(2, size + 1):
        made = rewrite(by_first[..., :-1, :, :], by_last[..., 1:, :, :])
        scores = spans.diagonal(width - 1, dim1=-3, dim2=-2).transpose(-1, -2)[..., :n]
        beta = semiring.times(made, scores)
        by_first = torch.cat([by_first[..., :-1, :, :], child(as_left, beta).unsqueeze(-2)], -2)
        by_last = torch.cat([child(as_right, beta).unsqueeze(-2), by_last[..., 1:, :, :]], -2)
        total = torch.where((lengths == width).unsqueeze(-1), beta[..., 0, :], total)
    return semiring.dot(root, total, -1)


def word_scores(terminals: Tensor, words: Tensor, real: Tensor, nonterminals: int) -> Tensor:
    """Scores of symbols over spans ``[*batch, T, T, N + P]`` that hold the words' log weights; 0 off the diagonal.

    Args:
        terminals: ``[..., P, V]``.
        words: ``[*batch, T]`` long, from 0 to V - 1 where ``real`` ``[*batch, T]``; a preterminal has -inf elsewhere.
    """
    words = torch.where(real, words, 0)
    if terminals.dim() == 2:
        found = torch.nn.functional.embedding(words, terminals.t())  # [.., T, P]
    else:
        table = terminals.expand(*words.shape[:-1], *terminals.shape[-2:])
        index = words.unsqueeze(-2).expand(*words.shape[:-1], table.shape[-2], words.shape[-1])
        found = table.gather(-1, index).transpose(-1, -2)
    found = torch.where(real.unsqueeze(-1), found, torch.full_like(found, -torch.inf))
    spans = torch.diag_embed(found.transpose(-1, -2)).movedim(-3, -1)  # [.., T, T, P]
    return torch.cat([spans.new_zeros(*spans.shape[:-1], nonterminals), spans], -1)


def low_rank_rules(head: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Log weights of the rules ``[..., N, M, M]``, log of sum_r exp(head[A, r] + left[r, X] + right[r, Y])."""
    tables = [x.double() for x in (head, left, right)]
    highs = [_finite(x.detach().amax((-1, -2), keepdim=True)) for x in tables]
    tables = [x - high for x, high in zip(tables, highs, strict=True)]
    a, b, c = tables
    # products of probabilities are exact where nothing but zeros underflows
    if all(bool((x.detach().masked_fill(x == -torch.inf, 0) > -200).all()) for x in tables):
        pairs = (b.exp().unsqueeze(-1) * c.exp().unsqueeze(-2)).flatten(-2)
        mass = (a.exp() @ pairs).unflatten(-1, (b.shape[-1], c.shape[-1]))
        empty = mass == 0
        rules = torch.where(empty, -torch.inf, torch.where(empty, 1.0, mass).log())
    else:
        pairs = b.unsqueeze(-1) + c.unsqueeze(-2)
        rules = torch.stack([safe_logsumexp(row[..., None, None] + pairs, -3) for row in a.unbind(-2)], -3)
    return (rules + sum(highs).unsqueeze(-1)).to(head.dtype)  # type: ignore[union-attr]


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)


# ---- by the kernels


class _Kept(NamedTuple):
    """What the backward pass needs: tensors in float64, arrays for the kernel, and rows done by the twin."""

    shapes: tuple[torch.Size, ...]
    tables: Tensor  # [G, N, M, M], exp(rules - greatest)
    words: Tensor  # [B, T, M], scores of single words, leaves of a graph
    unary: Tensor  # [G, N, P], another
    logs: Tensor  # [B, T, M], log beta of single words by them
    leaves: Tensor  # [B, T, M], exp of them, scaled
    arrays: tuple[Any, ...]  # left_leaves, right_leaves, tables, transposed, root, lengths, starts, scales, passed
    log_z: Tensor  # [B]
    hard: list[tuple[int, tuple[Tensor, ...], Tensor]]  # row, its scores, its log Z


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, _Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, M]``, rules, root and unary as in ``inside``, by the kernels."""
    spans, rules, root, unary = grouped(scores)
    words = spans.diagonal(dim1=1, dim2=2).transpose(1, 2).contiguous().requires_grad_(keep)
    unary = unary.contiguous().requires_grad_(keep)
    with torch.set_grad_enabled(keep):
        logs = log_leaves(words, unary, root.shape[-1])
    found, flags, tables, leaves, arrays = scaled_inside(spans, rules, root, logs.detach(), lengths)
    hard = []
    for row in np.flatnonzero(flags).tolist():
        own = tuple(x.detach()[row if x.shape[0] > 1 else 0].double().requires_grad_(keep) for x in scores)
        with torch.set_grad_enabled(keep):
            value = inside(LOG, tuple(LOG.lift(x) for x in own), lengths[row])[0]
        found[row] = value.detach()
        hard.append((row, own, value))
    if not keep:
        return found, None
    shapes = tuple(x.shape for x in scores)
    return found, _Kept(shapes, tables, words, unary, logs, leaves, arrays, found, hard)


def grouped(scores: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spans, rules, root and unary in float64, the last three with G rows each: B, or 1 that all rows share."""
    spans, rules, root, unary = (x.detach().double() for x in scores)
    groups = max(x.shape[0] for x in (rules, root, unary))
    return spans, *(x.expand(groups, *x.shape[1:]) for x in (rules, root, unary))  # type: ignore[return-value]


class ScaledInside(NamedTuple):
    """What the kernel makes of scores."""

    log_z: Tensor  # [B]
    flags: Any  # [B], 1 where something may have been lost
    tables: Tensor  # [G, N, M, M], exp(rules - greatest)
    leaves: Tensor  # [B, T, M], exp of log beta of single words, scaled
    arrays: tuple[Any, ...]  # left_leaves, right_leaves, tables, transposed, root, lengths, starts, scales, passed


def scaled_inside(spans: Tensor, rules: Tensor, root: Tensor, logs: Tensor, lengths: Tensor) -> ScaledInside:
    """The inside pass over scores as ``grouped`` gives them, and log beta ``[B, T, M]`` of single words."""
    rows, size, _, m = spans.shape
    groups, n = root.shape
    width, n4 = -(-n // 8) * 8, -(-n // 4) * 4
    scales = logs.amax(-1)
    leaves = torch.where(scales.unsqueeze(-1) > -torch.inf, logs - _finite(scales).unsqueeze(-1), -torch.inf)
    greatest = _finite(rules.amax((-1, -2, -3)))
    top = _finite(root.amax(-1))
    tables = (rules - greatest[:, None, None, None]).exp()
    careful = not (within(rules, SAFE_RANGE) and within(root, SAFE_RANGE))
    flags = np.zeros(rows, np.int64)
    if careful:  # what is not allowed is an exact zero, and nothing else may come near one
        small = kernels.LITTLE
        if bool((_finite(rules - greatest[:, None, None, None]) < small).any()) or bool(
            (_finite(root - top[:, None]) < small).any()
        ):
            flags[:] = 1
        flags |= (_finite(leaves) < small).flatten(1).any(1).numpy()
    leaves = leaves.exp()

    last = torch.zeros(groups, m, m, width, dtype=torch.float64)  # [X, Z, A]
    last[..., :n] = tables.permute(0, 2, 3, 1)
    left_leaves = (leaves.view(groups, -1, m) @ last.flatten(2)).view(rows, size, m, width)
    right_leaves = (leaves.view(groups, -1, m) @ last[:, :n].transpose(1, 2).flatten(2)).view(rows, size, n, width)
    both = torch.zeros(groups, n4, width, width, dtype=torch.float64)
    both[:, :n, :n] = last[:, :n, :n]
    both = both.flatten(1, 2)
    starts, passed = room.zeros((rows, size, size, width)), room.zeros((rows, size, size, width))
    chart_scales, log_z = np.full((rows, size, size), -np.inf), np.empty(rows)
    arrays = (
        left_leaves.numpy(), right_leaves.numpy(), both.numpy(), both.transpose(1, 2).contiguous().numpy(),
        (root - top[:, None]).exp().numpy(), lengths.long().contiguous().numpy(), starts, chart_scales, passed,
    )  # fmt: skip
    run_shares(
        kernels.inside,
        (
            spans.contiguous().numpy(), leaves.contiguous().numpy(), scales.contiguous().numpy(), *arrays[:3],
            greatest.numpy(), *arrays[4:6], careful, starts, chart_scales, passed, log_z, flags,
        ),
        rows,
        0.05 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    found = torch.from_numpy(log_z) + (top if groups == rows else top.expand(rows))
    return ScaledInside(found, flags, tables, leaves, arrays)


def backward(kept: _Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights * the gradient of log Z in spans, rules, root and unary, in their shapes; summed over rows that share."""
    left_leaves, right_leaves, both, transposed, root, lengths, starts, scales, passed = kept.arrays
    rows, size, m = kept.leaves.shape
    groups, n = root.shape
    width = starts.shape[-1]
    weights = torch.where(kept.log_z > -torch.inf, weights.detach().double(), 0.0)
    easy = weights.clone()
    for row, _, _ in kept.hard:
        easy[row] = 0.0
    shares = groups if groups > 1 else max(1, torch.get_num_threads())
    mass, to_leaves = room.zeros((rows, size, size, m)), room.zeros((rows, size, m))
    to_left, to_right = room.zeros(left_leaves.shape), room.zeros(right_leaves.shape)
    to_both, to_root = room.zeros((shares, *both.shape[1:])), room.zeros((shares, n))
    run_shares(
        kernels.outside,
        (
            kept.leaves.contiguous().numpy(), left_leaves, right_leaves, both, transposed, root, lengths, starts,
            scales, passed, easy.numpy(), mass, to_leaves, to_left, to_right, to_both, to_root,
        ),
        rows,
        0.1 * rows * size**2 * (n**3 + size * n**2),
    )  # fmt: skip
    last = torch.zeros(groups, m, m, width, dtype=torch.float64)
    last[..., :n] = kept.tables.permute(0, 2, 3, 1)
    leaves, from_leaves = kept.leaves.view(groups, -1, m), torch.from_numpy(to_leaves).view(groups, -1, m)
    d_left = torch.from_numpy(to_left).view(groups, -1, m * width)
    d_right = torch.from_numpy(to_right).view(groups, -1, n * width)
    by_last = last[:, :n].transpose(1, 2).flatten(2)  # [Z, X A]
    from_leaves = from_leaves + d_left @ last.flatten(2).mT + d_right @ by_last.mT
    d_rules = (leaves.mT @ d_left).view(groups, m, m, width)
    d_rules[:, :n] += (leaves.mT @ d_right).view(groups, m, n, width).transpose(1, 2)
    totals = torch.from_numpy(to_both)
    totals = totals if groups > 1 else totals.sum(0, keepdim=True)
    d_rules[:, :n, :n] += totals.view(groups, -1, width, width)[:, :n, :n]
    rules = d_rules[..., :n].permute(0, 3, 1, 2) * kept.tables
    of_leaves = from_leaves.view(rows, size, m) * kept.leaves
    words, unary = torch.autograd.grad(kept.logs, (kept.words, kept.unary), of_leaves, retain_graph=True)
    spans = torch.from_numpy(mass)
    spans.diagonal(dim1=1, dim2=2).add_(words.transpose(1, 2))
    d_root = torch.from_numpy(to_root)
    found = [spans, rules, d_root if groups > 1 else d_root.sum(0, keepdim=True), unary]
    found = [x if x.shape == s else x.sum(0, keepdim=True) for x, s in zip(found, kept.shapes, strict=True)]
    for row, own, value in kept.hard:
        if bool(torch.isfinite(value)):
            parts = torch.autograd.grad(value, own, weights[row], retain_graph=True, allow_unused=True)
            for x, part in zip(found, parts, strict=True):
                if part is not None:
                    x[row if x.shape[0] > 1 else 0] += part
    return tuple(found)


def log_leaves(words: Tensor, unary: Tensor, n: int) -> Tensor:
    """log beta ``[B, T, M]`` of single words, from scores ``[B, T, M]`` and unary rules ``[G, N, P]``."""
    below = words[..., n:]
    if bool((unary == -torch.inf).all()):
        single = torch.full_like(words[..., :n], -torch.inf) + 0 * unary.nan_to_num(neginf=0.0).sum()
    else:
        single = safe_logsumexp(unary.unsqueeze(1) + below.unsqueeze(-2), -1) + words[..., :n]
    return torch.cat([single, below], -1)


def within(x: Tensor, nats: float) -> bool:
    """Whether the greatest and the least lie within a range; -inf lies in none."""
    return bool(x.amax() - x.amin() <= nats)


RECURSION = Recursion(inside, forward, backward)
