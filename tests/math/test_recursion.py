"""A compiled recursion as a function: value and derivatives of every kind are those of its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math.recursion import Recursion, expected_parts, log_partition
from probllm.math.semirings import Semiring


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Sequences of independent choices: scores [T, K], and a bias [K] for every step."""
    scores, bias = parts
    total = semiring.ones(lengths.shape, scores[0, ..., 0, 0])
    for t in range(scores.shape[-2]):
        step = semiring.times(total, semiring.sum(semiring.times(scores[..., t, :], bias), -1))
        total = torch.where(t < lengths, step, total)
    return total


calls: list[str] = []


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, Any]:
    calls.append("forward")
    both = (scores[0] + scores[1].unsqueeze(1)).double()
    real = torch.arange(both.shape[1]) < lengths.unsqueeze(-1)
    log_z = torch.where(real, both.logsumexp(-1), 0.0).sum(-1)
    return log_z, (both.softmax(-1).nan_to_num(0.0) * real.unsqueeze(-1), scores, log_z) if keep else None


def backward(kept: Any, weights: Tensor) -> tuple[Tensor, ...]:
    calls.append("backward")
    expected, scores, log_z = kept
    found = expected * torch.where(log_z > -torch.inf, weights.double(), 0.0).view(-1, 1, 1)
    bias = found.sum(1)
    return found, bias if scores[1].shape[0] == bias.shape[0] else bias.sum(0, keepdim=True)


COMPILED, TWIN = Recursion(inside, forward, backward), Recursion(inside)


def example(seed: int, rows: int, shared: bool, forbidden: float = 0.0) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, 3, 2, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < forbidden, -torch.inf)
    bias = torch.randn(1 if shared else rows, 2, generator=generator, dtype=torch.float64)
    return (scores, bias), torch.randint(1, 4, (rows,), generator=generator)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), shared=st.booleans(), forbidden=st.sampled_from([0.0, 0.3]))
def test_value_gradient_and_expected_parts_are_the_twins(seed: int, rows: int, shared: bool, forbidden: float) -> None:
    scores, lengths = example(seed, rows, shared, forbidden)
    found = []
    for recursion in (COMPILED, TWIN):
        leaves = tuple(x.clone().requires_grad_() for x in scores)
        log_z = log_partition(recursion, leaves, lengths)
        total = torch.where(log_z > -torch.inf, log_z, 0.0) * torch.arange(1.0, rows + 1)
        found.append((log_z, *torch.autograd.grad(total.sum(), leaves), *expected_parts(recursion, scores, lengths)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_every_kind_hold(shared: bool) -> None:
    scores, lengths = example(0, 3, shared)
    leaves = tuple(x.clone().requires_grad_() for x in scores)

    def function(*given: Tensor) -> Tensor:
        return log_partition(COMPILED, given, lengths)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)

    def expected(*given: Tensor) -> tuple[Tensor, ...]:
        return expected_parts(COMPILED, given, lengths)

    assert torch.autograd.gradcheck(expected, leaves, check_forward_ad=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 1), (1, 0)])
def test_vmap_and_grad_are_a_loop(shared: bool, in_dims: tuple[int | None, ...]) -> None:
    both = [example(seed, 3, shared)[0] for seed in range(4)]
    lengths = torch.tensor([3, 1, 2])

    def function(*given: Tensor) -> Tensor:
        return log_partition(COMPILED, given, lengths)

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.func.grad(lambda *x: (function(*x) ** 2).sum(), argnums=(0, 1))(*given)
        return found

    stacked = tuple(
        parts[0] if d is None else torch.stack(parts, d)
        for d, parts in zip(in_dims, zip(*both, strict=True), strict=True)
    )
    loop = [tuple(x if d is None else x.select(d, i) for d, x in zip(in_dims, stacked, strict=True)) for i in range(4)]
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), torch.stack([function(*x) for x in loop]))
    found = torch.func.vmap(gradient, in_dims)(*stacked)
    for a, b in zip(found, zip(*(gradient(*x) for x in loop), strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    hessian = torch.func.vmap(torch.func.hessian(function), in_dims)(*stacked)
    torch.testing.assert_close(hessian, torch.stack([torch.func.hessian(function)(*x) for x in loop]))
    assert "backward" in calls


def test_first_derivatives_run_the_kernels_once() -> None:
    scores, lengths = example(1, 3, True)
    leaves = tuple(x.clone().requires_grad_() for x in scores)
    calls.clear()
    log_partition(COMPILED, leaves, lengths).sum().backward()
    assert calls == ["forward", "backward"]
