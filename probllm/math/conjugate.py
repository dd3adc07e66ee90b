"""Conjugate priors of the laws that a state emits by, and what EM and variational Bayes ask of them.

A posterior is the prior with expected statistics added. Its mode is EM's point estimate (MAP), its expected log density
the score of variational Bayes, and its evidence, the integral of prior times likelihood, gives KL(posterior, prior):

    KL = E_q[log likelihood of the statistics] - log evidence

Gaussians have a normal-inverse-Wishart prior (Murphy 2007, "Conjugate Bayesian analysis of the Gaussian distribution"):
Sigma ~ IW(scale, dof), mu | Sigma ~ N(mean, Sigma / strength), in four shapes of the covariance: ``full``, one for each
state; ``tied``, one for all; ``diag``, independent dimensions; ``spherical``, one variance for each state.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["full", "tied", "diag", "spherical"]
COVARIANCES: tuple[Covariance, ...] = ("full", "tied", "diag", "spherical")


class Moments(NamedTuple):
    """Sums over observations ``[N, D]`` with weights ``[N, K]``: of 1, x, and x x^T."""

    total: Tensor  # [K]
    first: Tensor  # [K, D]
    second: Tensor  # [K, D, D], or [K, D] where the covariance is diagonal or spherical


def moments(observations: Tensor, weights: Tensor, covariance: Covariance) -> Moments:
    """The statistics of observations ``[N, D]`` with weights ``[N, K]``."""
    total, first = weights.sum(0), weights.T @ observations
    if covariance in ("diag", "spherical"):
        return Moments(total, first, weights.T @ observations.square())
    k, d = weights.shape[1], observations.shape[1]
    spread = (weights.T.unsqueeze(-1) * observations).reshape(k, -1, d)  # [K, N, D]
    return Moments(total, first, spread.mT @ observations)


class NormalWishart(NamedTuple):
    """A normal-inverse-Wishart law of K means ``[K, D]`` and covariances in one of the four shapes."""

    covariance: Covariance
    mean: Tensor  # [K, D]
    strength: Tensor  # [K]
    scale: Tensor  # [K, D, D] (full), [D, D] (tied), [K, D] (diag), [K] (spherical)
    dof: Tensor  # [K]; [] if tied

    def updated(self, data: Moments) -> NormalWishart:
        """The posterior given statistics."""
        strength = self.strength + data.total
        mean = (self.strength.unsqueeze(-1) * self.mean + data.first) / strength.unsqueeze(-1)
        if self.covariance in ("diag", "spherical"):
            spread = data.second + self.strength.unsqueeze(-1) * self.mean**2 - strength.unsqueeze(-1) * mean**2
            spread = spread.clamp_min(0.0)
        else:
            spread = data.second + _outer(self.strength, self.mean) - _outer(strength, mean)
            spread = 0.5 * (spread + spread.mT)
        dimension = self.mean.shape[-1]
        if self.covariance == "tied":
            return self._replace(
                mean=mean, strength=strength, scale=self.scale + spread.sum(0), dof=self.dof + data.total.sum()
            )
        if self.covariance == "spherical":
            return self._replace(
                mean=mean, strength=strength, scale=self.scale + spread.sum(-1), dof=self.dof + dimension * data.total
            )
        return self._replace(mean=mean, strength=strength, scale=self.scale + spread, dof=self.dof + data.total)

    def mode(self) -> tuple[Tensor, Tensor]:
        """The means and covariances of the highest joint density; a covariance has the shape of ``scale``."""
        k, d = self.mean.shape
        taken = {"full": d + 2, "tied": d + 1 + k, "diag": 3, "spherical": d + 2}[self.covariance]
        divisor = self.dof + taken
        return self.mean, self.scale / divisor.reshape(*divisor.shape, *(1,) * (self.scale.dim() - divisor.dim()))

    def _log_precision(self) -> Tensor:
        """E[log |Sigma^-1|], ``[K]`` (``[]`` if tied)."""
        d = self.mean.shape[-1]
        if self.covariance == "diag":
            each = torch.digamma(self.dof / 2).unsqueeze(-1) + math.log(2) - self.scale.log()
            return each.sum(-1)
        if self.covariance == "spherical":
            return d * (torch.digamma(self.dof / 2) + math.log(2) - self.scale.log())
        steps = torch.arange(d, dtype=self.dof.dtype, device=self.dof.device)
        halves = torch.digamma((self.dof.unsqueeze(-1) - steps) / 2).sum(-1)
        return halves + d * math.log(2) - torch.logdet(self.scale)

    def _distances(self, observations: Tensor) -> Tensor:
        """E of the squared Mahalanobis distances under the mean precision, ``[N, K]``, less D / strength."""
        difference = observations.unsqueeze(-2) - self.mean  # [N, K, D]
        return mahalanobis(self.covariance, difference, self.scale) * self.dof

    def expected_log_density(self, observations: Tensor) -> Tensor:
        """E[log N(x; mu_k, Sigma_k)] of observations ``[N, D]``: ``[N, K]``."""
        d = self.mean.shape[-1]
        constant = self._log_precision() - d * math.log(2 * math.pi) - d / self.strength
        return 0.5 * (constant - self._distances(observations))

    def expected_log_likelihood(self, data: Moments) -> Tensor:
        """E[log likelihood] of the observations that the statistics come from, a scalar."""
        d = self.mean.shape[-1]
        constant = self._log_precision() - d * math.log(2 * math.pi) - d / self.strength
        n = data.total.unsqueeze(-1)
        if self.covariance in ("diag", "spherical"):
            spread = data.second - 2 * self.mean * data.first + n * self.mean**2
            each = spread / (self.scale if self.covariance == "diag" else self.scale.unsqueeze(-1))
            distance = (each.sum(-1) * self.dof).sum()
        else:
            cross = self.mean.unsqueeze(-1) * data.first.unsqueeze(-2)
            spread = data.second - cross - cross.mT + _outer(data.total, self.mean)
            inverse = torch.linalg.inv(self.scale)
            distance = ((inverse * spread).sum((-1, -2)) * self.dof).sum()
        return 0.5 * ((data.total * constant).sum() - distance)

    def log_evidence_from(self, prior: NormalWishart, total: Tensor) -> Tensor:
        """log of the integral of prior times likelihood of the data that turned ``prior`` into this, a scalar."""
        d = self.mean.shape[-1]
        ratio = 0.5 * d * (prior.strength.log() - self.strength.log()).sum()
        return self._log_normaliser() - prior._log_normaliser() + ratio - 0.5 * d * math.log(math.pi) * total.sum()

    def _log_normaliser(self) -> Tensor:
        """log of Gamma_D(dof / 2) |scale|^(-dof / 2), summed over states."""
        if self.covariance == "diag":
            each = torch.lgamma(self.dof / 2).unsqueeze(-1) - self.dof.unsqueeze(-1) / 2 * self.scale.log()
        elif self.covariance == "spherical":
            each = torch.lgamma(self.dof / 2) - self.dof / 2 * self.scale.log()
        else:
            gamma = torch.special.multigammaln(self.dof / 2, self.mean.shape[-1])
            each = gamma - self.dof / 2 * torch.logdet(self.scale)
        return each.sum()

    def log_density(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Log density of means and covariances, up to what depends on this law alone, a scalar."""
        k, d = self.mean.shape
        distance = (mahalanobis(self.covariance, (mean - self.mean).unsqueeze(0), covariance)[0] * self.strength).sum()
        if self.covariance in ("full", "tied"):
            log_det, trace = torch.logdet(covariance), (torch.linalg.inv(covariance) * self.scale).sum((-1, -2))
            power = self.dof + d + 1 + (k if self.covariance == "tied" else 1)
            found: Tensor = -0.5 * ((power * log_det + trace).sum() + distance)
            return found
        if self.covariance == "diag":
            power = (self.dof + 3).unsqueeze(-1)
        else:
            power = self.dof + d + 2
        return -0.5 * ((power * covariance.log() + self.scale / covariance).sum() + distance)


def mahalanobis(covariance: Covariance, difference: Tensor, matrix: Tensor) -> Tensor:
    """x^T M^-1 x of differences ``[N, K, D]`` for a covariance (or scale) of the given shape, ``[N, K]``."""
    if covariance == "diag":
        return (difference**2 / matrix).sum(-1)
    if covariance == "spherical":
        return (difference**2).sum(-1) / matrix
    factor = torch.linalg.cholesky(matrix)
    solved: Tensor = torch.linalg.solve_triangular(factor, difference.movedim(0, -1), upper=False)  # [K, D, N]
    return solved.square().sum(-2).T


def _outer(weight: Tensor, x: Tensor) -> Tensor:
    return weight[..., None, None] * x.unsqueeze(-1) * x.unsqueeze(-2)


def dirichlet_divergence(posterior: Tensor, prior: Tensor) -> Tensor:
    """KL between Dirichlet laws with concentrations ``[..., K]``, summed, a scalar."""
    prior = prior.expand_as(posterior)
    one, other = (torch.distributions.Dirichlet(x) for x in (posterior, prior))
    divergence: Tensor = torch.distributions.kl_divergence(one, other).sum()
    return divergence


def expected_log(concentration: Tensor) -> Tensor:
    """E[log p] under Dirichlet laws with concentrations ``[..., K]``."""
    return torch.digamma(concentration) - torch.digamma(concentration.sum(-1, keepdim=True))
