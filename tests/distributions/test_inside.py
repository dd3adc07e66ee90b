"""A law that gives one recursion over a semiring has the whole surface: tested on a chain, written in ten lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import Recursion
from probllm.math.semirings import Semiring
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    emissions, transitions = parts
    alpha = emissions[..., 0, :]
    for t in range(1, emissions.shape[-2]):
        step = semiring.times(semiring.dot(alpha.unsqueeze(-1), transitions, -2), emissions[..., t, :])
        alpha = torch.where((t < lengths).unsqueeze(-1), step, alpha)
    return semiring.sum(alpha, -1)


class ShortChain(InsideDistribution):
    _dims: ClassVar[dict[str, int]] = {"emissions": 2, "transitions": 2}
    _recursion = Recursion(inside)

    def __init__(self, emissions: Tensor, transitions: Tensor, lengths: Tensor | None = None) -> None:
        steps = emissions.shape[-2]
        self._set_up({"emissions": emissions, "transitions": transitions}, lengths, steps, (steps,))

    def _with(self, **parts: Tensor) -> Self:
        return type(self)(**{**self.parts, **parts}, lengths=self.lengths)

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        return self._real(used["emissions"].argmax(-1))

    def _greatest(self) -> int:
        return self.parts["emissions"].shape[-1] - 1

    def _real(self, value: Tensor) -> Tensor:
        return torch.where(mask_from_lengths(self.lengths, value.shape[-1]), value, 0)

    def _score(self, value: Tensor) -> Tensor:
        real = mask_from_lengths(self.lengths, value.shape[-1])
        value, real = torch.broadcast_tensors(value, real)
        emissions, transitions = (x.double() for x in self.parts.values())
        k = emissions.shape[-1]
        score = emissions.expand(*value.shape, k).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        pairs = value[..., :-1] * k + value[..., 1:]
        table = transitions.flatten(-2).expand(*value.shape[:-1], k * k)
        moves = torch.where(real[..., 1:], table.gather(-1, pairs), 0.0)
        return torch.where(real, score, 0.0).sum(-1) + moves.sum(-1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (3, 3), (2, 3), (1, 3), (3, 1), (1, 1)]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    parts = {
        "emissions": scores(*draw(st.sampled_from([batch, ()])), steps, k),
        "transitions": scores(*draw(st.sampled_from([batch, ()])), k, k),
    }
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Any) -> ShortChain:
        return ShortChain(**given, lengths=lengths)

    law = build(**parts)
    structures, every, listed = all_sequences(steps, k, law.lengths, law.batch_shape)

    def score(given: Parts) -> Tensor:
        z = structures.T
        emissions = given["emissions"].expand(*law.batch_shape, steps, k)
        table = given["transitions"].expand(*law.batch_shape, k, k)
        total = emissions[..., 0, z[0]]
        for t in range(1, steps):
            step = emissions[..., t, z[t]] + table[..., z[t - 1], z[t]]
            total = total + torch.where((t < law.lengths).unsqueeze(-1), step, 0.0)
        return total.movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)
