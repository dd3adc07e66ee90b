"""Hidden Markov models of series: the battery of a model, learning that never gets worse, and the edges of the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from probllm.data import Dataset
from probllm.math.conjugate import COVARIANCES, Covariance
from probllm.models import (
    HMM,
    CategoricalEmissions,
    Emissions,
    GaussianEmissions,
    MixtureEmissions,
    PoissonEmissions,
)
from probllm.models.hmm_learning import matched
from tests.models import battery

FAMILIES: dict[str, Callable[[], Emissions]] = {
    "categorical": lambda: CategoricalEmissions(3, 4),
    "poisson": lambda: PoissonEmissions(3),
    **{kind: (lambda kind=kind: GaussianEmissions(3, 2, kind)) for kind in COVARIANCES},  # type: ignore[misc]
    "mixture": lambda: MixtureEmissions(2, 2, 2),
    "tied mixture": lambda: MixtureEmissions(2, 2, 2, "tied"),
}
CONJUGATE = [name for name in FAMILIES if "mixture" not in name]


def series(name: str, seed: int, rows: int = 4, steps: int = 12) -> Dataset:
    """Series of unequal length with two regimes."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(rows):
        n = int(torch.randint(1, steps + 1, (), generator=generator))
        regime = (torch.rand(n, generator=generator) < 0.3).long().cumsum(0) % 2
        if name == "categorical":
            x = (2 * regime + torch.randint(0, 2, (n,), generator=generator)).clamp_max(3)
        elif name == "poisson":
            x = torch.poisson(1.0 + 9.0 * regime, generator=generator)
        else:
            x = 3.0 * regime.unsqueeze(-1) + torch.randn(n, 2, generator=generator) @ torch.tensor(
                [[1.0, 0], [0.7, 0.3]]
            )
        examples.append({"inputs": x})
    return Dataset(examples)


def batch_of(name: str) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = Dataset.collate(series(name, 0).examples)  # type: ignore[assignment]
    return batch


CASES = [
    battery.Case(name, lambda name=name: HMM(FAMILIES[name]()), batch_of(name), target="inputs")  # type: ignore[misc]
    for name in ("categorical", "full", "diag", "mixture")
]


# an HMM predicts states, not what it was trained on
CHECKS = [check for check in battery.CHECKS if "predict_has_the_shape" not in check.__name__]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: battery.Case, check: Callable[[battery.Case], None]) -> None:
    check(case)


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 2**31), missing=st.sampled_from([0.0, 0.3]))
@settings(max_examples=8)
def test_em_never_lowers_the_posterior_density(name: str, seed: int, missing: float) -> None:
    data = series(name, seed)
    generator = torch.Generator().manual_seed(seed)
    if missing:
        data = Dataset(
            {**example, "observed": torch.rand(len(example["inputs"]), generator=generator) > missing}  # type: ignore[arg-type]
            for example in data
        )
        if not any(bool(example["observed"].any()) for example in data):  # type: ignore[union-attr]
            return
    torch.manual_seed(seed % 1000)
    model = HMM(FAMILIES[name]())
    history = model.estimate(data, iterations=15, tolerance=0.0, seed=seed % 1000)
    losses = torch.tensor([row["penalised_loss"] for row in history], dtype=torch.float64)
    assert bool((losses[1:] <= losses[:-1] + 1e-8 * losses[:-1].abs() + 1e-8).all()), losses
    assert all(bool(torch.isfinite(x).all()) for x in model.parameters())


@pytest.mark.parametrize("name", CONJUGATE)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8)
def test_variational_bayes_never_lowers_its_bound(name: str, seed: int) -> None:
    model = HMM(FAMILIES[name]())
    history = model.estimate(series(name, seed), "variational", iterations=15, tolerance=0.0, seed=seed % 1000)
    losses = torch.tensor([row["loss"] for row in history], dtype=torch.float64)
    assert bool((losses[1:] <= losses[:-1] + 1e-8 * losses[:-1].abs() + 1e-8).all()), losses


def test_bound_is_below_the_evidence_and_near_it_for_one_state() -> None:
    """With one state there is nothing hidden: the bound is the exact evidence of the conjugate model."""
    data = series("full", 1)
    for name, emissions in (("full", GaussianEmissions(1, 2)), ("diag", GaussianEmissions(1, 2, "diag"))):
        model = HMM(emissions)
        history = model.estimate(data, "variational", iterations=3)
        x = torch.cat([example["inputs"] for example in data]).double()  # type: ignore[misc]
        family = emissions.double()
        sums = family.statistics(x, torch.ones(len(x), 1, dtype=torch.float64))
        about = family.prior()._replace(mean=torch.zeros(1, 2, dtype=torch.float64))
        evidence = family._posterior(sums).log_evidence_from(about, sums[0])
        assert -history[-1]["loss"] * len(data) == pytest.approx(float(evidence.detach()), rel=1e-6), name


def test_expected_statistics_are_those_of_all_paths() -> None:
    """One EM step of a tiny model, by enumeration of its state sequences."""
    torch.manual_seed(0)
    model = HMM(GaussianEmissions(2, 1, "diag"))
    x = torch.tensor([[0.1], [2.0], [1.5]])
    log = []
    paths = list(itertools.product(range(2), repeat=3))
    initial, transition = model.initial.log_softmax(-1), model.transition.log_softmax(-1)
    density = model.emissions.log_prob(x)
    for path in paths:
        steps = sum(transition[a, b] for a, b in itertools.pairwise(path))
        log.append(initial[path[0]] + steps + sum(density[t, z] for t, z in enumerate(path)))
    p = torch.stack(log).softmax(0)
    gamma = torch.zeros(3, 2)
    for weight, path in zip(p, paths, strict=True):
        for t, z in enumerate(path):
            gamma[t, z] += weight.detach()
    torch.testing.assert_close(model.marginals({"inputs": x[None]})[0], gamma)
    torch.testing.assert_close(model.log_prob({"inputs": x[None]})[0], torch.stack(log).logsumexp(0))


def test_missing_steps_are_summed_out() -> None:
    torch.manual_seed(0)
    model = HMM(CategoricalEmissions(2, 3))
    x, observed = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[True, False, True, True]])
    whole = [model.log_prob({"inputs": torch.tensor([[0, v, 2, 0]])}) for v in range(3)]
    torch.testing.assert_close(model.log_prob({"inputs": x, "observed": observed}), torch.stack(whole).logsumexp(0))


def test_learning_finds_the_states_that_made_the_data() -> None:
    torch.manual_seed(0)
    states = torch.randint(0, 3, (40, 60)).sort(-1).values
    centers = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    x = centers[states] + torch.randn(40, 60, 2)
    data = Dataset({"inputs": row} for row in x)
    model = HMM(GaussianEmissions(3, 2))
    model.estimate(data, restarts=3)
    found = model.predict({"inputs": x}).flatten()
    one_hot = torch.nn.functional.one_hot
    order = matched(one_hot(states.flatten(), 3).double(), one_hot(found, 3).double())
    model.permute(order)
    agreement = (model.predict({"inputs": x}) == states).float().mean()
    assert agreement > 0.99
    assert len(model.restarts) == 3
    assert max(row["agreement"] for row in model.restarts) == 1
    torch.testing.assert_close(model.emissions.mean.detach(), centers, atol=0.2, rtol=0)  # type: ignore[union-attr]


def test_more_states_than_the_data_needs_leave_no_nan() -> None:
    """States that go empty keep the prior's parameters, where other libraries end in NaN."""
    data = Dataset([{"inputs": torch.zeros(5, 2)}, {"inputs": torch.ones(1, 2)}])
    for kind in COVARIANCES:
        model = HMM(GaussianEmissions(6, 2, kind))
        for method in ("em", "variational", "stochastic"):
            history = model.estimate(data, method, iterations=20)  # type: ignore[arg-type]
            assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history)
            assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), (kind, method)
            assert bool(torch.isfinite(model.log_prob({"inputs": torch.randn(2, 4, 2)})).all())


def test_a_symbol_that_was_never_seen_keeps_a_probability() -> None:
    model = HMM(CategoricalEmissions(2, 5))
    model.estimate(Dataset([{"inputs": torch.tensor([0, 1, 0, 1])}]))
    assert bool(torch.isfinite(model.log_prob({"inputs": torch.tensor([[4, 4, 4]])})).all())


def test_stochastic_em_comes_near_em() -> None:
    torch.manual_seed(0)
    regime = (torch.rand(200, 30) < 0.2).long().cumsum(-1) % 2
    x = 4.0 * regime.unsqueeze(-1) + torch.randn(200, 30, 2)
    data = Dataset({"inputs": row} for row in x)
    losses = {}
    for method in ("em", "stochastic"):
        model = HMM(GaussianEmissions(2, 2, "diag"))
        model.estimate(data, method, iterations=20 if method == "em" else 5)  # type: ignore[arg-type]
        losses[method] = model.information_criteria(data)["log_likelihood"] / x.shape[:2].numel()
    assert losses["stochastic"] > losses["em"] - 0.01


def test_information_criteria_prefer_the_number_of_states_that_made_the_data() -> None:
    torch.manual_seed(1)
    regime = (torch.rand(60, 40) < 0.2).long().cumsum(-1) % 2
    x = torch.poisson(1.0 + 7.0 * regime)
    data = Dataset({"inputs": row} for row in x)
    found = {}
    for k in (1, 2, 4):
        model = HMM(PoissonEmissions(k))
        model.estimate(data, restarts=2)
        found[k] = model.information_criteria(data)
        n = x.numel()
        free = (k - 1) + k * (k - 1) + k
        assert model.num_free() == free
        assert found[k]["aic"] == pytest.approx(2 * free - 2 * found[k]["log_likelihood"])
        assert found[k]["bic"] == pytest.approx(
            free * float(torch.tensor(float(n)).log()) - 2 * found[k]["log_likelihood"]
        )
    assert min(found, key=lambda k: found[k]["bic"]) == 2


@pytest.mark.parametrize("name", CONJUGATE)
def test_program_with_priors_runs_under_an_automatic_guide(name: str) -> None:
    pyro.set_rng_seed(0)
    model = HMM(FAMILIES[name]())
    batch = batch_of(name)
    guide = AutoNormal(model.joint)
    svi = SVI(model.joint, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(batch) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_nuts_recovers_the_rates_of_two_states() -> None:
    pyro.set_rng_seed(0)
    regime = (torch.rand(6, 30) < 0.2).long().cumsum(-1) % 2
    x = torch.poisson(1.0 + 9.0 * regime)
    model = HMM(PoissonEmissions(2))
    mcmc = MCMC(NUTS(model.joint, jit_compile=False), num_samples=30, warmup_steps=30, disable_progbar=True)
    mcmc.run({"inputs": x})
    rates = mcmc.get_samples()["rate"].sort(-1).values.mean(0)
    assert abs(float(rates[0]) - 1) < 0.5
    assert abs(float(rates[1]) - 10) < 2


@pytest.mark.parametrize("kind", COVARIANCES)
def test_sites_have_the_laws_of_the_conjugate_prior(kind: Covariance) -> None:
    """The mean precision and the spread of the means, over draws of the program's prior."""
    torch.manual_seed(0)
    emissions = GaussianEmissions(2, 2, kind, strength=0.5, dof=6.0, scale=1.0).double()
    laws = [emissions.sites() for _ in range(3000)]
    dense = [
        law.precision_matrix if kind in ("full", "tied") else torch.diag_embed(law.base_dist.scale**-2) for law in laws
    ]
    prior = emissions.prior()
    scale, dof = prior.scale, prior.dof
    mean = {
        "full": lambda: dof[:, None, None] * torch.linalg.inv(scale),
        "tied": lambda: (dof * torch.linalg.inv(scale)).expand(2, 2, 2),
        "diag": lambda: torch.diag_embed(dof.unsqueeze(-1) / scale),
        "spherical": lambda: torch.diag_embed((dof / scale).unsqueeze(-1).expand(2, 2)),
    }[kind]()
    torch.testing.assert_close(torch.stack(dense).mean(0), mean, atol=0.5, rtol=0.1)
    precise = torch.stack([m @ p @ m for m, p in ((law.mean[0], p[0]) for law, p in zip(laws, dense, strict=True))])
    assert abs(float(precise.mean()) * 0.5 - 2) < 0.3  # a chi-square of 2 degrees over the strength


def test_predictive_draws_series_of_the_lengths_of_the_mask() -> None:
    model = HMM(GaussianEmissions(2, 3))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    drawn = Predictive(model, num_samples=5)({"mask": mask})["inputs"]
    assert drawn.shape == (5, 2, 3, 3)
    assert float(drawn[:, 0, 2].abs().max()) == 0
    assert model.sample(4, {"mask": mask}).shape == (4, 2, 3, 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: GaussianEmissions(0, 2), "num_states: expected at least 1"),
    (lambda: GaussianEmissions(2, 2, "round"), "covariance: expected one of"),
    (lambda: GaussianEmissions(2, 2, strength=0.0), "strength: expected above 0"),
    (lambda: HMM(PoissonEmissions(2), transition_concentration=0.0), "transition_concentration: expected above 0"),
    (lambda: HMM(PoissonEmissions(2)).estimate(Dataset([])), "data is empty"),
    (lambda: HMM(PoissonEmissions(2)).estimate(series("poisson", 0), "magic"), "method: expected"),
    (lambda: HMM(PoissonEmissions(2)).estimate(series("poisson", 0), restarts=0), "iterations, restarts"),
    (lambda: HMM(GaussianEmissions(2, 2)).estimate(series("poisson", 0)), "expected 2 dimensions"),
    (lambda: HMM(GaussianEmissions(2, 1)).estimate(Dataset([{"inputs": torch.tensor([[float("nan")]])}])), "finite"),
    (lambda: HMM(GaussianEmissions(2, 2)).log_prob({"inputs": torch.zeros(3, 2)}), "inputs: expected 3 dimensions"),
    (lambda: HMM(GaussianEmissions(2, 2)).sample(2), "batch is None"),
    (lambda: HMM(GaussianEmissions(2, 2)).permute(torch.tensor([0, 0])), "order: expected a permutation"),
    (lambda: matched(torch.zeros(3, 2), torch.zeros(2, 2)), "other: expected shape"),
])  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_variational_bayes_of_mixtures_says_that_there_is_none() -> None:
    with pytest.raises(NotImplementedError, match="variational"):
        HMM(MixtureEmissions(2, 2, 2)).estimate(series("mixture", 0), "variational")


def test_covariance_kinds_are_those_of_the_law() -> None:
    kinds: list[Covariance] = ["full", "tied", "diag", "spherical"]
    for kind in kinds:
        torch.manual_seed(0)
        emissions = GaussianEmissions(3, 2, kind)
        torch.nn.init.normal_(emissions.factor)
        x = torch.randn(7, 2)
        torch.testing.assert_close(emissions.log_prob(x), emissions.law().log_prob(x.unsqueeze(1)))
