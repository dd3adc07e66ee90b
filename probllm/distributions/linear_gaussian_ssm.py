"""The linear-Gaussian state-space model: a law over observations in which the states are integrated out exactly.

    z_0 ~ initial,    z_t = z_{t-1} F_t + transition noise,    x_t = z_t H_t + observation noise,     t = 1..T

with row vectors, as Pyro's ``GaussianHMM``, whose arguments it takes and whose numbers it gives: a transition is made
*before* the first observation. So every step is alike, and what is filtered from one stretch of observations is the
initial law of the next. With ``moves_first=False`` the first state comes from ``initial_dist`` itself, T - 1
transitions in all, as in ``HiddenMarkovModel`` and in textbooks. Kalman (1960); Rauch, Tung and Striebel (1965).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from probllm.distributions.gaussian_learning import GaussianLearning
from probllm.distributions.gaussian_parameters import Parameters, White, read
from probllm.distributions.gaussian_paths import GaussianPaths
from probllm.distributions.gaussian_streaming import GaussianStreaming, State, observed_entries
from probllm.distributions.structure import expanded
from probllm.math import gaussian_paths
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.gaussian import KALMAN, flatten, log_prob
from probllm.math.gaussian_steps import Chain, apply, normal_log_density
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import expected_parts


class Filtering(NamedTuple):
    """Moments of each state given the observations up to its step."""

    mean: Tensor  # [*batch, T, d]
    covariance: Tensor  # [*batch, T, d, d]
    log_prob: Tensor  # [*batch, T]: log density of x_t given x_1..x_{t-1}, in nats; 0 on padding
    state: State  # after the last step (of each row)


class LinearGaussianSSM(GaussianStreaming, GaussianLearning, TorchDistribution):  # type: ignore[misc]
    """Law over observations ``[T, o]`` with hidden states of size d.

    Args:
        initial_dist: law of the initial state, batch shape that broadcasts to ``batch``; like the other two a
            ``MultivariateNormal``, or an ``Independent`` ``Normal`` (``Normal(...).to_event(1)``). Its covariance and
            that of ``transition_dist`` may be singular (give ``scale_tril`` and ``validate_args=False``).
        transition_matrix: ``[..., d, d]``, from (row) and to; ``[*batch, T, d, d]`` where it changes with time.
        transition_dist: law of the noise, batch shape that broadcasts to ``[*batch, T]``.
        observation_matrix: ``[..., d, o]``, as ``transition_matrix``.
        observation_dist: as ``transition_dist``, over vectors of o.
        duration: T, where nothing else tells it; a model that does not change with time needs it to be sampled.
        lengths: ``[*batch]`` from 1 to T.
        moves_first: whether a transition is made before the first observation. If not, the time dimension of
            ``transition_matrix`` and ``transition_dist`` is T - 1.
    Raises:
        TypeError: for laws that are not normal, matrices that are no floating-point tensors, lengths no integers.
        ValueError: for shapes that do not agree, NaN, lengths out of range.
    """

    has_rsample = True
    has_enumerate_support = False
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial_dist: Any,
        transition_matrix: Tensor,
        transition_dist: Any,
        observation_matrix: Tensor,
        observation_dist: Any,
        validate_args: bool | None = None,
        duration: int | None = None,
        lengths: Tensor | None = None,
        *,
        moves_first: bool = True,
    ) -> None:
        parameters = read(
            initial_dist, transition_matrix, transition_dist, observation_matrix, observation_dist, moves_first
        )
        short = 0 if moves_first else 1
        leads = {
            "transition_matrix": (transition_matrix.shape[:-2], short),
            "transition_dist": (transition_dist.batch_shape, short),
            "observation_matrix": (observation_matrix.shape[:-2], 0),
            "observation_dist": (observation_dist.batch_shape, 0),
        }
        steps = {name: lead[-1] + less for name, (lead, less) in leads.items() if lead and lead[-1] != 1}
        if duration is not None:
            if duration < 1:
                raise ValueError(f"duration: expected at least 1, got {duration}")
            steps["duration"] = duration
        if len(set(steps.values())) > 1:
            raise ValueError(f"arguments disagree on the number of steps: {steps}")
        batches = {"initial_dist": initial_dist.batch_shape, "lengths": () if lengths is None else lengths.shape}
        batches |= {name: lead[:-1] for name, (lead, _) in leads.items()}
        try:
            batch = torch.broadcast_shapes(*batches.values())
        except RuntimeError:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in batches.items())
            raise ValueError(f"batch shapes do not broadcast: {found}") from None
        dtypes = (initial_dist.mean, transition_matrix, transition_dist.mean, observation_matrix, observation_dist.mean)
        dtype = dtypes[0].dtype
        for x in dtypes[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        self._set(parameters, next(iter(steps.values()), None), lengths, torch.Size(batch), dtype)

    def _set(
        self,
        parameters: Parameters,
        duration: int | None,
        lengths: Tensor | None,
        batch: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        if lengths is not None:
            check_lengths(lengths, duration)
        self.parameters, self.duration, self.lengths = parameters, duration, lengths
        self._dtype, self._own_shape = dtype, batch
        event = torch.Size((duration or 1, parameters.emission.shape[-1]))
        super().__init__(batch, event, validate_args=False)

    def _of(self, parameters: Parameters, duration: int | None, lengths: Tensor | None) -> Self:
        """A law of this class with other numbers."""
        law = type(self).__new__(type(self))
        leads = [x.shape[: x.dim() - n] for x, n in zip(parameters[:2], (1, 2), strict=True)]
        for name, n in (("transition", 3), ("drift", 2), ("noise", 3), ("emission", 3), ("offset", 2), ("error", 3)):
            leads.append(getattr(parameters, name).shape[:-n])
        batch = torch.broadcast_shapes(*leads, () if lengths is None else lengths.shape)
        law._set(parameters, duration, lengths, batch, self._dtype)
        return law

    @property
    def state_size(self) -> int:
        """d."""
        return int(self.parameters.emission.shape[-2])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        return expanded(self, batch_shape, _instance)

    def _validate_sample(self, value: Tensor) -> None:
        """Checks belong to ``_checked``, which every path takes: padding may hold anything."""

    # ---- observations

    def _checked(self, value: Tensor, observed: Tensor | None) -> Tensor | None:
        """Raises for observations that do not fit; which entries are observed ``[..., T, o]``, None where all are."""
        width = self.event_shape[1]
        if not value.is_floating_point():
            raise TypeError(f"value: expected floating-point numbers, got {value.dtype}")
        if value.dim() < 2 or value.shape[-1] != width:
            raise ValueError(f"value: expected shape [..., T, {width}], got {list(value.shape)}")
        steps = value.shape[-2]
        if steps < 1 or (self.duration is not None and steps != self.duration):
            raise ValueError(f"value: expected {self.duration or 'at least 1'} steps, got shape {list(value.shape)}")
        try:
            torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value: batch shape {list(value.shape[:-2])} does not broadcast with {list(self.batch_shape)}, "
                "that of the law"
            ) from None
        entries = observed_entries(value, observed)
        if not is_wrapped(value):
            bad = torch.isnan(value.detach())
            if bool(bad.any()):
                real = self._real(steps).unsqueeze(-1)
                if bool((bad & (real if entries is None else real & entries)).any()):
                    raise ValueError("value: NaN in an entry that is observed (mark what is missing by observed=False)")
        return entries

    def _real(self, steps: int) -> Tensor:
        """``[..., T]`` bool: no padding."""
        if self.lengths is None:
            return torch.ones(steps, dtype=torch.bool, device=self.parameters.mean.device)
        return mask_from_lengths(self.lengths, steps)

    def _padded(self, x: Tensor) -> Tensor:
        """``[..., T, n]`` with 0 on padding."""
        return x if self.lengths is None else torch.where(self._real(x.shape[-2]).unsqueeze(-1), x, 0.0)

    def _chain(self, value: Tensor) -> Chain:
        return self.parameters.chain(value)

    def _log_prob(self, value: Tensor, entries: Tensor | None) -> Tensor:
        return log_prob(self._chain(value), self.lengths, entries)

    def log_prob(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """Log density of observations ``[..., T, o]``, in nats.

        Args:
            observed: ``[..., T]`` bool for whole steps, or ``[..., T, o]`` for entries (where both would fit, the one
                with as many dimensions as ``value`` has is of entries); what is False is integrated out.
        """
        found = self._log_prob(value, self._checked(value, observed))
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape)).to(self._dtype)

    def _duration(self) -> int:
        if self.duration is None:
            raise ValueError("duration: a model that does not change with time needs it for this")
        return self.duration

    # ---- samples and moments

    def _white(self, shape: torch.Size, steps: int) -> White:
        return self.parameters.white(shape, steps, self._dtype)

    def _draw(self, sample_shape: Any) -> tuple[Tensor, Tensor]:
        """States and observations, float64."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        return self.parameters.unrolled(self._white(shape, self._duration()))

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Exact samples: states ``[*sample, *batch, T, d]``, observations ``[*sample, *batch, T, o]``; 0 on padding."""
        with torch.no_grad():
            states, values = (self._padded(x).to(self._dtype) for x in self._draw(sample_shape))
            return states, values

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Observations ``[*sample_shape, *batch, T, o]``, differentiable in the parameters; 0 on padding."""
        return self._padded(self._draw(sample_shape)[1]).to(self._dtype)

    @property
    def mean(self) -> Tensor:
        """``[*batch, T, o]``; also the mode."""
        return self._padded(self._mean(self._duration())).expand(self.batch_shape + self.event_shape).to(self._dtype)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def _mean(self, steps: int) -> Tensor:
        chain = self._chain(torch.zeros(steps, self.event_shape[1], device=self.parameters.mean.device))
        lead = torch.broadcast_shapes(chain.mean.shape[:-1], chain.drift.shape[:-2])
        drift = chain.drift.expand(*lead, steps - 1, -1)
        pushes = torch.cat((chain.mean.expand(*lead, -1).unsqueeze(-2), drift), -2)
        return apply(gaussian_paths.recurrence(chain.transition, pushes), chain.emission) + chain.offset

    @property
    def variance(self) -> Tensor:
        """``[*batch, T, o]``; 0 on padding."""
        steps, width = self._duration(), self.event_shape[1]
        nothing = torch.zeros(steps, width, dtype=torch.bool, device=self.parameters.mean.device)
        chain = self._chain(nothing.double())
        covariance = gaussian_paths.filter_moments(chain, None, nothing)[1]
        total = chain.emission.mT @ covariance @ chain.emission + chain.error
        found = self._padded(total.diagonal(dim1=-2, dim2=-1))
        return found.expand(self.batch_shape + self.event_shape).to(self._dtype)

    def entropy(self) -> Tensor:
        """Entropy of the observations ``[*batch]``, in nats; -inf where they have no density."""
        return self._entropy(self._duration(), None).expand(self.batch_shape).to(self._dtype)

    def _entropy(self, steps: int, entries: Tensor | None) -> Tensor:
        """-log p at the mean is the entropy but for half a nat an entry."""
        mean = self._mean(steps)
        real = self._real(steps)
        count = real.sum(-1) * mean.shape[-1] if entries is None else (real.unsqueeze(-1) & entries).sum((-1, -2))
        peak = self._log_prob(mean, entries)
        return torch.where(peak > -math.inf, 0.5 * count - peak, torch.full_like(peak, -math.inf))

    def cross_entropy(self, q: LinearGaussianSSM) -> Tensor:
        """-E[log q] under this law ``[*batch]``, in nats; exact, q may have states of another size.

        log q is quadratic: its mean is its value at this law's mean, and its derivative along this law's covariance.
        """
        if not isinstance(q, LinearGaussianSSM):
            raise TypeError(f"q: expected LinearGaussianSSM, got {type(q).__name__}")
        steps = self._duration()
        if (q.duration or steps, q.event_shape[1]) != tuple(self.event_shape):
            raise ValueError(f"q: expected a law over shape {list(self.event_shape)}, got {list(q.event_shape)}")
        if self.lengths is not None or q.lengths is not None:
            lengths = torch.broadcast_tensors(*(self._real(steps).sum(-1), q._real(steps).sum(-1)))
            if not torch.equal(*lengths):
                raise ValueError("q: expected the same lengths")
        peak = q._log_prob(self._mean(steps), None)
        shape = torch.broadcast_shapes(peak.shape, self.batch_shape, q.batch_shape)
        other, along = _side_by_side(q._chain(self._mean(steps)), self._chain(self._mean(steps)), steps, shape)
        flat, sizes, _ = flatten(other, q.lengths if self.lengths is None else self.lengths, None)
        slopes = Chain(*expected_parts(KALMAN, flat, sizes))
        change = sum(
            (slope.view(*shape, *slope.shape[1:]) * x).flatten(len(shape)).sum(-1)
            for slope, x in zip((slopes.covariance, slopes.noise, slopes.error), along, strict=True)
        )
        return (-(peak + change)).expand(shape).to(self._dtype)

    # ---- states given observations

    def filter(self, value: Tensor, observed: Tensor | None = None) -> Filtering:
        """Moments of each state given the observations up to its step, and the state after the last."""
        found = gaussian_paths.filter_moments(self._chain(value), self.lengths, self._checked(value, observed))
        mean, covariance, log_p = (
            x.expand(*self._over(x, n), *x.shape[x.dim() - n :]) for x, n in zip(found, (2, 3, 1), strict=True)
        )
        steps = value.shape[-2]
        if self.lengths is None:
            state = State(mean[..., -1, :].to(self._dtype), covariance[..., -1, :, :].to(self._dtype), steps)
        else:
            at = (self.lengths - 1).expand(mean.shape[:-2])[..., None, None]
            last = mean.gather(-2, at.expand(*at.shape[:-1], mean.shape[-1])).squeeze(-2)
            spread = covariance.gather(-3, at.unsqueeze(-1).expand(*at.shape[:-1], *covariance.shape[-2:])).squeeze(-3)
            state = State(last.to(self._dtype), spread.to(self._dtype), steps)
        return Filtering(mean.to(self._dtype), covariance.to(self._dtype), log_p.to(self._dtype), state)

    def _over(self, x: Tensor, dims: int) -> torch.Size:
        return torch.Size(torch.broadcast_shapes(x.shape[: x.dim() - dims], self.batch_shape))

    def posterior(self, value: Tensor, observed: Tensor | None = None) -> GaussianPaths:
        """p(z_1..z_T | x), a law over paths: moments (the smoother's), density, exact samples, entropy."""
        return GaussianPaths(self, value, self._checked(value, observed))

    def smooth(self, value: Tensor, observed: Tensor | None = None) -> GaussianPaths:
        """``posterior``, by the name under which its ``mean``, ``covariance`` and ``cross_covariance`` are known."""
        return self.posterior(value, observed)

    def log_prob_joint(self, states: Tensor, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(z, x) ``[...]`` of states ``[..., T, d]``, in nats; -inf where a noise is singular."""
        return self._log_prob_joint(states, value, self._checked(value, observed)).to(self._dtype)

    def _log_prob_joint(self, states: Tensor, value: Tensor, entries: Tensor | None) -> Tensor:
        chain, states = self._chain(value), states.double()
        real = self._real(value.shape[-2])
        zero = torch.zeros((), dtype=torch.float64, device=states.device)
        total = normal_log_density(states[..., 0, :] - chain.mean, chain.covariance)
        if states.shape[-2] > 1:
            push = states[..., 1:, :] - apply(states[..., :-1, :], chain.transition) - chain.drift
            total = total + torch.where(real[..., 1:], normal_log_density(push, chain.noise), zero).sum(-1)
        residual = chain.value - apply(states, chain.emission) - chain.offset
        seen = real.unsqueeze(-1) if entries is None else real.unsqueeze(-1) & entries
        return total + normal_log_density(residual, chain.error, seen.expand(residual.shape)).sum(-1)


def _side_by_side(q: Chain, p: Chain, steps: int, shape: torch.Size) -> tuple[Chain, tuple[Tensor, Tensor, Tensor]]:
    """q's chain at its own mean with p's states beside its own, p's without noise; and where p's noise would stand."""

    def beside(x: Tensor, y: Tensor, dims: int) -> Tensor:
        """Block-diagonal."""
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], shape if dims == 2 else (*shape, 1))
        n, m = x.shape[-1], y.shape[-1]
        above = torch.cat((x.expand(*lead, n, n), x.new_zeros(*lead, n, m)), -1)
        below = torch.cat((x.new_zeros(*lead, m, n), y.expand(*lead, m, m)), -1)
        return torch.cat((above, below), -2)

    def none(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    rows = torch.broadcast_shapes(q.emission.shape[:-2], p.emission.shape[:-2], (*shape, 1))
    emission = torch.cat((q.emission.expand(*rows, -1, -1), p.emission.expand(*rows, -1, -1)), -2)
    error = q.error.expand(torch.broadcast_shapes(q.error.shape, p.error.shape, (*shape, 1, 1, 1)))
    d, o = emission.shape[-2:]
    chain = Chain(
        emission.new_zeros(*shape, steps, o),
        emission.new_zeros(*shape, d),
        beside(q.covariance, none(p.covariance), 2),
        beside(q.transition, p.transition, 3),
        emission.new_zeros(*shape, 1, d),
        beside(q.noise, none(p.noise), 3),
        emission,
        emission.new_zeros(*shape, 1, o),
        error,
    )
    along = beside(none(q.covariance), p.covariance, 2), beside(none(q.noise), p.noise, 3), p.error
    return chain, along


@register_kl(LinearGaussianSSM, LinearGaussianSSM)  # type: ignore[untyped-decorator]
def _kl(p: LinearGaussianSSM, q: LinearGaussianSSM) -> Tensor:
    return p.cross_entropy(q) - p.entropy()
