"""Gaussian emissions of a hidden Markov model, and mixtures of them; priors as in ``math.conjugate``."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.math.conjugate import COVARIANCES, Covariance, Moments, NormalWishart, mahalanobis, moments
from probllm.models.hmm_emissions import Emissions, Statistics, above_zero, at_least_one, nearest_clusters


class GaussianEmissions(Emissions):
    """Vectors ``[D]`` with a normal-inverse-Wishart prior, whose centre and scale come from the data.

    Args:
        num_states: K.
        dim: D.
        covariance: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        strength: observations that the prior mean is worth.
        dof: beyond the least number of degrees of freedom: observations that the prior scale is worth.
        scale: of a state's covariance in the prior, as a share of the data's variance.
    """

    event_dims = 1

    def __init__(
        self,
        num_states: int,
        dim: int,
        covariance: Covariance = "full",
        strength: float = 0.01,
        dof: float = 1.0,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        at_least_one(num_states=num_states, dim=dim)
        above_zero(strength=strength, dof=dof, scale=scale)
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance: expected one of {', '.join(COVARIANCES)}, got {covariance!r}")
        self.num_states, self.dim, self.covariance = num_states, dim, covariance
        self.strength, self.dof, self.scale = strength, dof, scale
        self.mean = nn.Parameter(torch.randn(num_states, dim))
        shape = {"full": (num_states, dim, dim), "tied": (dim, dim), "diag": (num_states, dim)}
        self.factor = nn.Parameter(
            torch.zeros(shape.get(covariance, (num_states,)))
        )  # log of the diagonal, or triangle
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.center: Tensor
        self.spread: Tensor

    @property
    def num_free(self) -> int:
        k, d = self.num_states, self.dim
        triangle = d * (d + 1) // 2
        return k * d + {"full": k * triangle, "tied": triangle, "diag": k * d, "spherical": k}[self.covariance]

    def scale_tril(self) -> Tensor:
        """The Cholesky factors ``[K, D, D]``."""
        k, d = self.num_states, self.dim
        if self.covariance == "diag":
            return torch.diag_embed(self.factor.exp())
        if self.covariance == "spherical":
            return torch.diag_embed(self.factor.exp().unsqueeze(-1).expand(k, d))
        lower = self.factor.tril(-1) + torch.diag_embed(self.factor.diagonal(dim1=-2, dim2=-1).exp())
        return lower.expand(k, d, d)

    def covariances(self) -> Tensor:
        """The covariance in the shape of its kind: ``[K, D, D]``, ``[D, D]``, ``[K, D]`` or ``[K]``."""
        if self.covariance in ("diag", "spherical"):
            return (2 * self.factor).exp()
        tril = self.scale_tril() if self.covariance == "full" else self.scale_tril()[0]
        return tril @ tril.mT

    def law(self) -> Any:
        if self.covariance == "diag":
            return dist.Normal(self.mean, self.factor.exp()).to_event(1)
        if self.covariance == "spherical":
            return dist.Normal(self.mean, self.factor.exp().unsqueeze(-1)).to_event(1)
        return dist.MultivariateNormal(self.mean, scale_tril=self.scale_tril())

    def log_prob(self, observations: Tensor) -> Tensor:
        covariance = self.covariances()
        distance = mahalanobis(self.covariance, observations.unsqueeze(1) - self.mean, covariance)
        if self.covariance == "diag":
            log_det = covariance.log().sum(-1)
        elif self.covariance == "spherical":
            log_det = self.dim * covariance.log()
        else:
            log_det = 2 * self.factor.diagonal(dim1=-2, dim2=-1).sum(-1)
        return -0.5 * (distance + log_det + self.dim * math.log(2 * math.pi))

    def prior(self) -> NormalWishart:
        """The normal-inverse-Wishart prior."""
        k, d = self.num_states, self.dim
        variance = self.scale * self.spread
        shape = {"full": torch.diag(variance).expand(k, d, d), "tied": torch.diag(variance)}
        shape |= {"diag": variance.expand(k, d), "spherical": variance.mean().expand(k) * d}
        least = d if self.covariance in ("full", "tied") else 1
        dof = torch.full(() if self.covariance == "tied" else (k,), self.dof + least, dtype=variance.dtype)
        center, strength = self.center.expand(k, d), torch.full((k,), self.strength, dtype=variance.dtype)
        return NormalWishart(self.covariance, center, strength, shape[self.covariance], dof)

    def initialise(self, observations: Tensor, seed: int) -> None:
        with torch.no_grad():
            self.center.copy_(observations.mean(0))
            variance = observations.var(0, correction=0)
            # a dimension that does not vary is known as well as a float is
            least = 1e-6 * (1 + observations.abs().amax(0)) ** 2
            self.spread.copy_(variance.clamp_min(least))
            weights = nearest_clusters(observations, self.num_states, seed).to(observations.dtype)
            self.maximise(self.statistics(observations, weights))
            empty = weights.sum(0) == 0
            generator = torch.Generator().manual_seed(seed)
            apart = torch.randn(self.num_states, self.dim, generator=generator).to(self.mean.dtype)
            self.mean.copy_(torch.where(empty.unsqueeze(-1), self.center + self.spread.sqrt() * apart, self.mean))

    def statistics(self, observations: Tensor, weights: Tensor) -> Statistics:
        # about the centre: sums of squares far from 0 would lose the variance
        return moments(observations - self.center, weights, self.covariance)

    def _posterior(self, statistics: Statistics) -> NormalWishart:
        """The posterior about the centre."""
        prior = self.prior()
        return prior._replace(mean=torch.zeros_like(prior.mean)).updated(Moments(*statistics))

    def maximise(self, statistics: Statistics) -> None:
        mean, covariance = self._posterior(statistics).mode()
        self._set(mean + self.center, covariance)

    def _set(self, mean: Tensor, covariance: Tensor) -> None:
        with torch.no_grad():
            self.mean.copy_(mean)
            if self.covariance in ("diag", "spherical"):
                self.factor.copy_(0.5 * covariance.log())
            else:
                tril = torch.linalg.cholesky(covariance)
                self.factor.copy_(tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).log()))

    def log_prior(self) -> Tensor:
        return self.prior().log_density(self.mean, self.covariances())

    def posterior(self, statistics: Statistics) -> NormalWishart:
        found = self._posterior(statistics)
        return found._replace(mean=found.mean + self.center)

    def expected_log_prob(self, posterior: NormalWishart, observations: Tensor) -> Tensor:
        return posterior.expected_log_density(observations)

    def divergence(self, posterior: NormalWishart, statistics: Statistics) -> Tensor:
        data, prior = Moments(*statistics), self.prior()
        about = posterior._replace(mean=posterior.mean - self.center)
        expected = about.expected_log_likelihood(data)
        return expected - about.log_evidence_from(prior._replace(mean=torch.zeros_like(prior.mean)), data.total)

    def set_mean(self, posterior: NormalWishart) -> None:
        dof = posterior.dof.reshape(*posterior.dof.shape, *(1,) * (posterior.scale.dim() - posterior.dof.dim()))
        self._set(posterior.mean, posterior.scale / dof)  # the inverse of the mean precision

    def sites(self) -> Any:
        prior = self.prior()
        k, d = self.num_states, self.dim
        if self.covariance in ("diag", "spherical"):
            scale, dof = prior.scale, prior.dof
            dof = dof.unsqueeze(-1).expand_as(scale) if self.covariance == "diag" else dof
            law = dist.InverseGamma(dof / 2, scale / 2)
            variance = pyro.sample("variance", law.to_event(scale.dim())).clamp(1e-30, 1e30)
            wide = variance.expand(k, d) if self.covariance == "diag" else variance.unsqueeze(-1).expand(k, d)
            mean = pyro.sample("mean", dist.Normal(prior.mean, (wide / self.strength).sqrt()).to_event(2))
            return dist.Normal(mean, wide.sqrt()).to_event(1)
        # Bartlett's decomposition of a Wishart matrix: what samplers and guides know how to move in
        n = () if self.covariance == "tied" else (k,)
        freedom = prior.dof.unsqueeze(-1) - torch.arange(d, dtype=prior.dof.dtype, device=prior.dof.device)
        squares = pyro.sample("squares", dist.Chi2(freedom).to_event(len(n) + 1))
        normal = dist.Normal(torch.zeros_like(freedom[..., :1]), 1.0).expand((*n, d * (d - 1) // 2))
        below = pyro.sample("below", normal.to_event(len(n) + 1)) if d > 1 else None
        root = torch.diag_embed(squares.clamp(1e-30, 1e30).sqrt())
        if below is not None:
            root = root.clone()
            root[..., *torch.tril_indices(d, d, -1)] = below
        root = torch.linalg.cholesky(torch.linalg.inv(prior.scale)) @ root
        precision = pyro.deterministic("precision", root @ root.mT).expand(k, d, d)
        mean = pyro.sample(
            "mean", dist.MultivariateNormal(prior.mean, precision_matrix=self.strength * precision).to_event(1)
        )
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def permute(self, order: Tensor) -> None:
        with torch.no_grad():
            self.mean.copy_(self.mean[order].clone())
            if self.covariance != "tied":
                self.factor.copy_(self.factor[order].clone())


class MixtureEmissions(Emissions):
    """Vectors ``[D]`` from a mixture of M Gaussians in each state.

    Args:
        num_states: K.
        components: M.
        dim: D.
        concentration: of the Dirichlet prior on each state's weights.
        covariance: of each component, as in ``GaussianEmissions``, whose prior the components have too.
    """

    event_dims = 1

    def __init__(
        self,
        num_states: int,
        components: int,
        dim: int,
        covariance: Covariance = "diag",
        concentration: float = 1.0,
    ) -> None:
        super().__init__()
        at_least_one(num_states=num_states, components=components, dim=dim)
        above_zero(concentration=concentration)
        self.num_states, self.components, self.dim, self.concentration = num_states, components, dim, concentration
        self.gaussians = GaussianEmissions(num_states * components, dim, covariance)
        self.logits = nn.Parameter(torch.zeros(num_states, components))

    @property
    def num_free(self) -> int:
        return self.num_states * (self.components - 1) + self.gaussians.num_free

    def law(self) -> Any:
        k, m = self.logits.shape
        tril = self.gaussians.scale_tril().reshape(k, m, self.dim, self.dim)
        each = dist.MultivariateNormal(self.gaussians.mean.reshape(k, m, self.dim), scale_tril=tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), each)

    def _joint(self, of_component: Tensor, log_weights: Tensor) -> Tensor:
        """log of weight times density ``[N, K, M]``."""
        return of_component.reshape(-1, *log_weights.shape) + log_weights

    def log_prob(self, observations: Tensor) -> Tensor:
        return self._joint(self.gaussians.log_prob(observations), self.logits.log_softmax(-1)).logsumexp(-1)

    def initialise(self, observations: Tensor, seed: int) -> None:
        self.gaussians.initialise(observations, seed)
        with torch.no_grad():  # clusters that are near each other belong to one state
            centers = self.gaussians.mean.detach()
            states = nearest_clusters(centers, self.num_states, seed).argmax(-1)
            order = torch.argsort(states, stable=True)
        self.gaussians.permute(order)
        with torch.no_grad():
            self.logits.zero_()

    def _shares(self, observations: Tensor, weights: Tensor, joint: Tensor) -> Tensor:
        return (weights.unsqueeze(-1) * joint.softmax(-1)).flatten(1)

    def statistics(self, observations: Tensor, weights: Tensor) -> Statistics:
        joint = self._joint(self.gaussians.log_prob(observations), self.logits.log_softmax(-1))
        return self._sums(observations, self._shares(observations, weights, joint))

    def _sums(self, observations: Tensor, shares: Tensor) -> Statistics:
        return shares.sum(0).reshape(self.logits.shape), *self.gaussians.statistics(observations, shares)

    def maximise(self, statistics: Statistics) -> None:
        self.gaussians.maximise(statistics[1:])
        with torch.no_grad():
            self.logits.copy_((statistics[0] + self.concentration).log().log_softmax(-1))

    def log_prior(self) -> Tensor:
        return self.gaussians.log_prior() + self.concentration * self.logits.log_softmax(-1).sum()

    def permute(self, order: Tensor) -> None:
        m = self.components
        self.gaussians.permute((order.unsqueeze(-1) * m + torch.arange(m)).flatten())
        with torch.no_grad():
            self.logits.copy_(self.logits[order].clone())
