"""One step of a linear-Gaussian chain in torch operations, and the tensors that chains and their filters are made of.

See ``probllm.math.gaussian``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.chain import is_wrapped
from probllm.math.kernels.kalman import ROUNDING


class Chain(NamedTuple):
    """The numbers of a linear-Gaussian chain; a time dimension of size 1 is shared by all steps.

    Leading dimensions broadcast with each other.
    """

    value: Tensor  # [..., T, o]
    mean: Tensor  # [..., d]
    covariance: Tensor  # [..., d, d]
    transition: Tensor  # [..., T - 1, d, d]
    drift: Tensor  # [..., T - 1, d]
    noise: Tensor  # [..., T - 1, d, d]
    emission: Tensor  # [..., T, d, o]
    offset: Tensor  # [..., T, o]
    error: Tensor  # [..., T, o, o]


EVENT_DIMS = (2, 1, 2, 3, 2, 3, 3, 2, 3)


class Filtered(NamedTuple):
    """What the filter finds at each step, float64."""

    mean: Tensor  # [..., T, d] of z_t given x_1..x_t
    covariance: Tensor  # [..., T, d, d]
    gain: Tensor  # [..., T, o, d]: K
    inverse: Tensor  # [..., T, o, o]: that of the covariance of x_t given x_1..x_{t-1}, 0 at missing entries
    scaled: Tensor  # [..., T, o]: inverse times (x_t - its mean)
    log_prob: Tensor  # [..., T] of x_t given x_1..x_{t-1}, in nats


class Smoothed(NamedTuple):
    """Moments of the states given all observations; 0 on padding."""

    mean: Tensor  # [..., T, d]
    covariance: Tensor  # [..., T, d, d]
    cross_covariance: Tensor  # [..., T - 1, d, d]: of z_t (rows) and z_{t+1}


def seen_entries(sizes: Tensor, steps: int, width: int) -> Tensor | None:
    """``[B, T, o]`` bool, whether an entry is real and observed; None where all are."""
    lengths = sizes[..., :1]
    if sizes.shape[-1] == 1 and not is_wrapped(sizes) and bool((lengths == steps).all()):
        return None
    real = (torch.arange(steps, device=sizes.device) < lengths).unsqueeze(-1)
    if sizes.shape[-1] == 1:
        return real.expand(*real.shape[:-1], width)
    seen: Tensor = real & (sizes[..., 1:] > 0).unflatten(-1, (steps, width))
    return seen


def wide(chain: Chain) -> Chain:
    """In float64, covariances made symmetric."""
    value, mean, covariance, transition, drift, noise, emission, offset, error = (x.double() for x in chain)
    covariance, noise, error = (0.5 * (x + x.mT) for x in (covariance, noise, error))
    return Chain(value, mean, covariance, transition, drift, noise, emission, offset, error)


def update(
    mean: Tensor,
    covariance: Tensor,
    value: Tensor,
    emission: Tensor,
    offset: Tensor,
    error: Tensor,
    seen: Tensor | None,
) -> Filtered:
    """One observation joins, at one step or at many that stand in a leading dimension.

    Args:
        mean: ``[..., d]`` of the state before, and covariance ``[..., d, d]``; symmetric, float64.
        value: ``[..., o]``; emission ``[..., d, o]``, offset ``[..., o]``, error ``[..., o, o]``.
        seen: ``[..., o]`` bool, or None: all.
    """
    residual = value - apply(mean, emission) - offset
    if seen is not None:
        one = seen.double()
        residual = torch.where(seen, residual, torch.zeros_like(residual))
        emission = emission * one.unsqueeze(-2)
        error = error * (one.unsqueeze(-1) * one.unsqueeze(-2)) + torch.diag_embed(1 - one)
        count = one.sum(-1)
    else:
        count = torch.full((), float(value.shape[-1]), dtype=residual.dtype, device=residual.device)
    common = emission.mT @ covariance  # [..., o, d]
    total = common @ emission + error
    factor, regular = safe_cholesky(total)
    gain = torch.cholesky_solve(common.expand(*factor.shape[:-1], common.shape[-1]), factor)
    gain = torch.where(regular[..., None, None], gain, torch.zeros_like(gain))
    inverse = torch.cholesky_inverse(factor) * regular[..., None, None]
    if seen is not None:
        inverse = inverse * (one.unsqueeze(-1) * one.unsqueeze(-2))
    scaled = apply(residual, inverse)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_p = -0.5 * ((scaled * residual).sum(-1) + log_det + count * math.log(2 * math.pi))
    log_p = torch.where(regular, log_p, torch.full_like(log_p, -math.inf))
    keep = torch.eye(emission.shape[-2], dtype=gain.dtype, device=gain.device) - emission @ gain
    after = keep.mT @ covariance @ keep + gain.mT @ error @ gain
    return Filtered(mean + apply(residual, gain), 0.5 * (after + after.mT), gain, inverse, scaled, log_p)


def blank(real: Tensor, mean: Tensor, covariance: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments with 0 where a step is not ``real``."""
    return (
        torch.where(real.unsqueeze(-1), mean, torch.zeros_like(mean)),
        torch.where(real[..., None, None], covariance, torch.zeros_like(covariance)),
        torch.where(real[..., 1:, None, None], cross, torch.zeros_like(cross)),
    )


def safe_cholesky(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor, the identity where ``x`` is singular to rounding, and whether it is not."""
    factor, info = torch.linalg.cholesky_ex(x.detach())
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    limit = ROUNDING * x.shape[-1] * x.detach().diagonal(dim1=-2, dim2=-1)
    regular = (info == 0) & (pivots > limit).all(-1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.cholesky_ex(torch.where(regular[..., None, None], x, eye))[0], regular


def apply(row: Tensor, matrix: Tensor) -> Tensor:
    """The row vector ``[..., n]`` times the matrix ``[..., n, m]``."""
    if matrix.shape[:-2].numel() == 1 and row.dim() >= matrix.dim() - 1:
        return row @ matrix.reshape(matrix.shape[-2:])
    return (row.unsqueeze(-2) @ matrix).squeeze(-2)


def at_step(x: Tensor, t: int, dims: int) -> Tensor:
    """Step t of a part with ``dims`` dimensions an event, time first."""
    at = x.dim() - dims
    return x.select(at, t if x.shape[at] > 1 else 0)


def root(covariance: Tensor) -> Tensor:
    """A matrix ``[..., d, d]`` with root' root = covariance, which may be singular; differentiable, never NaN."""
    factor, regular = safe_cholesky(covariance)
    if not is_wrapped(regular) and bool(regular.all()):
        return factor.mT
    n = covariance.shape[-1]
    limit = ROUNDING * n * covariance.detach().diagonal(dim1=-2, dim2=-1)
    columns, rest = [], covariance
    for j in range(n):  # Cholesky, where a variable of which nothing is left adds nothing
        left = rest[..., j, j] > limit[..., j]
        pivot = torch.where(left, rest[..., j, j], torch.ones_like(rest[..., j, j]))
        column = torch.where(
            left.unsqueeze(-1), rest[..., j] / pivot.sqrt().unsqueeze(-1), torch.zeros_like(rest[..., j])
        )
        columns.append(column)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    return torch.stack(columns, -2)


def normal_log_density(residual: Tensor, covariance: Tensor, seen: Tensor | None = None) -> Tensor:
    """Log density ``[...]`` of N(0, covariance) at ``residual [..., n]``; -inf where the covariance is singular.

    Entries where ``seen [..., n]`` is False are integrated out.
    """
    count = torch.as_tensor(float(residual.shape[-1]), dtype=residual.dtype, device=residual.device)
    if seen is not None:
        one = seen.to(residual.dtype)
        residual = torch.where(seen, residual, torch.zeros_like(residual))
        covariance = covariance * (one.unsqueeze(-1) * one.unsqueeze(-2)) + torch.diag_embed(1 - one)
        count = one.sum(-1)
    factor, regular = safe_cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    density = -0.5 * (white.square().sum(-1) + count * math.log(2 * math.pi)) - log_det
    return torch.where(regular, density, torch.full_like(density, -math.inf))
