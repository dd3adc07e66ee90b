"""The compiled sums over derivations, full and of low rank, against their torch twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import cfg, low_rank_cfg
from probllm.math.recursion import Recursion, expected_parts, log_partition

Case = tuple[tuple[Tensor, ...], Tensor]


def shapes(low_rank: bool, rows: int, groups: int, size: int, n: int, p: int, r: int) -> list[tuple[int, ...]]:
    m = n + p
    rules = [(groups, n, r), (groups, r, m), (1, r, m)] if low_rank else [(groups, n, m, m)]
    return [(rows, size, size, m), *rules, (1, n), (groups, n, p)]


@st.composite
def cases(draw: st.DrawFn, low_rank: bool) -> Case:
    """Parts and lengths; tables of all rows or one for each, ranges for either arithmetic, forbidden entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, size, n, p, r = draw(
        st.sampled_from([(1, 1, 1, 1, 1), (2, 3, 2, 1, 3), (3, 5, 2, 3, 2), (2, 8, 9, 2, 4), (5, 7, 5, 1, 1)])
    )
    scale = draw(st.sampled_from([0.0, 1.0, 1.0, 5.0, 30.0, 400.0, 1e5]))
    share = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    groups = draw(st.sampled_from([1, rows]))
    parts = tuple(scores(*shape) for shape in shapes(low_rank, rows, groups, size, n, p, r))
    if draw(st.booleans()):
        parts = (*parts[:-1], torch.full_like(parts[-1], -torch.inf))
    return parts, torch.randint(1, size + 1, (rows,), generator=generator)


def check_against_twin(recursion: Recursion, case: Case) -> None:
    parts, lengths = case
    parts = tuple(x.clone().requires_grad_() for x in parts)
    weights = torch.linspace(-1, 2, len(lengths), dtype=torch.float64)
    values, gradients = [], []
    for log_z in (log_partition(recursion, parts, lengths), recursion.twin(parts, lengths)):
        values.append(log_z.detach())
        total = (weights * torch.where(log_z > -torch.inf, log_z, 0.0)).sum()
        found = torch.autograd.grad(total, parts, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, parts, strict=True)])
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-9)
    greatest = max(float(x.detach().nan_to_num(neginf=0.0).abs().amax()) for x in parts)
    for mine, twin in zip(*gradients, strict=True):
        assert bool(torch.isfinite(mine).all())
        torch.testing.assert_close(mine, twin, rtol=1e-8, atol=1e-9 + 3e-12 * greatest)
    assert recursion.forward is not None
    without = recursion.forward(tuple(x.detach() for x in parts), lengths, False)[0]
    torch.testing.assert_close(without, values[0], rtol=1e-12, atol=1e-10)


@given(cases(low_rank=False))
def test_kernels_are_the_twin_in_value_and_gradient(case: Case) -> None:
    check_against_twin(cfg.RECURSION, case)


@given(cases(low_rank=True))
def test_low_rank_in_probability_space_is_the_twin_in_value_and_gradient(case: Case) -> None:
    check_against_twin(low_rank_cfg.LOW_RANK, case)


@given(cases(low_rank=True))
def test_low_rank_is_the_explicit_grammar(case: Case) -> None:
    (spans, head, left, right, root, unary), lengths = case
    rules = cfg.low_rank_rules(head, left, right)
    low = log_partition(low_rank_cfg.LOW_RANK, (spans, head, left, right, root, unary), lengths)
    full = log_partition(cfg.RECURSION, (spans, rules, root, unary), lengths)
    torch.testing.assert_close(low, full, rtol=1e-10, atol=1e-9)


def fixed(low_rank: bool, rows: int = 2, size: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    each = shapes(low_rank, rows, 1, size, 2, 2, 3)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in each)


BOTH = pytest.mark.parametrize(
    ("recursion", "low_rank"), [(cfg.RECURSION, False), (low_rank_cfg.LOW_RANK, True)], ids=["full", "low rank"]
)


def test_ordinary_scores_stay_with_the_kernels() -> None:
    """Normalised grammars with forbidden rules, words of very different probability: no row is too much for doubles."""
    generator = torch.Generator().manual_seed(0)
    n, p, rows, size = 6, 10, 5, 25
    rules = torch.randn(1, n, n + p, n + p, generator=generator).double() * 3
    rules = rules.masked_fill(torch.rand(rules.shape, generator=generator) < 0.5, -torch.inf)
    rules = rules.flatten(-2).log_softmax(-1).view(rules.shape)
    spans = torch.zeros(rows, size, size, n + p, dtype=torch.float64)
    words = (torch.randn(rows, p, size, generator=generator) * 4 - 10).double()
    spans[..., n:] = torch.diag_embed(words).movedim(1, -1)
    root = torch.full((1, n), -torch.inf, dtype=torch.float64)
    root[0, 0] = 0.0
    unary = torch.full((1, n, p), -torch.inf, dtype=torch.float64)
    lengths = torch.tensor([25, 10, 3, 2, 25])
    log_z, kept = cfg.forward((spans, rules, root, unary), lengths, True)
    assert kept is not None
    assert len(kept.parts) == 1
    torch.testing.assert_close(log_z, cfg.RECURSION.twin((spans, rules, root, unary), lengths))


@BOTH
def test_gradients_of_gradients_are_right(recursion: Recursion, low_rank: bool) -> None:
    lengths = torch.tensor([3, 2])
    parts = tuple(x.requires_grad_() for x in fixed(low_rank, size=3))

    def value(*given: Tensor) -> Tensor:
        return log_partition(recursion, given, lengths)

    assert torch.autograd.gradcheck(value, parts)
    assert torch.autograd.gradgradcheck(value, parts)


@BOTH
def test_functions_are_mapped_differentiated_and_pushed_forward(recursion: Recursion, low_rank: bool) -> None:
    parts, lengths = fixed(low_rank), torch.tensor([5, 3])
    rules = torch.stack([parts[1], parts[1] + 0.5, parts[1] * 2])

    def value(table: Tensor) -> Tensor:
        return log_partition(recursion, (parts[0], table, *parts[2:]), lengths)

    torch.testing.assert_close(torch.func.vmap(value)(rules), torch.stack([value(x) for x in rules]))
    mapped = torch.func.vmap(torch.func.grad(lambda x: value(x).sum()))(rules)
    for one, table in zip(mapped, rules, strict=True):
        whole = expected_parts(recursion, (parts[0], table, *parts[2:]), lengths)[1]
        torch.testing.assert_close(one, whole)
    tangent = torch.randn_like(parts[1])
    pushed = torch.func.jvp(value, (parts[1],), (tangent,))[1]
    torch.testing.assert_close(pushed.sum(), (mapped[0] * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_narrow_scores_give_gradients_of_their_type(recursion: Recursion, low_rank: bool, dtype: torch.dtype) -> None:
    parts = tuple(x.to(dtype).requires_grad_() for x in fixed(low_rank))
    lengths = torch.tensor([5, 2])
    found = torch.autograd.grad(log_partition(recursion, parts, lengths).sum(), parts)
    wide = tuple(x.detach().double().requires_grad_() for x in parts)
    expected = torch.autograd.grad(recursion.twin(wide, lengths).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-2)


def test_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probllm.math.kernels.threads.SMALL", 0.0)
    parts, lengths = fixed(False, rows=5, size=6), torch.tensor([6, 2, 1, 5, 6])
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        log_z, kept = cfg.forward(parts, lengths, True)
        assert kept is not None
        found.append((log_z, *cfg.backward(kept, torch.ones(5))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_backward_twice_gives_the_same() -> None:
    for low_rank, forward, backward in (
        (False, cfg.forward, cfg.backward),
        (True, low_rank_cfg.forward, low_rank_cfg.backward),
    ):
        run: Callable[..., tuple[Tensor, ...]] = backward
        kept = forward(fixed(low_rank), torch.tensor([5, 4]), True)[1]
        for one, other in zip(run(kept, torch.ones(2)), run(kept, torch.ones(2)), strict=True):
            assert torch.equal(one, other)
