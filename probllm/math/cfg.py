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

import torch
from torch import Tensor

from probllm.math.chain_torch import safe_logsumexp
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring


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


RECURSION = Recursion(inside)
LOW_RANK = Recursion(low_rank_inside)


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
