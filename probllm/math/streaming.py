"""A hidden Markov chain whose observations come one by one: a state that is passed along, in memory that does not grow.

    p(z_t | x_1..t) ~ p(x_t | z_t) sum_z p(z_t | z) p(z | x_1..t-1),     log p(x_t | x_1..t-1) = log of what it sums to

``Filter`` gives these and, by a backward pass over the last L steps, p(z_{t-L} | x_1..t) (fixed-lag smoothing);
``BestPath`` the last states of the best sequence so far (Viterbi with a window). Source: Rabiner (1989); Moore (1973),
"Discrete-time fixed-lag smoothing algorithms". Torch operations, differentiable, any leading dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probllm.math.chain_torch import safe_logsumexp


class Seen(NamedTuple):
    """One step of the window: scores ``[..., K]``, and the transitions ``[..., K, K]`` that led to it."""

    filtered: Tensor
    log_likelihoods: Tensor
    transition: Tensor | None


class Filter(NamedTuple):
    """What has been learnt from the observations so far. Begin with ``start``; ``step`` gives the next.

    Log probabilities throughout; -inf forbids. A row whose observations are impossible has filtered laws of 0.
    """

    transition: Tensor  # [..., K, K], [from, to]
    lag: int
    steps: int
    log_filtered: Tensor  # [..., K] log p(z_t | x_1..t); before the first step the law of the first state
    log_likelihood: Tensor  # [...] log p(x_1..t) in nats
    window: tuple[Seen, ...]  # the last steps, lag + 1 at most

    @classmethod
    def start(cls, initial: Tensor, transition: Tensor, lag: int = 0) -> Self:
        """Before the first observation.

        Args:
            initial: ``[..., K]`` log probabilities of the first state.
            transition: ``[..., K, K]``, ``[from, to]``, log probabilities; a step may bring its own.
            lag: how many steps ``smoothed`` can look back.
        """
        _check(initial, transition, lag)
        return cls(transition, lag, 0, initial, initial.new_zeros(initial.shape[:-1]), ())

    def step(self, log_likelihoods: Tensor, transition: Tensor | None = None) -> tuple[Self, Tensor]:
        """Takes one observation in.

        Args:
            log_likelihoods: ``[..., K]`` log p(x_t | z_t = k); 0 for an observation that is missing.
            transition: ``[..., K, K]`` of this step, where it is not that of all; ignored at the first.
        Returns:
            The next state, and log p(x_t | x_1..t-1) ``[...]`` in nats.
        """
        _check_step(log_likelihoods, transition, self.transition.shape[-1])
        matrix = self.transition if transition is None else transition
        predicted = self.log_filtered
        if self.steps:
            predicted = safe_logsumexp(predicted.unsqueeze(-1) + matrix, -2)
        joint = predicted + log_likelihoods
        log_p = safe_logsumexp(joint, -1)
        filtered = joint - torch.where(log_p == -math.inf, 0.0, log_p).unsqueeze(-1)
        seen = Seen(filtered, log_likelihoods, transition)
        window = (*self.window, seen)[-self.lag - 1 :]
        return self._replace(
            steps=self.steps + 1, log_filtered=filtered, log_likelihood=self.log_likelihood + log_p, window=window
        ), log_p

    @property
    def filtered(self) -> Tensor:
        """p(z_t | x_1..t) ``[..., K]``."""
        return self.log_filtered.exp()

    def smoothed(self, lag: int | None = None) -> Tensor:
        """p(z_{t - lag} | x_1..t) ``[..., K]``, exactly; ``lag`` from 0 to that of ``start``, which is the default."""
        lag = self.lag if lag is None else lag
        if not 0 <= lag < len(self.window):
            raise ValueError(f"lag: expected from 0 to {len(self.window) - 1} after {self.steps} steps, got {lag}")
        beta = torch.zeros_like(self.log_filtered)
        for seen in reversed(self.window[len(self.window) - lag :]):
            matrix = self.transition if seen.transition is None else seen.transition
            beta = safe_logsumexp(matrix + (seen.log_likelihoods + beta).unsqueeze(-2), -1)
        joint = self.window[-1 - lag].filtered + beta
        total = safe_logsumexp(joint, -1).unsqueeze(-1)
        return (joint - torch.where(total == -math.inf, 0.0, total)).exp()


class BestPath(NamedTuple):
    """The best state sequence of the observations so far, of which the last ``lag + 1`` states are known."""

    transition: Tensor  # [..., K, K]
    lag: int
    steps: int
    delta: Tensor  # [..., K] best score of a sequence that ends in k, less that of the best
    score: Tensor  # [...] score of the best sequence
    came: tuple[Tensor, ...]  # [..., K] long, the state before the best way to k; the last lag steps at most

    @classmethod
    def start(cls, initial: Tensor, transition: Tensor, lag: int) -> Self:
        """Before the first observation; arguments as for ``Filter.start``."""
        _check(initial, transition, lag)
        return cls(transition, lag, 0, initial, initial.new_zeros(initial.shape[:-1]), ())

    def step(self, log_likelihoods: Tensor, transition: Tensor | None = None) -> Self:
        """Takes one observation in; arguments as for ``Filter.step``."""
        _check_step(log_likelihoods, transition, self.transition.shape[-1])
        best, came = self.delta, self.came
        if self.steps:
            matrix = self.transition if transition is None else transition
            best, source = (best.unsqueeze(-1) + matrix).max(-2)
            came = (*came, source)[-self.lag :] if self.lag else ()
        best = best + log_likelihoods
        high = best.amax(-1)
        delta = best - torch.where(high == -math.inf, 0.0, high).unsqueeze(-1)
        return self._replace(steps=self.steps + 1, delta=delta, score=self.score + high, came=came)

    def path(self) -> Tensor:
        """The last ``min(t, lag + 1)`` states of the best sequence, ``[..., n]`` long; -1 where none is possible."""
        tag = self.delta.argmax(-1, keepdim=True)
        states = [tag]
        for source in reversed(self.came):
            tag = source.expand(*tag.shape[:-1], source.shape[-1]).gather(-1, tag)
            states.append(tag)
        return torch.where((self.score == -math.inf).unsqueeze(-1), -1, torch.cat(states[::-1], -1))


def _check(initial: Tensor, transition: Tensor, lag: int) -> None:
    k = initial.shape[-1] if initial.dim() else 0
    if k < 1 or not initial.is_floating_point():
        raise ValueError(f"initial: expected scores [..., K], got {initial.dtype} of shape {list(initial.shape)}")
    if transition.shape[-2:] != (k, k):
        raise ValueError(f"transition: expected shape [..., {k}, {k}], got {list(transition.shape)}")
    if lag < 0:
        raise ValueError(f"lag: expected at least 0, got {lag}")


def _check_step(log_likelihoods: Tensor, transition: Tensor | None, k: int) -> None:
    if not log_likelihoods.dim() or log_likelihoods.shape[-1] != k:
        raise ValueError(f"log_likelihoods: expected shape [..., {k}], got {list(log_likelihoods.shape)}")
    if transition is not None and transition.shape[-2:] != (k, k):
        raise ValueError(f"transition: expected shape [..., {k}, {k}], got {list(transition.shape)}")
