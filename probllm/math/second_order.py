"""Chains of the second order, whose step scores look two tags back, as ``math.higher_order`` has them: compiled.

    alpha_t[j, k] = emissions[t, k] + logsumexp_i (alpha_{t-1}[i, j] + transitions[i, j, k])

The state is the pair of the last two tags (Thede and Harper 1999, "A second-order hidden Markov model for
part-of-speech tagging"), but pairs that disagree are never formed. On the CPU ``kernels.second_order`` does it in
probability space where one table serves all rows and the scores range little enough; else one matrix product a step
where that is certain to be exact, and logsumexp where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import higher_order, room
from probllm.math.chain import is_wrapped
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.kernels import second_order as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.recursion import Recursion

SAFE_RANGE = 600.0  # nats: float64's exp covers 700, and a sum of products needs both factors


class _Kept(NamedTuple):
    """What the kernels' way back needs."""

    tables: list[Any]  # exponentials of start, second and transitions
    lengths: Any
    q: Any
    alpha: Any
    scales: Any
    log_z: Any


def forward(
    scores: tuple[Tensor, ...], lengths: Tensor, keep: bool
) -> tuple[Tensor, _Kept | tuple[tuple[Tensor, ...], Tensor] | None]:
    """log Z ``[B]`` of emissions, transitions, and scores of the first and the second tag."""
    emissions, transitions, start, second = scores
    if not (is_compilable(*scores) and _ranges_little(*scores)):
        with torch.set_grad_enabled(keep):
            leaves = [x.detach().double().requires_grad_(keep) for x in scores]
            first, alphas = filtered(leaves, lengths)
            total = safe_logsumexp(first, -1)
            if alphas:
                total = torch.where(lengths == 1, total, safe_logsumexp(alphas[-1].flatten(-2), -1))
        return total.detach(), (tuple(leaves), total) if keep else None
    rows, length, tags = emissions.shape
    array, *steps = arrays(emissions, start, second, transitions)
    peaks = [table.max() for table in steps]
    tables = [np.exp(table - peak) for table, peak in zip(steps, peaks, strict=True)]
    q, alpha = room.empty((rows, length, tags)), room.empty((rows, length, tags, tags))
    scales, log_z, n = np.empty((rows, length)), np.empty(rows), lengths.numpy()
    run_shares(kernels.forward, (array, *tables, n, q, alpha, scales, log_z), rows, emissions.numel() * tags**2)
    taken = peaks[0] + peaks[1] * (n > 1) + peaks[2] * np.maximum(n - 2, 0)
    return torch.from_numpy(log_z + taken), _Kept(tables, n, q, alpha, scales, log_z) if keep else None


def backward(kept: Any, weights: Tensor) -> tuple[Tensor, ...]:
    """Expected parts, each row of the batch times its weight."""
    if not isinstance(kept, _Kept):
        leaves, total = kept
        gradients: tuple[Tensor, ...] = torch.autograd.grad(
            total, leaves, weights.double(), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradients
    rows, length, k = kept.q.shape
    by = np.where(kept.log_z > -np.inf, weights.double().numpy(), 0.0)
    shares = torch.get_num_threads()
    marginals = np.zeros((rows, length, k))
    parts = [np.zeros((shares, *(k,) * order)) for order in (1, 2, 3)]
    arguments = (kept.tables[0], kept.tables[2], *kept[1:5], by, marginals, *parts)
    run_shares(kernels.backward, arguments, rows, 2 * kept.alpha.size)
    firsts, seconds, triples = (part.sum(0) for part in parts)
    found = (marginals, (triples * kept.tables[2])[None], firsts[None], seconds[None])
    return tuple(map(torch.from_numpy, found))


def filtered(scores: Sequence[Tensor], lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The forward scores of the first tag, ``[*batch, K]``, and of each pair of tags, T-1 times ``[*batch, K, K]``.

    A row keeps its last scores beyond its length. float64.
    """
    emissions, transitions, start, second = (x.double() for x in scores)
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
            step = safe_logsumexp(alpha.unsqueeze(-1) + transitions, -3)
        real = (t < lengths)[..., None, None]
        alphas.append(torch.where(real, step + emissions[..., t, None, :], alpha))
    return first, alphas


def best(scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """One best path ``[B, T]`` of scores that are compilable: 0 at padding, -1 where every path is forbidden."""
    emissions, transitions, start, second = scores
    score = torch.empty(len(emissions), dtype=torch.float64)
    path = torch.zeros(emissions.shape[:-1], dtype=torch.long)
    arguments = (*arrays(emissions, start, second, transitions), lengths.numpy(), score.numpy(), path.numpy())
    run_shares(kernels.viterbi, arguments, len(emissions), emissions.numel() * emissions.shape[-1] ** 2)
    return torch.where((score == -torch.inf).unsqueeze(-1), -1, path)


def draw(scores: tuple[Tensor, ...], lengths: Tensor, count: int) -> Tensor:
    """``[count, B, T]`` exact draws: filtered forward, drawn backward; padding and -1 as in ``best``."""
    emissions, transitions = scores[:2]
    length, tags = emissions.shape[-2:]
    with torch.no_grad():
        first, alphas = filtered(scores, lengths)
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
    if is_wrapped(transitions):
        return False
    scores = transitions.detach()
    span = scores.amax(-3) - scores.amin(-3)  # NaN or inf where something is forbidden
    return bool((span < SAFE_RANGE).all())


def is_compilable(emissions: Tensor, *tables: Tensor) -> bool:
    """Whether the kernels take these scores: plain, on the CPU, and one table for all rows of the batch."""
    shared = all(x.shape[0] == 1 for x in tables)
    return shared and not any(x.device.type != "cpu" or is_wrapped(x) for x in (emissions, *tables))


def _ranges_little(emissions: Tensor, *tables: Tensor) -> bool:
    """Whether nothing underflows in probability space.

    If no step is forbidden, every allowed tag can be reached from, and followed by, every other; so the forward and
    backward weights of allowed pairs range over no more than the scores of two steps do, whatever came before.
    """
    with torch.no_grad():
        spans = [x.max() - x.min() for x in tables]
        allowed = emissions[emissions > -torch.inf]
        if not len(allowed):
            return False
        finite_range = 2 * (allowed.max() - allowed.min() + sum(spans))
        return bool(finite_range < SAFE_RANGE)


def arrays(*scores: Tensor) -> list[Any]:
    """Scores as contiguous float64 arrays, tables without their leading dimensions of size 1."""
    k = scores[0].shape[-1]
    shapes = [scores[0].shape, *((k,) * order for order in range(1, len(scores)))]
    return [x.detach().double().reshape(s).contiguous().numpy() for x, s in zip(scores, shapes, strict=True)]


def _safe_log(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, -torch.inf, torch.where(zero, 1.0, x).log())


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)


RECURSION = Recursion(higher_order.inside, forward, backward)
