"""The compiled sums over binary trees against their torch twin, and where they change arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.span_tree import SpanTree
from probllm.math import span_trees
from probllm.math.kernels import span_trees as kernels
from probllm.math.kernels.logarithm import logarithm
from probllm.math.recursion import expected_parts, log_partition
from probllm.math.semirings import MAX


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Spans ``[B, T, T, K]`` and lengths, B beyond and below the lanes of a vector."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, size, k = draw(st.sampled_from([(1, 1, 1), (3, 5, 2), (9, 6, 1), (17, 3, 3), (8, 12, 2), (2, 20, 1)]))
    scale = draw(st.sampled_from([0.0, 1.0, 8.0, 40.0, 400.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.1, 0.4, 0.9]))
    spans = scale * torch.randn(rows, size, size, k, generator=generator, dtype=torch.float64)
    spans = spans + draw(st.sampled_from([0.0, -50.0, 300.0]))
    spans = spans.masked_fill(torch.rand(spans.shape, generator=generator) < share, -torch.inf)
    return spans, torch.randint(1, size + 1, (rows,), generator=generator)


@given(cases())
def test_kernels_are_the_twin_in_value_and_gradient(case: tuple[Tensor, Tensor]) -> None:
    spans, lengths = case
    spans = spans.clone().requires_grad_()
    weights = torch.linspace(-1, 2, len(lengths), dtype=torch.float64)
    found = []
    for log_z in (log_partition(span_trees.RECURSION, (spans,), lengths), span_trees.RECURSION.twin((spans,), lengths)):
        finite = torch.where(log_z > -torch.inf, log_z, 0.0)
        found.append((log_z.detach(), torch.autograd.grad((weights * finite).sum(), spans)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-9)
    assert bool(torch.isfinite(found[0][1]).all())
    without = span_trees.forward((spans.detach(),), lengths, False)[0]
    torch.testing.assert_close(without, found[0][0], rtol=1e-12, atol=1e-10)


@given(cases())
def test_best_tree_of_the_kernel_attains_the_maximum(case: tuple[Tensor, Tensor]) -> None:
    spans, lengths = case
    trees = span_trees.best(spans, lengths)
    best = span_trees.inside(MAX, (MAX.lift(spans),), lengths)[0]
    score = SpanTree(spans, lengths).score(trees)
    torch.testing.assert_close(torch.where(best > -torch.inf, score, best), best, rtol=1e-12, atol=1e-9)
    assert bool((trees[best == -torch.inf] == -1).all())


def test_probability_space_and_log_space_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = torch.randn(9, 30, 30, 2, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([30, 30, 12, 1, 2, 30, 7, 29, 3])
    mine, kept = span_trees.forward((spans,), lengths, True)
    assert kept is not None
    gradient, room = np.empty((30, 30, 2)), np.empty((5, 30, 30))
    for b, n in enumerate(lengths.tolist()):
        value = kernels._in_logs(spans[b].numpy(), n, 1, gradient, room[0], room[0], room)
        assert value == pytest.approx(float(mine[b]), rel=1e-13, abs=1e-12)
        np.testing.assert_allclose(kept.marginals[0][b], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [2, 5, 8, 16, 20, 35])
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e3])
def test_narrow_labels_lose_no_more_than_their_rounding(k: int, scale: float) -> None:
    """log Z and marginals of float32 scores beside those of the same numbers in float64."""
    spans = scale * torch.randn(2, 40, 40, k).masked_fill(torch.rand(2, 40, 40, k) < 0.1, -torch.inf)
    lengths = torch.tensor([40, 33])
    narrow, kept = span_trees.forward((spans,), lengths, True)
    wide, wide_kept = span_trees.forward((spans.double(),), lengths, True)
    torch.testing.assert_close(narrow, wide, rtol=1e-12, atol=1e-5)
    weights = torch.tensor([1.0, -3.0])
    (gradient,), (expected,) = (span_trees.backward(x, weights) for x in (kept, wide_kept))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    beyond = ~span_trees.within_lengths(lengths, 40).unsqueeze(-1)
    assert bool((gradient[beyond.expand_as(gradient) | (spans == -torch.inf)] == 0).all())


def test_what_a_great_score_takes_from_the_digits_of_others_is_given_back() -> None:
    """Each leaf's own score is far above those of the wider spans, whose differences from it are all rounded alike."""
    spans = torch.full((1, 40, 40, 2), 0.3)
    spans[0].diagonal()[:] = 60.0
    log_z = [span_trees.forward((x,), torch.tensor([40]), False)[0] for x in (spans, spans.double())]
    torch.testing.assert_close(*log_z, rtol=1e-12, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_far_below_its_span_is_nothing_and_a_span_far_below_its_row_is_not(dtype: torch.dtype) -> None:
    spans = torch.zeros(1, 3, 3, 9, dtype=dtype)
    spans[..., 1:] = -1000.0  # exp of it is no normal number in either precision
    spans[0, 0, 1] -= 2000.0
    spans[0, 1, 2] = -torch.inf
    log_z, kept = span_trees.forward((spans,), torch.tensor([3]), True)
    assert float(log_z) == -2000.0
    (gradient,) = span_trees.backward(kept, torch.ones(1))
    used = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=dtype)
    assert torch.equal(gradient[0, ..., 0], used)
    assert not bool(gradient[..., 1:].any())


def test_logarithm_is_right_to_its_last_digits() -> None:
    x = torch.cat([torch.rand(1000).double() * 2, (600 * torch.randn(1000).double().clamp(-1, 1)).exp()])
    found = torch.tensor([logarithm(v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, x.log(), rtol=5e-16, atol=1e-16)
    assert logarithm(0.0) == -math.inf
    assert logarithm(1.0) == 0.0


def test_span_that_is_raised_but_certain_sends_its_row_to_logs() -> None:
    """All other spans of its width are forbidden, so that the least score of all has probability 1."""
    spans = torch.zeros(2, 5, 5, 1, dtype=torch.float64)
    spans[0, 0, 3] = -2000.0
    spans[0, 1, 4] = -torch.inf
    spans[0, 0, 1] = spans[0, 2, 4] = spans[0, 3, 4] = -torch.inf  # (0, 4) is (0, 3) and (4, 4), or (0, 0) and (1, 4)
    spans[0, 0, 2] = -torch.inf
    law = SpanTree(spans)
    assert float(law.marginals[0, 0, 3, 0]) == pytest.approx(1.0)
    torch.testing.assert_close(law.log_partition, span_trees.RECURSION.twin((spans,), torch.tensor([5, 5])))
    assert float(law.log_partition[0]) < -1999


def test_long_sentence_counts_its_trees() -> None:
    n = 150
    value = SpanTree(torch.zeros(n, n, 1, dtype=torch.float64)).log_partition
    expected = math.log(math.comb(2 * n - 2, n - 1) // n)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("forbid", [False, True])
def test_gradients_of_gradients_are_right(forbid: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    spans = torch.randn(2, 4, 4, 2, generator=generator, dtype=torch.float64)
    if forbid:
        spans[0, 0, 1, 0] = -torch.inf
    lengths = torch.tensor([4, 3])
    allowed = spans > -torch.inf

    def value(x: Tensor) -> Tensor:
        return log_partition(span_trees.RECURSION, (torch.where(allowed, x, -torch.inf),), lengths)

    leaf = spans.nan_to_num(neginf=0.0).requires_grad_()
    assert torch.autograd.gradcheck(value, leaf)
    assert torch.autograd.gradgradcheck(value, leaf)


def test_functions_are_mapped_differentiated_and_pushed_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = torch.randn(3, 2, 5, 5, 2, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 3])

    def value(x: Tensor) -> Tensor:
        return log_partition(span_trees.RECURSION, (x,), lengths)

    def total(x: Tensor) -> Tensor:
        return value(x).sum()

    torch.testing.assert_close(torch.func.vmap(value)(spans), torch.stack([value(x) for x in spans]))
    mapped = torch.func.vmap(torch.func.grad(total))(spans)
    for one, x in zip(mapped, spans, strict=True):
        torch.testing.assert_close(one, expected_parts(span_trees.RECURSION, (x,), lengths)[0])
    tangent = torch.randn(spans[0].shape, generator=generator, dtype=torch.float64)
    pushed = torch.func.jvp(value, (spans[0],), (tangent,))[1]
    torch.testing.assert_close(pushed, (mapped[0] * tangent).sum((-1, -2, -3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_scores_give_gradients_of_their_type(dtype: torch.dtype) -> None:
    for k in (1, 3):
        spans = torch.randn(3, 6, 6, k).to(dtype).requires_grad_()
        lengths = torch.tensor([6, 2, 5])
        log_z = log_partition(span_trees.RECURSION, (spans,), lengths)
        (gradient,) = torch.autograd.grad(log_z.sum(), spans)
        assert gradient.dtype == dtype
        wide = spans.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(span_trees.RECURSION.twin((wide,), lengths).sum(), wide)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-2)


def test_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probllm.math.kernels.threads.SMALL", 0.0)
    spans = torch.randn(20, 8, 8, 2, dtype=torch.float64)
    lengths = torch.randint(1, 9, (20,))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        log_z, kept = span_trees.forward((spans,), lengths, True)
        assert kept is not None
        torch.manual_seed(0)
        drawn = span_trees.draw(spans, lengths, 5)
        found.append((log_z, *span_trees.backward(kept, torch.ones(20)), span_trees.best(spans, lengths), drawn))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_widest_span_below_and_trees_of_nothing() -> None:
    assert not span_trees.are_trees(torch.zeros(3, 3, dtype=torch.bool), torch.tensor(3))
    chart = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]]) > 0
    assert span_trees.are_trees(chart, torch.tensor(3))
    assert span_trees.split_points(chart)[0].tolist() == [-1, 0, 0]
