"""The law of order n: the battery for n = 1, 2, 3, and agreement between orders."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.higher_order_crf import HigherOrderCRF
from probllm.distributions.linear_chain_crf import LinearChainCRF
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Orders, shapes, lengths, forbidden parts, scales and ties of every sort."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.sampled_from([1, 2, 3]))
    steps, k = draw(st.sampled_from([(4, 3), (3, 3), (5, 2), (4, 2), (2, 3), (1, 3), (5, 1), (1, 1), (2, 2)]))
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
    orders = {"transitions": n + 1, **{f"start{t}": t for t in range(1, n + 1)}}
    for name, order in orders.items():
        parts[name] = scores(*draw(st.sampled_from([(), batch])), *[k] * order)
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(emissions: Tensor, transitions: Tensor, **starts: Tensor) -> HigherOrderCRF:
        return HigherOrderCRF(emissions, transitions, [starts[f"start{t}"] for t in range(1, n + 1)], lengths)

    law = build(**parts)
    structures, every, listed = all_sequences(steps, k, law.lengths, law.batch_shape)

    def score(given: Parts) -> Tensor:
        z, rows = structures.T, law.lengths.unsqueeze(-1)
        total = torch.zeros(*law.batch_shape, len(structures), dtype=torch.float64)
        tables = {
            name: x.expand(*law.batch_shape, *x.shape[x.dim() - orders.get(name, 2) :]) for name, x in given.items()
        }
        for t in range(steps):
            name = f"start{t + 1}" if t < n else "transitions"
            seen = tuple(z[s] for s in range(max(0, t - n), t + 1))
            step = tables["emissions"][..., t, z[t]] + tables[name][(..., *seen)]
            total = total + torch.where(t < rows, step, 0.0)
        return total.movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def parts(n: int, k: int, *batch: int) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(*batch, *[k] * (n + 1)), [torch.randn(*batch, *[k] * t) for t in range(1, n + 1)]


def test_order_one_is_the_linear_chain() -> None:
    torch.manual_seed(0)
    emissions, lengths = torch.randn(2, 5, 3), torch.tensor([5, 3])
    transitions, (start,) = parts(1, 3)
    chain = LinearChainCRF(emissions, transitions, start, lengths=lengths)
    law = HigherOrderCRF(emissions, transitions, [start], lengths)
    torch.testing.assert_close(law.log_partition, chain.log_partition)
    torch.testing.assert_close(law.marginals, chain.marginals)
    torch.testing.assert_close(law.entropy(), chain.entropy())
    assert torch.equal(law.mode, chain.mode)
    assert torch.equal(law.topk(4)[1], chain.topk(4)[1])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_scores_that_do_not_look_at_the_oldest_tag_give_the_law_of_one_order_less(n: int) -> None:
    torch.manual_seed(0)
    k, emissions, lengths = 2, torch.randn(3, 6, 2), torch.tensor([6, 1, 3])
    transitions, starts = parts(n, k)
    less = HigherOrderCRF(emissions, transitions, starts, lengths)
    more = HigherOrderCRF(emissions, transitions.expand([k] * (n + 2)), [*starts, transitions], lengths)
    torch.testing.assert_close(more.log_partition, less.log_partition)
    torch.testing.assert_close(more.marginals, less.marginals)
    torch.testing.assert_close(more.entropy(), less.entropy())
    assert torch.equal(more.mode, less.mode)


def test_log_probabilities_make_a_markov_chain_of_mass_one_read_backwards_too() -> None:
    torch.manual_seed(0)
    transitions, starts = parts(3, 3)
    law = HigherOrderCRF(torch.zeros(7, 3), transitions.log_softmax(-1), [x.log_softmax(-1) for x in starts])
    torch.testing.assert_close(law.log_partition, torch.tensor(0.0), atol=1e-5, rtol=0)
    # with uniform starts the reversed sequence has the transposed table's law
    zeros = [torch.zeros_like(x) for x in starts]
    emissions = torch.randn(7, 3)
    forth = HigherOrderCRF(emissions, transitions, zeros)
    back = HigherOrderCRF(emissions.flip(0), transitions.permute(3, 2, 1, 0), zeros)
    torch.testing.assert_close(forth.log_partition, back.log_partition)
    torch.testing.assert_close(forth.marginals, back.marginals.flip(0))


def test_pyro_program_scores_samples_and_differentiates() -> None:
    torch.manual_seed(0)
    transitions, starts = parts(2, 3)
    emissions = torch.randn(4, 5, 3, requires_grad=True)

    def model(value: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 4):
            return pyro.sample("tags", HigherOrderCRF(emissions, transitions, starts), obs=value)

    drawn = model()
    trace = pyro.poutine.trace(model).get_trace(drawn)
    expected = HigherOrderCRF(emissions, transitions, starts).log_prob(drawn).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    (gradient,) = torch.autograd.grad(trace.log_prob_sum(), emissions)
    own = torch.nn.functional.one_hot(drawn, 3)
    torch.testing.assert_close(gradient, own - HigherOrderCRF(emissions, transitions, starts).marginals)


def test_torch_func_goes_through() -> None:
    torch.manual_seed(0)
    transitions, starts = parts(3, 2)
    emissions = torch.randn(5, 4, 6, 2)

    def total(scores: Tensor) -> Tensor:
        return HigherOrderCRF(scores, transitions, starts).log_partition.sum()

    found = torch.func.vmap(torch.func.grad(total))(emissions)
    torch.testing.assert_close(found, HigherOrderCRF(emissions, transitions, starts).marginals)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": torch.zeros(2, 2)}, r"transitions: expected shape \[..., 2, 2, 2\]"),
        ({"starts": [torch.zeros(3), torch.zeros(2, 2)]}, r"start1: expected shape \[..., 2\]"),
        ({"starts": []}, "starts: expected at least one tensor"),
        ({"lengths": torch.tensor([0])}, "lengths: expected values from 1 to 3, got values from 0"),
        ({"emissions": torch.zeros(2)}, "emissions: expected shape"),
        ({"emissions": torch.zeros(1, 0, 2)}, "emissions: expected shape"),
        ({"lengths": torch.tensor([1, 2]), "emissions": torch.zeros(3, 3, 2)}, "batch shapes do not broadcast"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    scores = {"emissions": torch.zeros(1, 3, 2), "transitions": torch.zeros(2, 2, 2)}
    with pytest.raises(ValueError, match=message):
        HigherOrderCRF(**{**scores, "starts": [torch.zeros(2), torch.zeros(2, 2)], **change})


def test_other_bad_input_is_named() -> None:
    zero, starts = torch.zeros(3, 2), [torch.zeros(2), torch.zeros(2, 2)]
    with pytest.raises(TypeError, match="start2: expected floating-point"):
        HigherOrderCRF(zero, torch.zeros(2, 2, 2), [starts[0], starts[1].long()])
    with pytest.raises(ValueError, match="transitions: scores must not be NaN"):
        HigherOrderCRF(zero, torch.full((2, 2), torch.nan), starts[:1]).log_partition  # noqa: B018
    with pytest.raises(ValueError, match="q: expected a law of order 2, got 1"):
        HigherOrderCRF(zero, torch.zeros(2, 2, 2), starts).cross_entropy(HigherOrderCRF(zero, starts[1], starts[:1]))
