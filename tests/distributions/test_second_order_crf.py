"""The second-order law: the battery of a law over structures, and agreement with the first order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.distributions.second_order_crf import SecondOrderCRF
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


def score_of_all(structures: Tensor, lengths: Tensor, batch: torch.Size, parts: Parts) -> Tensor:
    """Score of each sequence ``[N, T]`` in each row ``[N, *batch]``, step by step."""
    k = parts["emissions"].shape[-1]
    orders = {"emissions": 2, "transitions": 3, "second": 2, "start": 1}
    emissions, transitions, second, start = (
        parts[name].expand(*batch, *parts[name].shape[parts[name].ndim - order :]) for name, order in orders.items()
    )
    assert transitions.shape[-3:] == (k, k, k)
    z, n = structures.T, lengths.unsqueeze(-1)
    total = start[..., z[0]]
    for t in range(len(z)):
        step = emissions[..., t, z[t]]
        if t == 1:
            step = step + second[..., z[0], z[1]]
        if t > 1:
            step = step + transitions[..., z[t - 2], z[t - 1], z[t]]
        total = total + torch.where(t < n, step, 0.0)
    return total.movedim(-1, 0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, lengths, forbidden parts, scales and ties of every sort."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 3), (3, 3), (4, 2), (5, 2), (2, 3), (1, 3), (3, 1), (1, 1), (2, 2)]))
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 3), (0,)]))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.0, 0.2, 0.5]))
    ties = draw(st.booleans())

    def scores(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        value = scale * (value.round() if ties else value)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    some = (1, *batch[1:]) if batch else ()
    parts = {"emissions": scores(*draw(st.sampled_from([batch, batch, (), some])), steps, k)}
    for name, order in (("transitions", 3), ("second", 2), ("start", 1)):
        parts[name] = scores(*draw(st.sampled_from([(), batch])), *[k] * order)
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Tensor) -> SecondOrderCRF:
        return SecondOrderCRF(**given, lengths=lengths)

    law = build(**parts)
    structures, every, listed = all_sequences(steps, k, law.lengths, law.batch_shape)
    return Case(
        law,
        build,
        every,
        listed,
        lambda parts: score_of_all(structures, law.lengths, law.batch_shape, parts),
        draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_transitions_that_look_one_tag_back_give_the_first_order_law() -> None:
    torch.manual_seed(0)
    emissions, transitions, start = torch.randn(2, 5, 3), torch.randn(3, 3), torch.randn(3)
    lengths = torch.tensor([5, 3])
    first = LinearChainCRF(emissions, transitions, start, lengths=lengths)
    law = SecondOrderCRF(emissions, transitions.expand(3, 3, 3), transitions, start, lengths)
    torch.testing.assert_close(law.log_partition, first.log_partition)
    torch.testing.assert_close(law.marginals, first.marginals)
    torch.testing.assert_close(law.entropy(), first.entropy())
    assert torch.equal(law.mode, first.mode)
    assert torch.equal(law.topk(4)[1], first.topk(4)[1])


def test_expanded_law_is_the_same_law_and_samples_are_independent() -> None:
    torch.manual_seed(0)
    law = SecondOrderCRF(torch.randn(2, 3, 2), torch.randn(2, 2, 2), torch.randn(2, 2), torch.randn(2)).expand([500, 2])
    drawn = law.sample((2,))
    assert drawn.shape == (2, 500, 2, 3)
    assert len(drawn[:, :, 0].flatten(0, 1).unique(dim=0)) > 3
    assert law.log_prob(drawn).shape == (2, 500, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": torch.zeros(2, 2)}, r"transitions must end in \[2, 2, 2\]"),
        ({"start": torch.zeros(3)}, r"start must end in \[2\]"),
        ({"lengths": torch.tensor([0])}, "lengths: expected values from 1 to 3, got values from 0"),
        ({"lengths": torch.tensor([4])}, "lengths: expected values from 1 to 3"),
        ({"emissions": torch.zeros(2)}, "emissions must be"),
        ({"emissions": torch.zeros(1, 0, 2)}, "emissions must be"),
        ({"lengths": torch.tensor([1, 2]), "emissions": torch.zeros(3, 3, 2)}, "batch shapes do not broadcast"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    scores = {name: torch.zeros((2,) * order) for name, order in (("transitions", 3), ("second", 2), ("start", 1))}
    scores["emissions"] = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=message):
        SecondOrderCRF(**{**scores, **change})


@pytest.mark.parametrize("name", ["emissions", "transitions", "second", "start", "lengths"])
def test_dtypes_that_do_not_fit_are_named(name: str) -> None:
    scores = {"emissions": torch.zeros(1, 3, 2), "lengths": torch.tensor([3])}
    scores |= {name: torch.zeros((2,) * order) for name, order in (("transitions", 3), ("second", 2), ("start", 1))}
    scores[name] = scores[name].double() if name == "lengths" else scores[name].long()
    with pytest.raises(TypeError, match=name):
        SecondOrderCRF(**scores)


@pytest.mark.parametrize("name", ["emissions", "transitions", "second", "start"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinite_scores_are_refused_whatever_is_asked(name: str, bad: float) -> None:
    scores = {name: torch.zeros((2,) * order) for name, order in (("transitions", 3), ("second", 2), ("start", 1))}
    scores["emissions"] = torch.zeros(1, 3, 2)
    scores[name].view(-1)[1] = bad
    law = SecondOrderCRF(**scores)
    for ask in (lambda: law.log_partition, lambda: law.mode, law.sample, lambda: law.topk(2), law.entropy):
        with pytest.raises(ValueError, match=f"{name}: scores must not be NaN"):
            ask()


def test_bad_arguments_of_members_are_named() -> None:
    law = SecondOrderCRF(torch.zeros(2, 3, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="same lengths"):
        law.cross_entropy(SecondOrderCRF(*law.parts.values(), lengths=torch.tensor([3, 2])))
    with pytest.raises(TypeError, match=r"allowed: expected dtype torch\.bool"):
        law.condition(torch.ones(3, 2))
    with pytest.raises(ValueError, match="allowed"):
        law.log_prob_partial(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="loss: expected 'hamming' or shape"):
        law.min_risk(torch.zeros(3, 3))
