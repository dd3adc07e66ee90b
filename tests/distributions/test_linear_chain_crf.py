"""The linear-chain CRF: the battery of a law over structures, and what only a chain has."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from probllm.distributions import LinearChainCRF
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


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
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Tensor) -> LinearChainCRF:
        return LinearChainCRF(**given, lengths=lengths)

    law = build(**parts)
    own = torch.as_tensor(steps if lengths is None else lengths).expand(law.batch_shape)
    structures, every, listed = all_sequences(steps, k, own, law.batch_shape)
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


def test_a_dimension_of_size_one_expands_to_independent_copies() -> None:
    torch.manual_seed(0)
    law = LinearChainCRF(torch.randn(2, 1, 4, 3), torch.randn(2, 1, 1, 3, 3), torch.randn(3), lengths=torch.tensor(3))
    wide = law.expand((2, 200))
    drawn = wide.sample()
    assert drawn.shape == (2, 200, 4)
    assert all(len(rows.unique(dim=0)) > 3 for rows in drawn), "copies are drawn independently"
    assert torch.equal(wide.log_partition, law.log_partition.expand(2, 200))
    assert torch.equal(wide.mode[:, 7], law.mode[:, 0])
    torch.testing.assert_close(wide.log_prob(drawn).exp().mean(1), law.log_prob(drawn).exp().mean(1))


@pytest.mark.parametrize("kinds", [((), (4,)), ((4,), ()), ((2, 1), (2, 4)), ((2, 4), (2, 1)), ((), (2, 4))])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])])
def test_laws_whose_transitions_are_shared_by_the_steps_or_not_are_compared(
    kinds: tuple[tuple[int, ...], tuple[int, ...]], lengths: Tensor | None
) -> None:
    """Cross-entropy and divergence, and the expectation of scores that differ by step, as by pairs of each step."""
    torch.manual_seed(0)
    p, q = (LinearChainCRF(torch.randn(2, 5, 3), torch.randn(*kind, 3, 3), lengths=lengths) for kind in kinds)
    every = torch.tensor(list(itertools.product(range(3), repeat=5))).unsqueeze(1)
    once = (every == 0) | (torch.arange(5) < torch.as_tensor(5 if lengths is None else lengths).view(-1, 1))
    weight = p.log_prob(every.expand(-1, 2, -1)).exp() * once.all(-1)
    log_q = q.log_prob(every.expand(-1, 2, -1))
    torch.testing.assert_close(p.cross_entropy(q), -(weight * log_q).sum(0))
    torch.testing.assert_close(kl_divergence(p, q), (weight * (p.log_prob(every.expand(-1, 2, -1)) - log_q)).sum(0))
    table = torch.randn(4, 3, 3)
    expected = (p.pairwise_marginals * table).sum((-1, -2, -3))
    torch.testing.assert_close(p.expectation({"transitions": table}), expected)


def test_padding_of_a_value_may_be_anything_and_samples_pad_with_zero() -> None:
    torch.manual_seed(0)
    law = LinearChainCRF(torch.randn(3, 5, 4), torch.randn(4, 4), lengths=torch.tensor([5, 2, 1]))
    value = law.sample()
    padding = torch.arange(5) >= law.lengths.unsqueeze(-1)
    assert not value[padding].any()
    for filler in (-100, 4, 99, -1):
        spoiled = value.masked_fill(padding, filler)
        assert torch.equal(law.log_prob(spoiled), law.log_prob(value))
        assert torch.equal(law.score(spoiled), law.score(value))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_values_of_any_integer_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    law = LinearChainCRF(torch.randn(2, 5, 40), torch.randn(40, 40))
    value = law.sample()
    assert torch.equal(law.log_prob(value.to(dtype)), law.log_prob(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mode_of_large_scores_attains_the_maximum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    emissions = (1e5 + torch.randn(20, 4, 3, generator=generator)).to(dtype)
    transitions = (1e5 + torch.randn(3, 3, generator=generator)).to(dtype)
    law = LinearChainCRF(emissions, transitions)
    exact = LinearChainCRF(emissions.double(), transitions.double())
    torch.testing.assert_close(exact.score(law.mode), exact.score(exact.mode), rtol=0, atol=1e-9)


def _crf_program(value: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    emissions = pyro.param("emissions", lambda: torch.randn(3, 5, 4))
    transitions = pyro.param("transitions", lambda: torch.randn(4, 4))
    with pyro.plate("rows", 3):
        tags: Tensor = pyro.sample("tags", LinearChainCRF(emissions, transitions, lengths=lengths), obs=value)
    return tags


@pytest.mark.parametrize("name", ["emissions", "transitions", "start", "end", "lengths"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    scores = {"emissions": torch.zeros(2, 4, 3), "transitions": torch.zeros(3, 3)}
    with pytest.raises(TypeError, match=f"{name}: expected a tensor.*, got list"):
        LinearChainCRF(**{**scores, name: [1, 2]})


def test_pyro_program_traces_predicts_and_learns() -> None:
    torch.manual_seed(0)
    lengths, value = torch.tensor([5, 3, 1]), torch.randint(0, 4, (3, 5))
    with pyro.validation_enabled(True):
        trace = pyro.poutine.trace(_crf_program).get_trace(value, lengths)
        trace.compute_log_prob()
        law = trace.nodes["tags"]["fn"]
        assert isinstance(law, LinearChainCRF)
        torch.testing.assert_close(trace.log_prob_sum(), law.log_prob(value).sum())
        assert trace.nodes["tags"]["log_prob"].shape == (3,)
        drawn = Predictive(_crf_program, num_samples=7)(None, lengths)["tags"]
        assert drawn.shape == (7, 3, 5)
        stacked = Predictive(_crf_program, num_samples=7, parallel=False)(None, lengths)["tags"]
        assert stacked.dtype == torch.long
        svi = SVI(_crf_program, lambda *_: None, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO())
        losses = [svi.step(value, lengths) for _ in range(30)]
        assert losses[-1] < 0.5 * losses[0]
        assert losses[0] == pytest.approx(-float(trace.log_prob_sum()), rel=1e-5)


def test_nested_plates_expand_and_scale_and_mask() -> None:
    torch.manual_seed(0)
    law = LinearChainCRF(torch.randn(2, 4, 3), torch.randn(3, 3))

    def program(value: Tensor | None = None) -> Tensor:
        with pyro.plate("copies", 5, dim=-2), pyro.plate("rows", 2, dim=-1), pyro.poutine.scale(scale=3.0):
            found: Tensor = pyro.sample("tags", law, obs=value)
        return found

    with pyro.validation_enabled(True):
        drawn = program()
        assert drawn.shape == (5, 2, 4)
        total = pyro.poutine.trace(program).get_trace(drawn).log_prob_sum()
        torch.testing.assert_close(total, 3 * law.log_prob(drawn).sum())
        masked = law.mask(torch.tensor([True, False])).log_prob(drawn)
        assert not masked[:, 1].any()
        assert torch.equal(law.to_event(1).log_prob(drawn), law.log_prob(drawn).sum(-1))
        assert law.support.check(drawn).all()
        assert not bool(law.support.check(torch.full((4,), 3)))


def test_a_latent_crf_in_the_guide_gives_the_elbo_of_its_kl() -> None:
    """The score-function gradient needs log_prob of its own samples; E[ELBO] is the negative divergence."""
    torch.manual_seed(0)
    p, q = (LinearChainCRF(torch.randn(4, 3), torch.randn(3, 3)) for _ in range(2))

    def model() -> None:
        pyro.sample("tags", p)

    def guide() -> None:
        pyro.sample("tags", q)

    losses = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(600)])
    # five standard errors: a false alarm in two million, and the seed is fixed
    assert abs(float(losses.mean() - kl_divergence(q, p))) < 5 * float(losses.std()) / 600**0.5
