"""Recursions over chains of the second order, whose step scores look two tags back: K^3 work a position, never K^4.

    score(z) = start[z1] + second[z1, z2] + sum_{t>2} transitions[z_{t-2}, z_{t-1}, z_t] + sum_t emissions[t, z_t]
    alpha_t[j, k] = emissions[t, k] + logsumexp_i (alpha_{t-1}[i, j] + transitions[i, j, k])

The state is the pair of the last two tags (Thede and Harper 1999, "A second-order hidden Markov model for
part-of-speech tagging"), but pairs that disagree are never formed. The sum over i is one matrix product a step wherever
that is certain to be exact (see ``_certified``), else a logsumexp. All runs in float64 and returns the caller's dtype;
``-inf`` forbids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAFE_RANGE = 600.0  # nats: float64's exp covers 700, and a sum of products needs both factors


def log_partition(emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor) -> Tensor:
    """Log of the sum of exp(score) over all tag sequences; differentiable twice.

    Args:
        emissions: ``[*batch, T, K]``.
        start: ``[..., K]`` scores of the first tag.
        second: ``[..., K, K]`` scores of the step from the first tag to the second.
        transitions: ``[..., K, K, K]`` scores of the tag two back, the tag before, the tag. Leading dimensions of all
            three broadcast to ``batch``.
        lengths: ``[*batch]`` long, each from 1 to T.
    Returns:
        ``[*batch]`` in nats, ``-inf`` (with gradient 0) where every sequence is forbidden.
    """
    first, alphas = forward(emissions, start, second, transitions, lengths)
    total = logsumexp(first, -1)
    if alphas:
        total = torch.where(lengths == 1, total, logsumexp(alphas[-1].flatten(-2), -1))
    return total.to(emissions.dtype)


def forward(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The forward scores of the first tag, ``[*batch, K]``, and of each pair of tags, T-1 times ``[*batch, K, K]``.

    A row keeps its last scores beyond its length. Arguments as for ``log_partition``; float64.
    """
    emissions, start, second, transitions = (x.double() for x in (emissions, start, second, transitions))
    first = start + emissions[..., 0, :]
    if emissions.shape[-2] == 1:
        return first, []
    alphas = [first.unsqueeze(-1) + second + emissions[..., 1, None, :]]
    certified = _certified(transitions)
    if certified:
        peak = transitions.detach().amax(-3)  # [..., K, K], so that no factor of the products is above 1
        factors = (transitions - peak.unsqueeze(-3)).exp()
    for t in range(2, emissions.shape[-2]):
        alpha = alphas[-1]
        if certified:
            top = _finite(alpha.detach().amax(-2))  # [*batch, K]: the best way to reach each tag
            sums = torch.einsum("...ij,...ijk->...jk", (alpha - top.unsqueeze(-2)).exp(), factors)
            step = _safe_log(sums) + top.unsqueeze(-1) + peak
        else:
            step = logsumexp(alpha.unsqueeze(-1) + transitions, -3)
        real = (t < lengths)[..., None, None]
        alphas.append(torch.where(real, step + emissions[..., t, None, :], alpha))
    return first, alphas


def viterbi(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The best score ``[*batch]`` and one best path ``[*batch, T]``: 0 at padding, -1 where every path is forbidden."""
    dtype, length = emissions.dtype, emissions.shape[-2]
    emissions, start, second, transitions = (x.detach().double() for x in (emissions, start, second, transitions))
    first = start + emissions[..., 0, :]
    score, only = first.max(-1)
    if length == 1:
        return score.to(dtype), torch.where(score == -torch.inf, -1, only).unsqueeze(-1)
    delta = first.unsqueeze(-1) + second + emissions[..., 1, None, :]
    arguments: list[Tensor] = []
    for t in range(2, length):
        best, argument = (delta.unsqueeze(-1) + transitions).max(-3)
        arguments.append(argument.flatten(-2))
        delta = torch.where((t < lengths)[..., None, None], best + emissions[..., t, None, :], delta)
    pair_score, pair = delta.flatten(-2).max(-1)
    score = torch.where(lengths == 1, score, pair_score)

    def two_back(t: int, pair: Tensor) -> Tensor:
        return arguments[t - 2].gather(-1, pair.unsqueeze(-1)).squeeze(-1)

    path = _walk_back(only, pair, two_back, lengths, length, delta.shape[-1])
    return score.to(dtype), torch.where((score == -torch.inf).unsqueeze(-1), -1, path)


def sample(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor, count: int
) -> Tensor:
    """``[count, *batch, T]`` exact draws: filtered forward, drawn backward; padding and -1 as in ``viterbi``."""
    length, tags = emissions.shape[-2:]
    with torch.no_grad():
        first, alphas = forward(emissions, start, second, transitions, lengths)
    only = _draw(first.expand(count, *first.shape))
    dead = (first == -torch.inf).all(-1)
    if length == 1:
        return torch.where(dead, -1, only).unsqueeze(-1)
    last_pairs = alphas[-1].flatten(-2)
    dead = torch.where(lengths == 1, dead, (last_pairs == -torch.inf).all(-1))
    by_pair = transitions.detach().double().flatten(-2).transpose(-1, -2)  # [..., K*K, K]: the tag two back comes last
    by_pair = by_pair.expand(count, *first.shape[:-1], *by_pair.shape[-2:])

    def two_back(t: int, pair: Tensor) -> Tensor:
        alpha = alphas[t - 2].transpose(-1, -2).expand(count, *first.shape, tags)
        return _draw(_pick(alpha, pair // tags) + _pick(by_pair, pair))

    path = _walk_back(only, _draw(last_pairs.expand(count, *last_pairs.shape)), two_back, lengths, length, tags)
    return torch.where(dead.unsqueeze(-1), -1, path)


def _walk_back(
    only: Tensor, pair: Tensor, two_back: Callable[[int, Tensor], Tensor], lengths: Tensor, length: int, tags: int
) -> Tensor:
    """The path ``[*batch, length]`` whose last pair of tags is ``pair`` (``only``: its tag where it has just one)."""
    columns = []
    for t in range(length - 1, 1, -1):
        inside = t < lengths
        columns.append(torch.where(inside, pair % tags, 0))
        pair = torch.where(inside, two_back(t, pair) * tags + pair // tags, pair)
    columns.append(torch.where(lengths > 1, pair % tags, 0))
    columns.append(torch.where(lengths > 1, pair // tags, only))
    return torch.stack(columns[::-1], -1)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[..., index, :]`` with one index a batch element."""
    return rows.gather(-2, index[..., None, None].expand(*index.shape, 1, rows.shape[-1])).squeeze(-2)


def _draw(scores: Tensor) -> Tensor:
    """Categorical draws from unnormalised log scores by Gumbel's trick; 0 where all are ``-inf``."""
    gumbel = -torch.empty_like(scores).exponential_().log()
    return (scores + gumbel).argmax(-1)


def _certified(transitions: Tensor) -> bool:
    """Whether the products of ``forward`` are exact whatever the emissions are.

    The largest term of a sum has alpha factor 1 and a transition factor of at least exp(-range), so it cannot underflow
    if the scores of one pair, over the tag two back, lie within ``SAFE_RANGE`` of each other and none is forbidden.
    """
    scores = transitions.detach()
    span = scores.amax(-3) - scores.amin(-3)  # NaN or inf where something is forbidden
    return bool((span < SAFE_RANGE).all())


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` with gradient 0, not NaN, where everything is ``-inf``."""
    top = _finite(x.detach().amax(dim, keepdim=True))
    return _safe_log((x - top).exp().sum(dim)) + top.squeeze(dim)


def _safe_log(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, -torch.inf, torch.where(zero, 1.0, x).log())


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)
