"""The linear-Gaussian state-space law against the dense joint normal of its states and observations, and Pyro's own."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from probllm.distributions import LinearGaussianSSM
from tests.distributions.dense_gaussian import Case, Dense, cases, dense, given_seen, normal_law, of_rows, shared_case


@given(cases())
def test_log_prob_is_the_density_of_the_dense_marginal(case: Case) -> None:
    expected = []
    for joint, value, seen, _ in of_rows(case):
        part = Dense(joint.mean[-len(value) :][seen], joint.covariance[-len(value) :, -len(value) :][seen][:, seen])
        density = (
            MultivariateNormal(*part, validate_args=False).log_prob(value[seen])
            if bool(seen.any())
            else value.sum() * 0
        )
        expected.append(density)
    found = case.law.log_prob(case.value, case.observed)
    torch.testing.assert_close(found, torch.stack(expected).view(case.lengths.shape))
    poisoned = torch.where(case.seen, case.value, math.nan)
    assert torch.equal(case.law.log_prob(poisoned, case.observed), found)


@given(cases())
def test_posterior_is_the_conditional_of_the_dense_joint(case: Case) -> None:
    law, batch = case.law, case.lengths.shape
    posterior = law.posterior(case.value, case.observed)
    steps, d = posterior.event_shape
    moments = [given_seen(row) for row in of_rows(case)]
    real = case.present
    mean = torch.stack([m for m, _ in moments]).view(*batch, steps, d)
    full = torch.stack([c for _, c in moments]).view(*batch, steps, d, steps, d)
    torch.testing.assert_close(posterior.mean, torch.where(real, mean, 0.0))
    t = torch.arange(steps)
    own = full.movedim(-2, -3)[..., t, t, :, :] if not batch else full.transpose(-3, -2)[..., t, t, :, :]
    torch.testing.assert_close(posterior.covariance, torch.where(real.unsqueeze(-1), own, 0.0))
    next_to = full.transpose(-3, -2)[..., t[:-1], t[1:], :, :]
    torch.testing.assert_close(posterior.cross_covariance, torch.where(real[..., 1:, :, None], next_to, 0.0))
    path = torch.randn(*batch, steps, d, dtype=torch.float64)
    density, entropy = [], []
    for (m, c), row, z in zip(moments, of_rows(case), path.reshape(-1, steps * d), strict=True):
        keep = row[3]
        each = MultivariateNormal(m[keep], c[keep][:, keep], validate_args=False)
        density.append(each.log_prob(z[keep]))
        entropy.append(each.entropy())
    torch.testing.assert_close(posterior.log_prob(path), torch.stack(density).view(batch), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(posterior.entropy(), torch.stack(entropy).view(batch), rtol=1e-6, atol=1e-7)
    joint = law.log_prob_joint(path, case.value, case.observed)
    torch.testing.assert_close(joint, posterior.log_prob(path) + law.log_prob(case.value, case.observed))


@given(cases(masks=False))
def test_moments_entropy_and_divergence_are_those_of_the_dense_law(case: Case) -> None:
    batch = case.lengths.shape
    law = case.law.expand(batch)
    steps, d = case.value.shape[-2], law.state_size
    mine = dense(law, case.arguments, steps, batch).values(steps, d)
    joint = MultivariateNormal(*mine, validate_args=False)
    torch.testing.assert_close(law.mean.flatten(-2), joint.mean)
    torch.testing.assert_close(law.variance.flatten(-2), mine.covariance.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(law.entropy(), joint.entropy())
    generator = torch.Generator().manual_seed(1)
    o = case.value.shape[-1]
    arguments = (  # states of another size
        normal_law(generator, d + 1), 0.5 * torch.eye(d + 1, dtype=torch.float64), normal_law(generator, d + 1),
        torch.randn(d + 1, o, generator=generator, dtype=torch.float64), normal_law(generator, steps, o),
    )  # fmt: skip
    other = LinearGaussianSSM(*arguments)
    its = dense(other, arguments, steps, batch).values(steps, d + 1)
    expected = kl_divergence(joint, MultivariateNormal(*its, validate_args=False))
    torch.testing.assert_close(kl_divergence(law, other), expected)
    torch.testing.assert_close(law.cross_entropy(other), expected + joint.entropy())
    torch.testing.assert_close(kl_divergence(law, law), torch.zeros(law.batch_shape).double(), rtol=0, atol=1e-8)


@settings(max_examples=6)
@given(cases())
def test_samples_have_the_moments_of_the_dense_joint(case: Case) -> None:
    law, batch, n = case.law, case.lengths.shape, 20_000
    law = law.expand(batch)
    states, values = law.sample_joint((n,))
    drawn = torch.cat((states.flatten(-2), values.flatten(-2)), -1)
    posterior = law.posterior(case.value, case.observed)
    paths = posterior.sample((n,)).flatten(-2)
    steps = case.value.shape[-2]
    real = torch.arange(steps) < case.lengths.unsqueeze(-1)
    both = torch.cat([real.repeat_interleave(k, -1) for k in (law.state_size, case.value.shape[-1])], -1)
    by_row = (x.reshape(n, -1, x.shape[-1]).unbind(1) for x in (drawn, paths))
    for row, x, z, keep in zip(of_rows(case), *by_row, both.reshape(-1, both.shape[-1]), strict=True):
        assert bool((x[:, ~keep] == 0).all())
        for sample, (mean, covariance), used in ((x, row[0], keep), (z, given_seen(row), row[3])):
            c = covariance[used][:, used]
            scale = c.diagonal().sqrt()
            error = (sample[:, used].mean(0) - mean[used]) / scale
            assert float(error.abs().max()) < 6 / math.sqrt(n)  # false alarm below 1e-7 each
            spread = (sample[:, used].T.cov().view(c.shape) - c) / (scale * scale.unsqueeze(-1))
            assert float(spread.abs().max()) < 9 / math.sqrt(n)


def learnable() -> tuple[list[Tensor], Any]:
    """Parameters and the law they make."""
    torch.manual_seed(4)
    parts = [torch.randn(2), 0.5 * torch.randn(2, 2), torch.rand(2) + 0.5, torch.randn(2, 2), torch.rand(2) + 0.5]
    parts = [x.double().requires_grad_() for x in parts]

    def law(*given: Tensor) -> LinearGaussianSSM:
        start, f, noise, h, error = given
        return LinearGaussianSSM(
            dist.Normal(start, 1.0).to_event(1), f, dist.Normal(torch.zeros(2).double(), noise).to_event(1),
            h, dist.Normal(torch.zeros(2).double(), error).to_event(1), duration=4,
        )  # fmt: skip

    return parts, law


def test_reparametrised_and_score_function_gradients_are_the_exact_one() -> None:
    parts, law = learnable()
    q = law(*parts)
    weights = torch.randn(4, 2, dtype=torch.float64)
    # E[(sum w x)^2] = (w mean)^2 + variance of w x; the variance by the derivative of the density along w
    noises = [
        dist.Normal(loc, scale).to_event(1)
        for loc, scale in ((parts[0], 1.0), (0 * parts[2], parts[2]), (0 * parts[4], parts[4]))
    ]
    arguments = (noises[0], parts[1], noises[1], parts[3], noises[2])
    joint = dense(q, arguments, 4, torch.Size()).values(4, 2)
    w = weights.flatten()
    exact = torch.autograd.grad((w @ joint.mean) ** 2 + w @ joint.covariance @ w, parts)
    n = 60_000
    samples = q.rsample((n,))
    each = (samples * weights).sum((-1, -2)) ** 2
    found = torch.autograd.grad(each.mean(), parts, retain_graph=True)
    score = torch.autograd.grad((each.detach() * q.log_prob(samples.detach())).mean(), parts)
    for a, b, c in zip(exact, found, score, strict=True):
        scale = float(a.abs().max()) + float(each.detach().mean())
        assert float((a - b).abs().max()) < 0.06 * scale
        assert float((a - c).abs().max()) < 0.25 * scale


def test_gradients_of_posterior_paths_are_those_of_the_posterior_mean() -> None:
    parts, law = learnable()
    value = torch.randn(4, 2, dtype=torch.float64)
    weights = torch.randn(4, 2, dtype=torch.float64)
    posterior = law(*parts).posterior(value)
    exact = torch.autograd.grad((posterior.mean * weights).sum(), parts, retain_graph=True)
    found = torch.autograd.grad((posterior.rsample((20_000,)).mean(0) * weights).sum(), parts)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@settings(max_examples=30)
@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_paths_are_the_same_whether_or_not_they_are_differentiated(case: Case, dtype: torch.dtype) -> None:
    law, batch = case.law.expand((2, *case.lengths.shape)), case.lengths.shape
    law._dtype = dtype
    value = torch.where(case.seen, case.value, math.nan).requires_grad_()
    drawn = []
    for observed in (case.observed, case.seen):
        posterior = law.posterior(value, observed)
        for draw in (posterior.rsample, posterior.sample):
            torch.manual_seed(0)
            drawn.append(draw((3,)))
    assert [x.requires_grad for x in drawn] == [True, False, True, False]
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {}
    for found in drawn:
        assert found.shape == (3, 2, *batch, *posterior.event_shape)
        assert found.dtype == dtype
        torch.testing.assert_close(found, drawn[0], **tolerance)
    assert posterior.sample((0,)).shape == (0, *posterior.batch_shape, *posterior.event_shape)


@settings(max_examples=8)
@given(cases())
def test_derivatives_of_paths_agree_with_differences(case: Case) -> None:
    def paths(value: Tensor) -> Tensor:
        torch.manual_seed(0)
        return case.law.posterior(value, case.observed).rsample((2,))

    assert torch.autograd.gradcheck(paths, case.value.clone().requires_grad_(), fast_mode=True)
    parts, law = learnable()
    value = torch.randn(3, 4, 2, dtype=torch.float64)

    def of_parameters(*given: Tensor) -> Tensor:
        torch.manual_seed(0)
        return law(*given).posterior(value).rsample((2,))

    assert torch.autograd.gradcheck(of_parameters, tuple(parts), fast_mode=True)


def test_transforms_take_paths_through() -> None:
    law, value, observed = shared_case(steps=5, rows=3)

    def path(x: Tensor, seen: Tensor) -> Tensor:
        return law.posterior(x, seen).rsample()

    def seeded(function: Any, *given: Any) -> Any:
        torch.manual_seed(0)
        return function(*given)

    one = [seeded(path, x, seen) for x, seen in zip(value, observed, strict=True)]
    mapped = seeded(torch.func.vmap(path, randomness="same"), value, observed)
    torch.testing.assert_close(mapped, torch.stack(one))
    step = torch.randn_like(value)
    moved = seeded(torch.func.jvp, lambda x: path(x, observed), (value,), (step,))
    torch.testing.assert_close(moved[0], seeded(path, value, observed))
    torch.testing.assert_close(moved[1], seeded(path, value + step, observed) - moved[0])  # paths are linear in x


def test_every_statistic_is_differentiable_in_the_parameters() -> None:
    parts, law = learnable()
    value = torch.randn(3, 4, 2, dtype=torch.float64)

    def statistics(*given: Tensor) -> tuple[Tensor, ...]:
        q = law(*given)
        posterior = q.posterior(value)
        return q.entropy(), q.cross_entropy(law(*(x.detach() for x in parts))), posterior.entropy(), q.variance

    assert torch.autograd.gradcheck(statistics, tuple(parts), fast_mode=True)


@given(cases(masks=False))
def test_agrees_with_pyro_which_also_moves_first(case: Case) -> None:
    if not case.law.parameters.moves_first:
        return
    peer = dist.GaussianHMM(*case.arguments)
    torch.testing.assert_close(case.law.log_prob(case.value), peer.log_prob(case.value), rtol=1e-6, atol=1e-7)
    if case.value.dim() - 2 <= len(peer.batch_shape):
        last = peer.filter(case.value)
        found = case.law.filter(case.value).state
        torch.testing.assert_close(found.mean, last.mean.expand(found.mean.shape), rtol=1e-6, atol=1e-7)


def test_without_the_first_move_is_with_a_first_move_that_stands_still() -> None:
    generator = torch.Generator().manual_seed(0)
    initial, noise, error = (normal_law(generator, n) for n in (2, 2, 3))
    f, h = torch.randn(2, 2).double(), torch.randn(2, 3).double()
    value = torch.randn(5, 3).double()
    moves = torch.cat((torch.eye(2).double()[None], f.expand(4, 2, 2)))
    scale = torch.cat((torch.zeros(1, 2, 2).double(), noise.scale_tril.expand(4, 2, 2)))
    loc = torch.cat((torch.zeros(1, 2).double(), noise.mean.expand(4, 2)))
    quiet = dist.MultivariateNormal(loc, scale_tril=scale, validate_args=False)
    one = LinearGaussianSSM(initial, f, noise, h, error, moves_first=False)
    two = LinearGaussianSSM(initial, moves, quiet, h, error)
    torch.testing.assert_close(one.log_prob(value), two.log_prob(value))
    torch.testing.assert_close(one.posterior(value).mean, two.posterior(value).mean)


def test_pyro_runs_it_in_plates_with_observations_and_missing_ones() -> None:
    parts, law = learnable()
    data = law(*parts).sample((5,)).float()

    def model(x: Tensor | None = None) -> Tensor:
        f = pyro.param("f", lambda: 0.1 * torch.eye(2))
        q = LinearGaussianSSM(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), f, dist.Normal(torch.zeros(2), 1.0).to_event(1),
            torch.eye(2), dist.Normal(torch.zeros(2), 1.0).to_event(1), duration=4,
        )  # fmt: skip
        with pyro.plate("rows", 5):
            return pyro.sample("x", q, obs=x)  # type: ignore[no-any-return]

    trace = pyro.poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (5,)
    assert Predictive(model, num_samples=3)()["x"].shape == (3, 5, 4, 2)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_guide_by_paths_and_nuts_over_parameters() -> None:
    value = torch.randn(6, 1)

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        q = LinearGaussianSSM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1), 0.9 * torch.eye(1),
            dist.Normal(torch.zeros(1), scale).to_event(1), torch.eye(1), dist.Normal(torch.zeros(1), 1.0).to_event(1),
        )  # fmt: skip
        pyro.sample("x", q, obs=value)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    assert torch.isfinite(mcmc.get_samples()["scale"]).all()


def test_expanded_law_is_the_same_law() -> None:
    law, value, observed = shared_case()
    grown = law.expand((2, 6))
    assert type(grown) is LinearGaussianSSM
    assert grown.batch_shape == (2, 6)
    torch.testing.assert_close(grown.log_prob(value, observed), law.log_prob(value, observed).expand(2, 6))
    assert grown.rsample((3,)).shape == (3, 2, 6, 12, 3)
    assert grown.entropy().shape == grown.mean.shape[:2] == grown.variance.shape[:2] == (2, 6)
    assert len(set(grown.sample()[:, 0, 0, 0].tolist())) == 2
    posterior = law.posterior(value, observed).expand((2, 6))
    assert posterior.rsample((3,)).shape == (3, 2, 6, 12, 2)
    assert posterior.mean.shape == (2, 6, 12, 2)
    assert posterior.entropy().shape == (2, 6)


def test_masks_of_steps_are_masks_of_entries() -> None:
    law, value, _ = shared_case(steps=3)
    steps = torch.rand(6, 3) < 0.5
    entries = steps.unsqueeze(-1).expand(6, 3, 3)
    torch.testing.assert_close(law.log_prob(value, steps), law.log_prob(value, entries))
    torch.testing.assert_close(law.log_prob(value[:1], steps[0]), law.log_prob(value[:1], entries[:1]))


def test_narrow_numbers_come_back_narrow() -> None:
    law = LinearGaussianSSM(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.eye(2), dist.Normal(torch.zeros(2), 1.0).to_event(1),
        torch.eye(2), dist.Normal(torch.zeros(2), 1.0).to_event(1), duration=3,
    )  # fmt: skip
    value = torch.randn(3, 2)
    found = (
        law.log_prob(value),
        law.sample(),
        law.mean,
        law.entropy(),
        law.posterior(value).mean,
        law.filter(value).mean,
    )
    assert {x.dtype for x in found} == {torch.float32}


def test_states_that_are_certain_give_paths_and_no_nan() -> None:
    zero = dist.Normal(torch.zeros(2), torch.zeros(2), validate_args=False).to_event(1)
    law = LinearGaussianSSM(
        zero, torch.eye(2), zero, torch.eye(2), dist.Normal(torch.ones(2), 1.0).to_event(1), duration=3
    )
    value = torch.randn(3, 2)
    torch.testing.assert_close(law.log_prob(value), dist.Normal(1.0, 1.0).log_prob(value).sum())
    posterior = law.posterior(value)
    assert bool((posterior.rsample() == 0).all())
    assert bool((posterior.covariance == 0).all())
    assert posterior.log_prob(posterior.mean).item() == -math.inf  # there is no density
    assert posterior.entropy().item() == -math.inf
    silent = LinearGaussianSSM(zero, torch.eye(2), zero, torch.eye(2), zero, duration=3)
    assert silent.log_prob(value).item() == -math.inf
    assert silent.entropy().item() == -math.inf


def arguments(**change: Any) -> dict[str, Any]:
    unit = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    error = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return {
        "initial_dist": unit, "transition_matrix": torch.eye(2), "transition_dist": unit,
        "observation_matrix": torch.randn(2, 3), "observation_dist": error,
    } | change  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial_dist": dist.Normal(0.0, 1.0)}, TypeError, "initial_dist: expected a MultivariateNormal"),
        ({"transition_dist": torch.zeros(2)}, TypeError, "transition_dist: expected a MultivariateNormal"),
        ({"observation_dist": dist.Normal(torch.zeros(2), 1.0).to_event(1)}, ValueError, r"observation_dist: .*\[3\]"),
        ({"transition_matrix": torch.eye(3)}, ValueError, "transition_matrix: expected shape"),
        ({"transition_matrix": torch.eye(2).long()}, TypeError, "transition_matrix: expected floating-point"),
        ({"observation_matrix": [1.0]}, TypeError, "observation_matrix: expected a tensor"),
        ({"observation_matrix": torch.zeros(2)}, ValueError, "observation_matrix: expected shape"),
        ({"observation_matrix": torch.full((2, 3), math.nan)}, ValueError, "observation_matrix: .*NaN"),
        ({"transition_matrix": torch.eye(2).expand(4, 2, 2), "duration": 5}, ValueError, "number of steps"),
        ({"transition_matrix": torch.eye(2).expand(4, 1, 2, 2), "lengths": torch.ones(3).long()}, ValueError, "batch"),
        ({"lengths": torch.tensor([0]), "duration": 3}, ValueError, "lengths"),
        ({"lengths": torch.ones(1)}, TypeError, "lengths"),
        ({"duration": 0}, ValueError, "duration"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearGaussianSSM(**arguments(**change))


@pytest.mark.parametrize(
    ("value", "observed", "error", "message"),
    [
        (torch.zeros(4, 3).long(), None, TypeError, "value: expected floating-point"),
        (torch.zeros(3), None, ValueError, "value: expected shape"),
        (torch.zeros(4, 2), None, ValueError, "value: expected shape"),
        (torch.zeros(5, 3), None, ValueError, "value: expected 4 steps"),
        (torch.full((4, 3), math.nan), None, ValueError, "value: NaN"),
        (torch.zeros(4, 3), torch.ones(4), TypeError, "observed"),
        (torch.zeros(4, 3), torch.ones(3).bool(), ValueError, "observed"),
    ],
)
def test_bad_values_are_named(value: Tensor, observed: Tensor | None, error: type[Exception], message: str) -> None:
    law = LinearGaussianSSM(**arguments(duration=4))
    for ask in (law.log_prob, law.filter, law.posterior):
        with pytest.raises(error, match=message):
            ask(value, observed)


def test_what_cannot_be_asked_says_so() -> None:
    law = LinearGaussianSSM(**arguments())
    for ask in (law.sample, law.entropy, lambda: law.mean):
        with pytest.raises(ValueError, match="duration"):
            ask()
    with pytest.raises(ValueError, match="steps"):
        law.forecast(0)
    with pytest.raises(ValueError, match="lag"):
        law.fixed_lag(torch.zeros(3, 3), -1)
    with pytest.raises(ValueError, match="names among"):
        law.estimate(torch.zeros(3, 3), diagonal=("noise",))
    by_step = LinearGaussianSSM(**arguments(transition_matrix=torch.eye(2).repeat(3, 1, 1)))
    with pytest.raises(ValueError, match="shared"):
        by_step.estimate(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="more than the 3"):
        by_step.forecast(4)
    with pytest.raises(TypeError, match="q: expected LinearGaussianSSM"):
        by_step.cross_entropy(dist.Normal(0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_shape"):
        LinearGaussianSSM(**arguments(duration=2)).expand((2,)).expand((3,))
