"""The numbers of a linear-Gaussian state-space law, read from the distributions and matrices that a user gives.

All in float64, with time dimensions of 1 for what the steps share. A root is a matrix [k, d] by which k standard normal
variables become noise: root' root is its covariance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from probllm.math.chain import is_wrapped
from probllm.math.gaussian_paths import recurrence
from probllm.math.gaussian_steps import Chain, apply, root


class White(NamedTuple):
    """Standard normal numbers of a batch of states and observations."""

    initial: Tensor  # [..., k]
    moves: Tensor  # [..., T or T - 1, k]: T where a move is made first
    errors: Tensor  # [..., T, k]


class Parameters(NamedTuple):
    """Parameters by step. ``initial`` is of the state before the first step where ``moves_first``, else of z_1."""

    mean: Tensor  # [..., d]
    covariance: Tensor  # [..., d, d]
    initial_root: Tensor | None  # [..., k, d]; None: to be found
    transition: Tensor  # [..., S, d, d]: the moves into steps 1..T where ``moves_first``, else into 2..T
    drift: Tensor  # [..., S, d]
    noise: Tensor  # [..., S, d, d]
    noise_root: Tensor  # [..., S, k, d]
    emission: Tensor  # [..., S, d, o]
    offset: Tensor  # [..., S, o]
    error: Tensor  # [..., S, o, o]
    error_root: Tensor  # [..., S, k, o]
    moves_first: bool

    def chain(self, value: Tensor) -> Chain:
        """The chain from the first state that is seen, z_1."""
        mean, covariance = self.mean, self.covariance
        moves = self.transition, self.drift, self.noise
        if self.moves_first:
            f = self.transition[..., 0, :, :]
            mean = (mean.unsqueeze(-2) @ f).squeeze(-2) + self.drift[..., 0, :]
            covariance = f.mT @ covariance @ f + self.noise[..., 0, :, :]
            moves = tuple(  # type: ignore[assignment]
                x if x.shape[-n] == 1 else x.narrow(-n, 1, x.shape[-n] - 1)
                for x, n in zip(moves, (3, 2, 3), strict=True)
            )
        return Chain(value.double(), mean, covariance, *moves, self.emission, self.offset, self.error)

    def chain_from_start(self, value: Tensor) -> Chain:
        """The chain from the initial state, of which nothing is seen: one step longer than the observations."""
        nothing = torch.zeros_like(value[..., :1, :])
        seen = (x if x.shape[-n] == 1 else torch.cat((x.narrow(-n, 0, 1), x), -n)
                for x, n in ((self.emission, 3), (self.offset, 2), (self.error, 3)))  # fmt: skip
        moves = self.transition, self.drift, self.noise
        return Chain(torch.cat((nothing, value), -2).double(), self.mean, self.covariance, *moves, *seen)

    def starting(self, mean: Tensor, covariance: Tensor, step: int, steps: int) -> Parameters:
        """Those of ``steps`` steps after ``step``, from a state of these moments at that step."""
        if step == 0 and not self.moves_first:
            at = dict.fromkeys(("transition", "drift", "noise", "noise_root"), (0, steps - 1))
        else:
            at = dict.fromkeys(("transition", "drift", "noise", "noise_root"), (step - (not self.moves_first), steps))
        at |= dict.fromkeys(("emission", "offset", "error", "error_root"), (step, steps))
        found = {
            name: _cut(getattr(self, name), 2 if name in ("drift", "offset") else 3, *span) for name, span in at.items()
        }
        moves_first = self.moves_first or step > 0
        return self._replace(mean=mean, covariance=covariance, initial_root=None, moves_first=moves_first, **found)

    def fitted(
        self, initial: tuple[Tensor, Tensor], moves: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor]
    ) -> Parameters:
        """Of regressions: coefficients, the constant last, and covariance, of the three laws."""
        (mean, covariance), (move, noise), (sight, error) = initial, moves, seen
        return Parameters(
            mean[0], covariance, root(covariance), move[None, :-1], move[None, -1], noise[None], root(noise)[None],
            sight[None, :-1], sight[None, -1], error[None], root(error)[None], self.moves_first,
        )  # fmt: skip

    def initial_noise(self) -> Tensor:
        """The root of the initial covariance."""
        return root(self.covariance) if self.initial_root is None else self.initial_root

    def white(self, shape: torch.Size, steps: int, dtype: torch.dtype) -> White:
        """What a batch of this shape is drawn from."""

        def numbers(root: Tensor, *lead: int) -> Tensor:
            return torch.randn(*shape, *lead, root.shape[-2], dtype=dtype, device=root.device)

        moves = steps if self.moves_first else steps - 1
        first = self.initial_noise()
        return White(numbers(first), numbers(self.noise_root, moves), numbers(self.error_root, steps))

    def first_push(self, white: White) -> Tensor:
        """z_1 ``[..., d]`` less its mean."""
        push = apply(white.initial.double(), self.initial_noise())
        if not self.moves_first:
            return push
        move, noise = self.transition[..., 0, :, :], self.noise_root[..., 0, :, :]
        return apply(push, move) + apply(white.moves[..., 0, :].double(), noise)

    def unrolled(self, white: White) -> tuple[Tensor, Tensor]:
        """States ``[..., T, d]`` and observations ``[..., T, o]`` by the generative story, float64."""
        start = self.mean + apply(white.initial.double(), self.initial_noise())
        pushes = self.drift + apply(white.moves.double(), self.noise_root)
        moves = self.transition
        if self.moves_first:
            start = apply(start, moves[..., 0, :, :]) + pushes[..., 0, :]
            pushes = pushes[..., 1:, :]
            moves = moves if moves.shape[-3] == 1 else moves[..., 1:, :, :]
        states = recurrence(moves, torch.cat((start.unsqueeze(-2), pushes), -2))
        return states, apply(states, self.emission) + self.offset + apply(white.errors.double(), self.error_root)


def _cut(x: Tensor, dims: int, start: int, count: int) -> Tensor:
    return x if x.shape[-dims] == 1 else x.narrow(-dims, start, count)


def read(
    initial_dist: Any, transition_matrix: Any, transition_dist: Any, observation_matrix: Any, observation_dist: Any,
    moves_first: bool
) -> Parameters:  # fmt: skip
    """Parameters from the arguments of ``LinearGaussianSSM``, checked."""
    for name, matrix in (("transition_matrix", transition_matrix), ("observation_matrix", observation_matrix)):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
        if not matrix.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {matrix.dtype}")
    if observation_matrix.dim() < 2 or 0 in observation_matrix.shape[-2:]:
        raise ValueError(f"observation_matrix: expected shape [..., d, o], got {list(observation_matrix.shape)}")
    d, o = observation_matrix.shape[-2:]
    if transition_matrix.shape[-2:] != (d, d):
        raise ValueError(
            f"transition_matrix: expected shape [..., {d}, {d}] (observation_matrix has {d} rows), "
            f"got {list(transition_matrix.shape)}"
        )
    mean, covariance, initial_root = _moments("initial_dist", initial_dist, d)
    drift, noise, noise_root = (
        _timed(x, n) for x, n in zip(_moments("transition_dist", transition_dist, d), (1, 2, 2), strict=True)
    )
    offset, error, error_root = (
        _timed(x, n) for x, n in zip(_moments("observation_dist", observation_dist, o), (1, 2, 2), strict=True)
    )
    transition, emission = _timed(transition_matrix.double(), 2), _timed(observation_matrix.double(), 2)
    found = Parameters(
        mean, covariance, initial_root, transition, drift, noise, noise_root, emission, offset, error, error_root,
        moves_first,
    )  # fmt: skip
    for name, x in (
        ("initial_dist", mean), ("initial_dist", covariance), ("transition_matrix", transition),
        ("transition_dist", drift), ("transition_dist", noise), ("observation_matrix", emission),
        ("observation_dist", offset), ("observation_dist", error),
    ):  # fmt: skip
        if not is_wrapped(x) and not bool(torch.isfinite(x.detach()).all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return found


def _moments(name: str, law: Any, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and root of a normal law over vectors of ``size``."""
    normal = isinstance(law, Independent) and isinstance(law.base_dist, Normal)
    if not isinstance(law, MultivariateNormal) and not normal:
        raise TypeError(
            f"{name}: expected a MultivariateNormal or an Independent Normal (Normal(...).to_event(1)), "
            f"got {type(law).__name__}"
        )
    if law.event_shape != (size,):
        raise ValueError(f"{name}: expected event shape [{size}], got {list(law.event_shape)}")
    mean = _unexpanded(_mean(law), 1).double()
    if normal:
        scale = _unexpanded(law.base_dist.scale, 1).double()
        return mean, torch.diag_embed(scale.square()), torch.diag_embed(scale)
    factor = law._unbroadcasted_scale_tril.double()
    if "covariance_matrix" in law.__dict__:
        covariance = _unexpanded(law.covariance_matrix, 2).double()
    else:
        covariance = factor @ factor.mT
    return mean, covariance, factor.mT


def _mean(law: Any) -> Tensor:
    found: Tensor = law.loc if isinstance(law, MultivariateNormal) else law.base_dist.loc
    return found


def _unexpanded(x: Tensor, dims: int) -> Tensor:
    """Without the copies that an expansion shows: what a batch shares is worked out once."""
    if is_wrapped(x):
        return x
    for i in range(x.dim() - dims):
        if x.shape[i] > 1 and x.stride(i) == 0:
            x = x.narrow(i, 0, 1)
    while x.dim() > dims and x.shape[0] == 1:
        x = x[0]
    return x


def _timed(x: Tensor, dims: int) -> Tensor:
    return x if x.dim() > dims else x.unsqueeze(0)
