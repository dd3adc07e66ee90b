"""The linear-chain CRF: the battery of a law over structures, and what only a chain has."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import LinearChainCRF
from tests.distributions import battery
from tests.distributions.battery import Case, Parts, close, size_of


def score_of_all(structures: Tensor, lengths: Tensor, batch: torch.Size, parts: Parts) -> Tensor:
    """Score of each sequence ``[N, T]`` in each row ``[N, *batch]``, step by step."""
    steps, k = structures.shape[-1], parts["emissions"].shape[-1]
    emissions = parts["emissions"].expand(*batch, steps, k)
    table = parts["transitions"]
    table = table.expand(*batch, max(steps - 1, 0), k, k) if steps > 1 else table
    start, end = (
        parts[n].expand(*batch, k) if n in parts else emissions.new_zeros(*batch, k) for n in ("start", "end")
    )
    z, n = structures.T, lengths.unsqueeze(-1)
    total = start[..., z[0]]
    for t in range(steps):
        step = emissions[..., t, z[t]] + (table[..., t - 1, z[t - 1], z[t]] if t else 0.0)
        total = total + torch.where(t < n, step, 0.0) + torch.where(t == n - 1, end[..., z[t]], 0.0)
    return total.movedim(-1, 0)


@st.composite
def cases(
    draw: st.DrawFn, forbidden: bool = True, batches: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (2, 3), (0,))
) -> Case:
    """Shapes, lengths, kinds of transitions, forbidden parts, scales and ties of every sort."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 3), (3, 3), (3, 4), (4, 2), (5, 2), (2, 3), (1, 3), (3, 1), (1, 1), (2, 2)]))
    batch = draw(st.sampled_from(batches))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.0, 0.2, 0.5])) if forbidden else 0.0
    ties = draw(st.sampled_from([False, False, True]))

    def scores(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        value = scale * (value.round() if ties else value)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    some = (1, *batch[1:]) if batch else ()
    parts = {
        "emissions": scores(*draw(st.sampled_from([batch, batch, (), some])), steps, k),
        "transitions": scores(
            *draw(
                st.sampled_from(
                    [(), (), (steps - 1,), (*batch, 1), (*batch, steps - 1), (*batch[:1], *(1,) * len(batch[1:]), 1)]
                )
            ),
            k,
            k,
        ),
    }
    for name in ("start", "end"):
        own = draw(st.sampled_from([None, (), batch]))
        if own is not None:
            parts[name] = scores(*own, k)
    lengths = None
    kind = draw(st.sampled_from(["none", "each", "short", "one"]))
    if kind == "one":
        lengths = torch.tensor(draw(st.integers(1, steps)))
    elif kind != "none":
        greatest = steps if kind == "each" or steps == 1 else steps - 1  # all rows shorter than T
        lengths = torch.randint(1, greatest + 1, batch, generator=generator)
        if draw(st.booleans()):
            lengths = lengths.int()

    def build(**given: Tensor) -> LinearChainCRF:
        return LinearChainCRF(**given, lengths=lengths)

    law = build(**parts)
    own = torch.as_tensor(steps if lengths is None else lengths).expand(law.batch_shape)
    structures = torch.tensor(list(itertools.product(range(k), repeat=steps)))
    every = structures.reshape(-1, *(1,) * len(law.batch_shape), steps).expand(-1, *law.batch_shape, steps)
    listed = ((every == 0) | (torch.arange(steps) < own.unsqueeze(-1))).all(-1)
    return Case(
        law,
        build,
        every,
        listed,
        lambda parts: score_of_all(structures, own, law.batch_shape, parts),
        draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)
