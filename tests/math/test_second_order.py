"""The second-order recursions against enumeration of every tag sequence, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import recursion, second_order
from probllm.math.higher_order import inside
from probllm.math.recursion import Recursion

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def log_partition(*case: Tensor, by: Recursion = second_order.RECURSION) -> Tensor:
    """log Z of emissions, start, second, transitions and lengths."""
    return recursion.log_partition(by, as_scores(*case[:4]), case[4])


def as_scores(emissions: Tensor, start: Tensor, second: Tensor, transitions: Tensor) -> tuple[Tensor, ...]:
    return emissions, transitions[None], start[None], second[None]


@st.composite
def cases(draw: st.DrawFn, forbidden: bool = True) -> Case:
    batch, length, tags = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1.0, 30.0, 400.0]))
    share = draw(st.sampled_from([0.0, 0.3, 0.7])) if forbidden else 0.0

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    return scores(batch, length, tags), scores(tags), scores(tags, tags), scores(tags, tags, tags), lengths


def enumerate_scores(case: Case, row: int) -> tuple[Tensor, Tensor]:
    """Every tag sequence of one row ``[N, length]`` and its score ``[N]``."""
    emissions, start, second, transitions, lengths = case
    sequences = list(itertools.product(range(emissions.shape[-1]), repeat=int(lengths[row])))
    totals = []
    for z in sequences:
        total = start[z[0]] + sum(emissions[row, t, k] for t, k in enumerate(z))
        if len(z) > 1:
            total = total + second[z[0], z[1]]
        totals.append(total + sum(transitions[z[t - 2 : t + 1]] for t in range(2, len(z))))
    return torch.tensor(sequences), torch.stack(totals)


@given(cases())
def test_log_partition_sums_over_every_sequence(case: Case) -> None:
    value = log_partition(*case)
    expected = torch.stack([torch.logsumexp(enumerate_scores(case, row)[1], -1) for row in range(len(value))])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-8)


@given(cases())
def test_gradient_is_the_probability_of_each_part_and_never_nan(case: Case) -> None:
    scores = [x.clone().requires_grad_() for x in case[:4]]
    value = log_partition(*scores, case[4])
    gradients = torch.autograd.grad(value[value > -torch.inf].sum(), scores, allow_unused=True)
    expected = [torch.zeros_like(x) for x in case[:4]]
    for row in range(len(value)):
        sequences, totals = enumerate_scores(case, row)
        if value[row] == -torch.inf:
            continue
        for z, p in zip(sequences.tolist(), totals.softmax(-1), strict=True):
            expected[1][z[0]] += p
            for t, k in enumerate(z):
                expected[0][row, t, k] += p
            if len(z) > 1:
                expected[2][z[0], z[1]] += p
            for t in range(2, len(z)):
                expected[3][tuple(z[t - 2 : t + 1])] += p
    for gradient, reference in zip(gradients, expected, strict=True):
        gradient = torch.zeros_like(reference) if gradient is None else gradient
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-8)


@given(cases())
def test_gradient_of_a_row_without_mass_is_zero(case: Case) -> None:
    emissions = torch.full_like(case[0], -torch.inf).requires_grad_()
    start = case[1].clone().requires_grad_()
    value = log_partition(emissions, start, *case[2:])
    assert bool((value == -torch.inf).all())
    for gradient in torch.autograd.grad(value.sum(), (emissions, start)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@given(cases(forbidden=False))
def test_kernel_matrix_products_and_log_space_agree(case: Case) -> None:
    compiled = log_partition(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_order, "is_compilable", lambda *_: False)
        scaled = log_partition(*case)
        patch.setattr(second_order, "SAFE_RANGE", -1.0)
        in_logs = log_partition(*case)
    torch.testing.assert_close(compiled, in_logs, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(scaled, in_logs, rtol=1e-12, atol=1e-10)


@given(cases(), st.booleans())
def test_compiled_gradient_is_the_torch_twins(case: Case, forbid_tags: bool) -> None:
    weights = torch.linspace(-1.0, 2.0, len(case[0]), dtype=torch.float64)
    steps = [x.nan_to_num(neginf=-3.0).clamp(-30, 30) for x in case[1:4]]  # within the range of the kernel
    emissions = case[0].clamp(-50, 50)
    if forbid_tags and emissions.shape[-1] > 1:
        emissions = emissions.index_fill(-1, torch.tensor([0]), -torch.inf)
    found = []
    for by in (second_order.RECURSION, Recursion(inside)):
        scores = [x.clone().requires_grad_() for x in (emissions, *steps)]
        total = log_partition(*scores, case[4], by=by)
        gradients = torch.autograd.grad((weights * total).sum(), scores, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in zip(gradients, scores, strict=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@given(cases())
def test_viterbi_attains_the_maximum(case: Case) -> None:
    path = second_order.best(as_scores(*case[:4]), case[4])
    for row, n in enumerate(case[4].tolist()):
        sequences, totals = enumerate_scores(case, row)
        if totals.max() == -torch.inf:
            assert path[row].tolist() == [-1] * path.shape[-1]
            continue
        index = (sequences == path[row, :n]).all(-1).nonzero().item()
        torch.testing.assert_close(totals[index], totals.max(), rtol=1e-10, atol=1e-8)
        assert not path[row, n:].any()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_samples_have_the_frequencies_of_the_law(length: int) -> None:
    torch.manual_seed(length)
    generator = torch.Generator().manual_seed(length)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 2), (2,), (2, 2), (2, 2, 2))
    ]
    case: Case = (draw[0], draw[1], draw[2], draw[3], torch.tensor([length, 1]))
    count = 20_000
    drawn = second_order.draw(as_scores(*case[:4]), case[4], count)
    for row, n in enumerate(case[4].tolist()):
        sequences, totals = enumerate_scores(case, row)
        frequency = (drawn[:, row, None, :n] == sequences).all(-1).double().mean(0)
        probability = totals.softmax(-1)
        # 5 standard errors on each of at most 16 sequences: a false alarm in 100,000 runs, and the seed is fixed
        assert bool(((frequency - probability).abs() < 5 * (probability / count).sqrt() + 1e-9).all())
        assert not drawn[:, row, n:].any()


def test_samples_of_a_row_without_mass_are_minus_one() -> None:
    emissions = torch.zeros(2, 3, 2)
    emissions[0, 1] = -torch.inf
    tables = (torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 2, 2))
    drawn = second_order.draw(as_scores(emissions, *tables), torch.tensor([3, 2]), 5)
    assert bool((drawn[:, 0] == -1).all())
    assert bool((drawn[:, 1] >= 0).all())


def test_a_state_far_below_an_unreachable_one_keeps_its_mass() -> None:
    emissions = torch.zeros(1, 4, 2)
    emissions[0, 2] = torch.tensor([0.0, -200.0])
    transitions = torch.zeros(2, 2, 2)
    transitions[:, :, 0] = -torch.inf  # the better state of the third step cannot be reached
    value = log_partition(emissions, torch.zeros(2), torch.zeros(2, 2), transitions, torch.tensor([4]))
    torch.testing.assert_close(value, torch.tensor([-200.0 + 2 * math.log(2.0)], dtype=torch.float64))


def test_twice_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 2), (2,), (2, 2), (2, 2, 2))
    scores = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradgradcheck(lambda *x: log_partition(*x, torch.tensor([4])), scores)


def test_vmap_and_grad_of_functions_agree_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    emissions = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    start, second, transitions = (torch.randn(*(2,) * n, generator=generator, dtype=torch.float64) for n in (1, 2, 3))
    lengths = torch.tensor([4])

    def value(e: Tensor) -> Tensor:
        return log_partition(e[None], start, second, transitions, lengths).squeeze(0)

    together = torch.func.vmap(torch.func.grad(value))(emissions)
    for row, expected in zip(emissions, together, strict=True):
        row = row.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(row), row)
        torch.testing.assert_close(gradient, expected)
