"""Linear-Gaussian chains: log likelihood of what is observed, the states integrated out (Kalman 1960).

    z_1 ~ N(mean, covariance),    z_t = z_{t-1} F_t + N(drift_t, noise_t),    x_t = z_t H_t + N(offset_t, error_t)

Row vectors, matrices [from, to]. On the CPU compiled kernels filter and give the gradient (``gaussian_passes``);
everything else, higher derivatives and other devices, is their torch twin: the filter below step by step, or in
O(log T) depth by an associative scan (``gaussian_scan``). Only the covariance of an observation given those before it
is ever inverted, so that initial covariance, noise and error may be singular. All runs in float64. Where that
covariance is singular the law has no density: log p is -inf, with gradient 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probllm.math import gaussian_passes, gaussian_scan
from probllm.math.chain import is_wrapped
from probllm.math.gaussian_steps import (
    EVENT_DIMS,
    Chain,
    Filtered,
    Smoothed,
    apply,
    at_step,
    blank,
    seen_entries,
    update,
    wide,
)
from probllm.math.recursion import Recursion, log_partition

SCAN_FROM = 48  # steps: fewer are faster one by one


def log_prob(chain: Chain, lengths: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
    """Log density of the observations ``[...]``, float64, in nats; differentiable to any order.

    Args:
        lengths: ``[...]`` long, from 1 to T: what stands behind is ignored.
        observed: ``[..., T, o]`` bool: entries where it is False are integrated out.
    """
    flat, sizes, shape = flatten(chain, lengths, observed)
    return log_partition(KALMAN, flat, sizes).view(shape)


def flatten(chain: Chain, lengths: Tensor | None, observed: Tensor | None) -> tuple[Chain, Tensor, torch.Size]:
    """The chain with one leading dimension (size 1 for what all rows share), sizes, and the leading shape.

    Sizes are ``[B, 1]``, the lengths, or ``[B, 1 + T * o]``, what is observed (0 or 1) behind them. Values that are not
    used become 0.
    """
    leads = [x.shape[: x.dim() - dims] for x, dims in zip(chain, EVENT_DIMS, strict=True)]
    if lengths is not None:
        leads.append(lengths.shape)
    if observed is not None:
        leads.append(observed.shape[:-2])
    different = set(leads) - {torch.Size()}
    shape = different.pop() if len(different) == 1 else torch.broadcast_shapes(*leads)
    rows, steps = math.prod(shape), chain.value.shape[-2]
    parts = []
    for x, dims in zip(chain, EVENT_DIMS, strict=True):
        event = x.shape[x.dim() - dims :]
        if x is not chain.value and (x.dim() == dims or math.prod(x.shape[: x.dim() - dims]) == 1):
            parts.append(x.unsqueeze(0) if x.dim() == dims else x.reshape(1, *event))
        else:
            parts.append(x.expand(*shape, *event).reshape(rows, *event))
    device = chain.value.device
    n = torch.full((rows,), steps, device=device) if lengths is None else lengths.expand(shape).reshape(rows).long()
    sizes = n.unsqueeze(-1)
    if observed is not None:
        entries = observed.expand(*shape, *observed.shape[-2:]).reshape(rows, -1)
        sizes = torch.cat((sizes, entries.long()), -1)
    used = None if sizes.shape[-1] == 1 and lengths is None else seen_entries(sizes, *chain.value.shape[-2:])
    if used is not None:
        parts[0] = torch.where(used, parts[0], torch.zeros((), dtype=parts[0].dtype, device=device))
    return Chain(*parts), sizes, shape


class _Kalman(Recursion):
    """The log likelihood as a recursion with kernels; scores are the fields of a flat ``Chain``."""

    def twin(self, scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
        chain = Chain(*scores)
        return filtered(chain, seen_entries(lengths, *chain.value.shape[-2:])).log_prob.sum(-1)


KALMAN = _Kalman(gaussian_passes.refuse, gaussian_passes.forward, gaussian_passes.backward)


def filtered(chain: Chain, seen: Tensor | None) -> Filtered:
    """The filter in torch operations, for any leading dimensions; ``seen`` is ``[..., T, o]`` bool."""
    chain = wide(chain)
    steps = chain.value.shape[-2]
    if steps >= SCAN_FROM and not any(map(is_wrapped, chain)) and gaussian_scan.is_regular(chain, seen):
        mean, covariance = gaussian_scan.filtered_moments(chain, seen)
        before = gaussian_scan.predicted_moments(chain, mean, covariance)
        found = update(*before, chain.value, chain.emission, chain.offset, chain.error, seen)
        return Filtered(mean, covariance, *found[2:])
    results = []
    leads = [x.shape[: x.dim() - dims] for x, dims in zip(chain, EVENT_DIMS, strict=True)]
    matrices = [leads[i] for i in (2, 3, 5, 6, 8)] + ([] if seen is None else [seen.shape[:-2]])
    mean = chain.mean.expand(*torch.broadcast_shapes(*leads, *matrices), -1)
    covariance = chain.covariance.expand(*torch.broadcast_shapes(*matrices), -1, -1)
    for t in range(steps):
        if t:
            move = at_step(chain.transition, t - 1, 3)
            mean = apply(mean, move) + at_step(chain.drift, t - 1, 2)
            covariance = move.mT @ covariance @ move + at_step(chain.noise, t - 1, 3)
        emission, offset, error = at_step(chain.emission, t, 3), at_step(chain.offset, t, 2), at_step(chain.error, t, 3)
        used = None if seen is None else seen[..., t, :]
        found = update(mean, covariance, chain.value[..., t, :], emission, offset, error, used)
        mean, covariance = found.mean, found.covariance
        results.append(found)
    columns = zip(zip(*results, strict=True), (1, 2, 2, 2, 1, 0), strict=True)
    return Filtered(*(torch.stack(xs, -1 - n) for xs, n in columns))


def smoothed(chain: Chain, seen: Tensor | None, lengths: Tensor) -> Smoothed:
    """The smoother in torch operations; the chain is flat, lengths are ``[B]``."""
    chain = wide(chain)
    found = filtered(chain, seen)
    emission, transition = chain.emission, chain.transition
    eye = torch.eye(emission.shape[-2], dtype=emission.dtype, device=emission.device)
    keep = eye - emission @ found.gain  # [B, T, d, d]: A
    push = apply(found.scaled, emission.mT)  # [B, T, d]: H e
    information = emission @ found.inverse @ emission.mT
    steps = push.shape[-2]
    if steps > 1:
        # r_{t-1} = F_t (H e + A r_t), N_{t-1} = F_t (H S^-1 H' + A N_t A') F_t'
        back = transition @ keep[..., 1:, :, :]
        r = apply(push[..., 1:, :], transition.mT)
        n = transition @ information[..., 1:, :, :] @ transition.mT
        r, n = gaussian_scan.backward_moments(back, r, n)
        nothing = torch.zeros_like(r[..., :1, :]), torch.zeros_like(n[..., :1, :, :])
        r, n = torch.cat((r, nothing[0]), -2), torch.cat((n, nothing[1]), -3)
    else:
        r, n = torch.zeros_like(push), torch.zeros_like(information)
    left = eye - found.covariance @ n
    mean = found.mean + apply(r, found.covariance)
    covariance = left @ found.covariance
    covariance = 0.5 * (covariance + covariance.mT)
    cross = found.covariance[..., :-1, :, :] @ transition @ keep[..., 1:, :, :] @ left[..., 1:, :, :].mT
    real = torch.arange(steps, device=lengths.device) < lengths.unsqueeze(-1)
    return Smoothed(*blank(real, mean, covariance, cross))
