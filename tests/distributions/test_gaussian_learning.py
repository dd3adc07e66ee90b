"""EM of the linear-Gaussian law: it climbs, it stops where the gradient is zero, and its statistics are Fisher's."""

from __future__ import annotations

import pytest
import torch

from probllm.distributions import LinearGaussianSSM
from probllm.math.gaussian_em import RegressionPrior
from tests.distributions.dense_gaussian import normal_law, shared_case


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("diagonal", [(), ("transition", "observation", "initial")])
def test_no_iteration_of_em_lowers_the_objective(first: bool, with_prior: bool, diagonal: tuple[str, ...]) -> None:
    _, value, observed = shared_case()
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(1, 13, (6,), generator=generator)
    start = LinearGaussianSSM(
        normal_law(generator, 2), torch.eye(2).double(), normal_law(generator, 2),
        torch.randn(2, 3, generator=generator).double(), normal_law(generator, 3, diagonal=True),
        lengths=lengths, moves_first=first,
    )  # fmt: skip
    prior = None
    if with_prior:
        prior = {
            name: RegressionPrior(torch.zeros(p, q).double(), 0.5 * torch.eye(p).double(), torch.eye(q).double(), 4.0)
            for name, p, q in (("initial", 1, 2), ("transition", 3, 2), ("observation", 3, 3))
        }
    fitted, history = start.estimate(value, observed, iterations=12, tolerance=0.0, prior=prior, diagonal=diagonal)
    gains = torch.tensor(history).double().diff()
    assert len(history) == 12
    assert bool((gains > -1e-8 * abs(history[-1])).all()), gains
    assert history[-1] > history[0] + 1
    if diagonal:
        assert torch.equal(
            fitted.parameters.noise, torch.diag_embed(fitted.parameters.noise.diagonal(dim1=-2, dim2=-1))
        )


def test_em_stands_still_where_the_gradient_is_zero() -> None:
    law, value, observed = shared_case(steps=20, rows=40)
    fitted, _ = law.estimate(value, observed, iterations=400, tolerance=0.0)
    p = fitted.parameters
    names = ("transition", "drift", "noise", "emission", "offset", "error")
    parts = [getattr(p, name).clone().requires_grad_() for name in names]
    again = fitted._of(p._replace(**dict(zip(names, parts, strict=True))), 20, None)
    before = [getattr(law.parameters, name).clone().requires_grad_() for name in names]
    at_start = law._of(law.parameters._replace(**dict(zip(names, before, strict=True))), 20, None)
    slopes, first = (
        torch.autograd.grad(q.log_prob(value, observed).sum(), x) for q, x in ((again, parts), (at_start, before))
    )
    assert max(float(x.abs().max()) for x in slopes) < 0.1 * max(float(x.abs().max()) for x in first)


def test_expected_statistics_are_the_gradient_of_the_density() -> None:
    """Fisher's identity: the gradient of log p(x) is the expected one of log p(z, x)."""
    law, value, observed = shared_case(steps=5, rows=3)
    found = law.expected_statistics(value, observed)
    p = law.parameters
    (w, noise), (v, error) = law._regressions()
    moves = w.clone().requires_grad_()
    sight = v.clone().requires_grad_()
    again = law._of(
        p._replace(
            transition=moves[None, :-1], drift=moves[None, -1], emission=sight[None, :-1], offset=sight[None, -1]
        ), 5, None,
    )  # fmt: skip
    slopes = torch.autograd.grad(again.log_prob(value, observed).sum(), (moves, sight))
    for slope, part, coefficients, covariance in zip(slopes, found[1:], (w, v), (noise, error), strict=True):
        torch.testing.assert_close(slope, (part.cross - part.inputs @ coefficients) @ covariance.inverse())
