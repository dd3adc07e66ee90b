"""The law of the hidden states of a linear-Gaussian model given what was observed: a Gaussian over paths ``[T, d]``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probllm.distributions.structure import expanded
from probllm.math.gaussian_paths import paths, smooth, smooth_means
from probllm.math.gaussian_steps import Smoothed, normal_log_density

if TYPE_CHECKING:
    from probllm.distributions.linear_gaussian_ssm import LinearGaussianSSM


class GaussianPaths(TorchDistribution):  # type: ignore[misc]
    """p(z_1..z_T | x): moments by the smoother, exact samples, density by Bayes' rule.

    Paths are 0 on padding. Made by ``LinearGaussianSSM.posterior``.
    """

    has_rsample = True
    has_enumerate_support = False
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, law: LinearGaussianSSM, value: Tensor, entries: Tensor | None) -> None:
        self._law, self._value, self._entries = law, value, entries
        leads = [law.batch_shape, value.shape[:-2], () if entries is None else entries.shape[:-2]]
        self._own_shape = torch.broadcast_shapes(*leads)
        self._kept: dict[str, Any] = {}
        super().__init__(self._own_shape, torch.Size((value.shape[-2], law.state_size)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        return expanded(self, batch_shape, _instance)

    def _once(self, name: str, find: Callable[..., Any]) -> Any:
        found, with_gradients = self._kept.get(name, (None, False))
        if found is None or (torch.is_grad_enabled() and not with_gradients):
            found = find(self._law._chain(self._value), self._law.lengths, self._entries)
            self._kept[name] = (found, torch.is_grad_enabled())
        return found

    def _moments(self) -> Smoothed:
        return self._once("moments", smooth)  # type: ignore[no-any-return]

    def _grown(self, x: Tensor, dims: int) -> Tensor:
        return x.expand(self.batch_shape + x.shape[x.dim() - dims :]).to(self._law._dtype)

    @property
    def mean(self) -> Tensor:
        """``[*batch, T, d]``, the smoothed states; also the mode."""
        known = "moments" in self._kept
        return self._grown(self._moments().mean if known else self._once("mean", smooth_means), 2)

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def covariance(self) -> Tensor:
        """``[*batch, T, d, d]`` of each state."""
        return self._grown(self._moments().covariance, 3)

    @property
    def cross_covariance(self) -> Tensor:
        """``[*batch, T - 1, d, d]`` of each state (rows) and the next."""
        return self._grown(self._moments().cross_covariance, 3)

    @property
    def variance(self) -> Tensor:
        """``[*batch, T, d]``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def log_prob(self, path: Tensor) -> Tensor:
        """Log density of paths ``[..., T, d]``, in nats; -inf where a noise is singular, so that there is none."""
        if path.shape[-2:] != self.event_shape:
            raise ValueError(
                f"value: expected shape [..., {', '.join(map(str, self.event_shape))}], got {list(path.shape)}"
            )
        joint = self._law._log_prob_joint(path, self._value, self._entries)
        evidence = self._law._log_prob(self._value, self._entries)
        return (joint - torch.where(evidence > -math.inf, evidence, torch.zeros_like(evidence))).to(self._law._dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Exact paths ``[*sample_shape, *batch, T, d]``, differentiable in parameters and observations."""
        law = self._law
        p, chain = law.parameters, law._chain(self._value)
        white = law._white(torch.Size((*sample_shape, *self.batch_shape)), self.event_shape[0])
        moves, errors = (white.moves, p.noise_root), (white.errors, p.error_root)
        return paths(chain, law.lengths, self._entries, p.first_push(white), moves, errors).to(law._dtype)

    def entropy(self) -> Tensor:
        """Entropy ``[*batch]`` in nats, H(z) + H(x | z) - H(x); -inf where a noise is singular."""
        law = self._law
        chain = law._chain(self._value)
        steps, d = self.event_shape
        zero = torch.zeros((), dtype=torch.float64, device=self._value.device)
        real, seen = law._real(steps), self._seen()
        first = normal_log_density(zero.expand(chain.mean.shape), chain.covariance)
        moves = normal_log_density(zero.expand(*chain.noise.shape[:-2], d), chain.noise)
        if steps > 1:
            moves = torch.where(real[..., 1:], moves, zero)
            first = first + moves.sum(-1) - 0.5 * d * (real.sum(-1) - 1)
        errors = normal_log_density(zero.expand(seen.shape), chain.error, seen)
        peak = first + errors.sum(-1) - 0.5 * (d + seen.sum((-1, -2)))  # each entropy is half a nat an entry above
        entropy = torch.where(peak > -math.inf, -peak - law._entropy(steps, self._entries), -math.inf)
        return self._grown(entropy, 0)

    def _seen(self) -> Tensor:
        """``[..., T, o]`` bool: real and observed."""
        steps, width = self._value.shape[-2:]
        real = self._law._real(steps).unsqueeze(-1)
        real = real.expand(*real.shape[:-1], width)
        return real if self._entries is None else real & self._entries
