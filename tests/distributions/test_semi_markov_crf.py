"""Semi-Markov CRFs: the battery against all segmentations, their number, symmetries, bad input, and Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import SemiMarkovCRF
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.segmentations import all_segmentations, dot
from tests.distributions.sequences import draw_lengths

DIMS = {"segments": 3, "transitions": 2, "start": 1, "end": 1}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (3, 3), (2, 3), (1, 3), (4, 1), (1, 1)]))
    longest = draw(st.integers(1, steps + 1))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    def part(*event: int) -> Tensor:
        return scores(*draw(st.sampled_from([batch, ()])), *event)

    parts = {
        "segments": part(steps, longest, k),
        "transitions": part(k, k),
        "start": part(k),
        "end": part(k),
    }
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Any) -> SemiMarkovCRF:
        return SemiMarkovCRF(**given, lengths=lengths)

    law = build(**parts)
    every = all_segmentations(steps, longest, k)
    rows = law.lengths  # [*batch]
    count = len(every.structures)

    def score(given: Parts) -> Tensor:
        total = torch.zeros(*law.batch_shape, count, dtype=torch.float64)
        for name, dims in DIMS.items():
            scores = given[name].unsqueeze(-1 - dims)
            total = total + dot(getattr(every, name)[rows], scores, dims)
        return total.movedim(-1, 0)

    structures = every.structures.reshape(count, *(1,) * len(law.batch_shape), steps).expand(
        count, *law.batch_shape, steps
    )
    return Case(law, build, structures, every.listed[rows].movedim(-1, 0), score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_segmentations_number_k_times_k_plus_one_to_the_steps_less_one(steps: int, k: int) -> None:
    law = SemiMarkovCRF(torch.randn(steps, steps, k))
    expected = math.log(k) + (steps - 1) * math.log(k + 1)
    assert float(law.log_count) == pytest.approx(expected, rel=1e-12)
