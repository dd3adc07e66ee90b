"""Cases of linear-Gaussian laws, and the dense joint normal of their states and observations."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import LinearGaussianSSM


class Case(NamedTuple):
    law: LinearGaussianSSM
    value: Tensor  # [*batch, T, o]
    observed: Tensor | None  # [*batch, T, o]
    arguments: tuple[Any, ...]
    lengths: Tensor  # [*batch]

    @property
    def seen(self) -> Tensor:
        """``[*batch, T, o]``: real and observed."""
        real = (torch.arange(self.value.shape[-2]) < self.lengths.unsqueeze(-1)).unsqueeze(-1).expand(self.value.shape)
        return real if self.observed is None else real & self.observed

    @property
    def present(self) -> Tensor:
        """``[*batch, T, d]``: states that are no padding."""
        real = torch.arange(self.value.shape[-2]) < self.lengths.unsqueeze(-1)
        return real.unsqueeze(-1).expand(*real.shape, self.law.state_size)


def normal_law(generator: torch.Generator, *shape: int, diagonal: bool = False) -> Any:
    mean = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if diagonal:
        return dist.Normal(mean, 0.3 + torch.rand(*shape, generator=generator, dtype=torch.float64)).to_event(1)
    a = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return dist.MultivariateNormal(mean, a @ a.mT + 0.3 * torch.eye(shape[-1]))


@st.composite
def cases(draw: st.DrawFn, masks: bool = True) -> Case:
    """Shared parameters or own, by step or not, full and diagonal, both conventions, lengths, missing entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, d, o = draw(st.sampled_from([(4, 2, 2), (3, 3, 1), (1, 2, 2), (5, 1, 2), (2, 2, 3)]))
    batch = draw(st.sampled_from([(), (2,), (2, 1), (1,)]))
    first = draw(st.booleans())
    n = steps if first else steps - 1
    move = draw(st.sampled_from([(), (1,), (*batch, 1), *([(*batch, n), (n,)] if n else [])]))
    sight = draw(st.sampled_from([(), (1,), (*batch, 1), (*batch, steps), (steps,)]))
    diagonal = draw(st.booleans())
    arguments = (
        normal_law(generator, *draw(st.sampled_from([(), batch])), d),
        0.7 * torch.randn(*move, d, d, generator=generator, dtype=torch.float64),
        normal_law(generator, *draw(st.sampled_from([(), move])), d, diagonal=diagonal),
        torch.randn(*sight, d, o, generator=generator, dtype=torch.float64),
        normal_law(generator, *draw(st.sampled_from([(), sight])), o, diagonal=diagonal),
    )
    lengths = torch.randint(1, steps + 1, batch, generator=generator) if masks and draw(st.booleans()) else None
    law = LinearGaussianSSM(*arguments, duration=steps, lengths=lengths, moves_first=first)
    value = torch.randn(*batch, steps, o, generator=generator, dtype=torch.float64)
    observed = torch.rand(value.shape, generator=generator) < 0.6 if masks and draw(st.booleans()) else None
    return Case(law, value, observed, arguments, torch.as_tensor(steps if lengths is None else lengths).expand(batch))


class Dense(NamedTuple):
    """Joint of the flat states and observations of each row, all steps real."""

    mean: Tensor  # [*batch, T d + T o]
    covariance: Tensor

    def states(self, steps: int, d: int) -> Dense:
        return Dense(self.mean[..., : steps * d], self.covariance[..., : steps * d, : steps * d])

    def values(self, steps: int, d: int) -> Dense:
        return Dense(self.mean[..., steps * d :], self.covariance[..., steps * d :, steps * d :])


def dense(law: LinearGaussianSSM, arguments: tuple[Any, ...], steps: int, batch: torch.Size) -> Dense:
    """By unrolling the generative story: every variable is a linear map of independent noises."""
    initial, f, move, h, sight = arguments
    d, o = h.shape[-2:]
    first = bool(law.parameters.moves_first)
    moves = steps if first else steps - 1
    f, h = f if f.dim() > 2 else f.unsqueeze(0), h if h.dim() > 2 else h.unsqueeze(0)
    f, h = f.expand(*batch, moves, d, d), h.expand(*batch, steps, d, o)

    def moments(of: Any, *lead: int) -> tuple[Tensor, Tensor]:
        n = of.event_shape[0]
        covariance = torch.diag_embed(of.variance) if isinstance(of, dist.Independent) else of.covariance_matrix
        return of.mean.expand(*lead, n), covariance.expand(*lead, n, n)

    noises = [moments(initial, *batch)]
    noises += list(zip(*(x.unbind(len(batch)) for x in moments(move, *batch, moves)), strict=True))
    noises += list(zip(*(x.unbind(len(batch)) for x in moments(sight, *batch, steps)), strict=True))
    total = sum(x[0].shape[-1] for x in noises)
    eye = torch.eye(total, dtype=torch.float64).expand(*batch, total, total)
    at, pieces = 0, []
    for mean, _ in noises:
        pieces.append(eye[..., at : at + mean.shape[-1]])
        at += mean.shape[-1]
    state, states, values = pieces[0], [], []
    for t in range(steps):
        if first or t:
            i = t if first else t - 1
            state = state @ f[..., i, :, :] + pieces[1 + i]
        states.append(state)
        values.append(state @ h[..., t, :, :] + pieces[1 + moves + t])
    maps = torch.cat(states + values, -1)
    mean = torch.cat([x[0] for x in noises], -1)
    blocks = torch.zeros(*batch, total, total, dtype=torch.float64)
    at = 0
    for x, covariance in noises:
        n = x.shape[-1]
        blocks[..., at : at + n, at : at + n] = covariance
        at += n
    return Dense((mean.unsqueeze(-2) @ maps).squeeze(-2), maps.mT @ blocks @ maps)


def of_rows(case: Case) -> list[tuple[Dense, Tensor, Tensor, Tensor]]:
    """Of each row: the joint, its flat value, which values are seen and which states are real."""
    joint = dense(case.law, case.arguments, case.value.shape[-2], case.lengths.shape)
    n = max(1, case.lengths.numel())
    flat = [x.reshape(n, *x.shape[len(case.lengths.shape) :]) for x in (*joint, case.value, case.seen, case.present)]
    return [
        (Dense(m, c), value.flatten(), seen.flatten(), real.flatten())
        for m, c, value, seen, real in zip(*flat, strict=True)
    ]


def given_seen(row: tuple[Dense, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all states given what is seen."""
    joint, value, seen, _ = row
    n = len(joint.mean) - len(value)
    index = torch.arange(len(value))[seen] + n
    c = joint.covariance
    gain = torch.linalg.solve(c[index][:, index], c[index][:, :n]) if len(index) else c[index][:, :n]
    return joint.mean[:n] + (value[seen] - joint.mean[index]) @ gain, c[:n, :n] - c[:n][:, index] @ gain


def shared_case(steps: int = 12, rows: int = 6) -> tuple[LinearGaussianSSM, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    law = LinearGaussianSSM(
        normal_law(generator, 2), torch.tensor([[0.8, 0.3], [-0.2, 0.7]]).double(), normal_law(generator, 2),
        torch.randn(2, 3, generator=generator).double(), normal_law(generator, 3), duration=steps,
    )  # fmt: skip
    value = law.sample((rows,))
    return law, value, torch.rand(value.shape, generator=generator) < 0.8
