"""Several Markov chains side by side, seen through one observation: their joint states summed out chain by chain.

    alpha_t(z^1, ..., z^M) = e_t(z^1, ..., z^M) sum_{y^1} A^1(y^1, z^1) ... sum_{y^M} A^M(y^M, z^M) alpha_{t-1}(y)

One chain moves at a time, so a step costs M K^(M+1) and not K^(2M). A joint state is a number in base K whose first
digit is the first chain's state. Source: Ghahramani and Jordan (1997), "Factorial hidden Markov models", appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probllm.math.semirings import LOG, Semiring


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The semiring's sum over all sequences of joint states, ``[width, *lead]``.

    Args:
        parts: emissions ``[width, *lead, T, K^M]``, initial ``[width, *lead, M, K]`` and transitions
            ``[width, *lead, M, K, K]``, [from, to], of each chain; 1 in place of what a part shares.
        lengths: ``[*lead]`` from 1 to T.
    """
    emissions, initial, transitions = parts
    chains, k = initial.shape[-2:]
    alpha = initial[..., 0, :]
    for m in range(1, chains):
        alpha = semiring.times(alpha.unsqueeze(-1), initial[..., m, None, :]).flatten(-2)
    alpha = semiring.times(alpha, emissions[..., 0, :])
    for t in range(1, emissions.shape[-2]):
        after = alpha
        for m in range(chains):
            before = after.unflatten(-1, (k**m, k, 1, k ** (chains - 1 - m)))
            after = semiring.dot(before, transitions[..., m, None, :, :, None], -3).flatten(-3)
        alpha = torch.where((t < lengths).unsqueeze(-1), semiring.times(after, emissions[..., t, :]), alpha)
    return semiring.sum(alpha, -1)


def log_partition(emissions: Tensor, initial: Tensor, transitions: Tensor, lengths: Tensor) -> Tensor:
    """log Z ``[*lead]`` in nats, float64; parts as for ``inside``, without a width. Differentiable."""
    return inside(LOG, tuple(LOG.lift(x.double()) for x in (emissions, initial, transitions)), lengths).squeeze(0)


def joint_states(chains: int, k: int) -> Tensor:
    """The state of each chain in each joint state, ``[K^M, M]`` long."""
    powers = k ** torch.arange(chains - 1, -1, -1)
    return torch.arange(k**chains).unsqueeze(-1) // powers % k
