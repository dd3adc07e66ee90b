"""EM for linear-Gaussian chains whose parameters are shared by all steps (Shumway and Stoffer 1982).

Given the states, each part is a linear regression with a constant: the first state on 1, a state on the one before, an
observation on its state. E: the expected second moments of inputs u and outputs y. M, with a matrix-normal prior of
mean W0 and precision L, and an inverse-Wishart one:

    W = (S_uu + L)^-1 (S_uy + L W0)
    covariance = (scale + sum E[residual' residual] + (W - W0)' L (W - W0)) / (n + weight)

A missing entry of an observation that is seen in part is hidden too, and has its expectation given state and rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.chain import is_wrapped
from probllm.math.gaussian_paths import smooth
from probllm.math.gaussian_steps import Chain, apply, safe_cholesky


class Regression(NamedTuple):
    """Expected sums of a linear regression of y [q] on u [p], float64."""

    number: Tensor  # [], of rows
    inputs: Tensor  # [p, p]: of u' u
    cross: Tensor  # [p, q]: of u' y
    outputs: Tensor  # [q, q]: of y' y


class Statistics(NamedTuple):
    """Of the initial state on 1, of a state on (the one before, 1), of an observation on (its state, 1)."""

    initial: Regression
    transition: Regression
    observation: Regression


class RegressionPrior(NamedTuple):
    """Density of coefficients W ``[p, q]``, the constant last, and covariance C, up to its constant:

        -(weight log det C + trace C^-1 (scale + (W - mean)' precision (W - mean))) / 2

    A matrix normal given C times an inverse Wishart of ``weight - p - q - 1`` degrees of freedom (``weight - q - 1``
    where ``precision`` is 0). It counts as ``weight`` more residuals with scatter ``scale``.
    """

    mean: Tensor  # [p, q]
    precision: Tensor  # [p, p], positive semidefinite
    scale: Tensor  # [q, q], positive semidefinite
    weight: float

    def log_density(self, coefficients: Tensor, covariance: Tensor) -> Tensor:
        """In nats, up to a constant."""
        away = coefficients - self.mean
        scatter = self.scale + away.mT @ self.precision @ away
        solved = torch.linalg.solve(covariance, scatter.to(covariance.dtype))
        density: Tensor = -0.5 * (self.weight * torch.logdet(covariance) + solved.diagonal(dim1=-2, dim2=-1).sum(-1))
        return density


def maximise(found: Regression, prior: RegressionPrior | None, diagonal: bool) -> tuple[Tensor, Tensor]:
    """The coefficients ``[p, q]`` and the covariance ``[q, q]`` of the highest posterior density."""
    inputs, cross, count = found.inputs, found.cross, found.number
    if prior is not None:
        inputs, cross = inputs + prior.precision, cross + prior.precision.double() @ prior.mean.double()
        count = count + prior.weight
    scale = inputs.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    inverse = torch.linalg.pinv(inputs * scale * scale.unsqueeze(-1), hermitian=True) * scale * scale.unsqueeze(-1)
    w = inverse @ cross
    scatter = found.outputs - w.mT @ found.cross - found.cross.mT @ w + w.mT @ found.inputs @ w
    if prior is not None:
        away = w - prior.mean
        scatter = scatter + prior.scale + away.mT @ prior.precision.double() @ away
    covariance = 0.5 * (scatter + scatter.mT) / count
    return w, torch.diag_embed(covariance.diagonal()) if diagonal else covariance


def expected_statistics(chain: Chain, lengths: Tensor | None, observed: Tensor | None, from_start: bool) -> Statistics:
    """Sums over all rows and steps.

    Args:
        chain: of parameters that the steps share; where ``from_start``, with a first step of which nothing is seen.
        lengths: ``[...]`` of the observations.
        observed: ``[..., T, o]`` bool.
    """
    head = 1 if from_start else 0
    steps, width = chain.value.shape[-2:]
    entries = torch.ones(steps - head, width, dtype=torch.bool, device=chain.value.device)
    entries = entries if observed is None else observed
    if head:
        entries = torch.cat((torch.zeros_like(entries[..., :1, :]), entries), -2)
    moments = smooth(chain, None if lengths is None else lengths + head, entries)
    mean = moments.mean
    real = torch.arange(steps, device=mean.device) < (
        torch.full(mean.shape[:-2], steps, device=mean.device) if lengths is None else lengths + head
    ).unsqueeze(-1)
    real = real.expand(mean.shape[:-1])
    square = moments.covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)  # [..., T, d, d]
    rows = mean.shape[:-2].numel()
    one = torch.full((1, 1), float(rows), dtype=torch.float64, device=mean.device)
    initial = Regression(one[0, 0], one, _sum(mean[..., 0, :], 1).unsqueeze(0), _sum(square[..., 0, :, :], 2))
    moved = real[..., 1:]
    pair = moments.cross_covariance + mean[..., :-1, :].unsqueeze(-1) * mean[..., 1:, :].unsqueeze(-2)
    transition = _regression(
        moved, mean[..., :-1, :], square[..., :-1, :, :], pair, mean[..., 1:, :], square[..., 1:, :, :]
    )
    entries = entries.expand(*mean.shape[:-1], width) & real.unsqueeze(-1)
    output, cross, both = _observations(chain, entries, mean, square)
    observation = _regression(entries.any(-1), mean, square, cross, output, both)
    return Statistics(initial, transition, observation)


def _observations(chain: Chain, seen: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[x], E[z' x] and E[x' x] of each step, what is missing filled in: x = z A + a + noise of covariance V."""
    value = torch.where(seen, chain.value, torch.zeros_like(chain.value)).double()
    if not is_wrapped(seen) and torch.equal(seen.any(-1), seen.all(-1)):  # no step is seen in part
        return value, mean.unsqueeze(-1) * value.unsqueeze(-2), value.unsqueeze(-1) * value.unsqueeze(-2)
    one = seen.double()
    here, gone = torch.diag_embed(one), torch.diag_embed(1 - one)
    error = 0.5 * (chain.error + chain.error.mT)
    factor, _ = safe_cholesky(here @ error @ here + gone)
    fill = torch.cholesky_solve(here @ error @ gone, factor)  # [..., o, o]: from seen residuals to missing entries
    a = chain.emission @ (gone - here @ fill)
    constant = value + apply(chain.offset, gone) + apply(value - chain.offset, here @ fill)
    spread = gone @ error @ gone - fill.mT @ here @ error @ gone
    output = apply(mean, a) + constant
    cross = square @ a + mean.unsqueeze(-1) * constant.unsqueeze(-2)
    rest = apply(mean, a).unsqueeze(-1) * constant.unsqueeze(-2)
    both = a.mT @ square @ a + rest + rest.mT + constant.unsqueeze(-1) * constant.unsqueeze(-2) + spread
    return output, cross, both


def _regression(
    used: Tensor, inputs: Tensor, square: Tensor, cross: Tensor, outputs: Tensor, both: Tensor
) -> Regression:
    """Sums over the steps that are used, the constant 1 behind the inputs."""
    one = used.double()
    weight = one.unsqueeze(-1)
    count = one.sum()
    u, y = _sum(inputs * weight, 1), _sum(outputs * weight, 1)
    uu, uy, yy = (_sum(x * weight.unsqueeze(-1), 2) for x in (square, cross, both))
    uu = torch.cat((torch.cat((uu, u.unsqueeze(-1)), -1), torch.cat((u, count.unsqueeze(0))).unsqueeze(0)), 0)
    return Regression(count, uu, torch.cat((uy, y.unsqueeze(0)), 0), yy)


def _sum(x: Tensor, dims: int) -> Tensor:
    """Over all leading dimensions."""
    return x.reshape(-1, *x.shape[x.dim() - dims :]).sum(0)
