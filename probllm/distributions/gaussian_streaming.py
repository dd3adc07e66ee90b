"""Filtering step by step, forecasts and fixed-lag smoothing of a linear-Gaussian law; a state is passed along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from probllm.distributions.gaussian_parameters import Parameters
from probllm.math.gaussian_paths import filter_moments, smooth
from probllm.math.gaussian_steps import Chain, apply, at_step, update

if TYPE_CHECKING:
    from typing import Self


class State(NamedTuple):
    """What a stretch of observations says of the state: all that the next needs."""

    mean: Tensor  # [*batch, d]
    covariance: Tensor  # [*batch, d, d]
    step: int  # how many observations were gone through


def observed_entries(value: Tensor, observed: Tensor | None) -> Tensor | None:
    """Which entries of ``value [..., T, o]`` are observed, ``[..., T, o]``, from a mask of steps or of entries."""
    if observed is None:
        return None
    if observed.dtype != torch.bool:
        raise TypeError(f"observed: expected dtype torch.bool, got {observed.dtype}")
    steps, width = value.shape[-2:]
    by_entry = observed.shape[-2:] == (steps, width)
    if by_entry and not (steps == width and observed.dim() < value.dim()):
        return observed
    if observed.dim() < 1 or observed.shape[-1] != steps:
        raise ValueError(
            f"observed: expected shape [..., {steps}] or [..., {steps}, {width}], got {list(observed.shape)}"
        )
    return observed.unsqueeze(-1).expand(*observed.shape, width)


class GaussianStreaming:
    """What ``LinearGaussianSSM`` does one observation at a time. ``lengths`` play no part here."""

    parameters: Parameters
    duration: int | None
    batch_shape: torch.Size
    event_shape: torch.Size
    _dtype: torch.dtype

    if TYPE_CHECKING:

        def _of(self, parameters: Parameters, duration: int | None, lengths: Tensor | None) -> Self: ...
        def _checked(self, value: Tensor, observed: Tensor | None) -> Tensor | None: ...
        def _chain(self, value: Tensor) -> Chain: ...

    def start(self, batch_shape: Any = None) -> State:
        """The state before any observation, for a batch of this shape (the law's, if None)."""
        shape = torch.Size(self.batch_shape if batch_shape is None else batch_shape)
        p = self.parameters
        d = p.mean.shape[-1]
        return State(p.mean.expand(*shape, d).to(self._dtype), p.covariance.expand(*shape, d, d).to(self._dtype), 0)

    def step(self, state: State, value: Tensor, observed: Tensor | None = None) -> tuple[State, Tensor]:
        """One observation ``[..., o]`` joins.

        Args:
            observed: ``[..., o]`` bool for entries, or ``[...]`` for the whole observation (of one dimension less).
        Returns:
            the next state, and the log density ``[...]`` of the observation given those before, in nats. Chained over a
            sequence they are what ``filter`` gives.
        """
        p, t = self.parameters, state.step
        if self.duration is not None and t >= self.duration:
            raise ValueError(f"state: {t} steps are gone, of {self.duration}")
        if value.shape[-1:] != self.event_shape[1:]:
            raise ValueError(f"value: expected shape [..., {self.event_shape[1]}], got {list(value.shape)}")
        seen = None
        if observed is not None:
            entries = observed.dim() == value.dim() and observed.shape[-1] == value.shape[-1]
            seen = observed if entries else observed.unsqueeze(-1).expand(*observed.shape, value.shape[-1])
            value = torch.where(seen, value, torch.zeros_like(value))
        mean, covariance = state.mean.double(), state.covariance.double()
        at = t if p.moves_first else t - 1
        if at >= 0:
            move = at_step(p.transition, at, 3)
            mean = apply(mean, move) + at_step(p.drift, at, 2)
            covariance = move.mT @ covariance @ move + at_step(p.noise, at, 3)
        emission, offset, error = at_step(p.emission, t, 3), at_step(p.offset, t, 2), at_step(p.error, t, 3)
        found = update(mean, covariance, value.double(), emission, offset, error, seen)
        after = found.covariance.expand(*found.mean.shape, found.mean.shape[-1])
        return State(found.mean.to(self._dtype), after.to(self._dtype), t + 1), found.log_prob.to(self._dtype)

    def forecast(self, steps: int, state: State | None = None) -> Self:
        """The law of the next ``steps`` observations after a state (``start()``, if None)."""
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return self._of(self._from(state, steps), steps, None)

    def _from(self, state: State | None, steps: int) -> Parameters:
        at = self.start() if state is None else state
        if self.duration is not None and at.step + steps > self.duration and self._changes:
            raise ValueError(
                f"steps: {steps} after step {at.step} are more than the {self.duration} that the law knows"
            )
        return self.parameters.starting(at.mean.double(), at.covariance.double(), at.step, steps)

    @property
    def _changes(self) -> bool:
        """Whether a parameter changes with time."""
        p = self.parameters
        matrices = (p.transition, p.noise, p.emission, p.error)
        return any(x.shape[-3] > 1 for x in matrices) or any(x.shape[-2] > 1 for x in (p.drift, p.offset))

    def look_back(self, state: State, later: Tensor, observed: Tensor | None = None) -> State:
        """The state as it is seen after the observations ``[..., k, o]`` that followed it: fixed-lag smoothing, online.

        Keep the states and observations of the last k steps, and look back from the newest to the oldest.
        """
        p = self._from(state, later.shape[-2])
        entries = observed_entries(later, observed)
        if not p.moves_first:
            found = smooth(p.chain(later), None, entries)
        else:
            if entries is None:
                entries = torch.ones(later.shape[-2:], dtype=torch.bool, device=later.device)
            entries = torch.cat((torch.zeros_like(entries[..., :1, :]), entries), -2)
            found = smooth(p.chain_from_start(later), None, entries)
        return State(found.mean[..., 0, :].to(self._dtype), found.covariance[..., 0, :, :].to(self._dtype), state.step)

    def fixed_lag(self, value: Tensor, lag: int, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means ``[*batch, T, d]`` and covariances of each z_t given x_1..x_{t + lag}, of ``[..., T, o]``.

        The filter at lag 0, the smoother at lag T - 1. T windows of ``lag + 1`` steps, all in one call.
        """
        if lag < 0:
            raise ValueError(f"lag: expected at least 0, got {lag}")
        entries = self._checked(value, observed)
        chain = self._chain(value)
        lengths: Tensor | None = getattr(self, "lengths", None)
        mean, covariance, _ = filter_moments(chain, lengths, entries)
        steps, width = value.shape[-2:]
        lag = min(lag, steps - 1)
        if not lag:
            return mean.to(self._dtype), covariance.to(self._dtype)
        real = torch.ones(steps, dtype=torch.bool, device=value.device)
        if lengths is not None:
            real = torch.arange(steps, device=value.device) < lengths.unsqueeze(-1)
        seen = real.unsqueeze(-1).expand(*real.shape, width)
        seen = seen if entries is None else seen & entries
        seen = _windows(seen, 1, lag + 1, lag, False).clone()
        seen[..., 0, :] = False  # what the state has taken in is not seen again
        windows = Chain(
            _windows(chain.value, 1, lag + 1, lag, True), mean, covariance,
            *(_shared(x, n, lag) for x, n in ((chain.transition, 2), (chain.drift, 1), (chain.noise, 2))),
            *(_shared(x, n, lag, 1) for x, n in ((chain.emission, 2), (chain.offset, 1), (chain.error, 2))),
        )  # fmt: skip
        found = smooth(windows, None, seen)
        first, spread = found.mean[..., 0, :], found.covariance[..., 0, :, :]
        blank = real.unsqueeze(-1)
        return (
            torch.where(blank, first, torch.zeros_like(first)).to(self._dtype),
            torch.where(blank.unsqueeze(-1), spread, torch.zeros_like(spread)).to(self._dtype),
        )


def _windows(x: Tensor, dims: int, size: int, pad: int, repeat: bool) -> Tensor:
    """``[..., T, size, ...]``: steps t..t + size - 1 for each t; x has time before its last ``dims`` dimensions."""
    at = x.dim() - 1 - dims
    last = x.narrow(at, x.shape[at] - 1, 1)
    tail = last.expand(*x.shape[:at], pad, *x.shape[at + 1 :])
    padded = torch.cat((x, tail if repeat else torch.zeros_like(tail)), at)
    return padded.unfold(at, size, 1).movedim(-1, at + 1)


def _shared(x: Tensor, dims: int, lag: int, more: int = 0) -> Tensor:
    """A parameter in windows, with one for all where the steps share it."""
    if x.shape[-1 - dims] == 1:
        return x.unsqueeze(-2 - dims)
    return _windows(x, dims, lag + more, lag, True)
