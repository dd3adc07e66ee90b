"""The torch twin of the compiled chain recursions: reference in the tests, the GPU's path, and all second derivatives.

Plain differentiable torch operations with no branch on a value, so that it runs under autograd of any order,
``torch.func`` and ``vmap``. Scores come in the shapes of ``chain.Chain``: emissions [B, T, K], transitions
[G, S, K, K], start and end [B, K], lengths [B], where the rows of a batch are G groups in a row.
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


def log_partition(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor) -> Tensor:
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


def best_paths(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor) -> Tensor:
    """Viterbi with back-pointers: ``[B, T]``, -1 where nothing is allowed, 0 on padding."""
    rows, steps, k = emissions.shape
    groups, times = transitions.shape[:2]
    ends = torch.nn.functional.one_hot(lengths - 1, steps).to(emissions.dtype).unsqueeze(-1)
    scores = emissions + torch.where(ends > 0, end.unsqueeze(1), torch.zeros_like(emissions))
    v = scores[:, 0] + start
    stay = torch.arange(k, device=v.device).expand(rows, k)
    came = []
    for t in range(1, steps):
        matrix = transitions[:, t - 1 if times > 1 else 0].unsqueeze(1)
        high, source = (v.view(groups, -1, k, 1) + matrix).reshape(rows, k, k).max(1)
        live = (t < lengths).unsqueeze(-1)
        v = torch.where(live, high + scores[:, t], v)
        came.append(torch.where(live, source, stay))
    best, tag = v.max(-1)
    path = [tag]
    for source in reversed(came):
        tag = source.gather(1, tag.unsqueeze(1)).squeeze(1)
        path.append(tag)
    paths = torch.stack(path[::-1], 1)
    real = torch.arange(steps, device=v.device) < lengths.unsqueeze(-1)
    paths = torch.where(real, paths, torch.zeros_like(paths))
    return torch.where((best == -math.inf).unsqueeze(-1), torch.full_like(paths, -1), paths)


def sample_paths(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, uniforms: Tensor
) -> Tensor:
    """Forward filtering, backward sampling: ``[N, B, T]`` from ``uniforms`` of that shape."""
    rows, steps, k = emissions.shape
    groups, times = transitions.shape[:2]
    last = (torch.arange(steps, device=lengths.device) == (lengths - 1).unsqueeze(-1)).unsqueeze(-1)
    scores = emissions + torch.where(last, end.unsqueeze(1), torch.zeros_like(emissions))
    alpha = [scores[:, 0] + start]
    for t in range(1, steps):
        matrix = transitions[:, t - 1 if times > 1 else 0].unsqueeze(1)
        alpha.append(safe_logsumexp(alpha[-1].view(groups, -1, k, 1) + matrix, -2).reshape(rows, k) + scores[:, t])
    possible = torch.stack(alpha, 1).gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, k)).amax((1, 2)) > -math.inf
    group = torch.arange(rows, device=lengths.device) // (rows // groups)
    tag = torch.zeros(uniforms.shape[:2], dtype=torch.long, device=lengths.device)
    paths = []
    for t in range(steps - 1, -1, -1):
        logits = alpha[t].expand(uniforms.shape[0], rows, k)
        if t + 1 < steps:
            into = transitions[group, t if times > 1 else 0].transpose(1, 2)  # [B, K to, K from]
            column = into[torch.arange(rows, device=lengths.device), tag]  # [N, B, K]
            logits = torch.where((t + 1 < lengths).view(1, -1, 1), logits + column, logits)
        weights = torch.softmax(logits.double(), -1).cumsum(-1)
        drawn = torch.searchsorted(weights, (uniforms[..., t] * weights[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
        tag = torch.where((t < lengths).view(1, -1), drawn.clamp_max(k - 1), torch.zeros_like(drawn))
        paths.append(tag)
    result = torch.stack(paths[::-1], -1)
    return torch.where(possible.view(1, -1, 1), result, torch.full_like(result, -1))
