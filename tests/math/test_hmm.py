"""Expected counts of a categorical HMM: against enumeration of the states, and Baum-Welch's promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math.chain import as_chain, chain_log_partition
from probllm.math.hmm import expected_counts, log_likelihood

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, steps, k, size = (draw(st.integers(1, n)) for n in (3, 4, 3, 4))
    share = draw(st.sampled_from([0.0, 0.0, 0.2]))

    def logits(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        value = value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)
        value[..., 0] = value[..., 0].clamp_min(-1.0)
        return value.log_softmax(-1)

    symbols = torch.randint(0, size, (rows, steps), generator=generator)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator) if draw(st.booleans()) else None
    allowed = torch.rand(rows, steps, k, generator=generator) < 0.7 if draw(st.booleans()) else None
    return symbols, logits(k), logits(k, k), logits(k, size), lengths, allowed


def by_enumeration(case: Case) -> tuple[list[float], Tensor, Tensor, Tensor]:
    symbols, initial, transition, emission, lengths, allowed = case
    k = len(initial)
    log_z, counts = [], [torch.zeros_like(initial), torch.zeros_like(transition), torch.zeros_like(emission)]
    for row, x in enumerate(symbols.tolist()):
        n = len(x) if lengths is None else int(lengths[row])
        every = list(itertools.product(range(k), repeat=n))
        totals = []
        for z in every:
            total = float(initial[z[0]]) + sum(float(emission[z[t], x[t]]) for t in range(n))
            total += sum(float(transition[z[t - 1], z[t]]) for t in range(1, n))
            if allowed is not None and not all(bool(allowed[row, t, z[t]]) for t in range(n)):
                total = -math.inf
            totals.append(total)
        joint = torch.tensor(totals, dtype=torch.float64)
        log_z.append(float(joint.logsumexp(0)))
        if log_z[-1] == -math.inf:
            continue
        for z, p in zip(every, joint.softmax(0), strict=True):
            counts[0][z[0]] += p
            for t in range(n):
                counts[2][z[t], x[t]] += p
                if t:
                    counts[1][z[t - 1], z[t]] += p
    return log_z, counts[0], counts[1], counts[2]


@given(cases())
def test_counts_are_the_enumerated_ones(case: Case) -> None:
    found = expected_counts(*case)
    for one, other in zip(found, by_enumeration(case), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other, dtype=torch.float64))


@given(cases())
def test_counts_add_up_to_the_data(case: Case) -> None:
    symbols, *_, lengths, _ = case
    found = expected_counts(*case)
    possible = found.log_likelihood > -torch.inf
    n = torch.full((len(symbols),), symbols.shape[1]) if lengths is None else lengths
    assert float(found.initial.sum()) == pytest.approx(int(possible.sum()))
    assert float(found.transition.sum()) == pytest.approx(int((n - 1)[possible].sum()))
    real = torch.arange(symbols.shape[1]) < n.unsqueeze(1)
    seen = torch.bincount(symbols[real & possible.unsqueeze(1)], minlength=case[3].shape[1]).double()
    torch.testing.assert_close(found.emission.sum(0), seen)


@given(cases(), st.integers(0, 100))
def test_padding_may_hold_anything(case: Case, seed: int) -> None:
    symbols, *rest, lengths, allowed = case
    if lengths is None:
        return
    padding = torch.arange(symbols.shape[1]) >= lengths.unsqueeze(1)
    spoiled = symbols.masked_fill(padding, -100)
    for one, other in zip(expected_counts(spoiled, *rest, lengths, allowed), expected_counts(*case), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baum_welch_never_lowers_the_likelihood(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 6, (20, 30), generator=generator)
    lengths = torch.randint(1, 31, (20,), generator=generator)
    logits = [torch.randn(*s, generator=generator, dtype=dtype).log_softmax(-1) for s in ((4,), (4, 4), (4, 6))]
    before = -math.inf
    for _ in range(15):
        counts = expected_counts(symbols, *logits, lengths)
        total = float(counts.log_likelihood.double().sum())
        assert total > before - abs(total) * (1e-6 if dtype == torch.float32 else 1e-12)
        before = total
        logits = [(x / x.sum(-1, keepdim=True)).log() for x in counts[1:]]


def test_float32_and_float64_agree_on_long_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 50, (3, 4000), generator=generator)
    logits = [torch.randn(*s, generator=generator).log_softmax(-1) for s in ((16,), (16, 16), (16, 50))]
    narrow, wide = expected_counts(symbols, *logits), expected_counts(symbols, *(x.double() for x in logits))
    for one, other in zip(narrow, wide, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)
    every = torch.ones(3, 4000, 16, dtype=torch.bool)
    by_chain = expected_counts(symbols, *(x.double() for x in logits), allowed=every)
    for one, other in zip(wide, by_chain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("leaving", [-math.inf, -1.0], ids=["forward", "backward"])
def test_a_state_that_sinks_below_underflow_keeps_its_mass(leaving: float) -> None:
    """State 1 is unlikely by 60 nats a step. Without a way there its forward mass sinks, with one its backward mass;
    where the rare symbols come at the end it is the likelier one after all."""
    transition = torch.tensor([[0.0, leaving], [-math.inf, 0.0]], dtype=torch.float64).log_softmax(-1)
    emission = torch.tensor([[0.0, -60.0, -1.0], [-60.0, 0.0, -1.0]], dtype=torch.float64).log_softmax(-1)
    initial = torch.tensor([-0.5, -1.0], dtype=torch.float64).log_softmax(-1)
    symbols = torch.zeros(6, 24, dtype=torch.long)
    symbols[1, 12:] = 1
    symbols[2, 11:] = 1
    symbols[3] = 2
    lengths = torch.tensor([24, 24, 24, 24, 20, 1])
    logits = (initial, transition, emission)
    found = expected_counts(symbols, *logits, lengths)
    by_chain = expected_counts(symbols, *logits, lengths, torch.ones(6, 24, 2, dtype=torch.bool))
    for one, other in zip(found, by_chain, strict=True):
        torch.testing.assert_close(one, other)
    if leaving == -math.inf:  # each state keeps to itself, so the likelihood is a sum of two terms
        each = torch.stack([emission[:, x[:n]].sum(-1) for x, n in zip(symbols, lengths.tolist(), strict=True)])
        torch.testing.assert_close(found.log_likelihood, (each + initial).logsumexp(-1))


@pytest.mark.parametrize(
    ("symbols", "lengths", "message"),
    [
        (torch.zeros(3, dtype=torch.long), None, "symbols"),
        (torch.zeros(2, 3), None, "symbols"),
        (torch.full((2, 3), 4), None, "symbols: expected values from 0 to 3"),
        (torch.full((2, 3), -1), None, "symbols: expected values from 0 to 3"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 3]), "lengths"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([4, 3]), "lengths"),
    ],
)
def test_bad_input_is_named(symbols: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_counts(symbols, torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 4), lengths)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3,), (2, 2), (2, 4)), "initial_logits"),
        (((2,), (3, 3), (2, 4)), "transition_logits"),
        (((2,), (2, 2), (4,)), "emission_logits"),
    ],
)
def test_bad_logits_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_counts(torch.zeros(2, 3, dtype=torch.long), *(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_logits_are_refused(index: int) -> None:
    logits = [torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 4)]
    logits[index].view(-1)[1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        expected_counts(torch.ones(2, 3, dtype=torch.long), *logits)


def chain_log_prob(symbols: Tensor, scores: list[Tensor], lengths: Tensor | None) -> Tensor:
    initial, transition, emission = scores
    chain = as_chain(emission.t()[symbols], transition, initial, None, lengths)
    return chain_log_partition(chain)


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_the_counts_are_the_derivatives_of_the_log_likelihood(
    rows: int, steps: int, k: int, size: int, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    symbols = torch.randint(0, size, (rows, steps))
    lengths = torch.randint(1, steps + 1, (rows,))
    scores = [
        torch.randn(shape, dtype=torch.float64).log_softmax(-1).requires_grad_() for shape in ((k,), (k, k), (k, size))
    ]
    weights = torch.randn(rows, dtype=torch.float64) if weighted else torch.ones(rows, dtype=torch.float64)
    found, expected = log_likelihood(symbols, *scores, lengths), chain_log_prob(symbols, scores, lengths)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(found, scores, weights)
    for one, other in zip(slopes, torch.autograd.grad(expected, scores, weights), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert torch.equal(log_likelihood(symbols, *scores, lengths), found)


def test_the_log_likelihood_is_twice_differentiable() -> None:
    torch.manual_seed(0)
    symbols, lengths = torch.randint(0, 4, (3, 4)), torch.tensor([4, 1, 3])
    scores = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (2, 2), (2, 4))]
    torch.autograd.gradgradcheck(lambda *x: log_likelihood(symbols, *x, lengths), scores)
    value = log_likelihood(symbols, *scores).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_gradients_are_asked_for_part_by_part() -> None:
    symbols = torch.tensor([[0, 1, 1], [2, 0, 1]])
    scores = [torch.randn(s, dtype=torch.float64).log_softmax(-1) for s in ((2,), (2, 2), (2, 3))]
    whole = [x.clone().requires_grad_() for x in scores]
    expected = torch.autograd.grad(log_likelihood(symbols, *whole).sum(), whole)
    for i in range(3):
        one = [x.clone().requires_grad_(i == j) for j, x in enumerate(scores)]
        value = log_likelihood(symbols, *one)
        (slope,) = torch.autograd.grad(value.sum(), one[i], create_graph=True)
        torch.testing.assert_close(slope, expected[i])


def test_what_no_state_emits_has_no_probability_and_no_gradient() -> None:
    emission = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    initial, transition = torch.zeros(2).log_softmax(-1), torch.zeros(2, 2).log_softmax(-1)
    found = log_likelihood(torch.tensor([[0, 1], [0, 2]]), initial, transition, emission)
    assert found.tolist()[1] == -math.inf
    (slope,) = torch.autograd.grad(found[0], emission)
    assert torch.isfinite(slope).all()
    assert slope.sum() == 2.0


@pytest.mark.parametrize("span", [1.0, 70.0, 200.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_scores_that_span_too_much_for_the_fused_kernel_take_another_way(
    span: float, dtype: torch.dtype, part: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 6, (9, 20), generator=generator)
    lengths = torch.randint(1, 21, (9,), generator=generator)
    weights = torch.randn(9, generator=generator, dtype=dtype)
    scores = [torch.randn(s, generator=generator, dtype=dtype) for s in ((5,), (5, 5), (5, 6))]
    scores[part] *= span / float(scores[part].max() - scores[part].min())
    leaves = [x.clone().requires_grad_() for x in scores]
    found = log_likelihood(symbols, *leaves, lengths)
    slopes = torch.autograd.grad(found, leaves, weights)
    leaves = [x.double().requires_grad_() for x in scores]
    expected = chain_log_prob(symbols, leaves, lengths)
    close = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(found.double(), expected, **close)
    for one, other in zip(slopes, torch.autograd.grad(expected, leaves, weights.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **close)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(("low", "high"), [(-1, 2), (0, 4), (-(2**40), 2**40)])
def test_symbols_out_of_range_are_refused(with_gradient: bool, low: int, high: int) -> None:
    symbols = torch.zeros(6, 7, dtype=torch.long)
    symbols[5, 6], symbols[2, 3] = low, high
    scores = [torch.randn(s).requires_grad_(with_gradient) for s in ((3,), (3, 3), (3, 4))]
    with pytest.raises(ValueError, match=f"value: expected symbols from 0 to 3, got {low} to {high}"):
        log_likelihood(symbols, *scores)


def test_long_sequences_in_float32_keep_their_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 50, (6, 3000), generator=generator)
    scores = [torch.randn(*s, generator=generator).log_softmax(-1) for s in ((17,), (17, 17), (17, 50))]
    slopes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in scores]
        slopes.append(torch.autograd.grad(log_likelihood(symbols, *leaves).sum(), leaves))
    for narrow, wide in zip(*slopes, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=1e-3)
    assert float(slopes[1][2].sum()) == pytest.approx(symbols.numel())
