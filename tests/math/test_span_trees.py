"""The compiled sums over binary trees against their torch twin, and where they change arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from probllm.distributions.span_tree import SpanTree
from probllm.math import span_trees
from probllm.math.kernels import span_trees as kernels
from probllm.math.kernels.lanes import from_lanes, to_lanes
from probllm.math.kernels.logarithm import logarithm
from probllm.math.recursion import expected_parts, log_partition, log_partitions
from probllm.math.semirings import MAX

SHAPES = [
    (1, 1, 1), (3, 5, 2), (9, 6, 1), (17, 3, 3), (8, 12, 2), (2, 20, 1), (40, 4, 8), (5, 7, 16), (6, 9, 4), (2, 11, 20),
    (3, 19, 8), (1, 14, 9),
]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Spans ``[B, T, T, K]`` and lengths, B beyond and below the lanes of a vector."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, size, k = draw(st.sampled_from(SHAPES))
    scale = draw(st.sampled_from([0.0, 1.0, 8.0, 40.0, 400.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.1, 0.4, 0.9]))
    spans = scale * torch.randn(rows, size, size, k, generator=generator, dtype=torch.float64)
    spans = spans + draw(st.sampled_from([0.0, -50.0, 300.0]))
    spans = spans.masked_fill(torch.rand(spans.shape, generator=generator) < share, -torch.inf)
    return spans, torch.randint(1, size + 1, (rows,), generator=generator)


@given(cases(), st.sampled_from(["unequal", "one", "half", "none"]))
def test_kernels_are_the_twin_in_value_and_gradient(case: tuple[Tensor, Tensor], weighting: str) -> None:
    spans, lengths = case
    spans = spans.clone().requires_grad_()
    weights = torch.full((len(lengths),), {"unequal": 1.0, "one": 1.0, "half": 0.5, "none": 0.0}[weighting]).double()
    if weighting == "unequal":
        weights = torch.linspace(-1, 2, len(lengths), dtype=torch.float64).round(decimals=1)
    found = []
    for log_z in (log_partition(span_trees.RECURSION, (spans,), lengths), span_trees.RECURSION.twin((spans,), lengths)):
        finite = torch.where(log_z > -torch.inf, log_z, 0.0)
        found.append((log_z.detach(), torch.autograd.grad((weights * finite).sum(), spans)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-9)
    assert bool(torch.isfinite(found[0][1]).all())
    beyond = ~span_trees.within_lengths(lengths, spans.shape[1]).unsqueeze(-1).expand_as(spans)
    assert not bool(found[0][1][beyond | (spans == -torch.inf)].any())
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
    logs, starts, ends, inner, marginals = np.empty((5, 30, 30))
    log_z = span_trees.forward((spans,), lengths, False)[0]
    expected = expected_parts(span_trees.RECURSION, (spans,), lengths)[0]
    for b, n in enumerate(lengths.tolist()):
        logs[:] = spans[b].logsumexp(-1)
        value = kernels._logs(logs, n, True, starts, ends, inner, marginals)
        assert value == pytest.approx(float(log_z[b]), rel=1e-13, abs=1e-12)
        np.testing.assert_allclose(expected[b].sum(-1).triu()[:n, :n], np.triu(marginals[:n, :n]), atol=1e-12)


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
    torch.testing.assert_close(gradient[0, ..., 0], used, rtol=3e-16, atol=0)
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


def far_below(place: str, dtype: torch.dtype) -> Tensor:
    """Spans ``[3, 9, 9, 2]`` of which one lies far from the others, in the second sentence."""
    generator = torch.Generator().manual_seed(0)
    spans = torch.randn(3, 9, 9, 2, generator=generator, dtype=torch.float64).to(dtype)
    if place == "span":  # in a scale of its own, and certain
        spans[1, 2, 5] -= 300.0
        spans[1, :2, 2:5] = spans[1, 3, 5:] = spans[1, 4:6, 6:] = spans[1, :2, 5] = -torch.inf
    elif place == "mask":  # too small for a number
        spans[1, 2, 5:] = -1e9
        spans[1, 0, 3, 1] = -1e9
    elif place == "leaf":
        spans[1, 3, 3] -= 500.0
    elif place == "masked leaf":
        spans[1, 3, 3] -= 1e8
    elif place == "rest":  # the first word's spans tell nothing of the others
        spans[1, 1:] += 1000.0
    elif place == "first":
        spans[1, 0] += 1000.0
    else:
        spans[1] += 3e4
    return spans


@pytest.mark.parametrize("place", ["span", "mask", "leaf", "masked leaf", "rest", "first", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spans_far_from_the_others_have_a_scale_of_their_own(place: str, dtype: torch.dtype) -> None:
    spans, lengths = far_below(place, dtype), torch.tensor([9, 8, 3])
    log_z, kept = span_trees.forward((spans,), lengths, True)
    assert kept is not None
    wide = spans.double().requires_grad_()
    expected = span_trees.RECURSION.twin((wide,), lengths)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    loss = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(log_z, expected.detach(), rtol=loss, atol=loss)
    torch.testing.assert_close(
        span_trees.backward(kept, torch.ones(3))[0].double(), gradient, rtol=1e-5, atol=10 * loss
    )


def test_certain_span_in_a_scale_of_its_own_has_probability_one() -> None:
    marginals = SpanTree(far_below("span", torch.float32)).marginals.sum(-1)
    assert float(marginals[1, 2, 5]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_precisions_of_log_z_send_their_gradients_back(dtype: torch.dtype) -> None:
    spans, lengths = torch.randn(3, 6, 6, 2).to(dtype).requires_grad_(), torch.tensor([6, 2, 5])
    found = log_partitions(span_trees.RECURSION, (spans,), lengths, dtype)
    assert [x.dtype for x in found] == [torch.float64, dtype]
    assert torch.equal(found[0].to(dtype), found[1])
    weights = torch.tensor([1.0, 0.0, -2.0])
    first, second, both = (
        torch.autograd.grad(total, spans, retain_graph=True)[0]
        for total in (found[0].sum(), (weights * found[1]).sum(), found[0].sum() + (weights * found[1]).sum())
    )
    (expected,) = span_trees.backward(span_trees.forward((spans,), lengths, True)[1], torch.ones(3))
    rtol = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(first, expected.to(dtype), rtol=rtol, atol=1e-7)
    torch.testing.assert_close(second, first * weights[:, None, None, None].to(dtype), rtol=rtol, atol=1e-7)
    torch.testing.assert_close(both, first + second, rtol=rtol, atol=1e-3 if rtol > 1e-3 else 1e-6)


def test_gradients_asked_for_twice_are_not_one_tensor() -> None:
    spans = torch.randn(2, 5, 5, 3, requires_grad=True)
    total = SpanTree(spans).log_partition.sum()
    (first,) = torch.autograd.grad(total, spans, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(3 * total, spans)
    torch.testing.assert_close(second, 3 * kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_scores_that_count_are_refused(bad: float) -> None:
    spans, lengths = torch.randn(10, 4, 4, 3), torch.tensor([4, 2, 3, 1, 4, 4, 2, 3, 4, 4])
    expected = SpanTree(spans, lengths)
    ignored = spans.clone()
    ignored[:, 2, 1] = ignored[1, 0, 2:] = ignored[3, 1] = bad
    law = SpanTree(ignored.requires_grad_(), lengths)
    (gradient,) = torch.autograd.grad(law.log_partition.sum(), ignored)
    torch.testing.assert_close(gradient, expected.marginals)
    assert torch.equal(law.log_partition, expected.log_partition)
    assert torch.equal(law.mode, expected.mode)
    assert law.sample().shape == (10, 4, 4)
    for row, first, last in ((0, 1, 3), (9, 2, 2), (1, 0, 1)):
        wrong = spans.clone()
        wrong[row, first, last, 1] = bad
        for name in ("log_partition", "marginals", "mode", "sample"):
            law = SpanTree(wrong, lengths)
            with pytest.raises(ValueError, match="spans: scores must not be NaN or"):
                law.sample() if name == "sample" else getattr(law, name)
        with pytest.raises(ValueError, match="spans: scores must not be NaN or"):
            torch.func.vmap(lambda x: log_partition(span_trees.RECURSION, (x,), lengths))(wrong.unsqueeze(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lanes_are_entered_and_left(dtype: type) -> None:
    @njit  # type: ignore[untyped-decorator]
    def there_and_back(x, by, table, y):  # type: ignore[no-untyped-def]
        to_lanes(x, 1, x.size // 8, 11, by, table, 16)
        from_lanes(table, 16, 11, y, 1, y.size // 8)

    x, by = np.random.default_rng(0).normal(size=(8, 20)).astype(dtype), np.arange(1.0, 9.0)
    table, y = np.zeros((22, 8)), np.zeros_like(x)
    there_and_back(x.reshape(-1), by, table.reshape(-1), y.reshape(-1))
    np.testing.assert_array_equal(table[2:13], x[:, 1:12].T * by)
    np.testing.assert_allclose(y[:, 1:12], x[:, 1:12] * by[:, None], rtol=1e-6)


def test_raised_total_under_great_sums_sends_its_row_to_logs() -> None:
    spans = torch.zeros(1, 90, 90, 1, dtype=torch.float64)
    spans[0, 0, 1:] = 30.0
    spans[0, 0, 89] = -1e5  # in every tree; what is under it would lift the least total far above the least beta
    lengths = torch.tensor([90])
    expected = span_trees.RECURSION.twin((spans,), lengths)
    torch.testing.assert_close(span_trees.forward((spans,), lengths, False)[0], expected, rtol=1e-12, atol=0)


def test_log_z_alone_is_looked_at_for_underflow_too() -> None:
    spans = torch.full((1, 5, 5, 1), -torch.inf, dtype=torch.float64)
    spans[0, range(5), range(5)] = 0.0
    spans[0, 0, 1:4], spans[0, 1, 2], spans[0, 0, 4] = -300.0, 0.0, 0.0  # 0..4 is 0..3 and 4, 0..3 is 0..2 and 3
    lengths = torch.tensor([5])
    expected = span_trees.RECURSION.twin((spans,), lengths)
    torch.testing.assert_close(span_trees.forward((spans,), lengths, False)[0], expected, rtol=1e-12, atol=0)
