"""Semi-Markov recursions: kernels are the recursion over a semiring, in value, gradient, best structure and draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import semimarkov
from probllm.math.kernels import threads
from probllm.math.recursion import Recursion, log_partition
from probllm.math.semimarkov import ADDITIVE, RECURSION, step_labels
from probllm.math.semirings import LOG, MAX

Case = tuple[Recursion, tuple[Tensor, ...], Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tables of segments, or emissions and durations; own parts and shared ones; scores small, huge and forbidden."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, steps, k = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    longest = draw(st.integers(1, 8))
    scale = draw(st.sampled_from([1.0, 30.0, 400.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.2, 0.6]))

    def part(*event: int, own: bool = False) -> Tensor:
        shape = (rows if own or draw(st.booleans()) else 1, *event)
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    if draw(st.booleans()):
        return RECURSION, (part(steps, longest, k), part(k, k), part(k), part(k)), lengths
    parts = (part(steps, k, own=True), part(longest, k), part(longest, k), part(k, k), part(k))
    return ADDITIVE, parts, lengths


def value_and_gradients(recursion: Recursion, parts: tuple[Tensor, ...], lengths: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in parts]
    log_z = log_partition(recursion, tuple(leaves), lengths)
    weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    total = (weights * torch.where(log_z > -torch.inf, log_z, 0.0)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [log_z.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))]


@given(cases())
def test_kernels_have_the_value_and_the_gradient_of_the_recursion(case: Case) -> None:
    recursion, parts, lengths = case
    compiled = value_and_gradients(recursion, parts, lengths)
    twin = value_and_gradients(Recursion(recursion.inside), parts, lengths)
    for found, expected in zip(compiled, twin, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(cases())
def test_viterbi_attains_the_recursion_over_maxima(case: Case) -> None:
    recursion, parts, lengths = case
    best, path = semimarkov.viterbi(parts, lengths)
    torch.testing.assert_close(best, recursion.inside(MAX, tuple(MAX.lift(x) for x in parts), lengths)[0])
    for row, (value, z, n) in enumerate(zip(best.tolist(), path.tolist(), lengths.tolist(), strict=True)):
        if value == -math.inf:
            assert set(z) == {-1}
            continue
        assert not any(z[n:]), "padding is 0"
        assert added_up(parts, row, z, n) == pytest.approx(value, rel=1e-12)


def added_up(parts: tuple[Tensor, ...], row: int, z: list[int], n: int) -> float:
    """The score of a segmentation of n steps."""
    own = [x[row if len(x) > 1 else 0] for x in parts]
    cuts = [t for t in range(n) if z[t]] + [n]
    assert cuts[0] == 0
    labels = [z[t] - 1 for t in cuts[:-1]]
    if len(parts) == 4:
        segments, transitions, start, end = own
        total = float(start[labels[0]] + end[labels[-1]])
        total += sum(float(segments[t, u - t - 1, k]) for t, u, k in zip(cuts, cuts[1:], labels, strict=False))
    else:
        emissions, durations, last, transitions, start = own
        total = float(start[labels[0]])
        for t, u, k in zip(cuts, cuts[1:], labels, strict=False):
            total += float(emissions[t:u, k].sum() + (last if u == n else durations)[u - t - 1, k])
    return total + sum(float(transitions[j, k]) for j, k in itertools.pairwise(labels))


@given(cases())
def test_draws_are_allowed_segmentations(case: Case) -> None:
    _, parts, lengths = case
    drawn = semimarkov.sample(parts, lengths, 3)
    best = semimarkov.viterbi(parts, lengths)[0]
    for each in drawn.tolist():
        for row, (z, n) in enumerate(zip(each, lengths.tolist(), strict=True)):
            if best[row] == -math.inf:
                assert set(z) == {-1}
            else:
                assert not any(z[n:])
                assert added_up(parts, row, z, n) > -math.inf


def test_draws_by_emissions_and_durations_have_the_frequencies_of_the_law() -> None:
    """Chi-square at a false-alarm rate of one in a million."""
    torch.manual_seed(0)
    parts = tuple(torch.randn(1, *shape, dtype=torch.float64) for shape in ((4, 2), (3, 2), (3, 2), (2, 2), (2,)))
    every = [z for z in itertools.product(range(3), repeat=4) if z[0] and not (z[1] == z[2] == z[3] == 0)]
    p = torch.tensor([added_up(parts, 0, list(z), 4) for z in every], dtype=torch.float64).softmax(0)
    count = 5000
    drawn = semimarkov.sample(parts, torch.tensor([4]), count)[:, 0]
    same = (drawn.unsqueeze(1) == torch.tensor(every)).all(-1)
    assert bool(same.any(1).all())
    statistic = float(((same.double().sum(0) - count * p) ** 2 / (count * p)).sum())
    assert scipy.stats.chi2.sf(statistic, len(every) - 1) > 1e-6


def test_labels_that_are_only_reached_from_far_below_the_best_keep_their_digits() -> None:
    """exp(-740) has three digits left, and the sum of two such has the gradient of neither."""
    segments = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    start = torch.tensor([[0.0, -740.0, -740.7]], dtype=torch.float64)
    transitions = torch.zeros(1, 3, 3, dtype=torch.float64)
    transitions[0, 0, 1] = -torch.inf
    end = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=torch.float64)
    parts, lengths = (segments, transitions, start, end), torch.tensor([2])
    compiled = value_and_gradients(RECURSION, parts, lengths)
    for found, expected in zip(compiled, value_and_gradients(Recursion(RECURSION.inside), parts, lengths), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_threads_give_the_same_answer(additive: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, steps, longest, k = 5, 9, 4, 3
    many = 1 if shared else rows
    tables = (torch.randn(many, k, k), torch.randn(many, k))
    if additive:
        parts = (torch.randn(rows, steps, k), torch.randn(many, longest, k), torch.randn(many, longest, k), *tables)
    else:
        parts = (torch.randn(rows, steps, longest, k), *tables, torch.randn(many, k))
    recursion, lengths = ADDITIVE if additive else RECURSION, torch.tensor([9, 1, 4, 9, 5])
    torch.set_num_threads(1)
    expected = [*value_and_gradients(recursion, parts, lengths), *semimarkov.viterbi(parts, lengths)]
    monkeypatch.setattr(threads, "SMALL", 0.0)
    torch.set_num_threads(3)
    found = [*value_and_gradients(recursion, parts, lengths), *semimarkov.viterbi(parts, lengths)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("additive", [True, False])
def test_second_derivatives_and_forward_mode_are_differences(additive: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    lengths = torch.tensor([3, 2])
    if additive:
        parts = (leaf(2, 3, 2), leaf(1, 2, 2), leaf(1, 2, 2), leaf(1, 2, 2), leaf(1, 2))
    else:
        parts = (leaf(2, 3, 2, 2), leaf(1, 2, 2), leaf(1, 2), leaf(1, 2))
    recursion = ADDITIVE if additive else RECURSION

    def function(*given: Tensor) -> Tensor:
        return log_partition(recursion, given, lengths)

    assert torch.autograd.gradcheck(function, parts, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, parts)


def test_vmap_and_grad_are_a_loop() -> None:
    torch.manual_seed(0)
    segments, transitions = torch.randn(3, 2, 4, 3, 2), torch.randn(3, 1, 2, 2)
    zeros, lengths = torch.zeros(1, 2), torch.tensor([4, 2])

    def value(s: Tensor, a: Tensor) -> Tensor:
        return log_partition(RECURSION, (s, a, zeros, zeros), lengths).sum()

    functions: list[Callable[..., Tensor]] = [value, torch.func.grad(value), torch.func.grad(value, argnums=1)]
    for function in functions:
        loop = torch.stack([function(s, a) for s, a in zip(segments, transitions, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function)(segments, transitions), loop)
        alike = torch.stack([function(s, transitions[0]) for s in segments])
        torch.testing.assert_close(torch.func.vmap(function, (0, None))(segments, transitions[0]), alike)


def test_emissions_and_durations_are_a_table_of_segments() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([400, 17, 399])
    emissions, durations, last = torch.randn(3, 400, 3), torch.randn(1, 50, 3), torch.randn(1, 50, 3)
    transitions, start = torch.randn(1, 3, 3), torch.randn(1, 3)
    table = semimarkov.segment_scores(LOG, *(x.double().unsqueeze(0) for x in (emissions, durations, last)), lengths)
    of_table = log_partition(RECURSION, (table[0], transitions, start, torch.zeros(1, 3)), lengths)
    of_parts = log_partition(ADDITIVE, (emissions, durations, last, transitions, start), lengths)
    torch.testing.assert_close(of_parts, of_table, rtol=1e-12, atol=0)


def test_labels_of_steps() -> None:
    z = torch.tensor([[3, 0, 1, 0, 0], [2, 1, 0, 0, 0], [-1, -1, -1, -1, -1]])
    expected = torch.tensor([[2, 2, 0, 0, 0], [1, 0, 0, 0, 0], [-1, -1, -1, -1, -1]])
    assert torch.equal(step_labels(z), expected)
    assert step_labels(torch.tensor([3, 0, 0]), torch.tensor(2)).tolist() == [2, 2, 0]
