"""Expected counts of a hidden Markov model with categorical observations: the E-step of Baum-Welch.

    gamma_t(k) = P(z_t = k | x),   xi_t(i, j) = P(z_{t-1} = i, z_t = j | x)
    initial(k) = sum gamma_1(k),   transition(i, j) = sum_t xi_t(i, j),   emission(k, v) = sum_{t: x_t = v} gamma_t(k)

Source: Baum et al. (1970); Rabiner (1989), equations 40a to 40c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.chain import as_chain, chain_log_partition
from probllm.math.chain_passes import forward_backward


class Counts(NamedTuple):
    """Expected counts of a categorical HMM, and the log likelihood that they belong to."""

    log_likelihood: Tensor  # [B] in nats
    initial: Tensor  # [K]
    transition: Tensor  # [K, K], [from, to]
    emission: Tensor  # [K, V]


def expected_counts(
    symbols: Tensor,
    initial_logits: Tensor,
    transition_logits: Tensor,
    emission_logits: Tensor,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Counts:
    """Expected counts over a batch of sequences, without gradients.

    Args:
        symbols: ``[B, T]`` long, from 0 to V - 1; anything on padding.
        initial_logits: ``[K]``, transition_logits: ``[K, K]``, emission_logits: ``[K, V]``: log probabilities.
        lengths: ``[B]``.
        allowed: ``[B, T, K]`` bool: states that each step may take (a partly labelled sequence); all where missing.
    Raises:
        ValueError: for shapes that do not agree, or symbols out of range at a real position.
    """
    if symbols.dim() != 2 or symbols.is_floating_point():
        raise ValueError(f"symbols: expected integers of shape [B, T], got {symbols.dtype} of {list(symbols.shape)}")
    k, size = emission_logits.shape
    real = symbols
    if lengths is not None:
        real = symbols.masked_fill(torch.arange(symbols.shape[1], device=symbols.device) >= lengths.unsqueeze(1), 0)
    if real.numel():
        low, high = real.aminmax()
        if int(low) < 0 or int(high) >= size:
            raise ValueError(
                f"symbols: expected values from 0 to {size - 1}, got values from {int(low)} to {int(high)}"
            )
    with torch.no_grad():
        table = emission_logits.detach().t().contiguous()
        emissions = table.index_select(0, real.reshape(-1)).view(*real.shape, k)
        if allowed is not None:
            emissions = emissions.masked_fill(~allowed, -torch.inf)
    chain = as_chain(emissions, transition_logits.detach(), initial_logits.detach(), None, lengths)
    if emissions.device.type == "cpu":
        done = forward_backward(*chain[:5], backward=2)
        log_z, gamma = done.log_z, done.marginals
        pairs = done.pairs(torch.ones((), dtype=gamma.dtype).expand(gamma.shape[0]))
    else:
        scores = [x.detach().requires_grad_() for x in chain[:2]]
        log_z = chain_log_partition(chain._replace(emissions=scores[0], transitions=scores[1]))
        gamma, pairs = torch.autograd.grad(log_z.clamp_min(torch.finfo(log_z.dtype).min).sum(), scores)
    emission = torch.zeros(size, k, dtype=gamma.dtype, device=gamma.device)
    emission.index_add_(0, real.reshape(-1), gamma.reshape(-1, k))
    return Counts(log_z.to(emissions.dtype), gamma[:, 0].sum(0), pairs[0, 0], emission.t())
