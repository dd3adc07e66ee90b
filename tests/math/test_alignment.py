"""Kernels of monotone alignments are their torch twin, for every score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import alignment, ctc
from probllm.math.recursion import Recursion, expected_parts, log_partition

Scores = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def lattices(draw: st.DrawFn) -> tuple[Scores, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, frames, states = (draw(st.integers(1, n)) for n in (3, 40, 12))
    moves = draw(st.sampled_from([1, 2, 3, 5]))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 300.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.1]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    own = [draw(st.sampled_from([1, rows])) for _ in range(3)]
    found = (
        scores(rows, frames, states),
        scores(own[0], moves, states),
        scores(own[1], states),
        scores(own[2], states),
    )
    return found, torch.randint(1, frames + 1, (rows,), generator=generator)


@given(lattices())
def test_value_and_gradient_are_the_twins(case: tuple[Scores, Tensor]) -> None:
    scores, lengths = case
    weights = torch.randn(len(lengths), dtype=torch.float64)

    def run(recursion: Recursion) -> list[Tensor]:
        leaves = tuple(x.clone().requires_grad_() for x in scores)
        log_z = log_partition(recursion, leaves, lengths)
        total = (weights * torch.where(log_z > -torch.inf, log_z, 0.0)).sum()
        return [log_z.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]

    size = 1 + max(float(x[x > -torch.inf].abs().sum()) if bool((x > -torch.inf).any()) else 0.0 for x in scores)
    for found, expected in zip(run(alignment.RECURSION), run(Recursion(alignment.inside)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 + 1e-13 * size)


@pytest.mark.parametrize("moves", [2, 3, 4])
def test_what_the_best_beginning_leads_to_may_be_as_improbable_as_it_likes(moves: int) -> None:
    # the best states of the first half are of no use to the second
    torn = torch.zeros(2, 200, 61, dtype=torch.float64)
    torn[0, :100, 40:], torn[0, 100:, :40] = 40.0, 40.0
    torn[1] = 1e6 * torch.randn(200, 61, generator=torch.Generator().manual_seed(0))
    scores = (torn, torch.zeros(1, moves, 61), torch.zeros(1, 61), torch.zeros(1, 61))
    both = []
    for recursion in (alignment.RECURSION, Recursion(alignment.inside)):
        leaf = torn.clone().requires_grad_()
        log_z = log_partition(recursion, (leaf, *scores[1:]), torch.full((2,), 200))
        both.append((log_z, torch.autograd.grad(log_z.sum(), leaf)[0]))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-13, atol=0.0)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=1e-6, atol=1e-9)


def test_long_paths_keep_their_digits_and_masks_of_the_least_float_stand_for_what_they_are() -> None:
    steps, states = 20_000, 5
    scores = (torch.zeros(1, steps, states), torch.zeros(1, 2, states), torch.zeros(1, states), torch.zeros(1, states))
    # state s is reached by C(steps - 1, d) paths that advance d times in all
    counts = [math.comb(steps - 1, d) * (states - d) for d in range(states)]
    for moves in (2, 3):
        table = torch.zeros(1, moves, states).index_fill(1, torch.arange(2, moves), -torch.inf)
        each = torch.full((1, steps, states), 0.3, dtype=torch.float64, requires_grad=True)
        found = log_partition(alignment.RECURSION, (each, table, *scores[2:]), torch.tensor([steps]))
        assert float(found) == pytest.approx(math.log(sum(counts)) + 0.3 * steps, rel=1e-12)
        (used,) = torch.autograd.grad(found.sum(), each)
        torch.testing.assert_close(used.sum(-1), torch.ones(1, steps, dtype=torch.float64))
    least = float(torch.finfo(torch.float32).min)
    masked = scores[0][:, :6].clone()
    masked[:, 2], masked[:, 4, 0] = least, least
    found = log_partition(alignment.RECURSION, (masked, *scores[1:]), torch.tensor([6]))
    assert float(found) == pytest.approx(least, rel=1e-12)


def test_second_derivatives_and_torch_func() -> None:
    torch.manual_seed(0)
    scores = tuple(
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3), (1, 2, 3), (1, 3), (2, 3))
    )
    lengths = torch.tensor([4, 3])

    def value(*given: Tensor) -> Tensor:
        return log_partition(alignment.RECURSION, given, lengths)

    assert torch.autograd.gradcheck(value, scores)
    assert torch.autograd.gradgradcheck(value, scores)
    parts = expected_parts(alignment.RECURSION, scores, lengths)
    torch.testing.assert_close(parts[0].sum(-1)[0], torch.ones(4, dtype=torch.float64))
    many = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    rest = tuple(x.detach() for x in scores[1:])
    together = torch.func.vmap(lambda e: value(e, *rest))(many)
    torch.testing.assert_close(together, torch.stack([value(e, *rest) for e in many]))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_answer(threads: int) -> None:
    scores = (torch.randn(7, 300, 80), torch.zeros(1, 3, 80), torch.zeros(1, 80), torch.zeros(1, 80))
    lengths = torch.full((7,), 300)
    torch.set_num_threads(1)
    one = log_partition(alignment.RECURSION, scores, lengths)
    torch.set_num_threads(threads)
    assert torch.equal(log_partition(alignment.RECURSION, scores, lengths), one)


@given(st.integers(0, 1000))
def test_ctc_kernels_are_their_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = ctc.pack(
        torch.randint(1, 3, (3, 4), generator=generator),
        torch.randint(1, 9, (3,), generator=generator),
        torch.randint(0, 5, (3,), generator=generator),
        0,
    )
    log_probs = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)
    log_probs[torch.rand(log_probs.shape, generator=generator) < 0.1] = -torch.inf

    def run(recursion: Recursion) -> tuple[Tensor, Tensor]:
        leaf = log_probs.clone().requires_grad_()
        log_z = log_partition(recursion, (leaf,), packed)
        return log_z, torch.autograd.grad(log_z[log_z > -torch.inf].sum(), leaf)[0]

    for found, expected in zip(run(ctc.RECURSION), run(Recursion(ctc.inside)), strict=True):
        torch.testing.assert_close(found, expected)
