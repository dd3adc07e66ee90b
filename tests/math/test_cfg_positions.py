"""Sums over derivations with spans side by side in the lanes of vectors: every shape, and scores that range too far."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import cfg, cfg_positions, cfg_scaled

Parts = tuple[Tensor, ...]
WAYS = {torch.float32: 2, torch.float64: 1}  # arithmetics before each span has a scale of its own


@st.composite
def shaped(draw: st.DrawFn) -> tuple[Parts, Tensor]:
    """Scores of ordinary range, partly forbidden, of rows that fill lanes, symbols that fill sides, or neither."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 40]))
    size, n, p = draw(st.integers(1, 26)), draw(st.integers(1, 11)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, share = draw(st.sampled_from([0.0, 1.0, 1.0, 2.0])), draw(st.sampled_from([0.0, 0.0, 0.1, 0.4]))
    # twins of large sizes take long
    rows, size = (rows, min(size, 10)) if rows > 3 else (rows, size)

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf).to(dtype)

    groups, roots = draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, rows]))
    parts = (scores(rows, size, size, n + p), scores(groups, n, n + p, n + p), scores(roots, n), scores(groups, n, p))
    if draw(st.booleans()):
        parts = (*parts[:-1], torch.full((1, n, p), -torch.inf, dtype=dtype))
    return parts, torch.randint(1, size + 1, (rows,), generator=generator)


def twin(parts: Parts, lengths: Tensor, weights: Tensor) -> tuple[Tensor, Parts]:
    """log Z and the gradient of weights * log Z by torch operations in double precision."""
    leaves = tuple(x.detach().double().requires_grad_() for x in parts)
    log_z = cfg.RECURSION.twin(leaves, lengths)
    total = (weights * torch.where(log_z > -torch.inf, log_z, 0.0)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return log_z.detach(), tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


def check(parts: Parts, lengths: Tensor, weights: Tensor) -> list[int]:
    """Compares with the twin; returns how many rows each way has done."""
    log_z, kept = cfg.forward(parts, lengths, True)
    assert kept is not None
    found = cfg.backward(kept, weights)
    expected, gradient = twin(parts, lengths, weights)
    narrow = parts[0].dtype == torch.float32
    torch.testing.assert_close(log_z, expected, rtol=3e-7 if narrow else 1e-12, atol=1e-5 if narrow else 1e-11)
    most = float(weights.abs().amax())
    for mine, other in zip(found, gradient, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(
            mine.double(), other, rtol=2e-5 if narrow else 1e-9, atol=most * (4e-6 if narrow else 1e-11)
        )
    return [int(part.done.sum()) for part in kept.parts]


@given(shaped())
def test_values_and_gradients_are_the_twins(case: tuple[Parts, Tensor]) -> None:
    parts, lengths = case
    assert sum(check(parts, lengths, torch.linspace(-1, 2, len(lengths), dtype=torch.float64))) == len(lengths)


@given(shaped())
def test_what_is_forbidden_has_no_gradient_and_what_is_allowed_has_some(case: tuple[Parts, Tensor]) -> None:
    parts, lengths = case
    log_z, kept = cfg.forward(parts, lengths, True)
    assert kept is not None
    weights = torch.ones(len(lengths), dtype=torch.float64)
    expected, gradient = twin(parts, lengths, weights)
    assert torch.equal(log_z == -torch.inf, expected == -torch.inf)
    for mine, other in zip(cfg.backward(kept, weights), gradient, strict=True):
        assert torch.equal(mine == 0, other == 0)


def ordinary(rows: int, size: int, dtype: torch.dtype, n: int = 5, p: int = 4, unary: bool = False) -> Parts:
    generator = torch.Generator().manual_seed(rows + size)
    m = n + p
    shapes = [(rows, size, size, m), (1, n, m, m), (1, n), (1, n, p)]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return (*parts[:3], parts[3] if unary else torch.full_like(parts[3], -torch.inf))


@pytest.mark.parametrize("dtype", WAYS)
@pytest.mark.parametrize("unary", [False, True])
def test_sentences_of_any_growth_stay_with_the_first_arithmetic(dtype: torch.dtype, unary: bool) -> None:
    """Scores add up to hundreds of nats above or below what any float can hold."""
    size = 45
    lengths, weights = torch.tensor([45, 17, 44]), torch.ones(3, dtype=torch.float64)
    for shift in (-5.0, 5.0) if dtype == torch.float32 else (-80.0, 80.0):
        spans, *rest = ordinary(3, size, dtype, unary=unary)
        parts = (0.2 * spans + shift, *rest)
        log_z, kept = cfg.forward(parts, lengths, True)
        assert kept is not None
        assert len(kept.parts) == 1
        expected, gradient = twin(parts, lengths, weights)
        torch.testing.assert_close(log_z, expected, rtol=1e-6, atol=0)
        for mine, other in zip(cfg.backward(kept, weights), gradient, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


TOO_FAR = {
    "span": (0, (1, 0, 3, 1), -20.0, -120.0),
    "word": (0, (1, 2, 2, 5), -25.0, -200.0),
    "rule": (1, (0, 1, 2, 3), -25.0, -200.0),
    "root": (2, (0, 2), -25.0, -200.0),
}


@pytest.mark.parametrize("dtype", WAYS)
@pytest.mark.parametrize("what", TOO_FAR)
def test_rows_that_range_too_far_go_on_and_come_back_right(dtype: torch.dtype, what: str) -> None:
    which, place, far, farther = TOO_FAR[what]
    lengths = torch.tensor([6, 6, 4])
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for value, way in ((far, 1), (farther, 2)):
        parts = tuple(x.clone() for x in ordinary(3, 6, dtype))
        parts[which][place] = value
        done = check(parts, lengths, weights)
        moved = 1 if which == 0 else 3
        expected = [0] * (WAYS[dtype] + way - 1)
        expected[0] += 3 - moved
        expected[-1] += moved
        assert done == expected


@pytest.mark.parametrize("dtype", WAYS)
def test_a_chart_that_ranges_too_far_is_given_up(dtype: torch.dtype) -> None:
    """Every score alone is in bounds; those of one end of the sentence add up."""
    size = 24
    spans, *rest = ordinary(2, size, dtype)
    spans = spans.clone()
    step = 14.0 if dtype == torch.float32 else 70.0
    for i in range(size):
        spans[1, i, i + 1 :] = step if i > size // 2 else -step
    done = check((spans, *rest), torch.tensor([size, size]), torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert done[0] == 1


@pytest.mark.parametrize(
    ("dtype", "step", "up", "size"),
    [(torch.float32, -17.0, 0.0, 6), (torch.float32, -15.0, 10.0, 4), (torch.float64, -85.0, 0.0, 6)],
)
def test_trees_far_below_others_that_no_root_allows_are_not_lost(
    dtype: torch.dtype, step: float, up: float, size: int
) -> None:
    """S -> B B and B -> p p or B p, each at little more than the least score, beside A -> A A and A -> p p."""
    s, a, b, p = range(4)
    spans, rules = torch.zeros(1, size, size, 4, dtype=dtype), torch.full((1, 3, 4, 4), -torch.inf, dtype=dtype)
    spans[..., [s, b]], spans[..., a] = step, up
    rules[0, a, a, a] = rules[0, a, p, p] = 0.0
    rules[0, s, b, b] = rules[0, b, p, p] = rules[0, b, b, p] = step
    root = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=dtype)
    parts = (spans, rules, root, torch.full((1, 3, 1), -torch.inf, dtype=dtype))
    check(parts, torch.tensor([size]), torch.ones(1, dtype=torch.float64))
    trees = {4: 1, 6: 3}[size]
    assert float(cfg.forward(parts, torch.tensor([size]), False)[0]) == pytest.approx(
        2 * (size - 1) * step + math.log(trees)
    )


@pytest.mark.parametrize("most", [1e-40, 1e40])
def test_weights_may_be_as_small_and_as_large_as_doubles_are(most: float) -> None:
    parts, lengths = ordinary(3, 9, torch.float32), torch.tensor([9, 8, 3])
    kept = cfg.forward(parts, lengths, True)[1]
    assert kept is not None
    weights = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    for mine, other in zip(cfg.backward(kept, weights * most), cfg.backward(kept, weights), strict=True):
        if most < 1:
            assert bool(torch.isfinite(mine).all())
        else:
            assert torch.equal(torch.isinf(mine), other.abs() * most > torch.finfo(torch.float32).max)


@pytest.mark.parametrize("dtype", WAYS)
def test_what_lies_behind_a_sentence_does_not_matter(dtype: torch.dtype) -> None:
    parts, lengths = ordinary(3, 20, dtype, unary=True), torch.tensor([20, 7, 1])
    weights = torch.ones(3, dtype=torch.float64)
    place = torch.arange(20)
    inside = (place < lengths.unsqueeze(-1)).unsqueeze(1) & (place.unsqueeze(-1) <= place)
    noisy = (torch.where(inside.unsqueeze(-1), parts[0], 3.0), *parts[1:])
    found = []
    for given_parts in (parts, noisy):
        log_z, kept = cfg.forward(given_parts, lengths, True)
        assert kept is not None
        found.append((log_z, *cfg.backward(kept, weights)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert bool((found[0][1].masked_fill(inside.unsqueeze(-1), 0.0) == 0).all())


def test_both_ways_of_doubles_agree() -> None:
    parts, lengths = ordinary(4, 30, torch.float64, n=8, p=3, unary=True), torch.tensor([30, 29, 9, 2])
    weights = torch.linspace(-1, 1, 4, dtype=torch.float64)
    log_z, flags, kept = cfg_positions.forward(cfg_positions.DOUBLE, parts, lengths, True)
    other, scaled = cfg_scaled.forward(parts, lengths, True)
    assert kept is not None
    assert scaled is not None
    assert not flags.any()
    torch.testing.assert_close(log_z, other, rtol=1e-13, atol=0)
    both = (cfg_positions.backward(kept, weights), cfg_scaled.backward(scaled, weights))
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
