"""Normal-inverse-Wishart laws in four shapes, against the definitions in plain probability densities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Gamma, MultivariateNormal, Wishart

from probllm.math.conjugate import COVARIANCES, Covariance, NormalWishart, moments

each = pytest.mark.parametrize("covariance", COVARIANCES)


def prior(covariance: Covariance, k: int, d: int, seed: int) -> NormalWishart:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    full = root @ root.mT + torch.eye(d, dtype=torch.float64)
    scale = {
        "full": full, "tied": full[0], "diag": full.diagonal(dim1=-2, dim2=-1), "spherical": full[:, 0, 0],
    }[covariance]  # fmt: skip
    dof = d + 0.5 + torch.rand(() if covariance == "tied" else (k,), generator=generator, dtype=torch.float64)
    mean = torch.randn(k, d, generator=generator, dtype=torch.float64)
    return NormalWishart(covariance, mean, 0.2 + torch.rand(k, generator=generator, dtype=torch.float64), scale, dof)


def dense(covariance: Covariance, matrix: Tensor, k: int, d: int) -> Tensor:
    """The covariance ``[K, D, D]`` of any shape."""
    if covariance == "diag":
        return torch.diag_embed(matrix)
    if covariance == "spherical":
        return torch.diag_embed(matrix.unsqueeze(-1).expand(k, d))
    return matrix.expand(k, d, d)


def draw(law: NormalWishart, n: int) -> tuple[Tensor, Tensor]:
    """Means ``[n, K, D]`` and precisions ``[n, K, D, D]`` by torch's own Wishart and Gamma laws."""
    k, d = law.mean.shape
    if law.covariance in ("full", "tied"):
        precision = Wishart(law.dof, precision_matrix=law.scale).sample((n,)).reshape(n, -1, d, d).expand(n, k, d, d)
    else:
        dof = law.dof.unsqueeze(-1).expand_as(law.scale) if law.covariance == "diag" else law.dof
        each = Gamma(dof / 2, law.scale / 2).sample((n,))
        precision = dense(law.covariance, each.reshape(-1, *each.shape[2:]), n * k, d).reshape(n, k, d, d)
    mean = MultivariateNormal(law.mean, precision_matrix=law.strength[:, None, None] * precision).sample()
    return mean, precision


@each
def test_expected_log_density_is_the_mean_over_draws(covariance: Covariance) -> None:
    torch.manual_seed(0)
    law, x = (
        prior(covariance, 2, 2, 0)._replace(
            dof=torch.full((), 9.0).expand(() if covariance == "tied" else (2,)).double()
        ),
        torch.randn(3, 2).double(),
    )
    mean, precision = draw(law, 40000)
    log = MultivariateNormal(mean, precision_matrix=precision).log_prob(x[:, None, None]).mean(1)
    torch.testing.assert_close(law.expected_log_density(x), log, atol=0.1, rtol=0.05)


@each
@given(seed=st.integers(0, 2**31), n=st.integers(1, 6))
def test_evidence_of_all_is_the_product_of_the_evidence_of_each_given_those_before(
    covariance: Covariance, seed: int, n: int
) -> None:
    """The chain rule, with the predictive of one observation; and any order of the data gives one posterior."""
    generator = torch.Generator().manual_seed(seed)
    law, d = prior(covariance, 2, 2, seed), 2
    x = 2 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    weights = torch.nn.functional.one_hot(torch.randint(2, (n,), generator=generator), 2).double()
    whole = moments(x, weights, covariance)
    posterior, total = law, torch.zeros((), dtype=torch.float64)
    for i in range(n):
        data = moments(x[i : i + 1], weights[i : i + 1], covariance)
        after = posterior.updated(data)
        total = total + after.log_evidence_from(posterior, data.total)
        posterior = after
    once = law.updated(whole)
    for found, expected in zip(once[1:], posterior[1:], strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(once.log_evidence_from(law, whole.total), total)


def test_evidence_of_one_number_is_students_t() -> None:
    law = NormalWishart("full", *(torch.tensor(x).double() for x in ([[0.5]], [2.0], [[[3.0]]], [4.0])))
    x = torch.tensor([[1.7]]).double()
    data = moments(x, torch.ones(1, 1).double(), "full")
    scale = math.sqrt(3.0 / 4.0 * (1 + 1 / 2.0))
    expected = torch.distributions.StudentT(4.0, 0.5, scale).log_prob(x[0, 0])
    torch.testing.assert_close(
        law.updated(data).log_evidence_from(law, data.total), expected.double(), rtol=1e-6, atol=0
    )


@each
@given(seed=st.integers(0, 2**31))
def test_expected_log_likelihood_of_statistics_is_the_weighted_sum(covariance: Covariance, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    law = prior(covariance, 3, 2, seed)
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    found = law.expected_log_likelihood(moments(x, weights, covariance))
    torch.testing.assert_close(found, (weights * law.expected_log_density(x)).sum())


@each
@given(seed=st.integers(0, 2**31))
def test_mode_is_where_the_density_is_highest(covariance: Covariance, seed: int) -> None:
    law = prior(covariance, 2, 2, seed)
    mean, matrix = (x.clone().requires_grad_() for x in law.mode())
    gradients = torch.autograd.grad(law.log_density(mean, matrix), (mean, matrix))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-8, rtol=0)


@each
def test_density_is_that_of_torchs_own_laws_up_to_a_constant(covariance: Covariance) -> None:
    law = prior(covariance, 2, 2, 1)
    k, d = law.mean.shape
    found, expected = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(k, d, generator=generator, dtype=torch.float64)
        matrix = prior(covariance, k, d, seed + 10).scale
        whole = dense(covariance, matrix, k, d)
        total = MultivariateNormal(law.mean, whole / law.strength[:, None, None]).log_prob(mean).sum()
        if covariance in ("full", "tied"):
            precision = torch.linalg.inv(matrix)
            wishart = Wishart(law.dof, precision_matrix=law.scale).log_prob(precision)
            total = total + (wishart - (d + 1) * torch.logdet(matrix)).sum()  # of the inverse, by its Jacobian
        else:
            dof = law.dof.unsqueeze(-1).expand_as(law.scale) if covariance == "diag" else law.dof
            gamma = Gamma(dof / 2, law.scale / 2).log_prob(1 / matrix)
            total = total + (gamma - 2 * matrix.log()).sum()
        found.append(law.log_density(mean, matrix))
        expected.append(total)
    difference = torch.stack(found) - torch.stack(expected)
    torch.testing.assert_close(difference, difference[:1].expand(4), atol=1e-8, rtol=1e-8)
