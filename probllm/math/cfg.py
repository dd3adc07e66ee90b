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

import torch
from torch import Tensor

from probllm.math import cfg_positions, cfg_scaled
from probllm.math.cfg_scaled import finite
from probllm.math.cfg_torch import inside
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.recursion import Recursion


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
    highs = [finite(x.detach().amax((-1, -2), keepdim=True)) for x in tables]
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


# ---- by the kernels


class _Part(NamedTuple):
    """Rows that went one way, and what its backward pass needs."""

    tried: Tensor  # [B] bool
    done: Tensor  # [B] bool, of these
    backward: Callable[[Any, Tensor], tuple[Tensor, ...]]
    kept: Any


class _Kept(NamedTuple):
    log_z: Tensor  # [B]
    parts: list[_Part]


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, _Kept | None]:
    """log Z ``[B]`` of spans ``[B, T, T, M]``, rules, root and unary as in ``cfg_torch.inside``, with 1 or B rows.

    Rows whose scores range too widely for one arithmetic go on to the next.
    """
    rows = len(lengths)
    log_z, left, parts = torch.empty(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.bool), []
    narrow = all(x.dtype != torch.float64 for x in scores)
    for arithmetic in (cfg_positions.SINGLE, cfg_positions.DOUBLE) if narrow else (cfg_positions.DOUBLE,):
        tried = left
        log_z[tried], flags, kept = cfg_positions.forward(arithmetic, *_rows(scores, lengths, tried), keep)
        left = torch.zeros_like(tried)
        left[tried] = torch.from_numpy(flags != 0)
        parts.append(_Part(tried, tried & ~left, cfg_positions.backward, kept))
        if not flags.any():
            break
    else:
        log_z[left], rest = cfg_scaled.forward(*_rows(scores, lengths, left), keep)
        parts.append(_Part(left, left, cfg_scaled.backward, rest))
    return log_z, _Kept(log_z, parts) if keep else None


def backward(kept: _Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights * the gradient of log Z in spans, rules, root and unary, in their shapes; summed over rows that share."""
    weights = torch.where(kept.log_z > -torch.inf, weights.detach().double(), 0.0)
    first, *others = kept.parts
    found = first.backward(first.kept, torch.where(first.done, weights, 0.0))
    for part in others:
        more = part.backward(part.kept, torch.where(part.done, weights, 0.0)[part.tried])
        found = tuple(x.to(y.dtype) for x, y in zip(found, more, strict=True))
        for x, y in zip(found, more, strict=True):
            if x.shape[0] == len(weights):
                x[part.tried] += y
            else:
                x += y
    return found


def _rows(scores: tuple[Tensor, ...], lengths: Tensor, which: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Scores and lengths of some rows; what all rows share stays shared."""
    if bool(which.all()):
        return scores, lengths
    return tuple(x[which] if x.shape[0] == len(which) else x for x in scores), lengths[which]


RECURSION = Recursion(inside, forward, backward)
