"""The torch twin of the compiled chain recursions: the reference in the tests, the GPU's path, and all second derivatives.

Plain differentiable torch operations with no branch on a value, so that it runs under autograd of any order, ``torch.func`` and
``vmap``. Scores come in the shapes of ``chain.Chain``: emissions [B, T, K], transitions [G, S, K, K], start and end [B, K], lengths
[B], where the rows of a batch are G groups in a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp that is -inf with gradient 0 (not NaN) where all entries are -inf."""
    high = x.detach().amax(dim, keepdim=True)
    high = torch.where(torch.isfinite(high), high, torch.zeros_like(high))
    # an entry far below -inf's reach must not meet inf * 0 on the way back
    forbidden = x == -math.inf
    mass = torch.where(forbidden, torch.zeros_like(x), torch.exp(torch.where(forbidden, high, x) - high)).sum(dim)
    empty = mass == 0
    log = torch.log(torch.where(empty, torch.ones_like(mass), mass)) + high.squeeze(dim)
    return torch.where(empty, torch.full_like(log, -math.inf), log)


def log_partition(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """log Z ``[B]`` by the forward recursion in log space; O(T B K^2) memory with gradients."""
    rows, steps, k = emissions.shape
    groups, times = transitions.shape[:2]
    alpha = emissions[:, 0] + start
    for t in range(1, steps):
        matrix = transitions[:, t - 1 if times > 1 else 0].unsqueeze(1)  # [G, 1, K, K]
        pairs = alpha.view(groups, rows // groups, k, 1) + matrix
        after = safe_logsumexp(pairs, -2).reshape(rows, k) + emissions[:, t]
        alpha = torch.where((t < lengths).unsqueeze(-1), after, alpha)
    return safe_logsumexp(alpha + end, -1)


def expectations(
    weights: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor
) -> tuple[Tensor, ...]:
    """weights * gradient of log Z in the emissions, the transitions, start and end; differentiable in all of them."""

    def total(e: Tensor, a: Tensor, s: Tensor, f: Tensor) -> Tensor:
        log_z = log_partition(e, a, s, f, lengths)
        return (weights * torch.where(torch.isfinite(log_z), log_z, torch.zeros_like(log_z))).sum()

    result: tuple[Tensor, ...] = torch.func.grad(total, argnums=(0, 1, 2, 3))(emissions, transitions, start, end)
    return result


def directional(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, tangent: Tensor
) -> Tensor:
    """Change of log Z ``[B]`` along ``tangent`` ``[G, S, K, K]`` of the transitions."""

    def along(a: Tensor) -> Tensor:
        return log_partition(emissions, a, start, end, lengths)

    result: Tensor = torch.func.jvp(along, (transitions,), (tangent,))[1]
    return result
