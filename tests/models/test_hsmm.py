"""Hidden semi-Markov models of series: the battery, learning that never gets worse, durations that are found again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from probllm.data import Dataset
from probllm.models import HMM, HSMM, GaussianEmissions, PoissonEmissions
from probllm.models.hmm_learning import matched
from probllm.models.hsmm import mean_durations
from tests.models import battery
from tests.models.test_hmm import CHECKS, batch_of, series

CASES = [
    battery.Case("poisson", lambda: HSMM(PoissonEmissions(2), 3), batch_of("poisson"), target="inputs"),
    battery.Case("diag", lambda: HSMM(GaussianEmissions(3, 2, "diag"), 2), batch_of("diag"), target="inputs"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: battery.Case, check: Callable[[battery.Case], None]) -> None:
    check(case)


@pytest.mark.parametrize("method", ["em", "variational"])
@given(seed=st.integers(0, 2**31), duration=st.integers(1, 5))
@settings(max_examples=10)
def test_learning_never_lowers_its_objective(method: str, seed: int, duration: int) -> None:
    model = HSMM(GaussianEmissions(3, 2, "diag"), duration)
    history = model.estimate(series("diag", seed), method, iterations=12, tolerance=0.0, seed=seed % 100)  # type: ignore[arg-type]
    losses = torch.tensor([row["penalised_loss"] for row in history], dtype=torch.float64)
    assert bool((losses[1:] <= losses[:-1] + 1e-8 * losses[:-1].abs() + 1e-8).all()), losses
    assert all(bool(torch.isfinite(x).all()) for x in model.parameters())


def test_geometric_durations_are_those_of_an_hmm() -> None:
    """An HMM is the semi-Markov model whose durations are geometric, long ones cut off where nothing reaches."""
    torch.manual_seed(0)
    hmm, steps = HMM(PoissonEmissions(3)), 6
    hsmm = HSMM(PoissonEmissions(3), steps + 30)
    stay = torch.tensor([0.5, 0.6, 0.7])
    other = torch.rand(3, 3).fill_diagonal_(0.0)
    other = other / other.sum(-1, keepdim=True)
    with torch.no_grad():
        hmm.initial.copy_(torch.randn(3))
        hmm.transition.copy_((torch.diag(stay) + (1 - stay).unsqueeze(-1) * other).log())
        hsmm.initial.copy_(hmm.initial)
        hsmm.transition.copy_(other.clamp_min(1e-30).log())
        d = torch.arange(steps + 30.0)
        hsmm.durations.copy_((1 - stay).log().unsqueeze(-1) + d * stay.log().unsqueeze(-1))
        hsmm.emissions.load_state_dict(hmm.emissions.state_dict())
    batch = {"inputs": torch.poisson(torch.full((4, steps), 2.0))}
    torch.testing.assert_close(hsmm.log_prob(batch), hmm.log_prob(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hsmm.marginals(batch), hmm.marginals(batch), rtol=1e-3, atol=1e-4)


def test_learning_finds_the_durations_that_made_the_data() -> None:
    """Two states of 3 and 8 steps, which no HMM has: its durations are geometric, and its likelihood is lower."""
    torch.manual_seed(0)
    rows = []
    for _ in range(40):
        states: list[int] = []
        state = int(torch.randint(2, ()))
        while len(states) < 60:
            states += [state] * (3 if state == 0 else 8)
            state = 1 - state
        rows.append(torch.tensor(states[:60]))
    states_of = torch.stack(rows)
    x = 2.0 * states_of.unsqueeze(-1) + torch.randn(40, 60, 1)
    data = Dataset({"inputs": row} for row in x)
    hsmm, hmm = HSMM(GaussianEmissions(2, 1), 12), HMM(GaussianEmissions(2, 1))
    for model in (hsmm, hmm):
        model.estimate(data, restarts=2)
        one_hot = torch.nn.functional.one_hot
        found = model.predict({"inputs": x})
        model.permute(matched(one_hot(states_of.flatten(), 2).double(), one_hot(found.flatten(), 2).double()))
    torch.testing.assert_close(mean_durations(hsmm).detach(), torch.tensor([3.0, 8.0]), atol=0.3, rtol=0)
    right = {
        name: (model.predict({"inputs": x}) == states_of).float().mean() for name, model in (("s", hsmm), ("h", hmm))
    }
    assert right["s"] > right["h"] + 0.02
    assert hsmm.information_criteria(data)["bic"] < hmm.information_criteria(data)["bic"]


def test_a_state_never_follows_itself() -> None:
    model = HSMM(PoissonEmissions(2), 4)
    law = model.law({"mask": torch.ones(1, 30, dtype=torch.bool)})
    starts = law.sample_joint((50,))[0]
    for row in starts.reshape(-1, 30):
        labels = row[row > 0].tolist()
        assert all(a != b for a, b in itertools.pairwise(labels))


def test_program_with_priors_runs_under_an_automatic_guide() -> None:
    pyro.set_rng_seed(0)
    model, batch = HSMM(PoissonEmissions(2), 3), batch_of("poisson")
    svi = SVI(model.joint, AutoNormal(model.joint), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(batch) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: HSMM(PoissonEmissions(1), 3), "emissions: expected at least 2 states"),
    (lambda: HSMM(PoissonEmissions(2), 0), "max_duration: expected at least 1"),
    (lambda: HSMM(PoissonEmissions(2), 2, duration_concentration=-1.0), "duration_concentration: expected above 0"),
])  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
