"""The algebras: their laws, what each computes on one small sum of products, and their gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math.semirings import COUNT, EXPECTATION, LOG, MAX, SAMPLING, KMax, Semiring

SEMIRINGS: list[Semiring] = [LOG, MAX, SAMPLING, COUNT, EXPECTATION, KMax(1), KMax(3)]
each = pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: f"{type(s).__name__}{s.width}")


def values(semiring: Semiring, seed: int, *shape: int) -> Tensor:
    """Sums of two products of lifted scores, a few forbidden: values of full width."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(4, *shape, generator=generator) < 0.2, -math.inf)
    a, b, c, d = (semiring.lift(x) for x in scores)
    return semiring.plus(semiring.times(a, b), semiring.times(c, d))


@each
@given(seed=st.integers(0, 2**31))
def test_sum_and_product_have_the_laws_of_a_semiring(semiring: Semiring, seed: int) -> None:
    a, b, c = values(semiring, seed, 5), values(semiring, seed + 1, 5), values(semiring, seed + 2, 5)
    zero, one = semiring.zeros((5,), a[0]), semiring.ones((5,), a[0])
    for found, expected in (
        (semiring.plus(a, b), semiring.plus(b, a)),
        (semiring.plus(semiring.plus(a, b), c), semiring.plus(a, semiring.plus(b, c))),
        (semiring.times(semiring.times(a, b), c), semiring.times(a, semiring.times(b, c))),
        (semiring.times(a, semiring.plus(b, c)), semiring.plus(semiring.times(a, b), semiring.times(a, c))),
        (semiring.plus(a, zero), a),
        (semiring.times(a, one), a),
        (semiring.times(a, zero)[0], zero[0]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@each
@given(seed=st.integers(0, 2**31))
def test_product_of_matrices_is_the_sum_of_elementwise_products(semiring: Semiring, seed: int) -> None:
    left, right = values(semiring, seed, 2, 3, 4), values(semiring, seed + 1, 2, 4, 2)
    found = semiring.matmul(left, right)
    assert found.shape == (semiring.width, 2, 3, 2)
    for i, k in itertools.product(range(3), range(2)):
        terms = [semiring.times(left[..., i, j], right[..., j, k]) for j in range(4)]
        torch.testing.assert_close(found[..., i, k], semiring.plus(*terms))


@given(seed=st.integers(0, 2**31), k=st.integers(1, 7))
def test_k_best_values_are_the_sorted_list_and_each_has_its_own_terms(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    semiring = KMax(k)
    found = semiring.times(*(semiring.sum(semiring.lift(row), -1) for row in scores))
    every = sorted((float(a + b) for a, b in itertools.product(*scores.tolist())), reverse=True)
    every += [-math.inf] * (k - len(every))
    torch.testing.assert_close(found, torch.tensor(every[:k], dtype=torch.float64))
    seen = set()
    for value in found[: min(k, 9)]:
        (used,) = torch.autograd.grad(value, scores, retain_graph=True)
        assert used.sum(-1).tolist() == [1, 1]
        torch.testing.assert_close((used * scores).sum(), value)
        seen.add(tuple(used.flatten().tolist()))
    assert len(seen) == min(k, 9)


def test_best_of_ties_is_one_of_them() -> None:
    scores = torch.zeros(3, requires_grad=True)
    (used,) = torch.autograd.grad(MAX.sum(MAX.lift(scores), -1).sum(), scores)
    assert sorted(used.tolist()) == [0, 0, 1]


def test_drawn_terms_have_their_probabilities() -> None:
    torch.manual_seed(0)
    scores = (
        torch.tensor([0.0, math.log(3.0), -math.inf], dtype=torch.float64).expand(20000, 3).clone().requires_grad_()
    )
    (used,) = torch.autograd.grad(SAMPLING.sum(SAMPLING.lift(scores), -1).sum(), scores)
    assert bool((used.sum(-1) == 1).all())
    share = used.mean(0)
    assert share[2] == 0
    assert abs(float(share[1]) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 20000)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 1e4, 1e6]))
def test_expectation_is_the_mean_of_an_additive_function(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, f = scale * torch.randn(2, 3, generator=generator).double(), torch.randn(2, 3, generator=generator).double()
    scores[0, 0] = -math.inf
    rows = [EXPECTATION.sum(EXPECTATION.lift_with(s, g), -1) for s, g in zip(scores, f, strict=True)]
    log_z, mean = EXPECTATION.times(*rows)
    pairs = list(itertools.product(range(3), range(3)))
    total = torch.stack([scores[0, i] + scores[1, j] for i, j in pairs])
    expected = (total.softmax(0) * torch.stack([f[0, i] + f[1, j] for i, j in pairs])).sum()
    torch.testing.assert_close(log_z, total.logsumexp(0))
    torch.testing.assert_close(mean, expected)


def test_entropy_by_expectation() -> None:
    """E[-log p] = log Z - E[score]: the score itself as the additive function."""
    scores = torch.randn(6, dtype=torch.float64)
    log_z, mean = EXPECTATION.sum(EXPECTATION.lift_with(scores, scores), -1)
    torch.testing.assert_close(log_z - mean, torch.special.entr(scores.softmax(0)).sum())


def test_a_users_own_semiring_computes_what_it_says() -> None:
    class Reachable(Semiring):
        """(or, and) on 0 and 1: whether there is any structure at all."""

        def lift(self, scores: Tensor) -> Tensor:
            return (scores > -math.inf).unsqueeze(0)

        def sum(self, values: Tensor, dim: int) -> Tensor:
            return values.any(dim)

        def times(self, *values: Tensor) -> Tensor:
            return torch.stack(torch.broadcast_tensors(*values)).all(0)

    semiring = Reachable()
    table = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    lifted = semiring.lift(table)
    assert semiring.matmul(lifted, lifted)[0].tolist() == [[True, False], [False, False]]
    assert not bool(semiring.zeros((), table).any())
    assert bool(semiring.ones((), table).all())


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        KMax(0)
