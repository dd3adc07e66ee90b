"""Recursions over chains of order n, whose step scores look n tags back: K^(n+1) work a step, never K^(2n).

    score(z) = sum_{t<=n} start_t[z_1, ..., z_t] + sum_{t>n} transitions[z_{t-n}, ..., z_t] + sum_t emissions[t, z_t]
    alpha_t[m, k] = emissions[t, k] + logsumexp_i (alpha_{t-1}[i, m] + transitions[i, m, k])

The state is the last n tags: i the oldest, m the n - 1 between, k the new one. States that disagree are never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The semiring's sum over all tag sequences, ``[width, *lead]``.

    Args:
        parts: emissions ``[width, *lead, T, K]``, transitions ``[width, *lead, K, ..., K]`` over n + 1 tags, and
            starts over 1, 2, ..., n tags; 1 in place of what a part shares.
        lengths: ``[*lead]`` from 1 to T.
    """
    emissions, transitions, *starts = parts
    n, (steps, k) = len(starts), emissions.shape[-2:]
    table = transitions.flatten(-n - 1).unflatten(-1, (k, k ** (n - 1), k))  # [..., i, m, k]
    alpha = semiring.times(starts[0], emissions[..., 0, :])  # [..., K^t]: the tags so far, the newest last
    total = semiring.sum(alpha, -1)
    for t in range(1, steps):
        real = t < lengths
        tag = emissions[..., t, None, :]
        if t < n:
            start = starts[t].flatten(-t - 1).unflatten(-1, (k**t, k))
            alpha = semiring.times(alpha.unsqueeze(-1), start, tag).flatten(-2)
            total = torch.where(real, semiring.sum(alpha, -1), total)
            continue
        before = alpha.unflatten(-1, (k, k ** (n - 1), 1))
        step = semiring.times(semiring.dot(before, table, -3), tag).flatten(-2)
        alpha = torch.where(real.unsqueeze(-1), step, alpha)
    return torch.where(lengths > n, semiring.sum(alpha, -1), total) if steps > n else total


RECURSION = Recursion(inside)
