"""Losses of structured laws against their definitions, by enumeration of all sequences of a small chain."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from probllm.distributions import LinearChainCRF
from probllm.objectives import perturbed_loss, sparsemap_loss, sparsemap_marginals, structured_hinge

STEPS, K = 3, 2
EVERY = torch.tensor(list(itertools.product(range(K), repeat=STEPS)))
PARTS = torch.nn.functional.one_hot(EVERY, K).double()  # [N, T, K]


def chain(seed: int, scale: float = 1.0, forbidden: float = 0.0) -> LinearChainCRF:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(2, STEPS, K, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < forbidden, -torch.inf)
    table = scale * torch.randn(K, K, generator=generator, dtype=torch.float64)
    return LinearChainCRF(scores.requires_grad_(), table.requires_grad_())


def some(seed: int) -> Tensor:
    return EVERY[torch.randint(len(EVERY), (2,), generator=torch.Generator().manual_seed(seed))]


@given(seed=st.integers(0, 2**31), cost=st.sampled_from([0.0, 0.5, 3.0]), forbidden=st.sampled_from([0.0, 0.2]))
def test_hinge_is_the_greatest_violation_of_the_margin(seed: int, cost: float, forbidden: float) -> None:
    law, value = chain(seed, forbidden=forbidden), some(seed)
    scores = law.score(EVERY.unsqueeze(1))  # [N, 2]
    difference = (PARTS.unsqueeze(1) - law.parts_of(value)).abs().flatten(2).sum(-1)
    expected = (scores + cost * difference).amax(0) - law.score(value)
    expected = torch.where(law.log_partition > -torch.inf, expected, 0.0)
    torch.testing.assert_close(structured_hinge(law, value, cost), expected)
    assert bool((structured_hinge(law, value, cost) >= -1e-12).all())


def test_hinge_is_zero_and_flat_where_the_margin_is_kept() -> None:
    law = LinearChainCRF(torch.tensor([[9.0, 0], [0, 9]]).requires_grad_(), torch.zeros(2, 2))
    value = torch.tensor([0, 1])
    loss = structured_hinge(law, value)
    loss.backward()
    assert loss.item() == 0
    assert float(law.emissions.grad.abs().max()) == 0
    wrong = structured_hinge(law, torch.tensor([1, 1]))
    assert wrong.item() == pytest.approx(9 + 2)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_sparsemap_solves_its_quadratic_problem(seed: int, scale: float) -> None:
    """Against a general solver over the probabilities of all structures, and by its optimality condition."""
    law = chain(seed, scale)
    scores = law.score(EVERY.unsqueeze(1)).detach()
    mean = sparsemap_marginals(law)
    parts = PARTS.flatten(1).numpy()
    for row in range(2):
        theta = scores[:, row].numpy()

        def loss(p: object, theta: object = theta) -> float:
            return float(0.5 * ((p @ parts) ** 2).sum() - p @ theta)  # type: ignore[operator]

        start = torch.full((len(EVERY),), 1 / len(EVERY)).numpy()
        found = minimize(
            loss, start, bounds=[(0, 1)] * len(EVERY), constraints={"type": "eq", "fun": lambda p: p.sum() - 1}
        )
        ours = mean[row].flatten()
        best = torch.where(torch.tensor(found.x > 1e-6), scores[:, row], -torch.inf)
        assert bool(best.isfinite().any())
        value = float(sparsemap_loss(law, EVERY[0].expand(2, -1))[row].detach())
        right = float(theta[0] - 0.5 * STEPS)
        assert value + right == pytest.approx(-found.fun, abs=1e-4 * (1 + abs(found.fun)))
        gain = scores[:, row] - torch.tensor(parts) @ ours  # no structure gains over those in use
        use = gain.max() - (value + right - 0.5 * float((ours**2).sum()))
        assert float(use) == pytest.approx(0, abs=1e-6 * (1 + scale))


@given(seed=st.integers(0, 2**31))
def test_sparsemap_loss_is_a_fenchel_young_loss(seed: int) -> None:
    """At least 0, and its gradient in the scores is the sparse marginals less the right parts."""
    law, value = chain(seed), some(seed)
    loss = sparsemap_loss(law, value)
    assert bool((loss >= -1e-9).all())
    (gradient,) = torch.autograd.grad(loss.sum(), law.emissions, retain_graph=True)
    torch.testing.assert_close(gradient, sparsemap_marginals(law) - law.parts_of(value), rtol=1e-6, atol=1e-8)
    assert bool((sparsemap_marginals(law).sum(-1) - 1 < 1e-9).all())


@pytest.mark.parametrize("seed", range(6))
def test_sparse_marginals_are_a_layer_with_the_derivative_of_the_solution(seed: int) -> None:
    law = chain(seed, 0.5)

    def solved(scores: Tensor, table: Tensor) -> Tensor:
        return sparsemap_marginals(LinearChainCRF(scores, table))

    scores, table = law.emissions, law.transitions
    assert torch.autograd.gradcheck(solved, (scores, table), eps=1e-7, atol=1e-5)
    slopes = torch.autograd.functional.jacobian(lambda x: solved(x, table), scores)[0, :, :, 0].reshape(2 * STEPS, -1)
    torch.testing.assert_close(slopes, slopes.T)  # of a projection onto a convex set
    assert bool((torch.linalg.eigvalsh(slopes) > -1e-9).all())
    assert 0 < int(torch.linalg.matrix_rank(slopes)) < 2 * STEPS


def test_sparsemap_is_sparse_and_handles_rows_in_which_nothing_is_allowed() -> None:
    scores = torch.tensor([[[4.0, 0], [0, 4]], [[-torch.inf, -torch.inf], [0, 0]]], dtype=torch.float64)
    law = LinearChainCRF(scores.requires_grad_(), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(sparsemap_marginals(law)[0], torch.eye(2, dtype=torch.float64))
    assert float(sparsemap_marginals(law)[1].detach().abs().max()) == 0
    (gradient,) = torch.autograd.grad(sparsemap_marginals(law).sum(), law.emissions)
    assert float(gradient.abs().max()) == pytest.approx(0.0, abs=1e-9)  # one structure alone, or none, moves nowhere
    loss = sparsemap_loss(law, torch.tensor([[0, 1], [0, 0]]))
    assert loss.tolist() == [0, 0]


def test_gradient_of_the_perturbed_loss_is_the_mean_of_perturbed_modes_less_the_right_parts() -> None:
    law, value = chain(0), some(0)
    torch.manual_seed(1)
    loss = perturbed_loss(law, value, samples=400)
    (gradient,) = torch.autograd.grad(loss.sum(), law.emissions)
    torch.manual_seed(2)
    noise = torch.randn(4000, 2, STEPS, K, dtype=torch.float64)
    modes = LinearChainCRF((law.emissions + noise).detach(), law.transitions.detach()).mode
    expected = torch.nn.functional.one_hot(modes, K).double().mean(0) - law.parts_of(value)
    assert float((gradient - expected).abs().max()) < 5 * (0.25 / 400) ** 0.5 * 1.1


@pytest.mark.parametrize(("call", "message"), [
    (lambda law, x: structured_hinge(law, x, -1.0), "cost: expected at least 0"),
    (lambda law, x: perturbed_loss(law, x, samples=0), "samples, scale"),
    (lambda law, x: perturbed_loss(law, x, scale=0.0), "samples, scale"),
    (lambda law, x: sparsemap_loss(law, x[..., :2]), "value: expected shape"),
])  # fmt: skip
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(chain(0), some(0))  # type: ignore[operator]
