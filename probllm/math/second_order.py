"""Recursions over chains of the second order, whose step scores look two tags back: K^3 work a position, never K^4.

    score(z) = start[z1] + second[z1, z2] + sum_{t>2} transitions[z_{t-2}, z_{t-1}, z_t] + sum_t emissions[t, z_t]
    alpha_t[j, k] = emissions[t, k] + logsumexp_i (alpha_{t-1}[i, j] + transitions[i, j, k])

The state is the pair of the last two tags (Thede and Harper 1999, "A second-order hidden Markov model for
part-of-speech tagging"), but pairs that disagree are never formed. On the CPU, ``kernels.second_order`` does it in
probability space where the scores range little enough; else, for second derivatives and under ``torch.func``, its torch
twin below, by one matrix product a step where that is certain to be exact and by logsumexp where it is not. All runs in
float64 and returns the caller's dtype; ``-inf`` forbids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math.chain import is_wrapped
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.kernels import second_order as kernels
from probllm.math.kernels.threads import run_shares

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
    scores = (emissions, start, second, transitions)
    if _is_compilable(*scores) and _ranges_little(*scores):
        flat = emissions.reshape(-1, *emissions.shape[-2:])
        total: Tensor = _LogPartition.apply(flat, *scores[1:], lengths.flatten())  # type: ignore[no-untyped-call]
        return total.reshape(emissions.shape[:-2]).to(emissions.dtype)
    return log_partition_torch(*scores, lengths)


def log_partition_torch(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
) -> Tensor:
    """``log_partition`` in torch operations."""
    first, alphas = forward(emissions, start, second, transitions, lengths)
    total = safe_logsumexp(first, -1)
    if alphas:
        total = torch.where(lengths == 1, total, safe_logsumexp(alphas[-1].flatten(-2), -1))
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
            step = safe_logsumexp(alpha.unsqueeze(-1) + transitions, -3)
        real = (t < lengths)[..., None, None]
        alphas.append(torch.where(real, step + emissions[..., t, None, :], alpha))
    return first, alphas


def viterbi(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The best score ``[*batch]`` and one best path ``[*batch, T]``: 0 at padding, -1 where every path is forbidden."""
    if _is_compilable(emissions, start, second, transitions):
        flat = emissions.reshape(-1, *emissions.shape[-2:])
        score = torch.empty(len(flat), dtype=torch.float64)
        path = torch.zeros(flat.shape[:-1], dtype=torch.long)
        arguments = (*_arrays(flat, start, second, transitions), _ints(lengths), score.numpy(), path.numpy())
        run_shares(kernels.viterbi, arguments, len(flat), flat.numel() * flat.shape[-1] ** 2)
        path = torch.where((score == -torch.inf).unsqueeze(-1), -1, path)
        return score.reshape(emissions.shape[:-2]).to(emissions.dtype), path.reshape(emissions.shape[:-1])
    return viterbi_torch(emissions, start, second, transitions, lengths)


def viterbi_torch(
    emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """``viterbi`` in torch operations."""
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
    if is_wrapped(transitions):
        return False
    scores = transitions.detach()
    span = scores.amax(-3) - scores.amin(-3)  # NaN or inf where something is forbidden
    return bool((span < SAFE_RANGE).all())


class _LogPartition(torch.autograd.Function):
    """log Z ``[B]`` of emissions ``[B, T, K]``, float64, by the kernels."""

    @staticmethod
    def forward(
        ctx: Any, emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor, lengths: Tensor
    ) -> Tensor:
        rows, length, tags = emissions.shape
        scores, *steps = _arrays(emissions, start, second, transitions)
        peaks = [table.max() for table in steps]
        tables = [np.exp(table - peak) for table, peak in zip(steps, peaks, strict=True)]
        q = np.empty((rows, length, tags))
        alpha, scales, log_z = np.empty((rows, length, tags, tags)), np.empty((rows, length)), np.empty(rows)
        arguments = (scores, *tables, _ints(lengths), q, alpha, scales, log_z)
        run_shares(kernels.forward, arguments, rows, emissions.numel() * tags**2)
        ctx.save_for_backward(emissions, start, second, transitions, lengths)
        ctx.passed = tables, q, alpha, scales, log_z
        n = _ints(lengths)
        taken = peaks[0] + peaks[1] * (n > 1) + peaks[2] * np.maximum(n - 2, 0)
        return torch.from_numpy(log_z + taken)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        emissions, start, second, transitions, lengths = ctx.saved_tensors
        scores = (emissions, start, second, transitions)
        if torch.is_grad_enabled():  # someone will differentiate what this returns
            total = log_partition_torch(*scores, lengths)
            total = (total * torch.where(total > -torch.inf, grad, 0.0)).nan_to_num(neginf=0.0)
            wanted = [x for x, needed in zip(scores, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(total.sum(), wanted, create_graph=True, allow_unused=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None)
        tables, q, alpha, scales, log_z = ctx.passed
        rows, length, k = scores[0].shape
        weights = np.where(log_z > -np.inf, grad.double().numpy(), 0.0)
        shares = torch.get_num_threads()
        marginals = np.zeros((rows, length, k))
        parts = [np.zeros((shares, *(k,) * order)) for order in (1, 2, 3)]
        arguments = (tables[0], tables[2], _ints(lengths), q, alpha, scales, weights, marginals, *parts)
        run_shares(kernels.backward, arguments, rows, 2 * scores[0].numel() * k**2)
        firsts, seconds, triples = (part.sum(0) for part in parts)
        gradients = (marginals, firsts, seconds, triples * tables[2])
        return (
            *(torch.from_numpy(x).reshape(s.shape).to(s.dtype) for x, s in zip(gradients, scores, strict=True)),
            None,
        )


def _is_compilable(emissions: Tensor, *steps: Tensor) -> bool:
    """Whether the kernels take these scores: plain, on the CPU, and one table for all rows of the batch."""
    shared = all(x.numel() == emissions.shape[-1] ** (order + 1) for order, x in enumerate(steps))
    return shared and not any(x.device.type != "cpu" or is_wrapped(x) for x in (emissions, *steps))


def _ranges_little(emissions: Tensor, *steps: Tensor) -> bool:
    """Whether nothing underflows in probability space.

    If no step is forbidden, every allowed tag can be reached from, and followed by, every other; so the forward and
    backward weights of allowed pairs range over no more than the scores of two steps do, whatever came before.
    """
    with torch.no_grad():
        spans = [x.max() - x.min() for x in steps]
        allowed = emissions[emissions > -torch.inf]
        if not len(allowed):
            return False
        finite_range = 2 * (allowed.max() - allowed.min() + sum(spans))
        return bool(finite_range < SAFE_RANGE)


def _arrays(*scores: Tensor) -> list[Any]:
    """Scores as contiguous float64 arrays, tables without their leading dimensions of size 1."""
    k = scores[0].shape[-1]
    shapes = [scores[0].shape, *((k,) * order for order in range(1, len(scores)))]
    return [x.detach().double().reshape(s).contiguous().numpy() for x, s in zip(scores, shapes, strict=True)]


def _ints(lengths: Tensor) -> Any:
    return lengths.flatten().long().contiguous().numpy()


def _safe_log(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, -torch.inf, torch.where(zero, 1.0, x).log())


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)
