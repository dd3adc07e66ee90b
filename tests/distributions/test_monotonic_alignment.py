"""The law over monotone alignments, and CTC as a case of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.nn.functional import ctc_loss

from probllm.distributions import MonotonicAlignment
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    frames, states = draw(st.sampled_from([(4, 3), (3, 4), (5, 2), (2, 3), (1, 3), (3, 1), (1, 1)]))
    moves = draw(st.sampled_from([1, 2, 3, 5]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    parts = {
        "emissions": scores(*draw(st.sampled_from([batch, ()])), frames, states),
        "steps": scores(*draw(st.sampled_from([batch, ()])), moves, states),
        "start": scores(*draw(st.sampled_from([batch, ()])), states),
        "end": scores(*draw(st.sampled_from([batch, ()])), states),
    }
    lengths = draw_lengths(draw, batch, frames, generator)

    def build(**given: Any) -> MonotonicAlignment:
        return MonotonicAlignment(**given, lengths=lengths)

    law = build(**parts)
    structures, every, listed = all_sequences(frames, states, law.lengths, law.batch_shape)
    by = every[..., 1:] - every[..., :-1]
    within = torch.arange(1, frames) < law.lengths.unsqueeze(-1)
    listed = listed & (~within | ((by >= 0) & (by < moves))).all(-1)

    def score(given: Parts) -> Tensor:
        z = structures.T
        emissions = given["emissions"].expand(*law.batch_shape, frames, states)
        table = given["steps"].expand(*law.batch_shape, moves, states)
        start, end = (given[name].expand(*law.batch_shape, states) for name in ("start", "end"))
        total = emissions[..., 0, z[0]] + start[..., z[0]]
        for t in range(1, frames):
            d = (z[t] - z[t - 1]).clamp(0, moves - 1)
            step = emissions[..., t, z[t]] + table[..., d, z[t]]
            total = total + torch.where((t < law.lengths).unsqueeze(-1), step, 0.0)
        last = z[law.lengths - 1]
        return (total + end.gather(-1, last)).movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)
