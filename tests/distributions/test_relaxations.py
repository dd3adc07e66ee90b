"""Relaxed samples: points of the marginal polytope, whole structures when cold, with a gradient."""

from __future__ import annotations

import torch

from probllm.distributions import LinearChainCRF
from probllm.distributions.relaxations import perturb_and_map, relaxed_sample, straight_through_sample


def law() -> LinearChainCRF:
    torch.manual_seed(0)
    return LinearChainCRF(
        torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 3, dtype=torch.float64)
    )


def test_relaxed_samples_are_marginals_and_become_structures_when_cold() -> None:
    chain = law()
    soft = relaxed_sample(chain, 1.0, (5,))
    assert soft.shape == (5, 2, 4, 3)
    torch.testing.assert_close(soft.sum(-1), torch.ones(5, 2, 4, dtype=torch.float64))
    torch.manual_seed(3)
    cold = relaxed_sample(chain, 1e-6, (50,))
    torch.manual_seed(3)
    hard = chain.parts_of(perturb_and_map(chain, (50,)))
    torch.testing.assert_close(cold, hard, atol=1e-6, rtol=0)
    assert len(hard.unique(dim=0)) > 3


def test_straight_through_has_hard_values_and_the_gradient_of_the_relaxed_ones() -> None:
    chain = law()
    weights = torch.randn(4, 3, dtype=torch.float64)
    found = []
    for sample in (straight_through_sample, lambda law, t, n: relaxed_sample(law, t, n)):
        torch.manual_seed(1)
        value = sample(chain, 0.7, (3,))
        found.append(torch.autograd.grad((value * weights).sum(), chain.emissions)[0])
    torch.testing.assert_close(*found)
    hard = straight_through_sample(chain, 0.7, (3,)).detach()
    torch.testing.assert_close(hard, hard.round())
    assert float(found[0].abs().max()) > 0


def test_with_one_step_the_perturbed_mode_is_an_exact_sample() -> None:
    """One step is the Gumbel-max trick itself, so its frequencies are the law's."""
    chain = LinearChainCRF(torch.tensor([[0.0, 1.0, 2.0]]), torch.zeros(3, 3))
    torch.manual_seed(0)
    drawn = perturb_and_map(chain, (20000,))
    share = torch.bincount(drawn.flatten(), minlength=3) / 20000
    torch.testing.assert_close(share, chain.marginals[0], atol=0.02, rtol=0)


def test_parts_of_a_structure_are_its_indicator_and_respect_padding() -> None:
    chain = LinearChainCRF(torch.zeros(2, 3, 2), torch.zeros(2, 2), lengths=torch.tensor([3, 1]))
    found = chain.parts_of(torch.tensor([1, 0, 1]))
    assert found.tolist() == [[[0, 1], [1, 0], [0, 1]], [[0, 1], [0, 0], [0, 0]]]
    nothing = LinearChainCRF(torch.full((3, 2), -torch.inf), torch.zeros(2, 2))
    assert float(nothing.parts_of(nothing.mode).abs().sum()) == 0
