"""What the states of a hidden Markov model emit: laws with a conjugate prior, so that EM has its M step in closed form.

Each family holds point estimates as parameters (gradients train them too) and gives EM: its law, the statistics of
observations weighted by state, the estimate from statistics, the log density of its prior; for variational Bayes, the
expected log density under a posterior. A user's own family without statistics is trained by gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.math.conjugate import dirichlet_divergence, expected_log
from probllm.nn.config import Configurable

Statistics = tuple[Tensor, ...]  # sums over observations, so that they can be added and scaled


class Emissions(Configurable, nn.Module):
    """A family of emission laws for ``num_states`` states."""

    num_states: int
    event_dims: int  # of one observation: 0 for a symbol or a count, 1 for a vector

    def law(self) -> Any:
        """The distribution of an observation, batch shape ``[K]``."""
        raise NotImplementedError(f"{type(self).__name__} has no law")

    @property
    def num_free(self) -> int:
        """Number of free parameters, for AIC and BIC."""
        raise NotImplementedError(f"{type(self).__name__} does not count its parameters")

    def log_prob(self, observations: Tensor) -> Tensor:
        """log p(x | k) ``[N, K]`` of observations ``[N, ...]``."""
        found: Tensor = self.law().log_prob(observations.unsqueeze(1))
        return found

    def initialise(self, observations: Tensor, seed: int) -> None:
        """Sets the prior's scales and a first estimate from observations ``[N, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} has no conjugate estimate: train it by gradient")

    def statistics(self, observations: Tensor, weights: Tensor) -> Statistics:
        """Sums over observations ``[N, ...]`` with weights ``[N, K]``."""
        raise NotImplementedError(f"{type(self).__name__} has no conjugate estimate: train it by gradient")

    def maximise(self, statistics: Statistics) -> None:
        """Sets the parameters to the mode of the posterior."""
        raise NotImplementedError(f"{type(self).__name__} has no conjugate estimate: train it by gradient")

    def log_prior(self) -> Tensor:
        """Log density of the parameters, up to a constant, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no conjugate estimate: train it by gradient")

    # variational Bayes: a posterior is what ``posterior`` makes of statistics

    def posterior(self, statistics: Statistics) -> Any:
        """The conjugate posterior."""
        raise NotImplementedError(f"{type(self).__name__} has no variational posterior")

    def expected_log_prob(self, posterior: Any, observations: Tensor) -> Tensor:
        """E[log p(x | k)] under the posterior, ``[N, K]``."""
        raise NotImplementedError(f"{type(self).__name__} has no variational posterior")

    def divergence(self, posterior: Any, statistics: Statistics) -> Tensor:
        """KL(posterior, prior) of the posterior that the statistics make, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no variational posterior")

    def set_mean(self, posterior: Any) -> None:
        """Sets the parameters to those that stand for the posterior."""
        raise NotImplementedError(f"{type(self).__name__} has no variational posterior")

    def sites(self) -> Any:
        """The law with its parameters drawn from the prior, as Pyro sample sites."""
        raise NotImplementedError(f"{type(self).__name__} has no prior to sample from")

    def permute(self, order: Tensor) -> None:
        """Renumbers the states: the new state i is the old ``order[i]``."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.shape[:1] == (self.num_states,):
                    parameter.copy_(parameter[order].clone())


def at_least_one(**sizes: int) -> None:
    """Raises for a size that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def above_zero(**values: float) -> None:
    """Raises for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: expected above 0, got {value}")


def nearest_clusters(observations: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means labels of vectors ``[N, D]`` as weights ``[N, clusters]``; with fewer points, some clusters are empty."""
    from sklearn.cluster import KMeans  # takes seconds to import

    points = observations.detach().cpu().numpy().astype(np.float64)
    distinct = min(clusters, len(np.unique(points, axis=0)))
    spread = points.std(0)
    labels = KMeans(distinct, n_init=1, random_state=seed).fit_predict(points / np.where(spread > 0, spread, 1.0))
    return nn.functional.one_hot(torch.from_numpy(labels).long(), clusters).double()


class CategoricalEmissions(Emissions):
    """Symbols 0..V-1 with a symmetric Dirichlet prior.

    Args:
        num_states: K.
        num_symbols: V.
        concentration: of the prior, in the softmax basis: its mode is (counts + concentration) / sum, so any value
            above 0 will do.
    """

    event_dims = 0

    def __init__(self, num_states: int, num_symbols: int, concentration: float = 0.01) -> None:
        super().__init__()
        at_least_one(num_states=num_states, num_symbols=num_symbols)
        above_zero(concentration=concentration)
        self.num_states, self.num_symbols, self.concentration = num_states, num_symbols, concentration
        self.logits = nn.Parameter(0.5 * torch.randn(num_states, num_symbols))

    @property
    def num_free(self) -> int:
        return self.num_states * (self.num_symbols - 1)

    def law(self) -> Any:
        return dist.Categorical(logits=self.logits)

    def log_prob(self, observations: Tensor) -> Tensor:
        return self.logits.log_softmax(-1).T[observations]

    def initialise(self, observations: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        seen = torch.bincount(observations, minlength=self.num_symbols).double() + 1.0
        noise = torch.rand(self.num_states, self.num_symbols, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            self.logits.copy_((seen / seen.sum() * (0.5 + noise)).log().log_softmax(-1))

    def statistics(self, observations: Tensor, weights: Tensor) -> Statistics:
        counts = weights.new_zeros(self.num_symbols, self.num_states)
        return (counts.index_add_(0, observations, weights).T,)

    def maximise(self, statistics: Statistics) -> None:
        with torch.no_grad():
            self.logits.copy_((statistics[0] + self.concentration).log().log_softmax(-1))

    def log_prior(self) -> Tensor:
        return self.concentration * self.logits.log_softmax(-1).sum()

    def posterior(self, statistics: Statistics) -> Tensor:
        return statistics[0] + self.concentration

    def expected_log_prob(self, posterior: Tensor, observations: Tensor) -> Tensor:
        return expected_log(posterior).T[observations]

    def divergence(self, posterior: Tensor, statistics: Statistics) -> Tensor:
        return dirichlet_divergence(posterior, torch.full_like(posterior, self.concentration))

    def set_mean(self, posterior: Tensor) -> None:
        with torch.no_grad():
            self.logits.copy_(posterior.log().log_softmax(-1))

    def sites(self) -> Any:
        with pyro.plate("emission_states", self.num_states):
            row = pyro.sample("emission", dist.Dirichlet(torch.full_like(self.logits, self.concentration)))
        return dist.Categorical(row)


class PoissonEmissions(Emissions):
    """Counts 0, 1, ... with a Gamma prior on each state's rate.

    Args:
        num_states: K.
        shape, rate: of the Gamma prior.
    """

    event_dims = 0

    def __init__(self, num_states: int, shape: float = 1.1, rate: float = 0.01) -> None:
        super().__init__()
        at_least_one(num_states=num_states)
        above_zero(shape=shape, rate=rate)
        self.num_states, self.shape, self.rate = num_states, shape, rate
        self.log_rate = nn.Parameter(torch.randn(num_states))

    @property
    def num_free(self) -> int:
        return self.num_states

    def law(self) -> Any:
        return dist.Poisson(self.log_rate.exp())

    def initialise(self, observations: Tensor, seed: int) -> None:
        weights = nearest_clusters(observations.double().unsqueeze(-1), self.num_states, seed)
        self.maximise(self.statistics(observations.double(), weights))
        with torch.no_grad():  # clusters that got nothing start at the mean, apart from each other
            empty = weights.sum(0) == 0
            start = (observations.double().mean() + 0.1).log() + 0.1 * torch.arange(self.num_states)
            self.log_rate.copy_(torch.where(empty, start, self.log_rate))

    def statistics(self, observations: Tensor, weights: Tensor) -> Statistics:
        return weights.sum(0), weights.T @ observations.to(weights.dtype)

    def maximise(self, statistics: Statistics) -> None:
        count, total = statistics
        with torch.no_grad():  # the mode of log(rate)'s density, which exists for every shape above 0
            self.log_rate.copy_(((total + self.shape) / (count + self.rate)).log())

    def log_prior(self) -> Tensor:
        return (self.shape * self.log_rate - self.rate * self.log_rate.exp()).sum()

    def posterior(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        count, total = statistics
        return total + self.shape, count + self.rate

    def expected_log_prob(self, posterior: tuple[Tensor, Tensor], observations: Tensor) -> Tensor:
        shape, rate = posterior
        x = observations.to(shape.dtype).unsqueeze(-1)
        return x * (torch.digamma(shape) - rate.log()) - shape / rate - torch.lgamma(x + 1)

    def divergence(self, posterior: tuple[Tensor, Tensor], statistics: Statistics) -> Tensor:
        prior = dist.Gamma(torch.full_like(posterior[0], self.shape), torch.full_like(posterior[1], self.rate))
        divergence: Tensor = torch.distributions.kl_divergence(dist.Gamma(*posterior), prior).sum()
        return divergence

    def set_mean(self, posterior: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            self.log_rate.copy_((posterior[0] / posterior[1]).log())

    def sites(self) -> Any:
        with pyro.plate("emission_states", self.num_states):
            like = self.log_rate.detach()
            rate = pyro.sample("rate", dist.Gamma(torch.full_like(like, self.shape), torch.full_like(like, self.rate)))
        return dist.Poisson(rate.clamp(1e-30, 1e30))  # where a sampler strays to the ends of the floats
