"""The hidden Markov model against enumeration of its states, Bayes' rule, and Pyro's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from probllm.distributions import HiddenMarkovModel, LinearChainCRF

Case = tuple[HiddenMarkovModel, Tensor, Tensor, Tensor]  # law, value, observed, lengths of each row


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Categorical or normal observations; shared and own transitions; lengths, missing steps, forbidden moves."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (3, 3), (1, 3), (3, 1), (2, 2)]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (1,)]))
    share = draw(st.sampled_from([0.0, 0.0, 0.3]))

    def logits(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    lead = draw(st.sampled_from([(), (*batch, steps - 1), (*batch, 1), (steps - 1,)]))
    over = draw(st.sampled_from([(k,), (steps, k), (*batch, steps, k)]))
    observation: Any
    if draw(st.booleans()):
        observation = dist.Categorical(logits=torch.randn(*over, 3, generator=generator, dtype=torch.float64))
        value = torch.randint(0, 3, (*batch, steps), generator=generator)
    else:
        mean = torch.randn(*over, 2, generator=generator, dtype=torch.float64)
        observation = dist.Normal(mean, torch.ones((), dtype=torch.float64)).to_event(1)
        value = torch.randn(*batch, steps, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, steps + 1, batch, generator=generator) if draw(st.booleans()) else None
    law = HiddenMarkovModel(
        logits(*draw(st.sampled_from([(), batch])), k), logits(*lead, k, k), observation, lengths, duration=steps
    )
    observed = torch.rand(*batch, steps, generator=generator) < draw(st.sampled_from([1.0, 0.6]))
    return law, value, observed, torch.as_tensor(steps if lengths is None else lengths).expand(batch)


def joint(case: Case) -> tuple[Tensor, Tensor]:
    """Every state sequence ``[N, T]`` and log p(z, x) ``[N, *batch]``, -inf for what only repeats it on padding."""
    law, value, observed, lengths = case
    batch, steps, k = lengths.shape, observed.shape[-1], law.num_states
    z = torch.tensor(list(itertools.product(range(k), repeat=steps)))
    inner = law.observation_dist.event_dim
    each = law.observation_dist.expand((*batch, steps, k)).log_prob(value.unsqueeze(value.dim() - inner))
    initial = law.initial.expand(*batch, k)
    moves = law.transition.expand(*batch, steps - 1, k, k) if steps > 1 else law.transition
    n, total = lengths.unsqueeze(-1), initial[..., z[:, 0]]
    for t in range(steps):
        total = total + torch.where((t < n) & observed[..., t, None], each[..., t, z[:, t]], 0.0)
        if t:
            total = total + torch.where(t < n, moves[..., t - 1, z[:, t - 1], z[:, t]], 0.0)
    padding = torch.arange(steps) >= lengths.unsqueeze(-1)  # [*batch, T]
    repeats = ((z != 0) & padding.unsqueeze(-2)).any(-1)  # [*batch, N]
    return z, total.masked_fill(repeats, -torch.inf).movedim(-1, 0)


@given(cases())
def test_log_prob_is_the_sum_over_states(case: Case) -> None:
    law, value, observed, _ = case
    found = law.log_prob(value, observed)
    torch.testing.assert_close(found, joint(case)[1].logsumexp(0))
    if bool(observed.all()):
        assert torch.equal(found, law.log_prob(value))


@given(cases())
def test_posterior_is_bayes_rule(case: Case) -> None:
    law, value, observed, _ = case
    z, log_joint = joint(case)
    posterior = law.posterior(value, observed)
    assert isinstance(posterior, LinearChainCRF)
    every = z.reshape(len(z), *(1,) * (log_joint.dim() - 1), -1).expand(*log_joint.shape, -1)
    possible = log_joint > -torch.inf
    expected = log_joint - torch.where(possible.any(0), log_joint.logsumexp(0), 0.0)
    torch.testing.assert_close(posterior.log_prob(every)[possible], expected[possible])
    torch.testing.assert_close(law.log_prob_joint(every, value, observed)[possible], log_joint[possible])
    torch.testing.assert_close(posterior.log_partition, law.log_prob(value, observed))


@given(cases())
def test_missing_values_and_padding_may_be_anything_with_finite_gradients(case: Case) -> None:
    law, value, observed, lengths = case
    used = observed & (torch.arange(observed.shape[-1]) < lengths.unsqueeze(-1))
    inner = law.observation_dist.event_dim
    poison = math.nan if value.is_floating_point() else -7
    spoiled = torch.where(used.reshape(*used.shape, *(1,) * inner), value, poison)
    before = torch.random.get_rng_state()
    if bool(used.any()):
        assert torch.equal(law.log_prob(spoiled, observed), law.log_prob(value, observed))
        assert torch.equal(torch.random.get_rng_state(), before), "scoring draws random numbers"
    else:
        torch.testing.assert_close(law.log_prob(spoiled, observed), law.log_prob(value, observed))


@given(cases())
def test_filtering_step_by_step_is_the_posterior_of_each_prefix(case: Case) -> None:
    law, value, observed, lengths = case
    state, batch = law.start(lag=1), lengths.shape
    at = len(batch)
    for t in range(1, observed.shape[-1] + 1):
        state, _ = law.step(state, value.select(at, t - 1), observed[..., t - 1])
        prefix = HiddenMarkovModel(
            law.initial, law.transition, law.observation_dist, torch.full(batch, t), observed.shape[-1]
        )
        torch.testing.assert_close(state.log_likelihood.expand(batch), prefix.log_prob(value, observed))
        marginals = prefix.posterior(value, observed).marginals
        torch.testing.assert_close(state.filtered.expand(*batch, -1), marginals[..., t - 1, :])
        if t > 1:
            torch.testing.assert_close(state.smoothed().expand(*batch, -1), marginals[..., t - 2, :])
    if law.transition.dim() > 2 and law.transition.shape[-3] > 1:
        with pytest.raises(ValueError, match="state: expected fewer than"):
            law.step(state, value.select(at, 0))


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 1])])
def test_sample_joint_has_the_frequencies_of_the_law(lengths: Tensor | None) -> None:
    """Chi-square at a false-alarm rate of one in a million."""
    generator = torch.Generator().manual_seed(1)
    initial, moves = torch.randn(2, generator=generator), torch.randn(2, 2, generator=generator)
    law = HiddenMarkovModel(
        initial, moves, dist.Categorical(logits=torch.randn(2, 2, generator=generator)), lengths, duration=2
    )
    count = 4000
    z, x = law.sample_joint((count,))
    assert z.shape == x.shape == (count, *law.batch_shape, 2)
    full = HiddenMarkovModel(initial, moves, law.observation_dist, duration=2)
    outcomes = torch.tensor(list(itertools.product(range(2), repeat=4)))
    p = full.log_prob_joint(outcomes[:, :2], outcomes[:, 2:]).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    for row, n in enumerate([2] if lengths is None else lengths.tolist()):
        mine = torch.cat([z, x], -1) if lengths is None else torch.cat([z[:, row], x[:, row]], -1)
        if n == 1:
            assert not mine[:, [1, 3]].any(), "padding is 0"
            first = mine[:, 0] * 2 + mine[:, 2]
            expected = p.reshape(2, 2, 2, 2).sum((1, 3)).flatten()
        else:
            first, expected = mine @ torch.tensor([8, 4, 2, 1]), p
        observed = torch.bincount(first, minlength=len(expected)).double()
        statistic = float(((observed - count * expected) ** 2 / (count * expected)).sum())
        assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-6


def test_log_prob_agrees_with_pyros_discrete_hmm_which_moves_before_it_observes() -> None:
    generator = torch.Generator().manual_seed(0)
    before, moves = torch.randn(3, generator=generator), torch.randn(2, 5, 3, 3, generator=generator)
    observation = dist.Normal(torch.randn(3, generator=generator), 1.0)
    x = torch.randn(2, 5, generator=generator)
    theirs = dist.DiscreteHMM(before, moves, observation)
    first = (before.log_softmax(-1).unsqueeze(-1) + moves[:, 0].log_softmax(-1)).logsumexp(-2)
    ours = HiddenMarkovModel(first, moves[:, 1:], observation)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))


def test_log_prob_agrees_with_pyros_enumeration() -> None:
    generator = torch.Generator().manual_seed(0)
    initial, moves = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    emission, x = torch.randn(3, 4, generator=generator), torch.tensor([0, 3, 2, 2, 1])

    @config_enumerate
    def model() -> None:
        state: Any = None
        for t in pyro.markov(range(len(x))):
            row = initial if state is None else moves[state]
            state = pyro.sample(f"z{t}", dist.Categorical(logits=row))
            pyro.sample(f"x{t}", dist.Categorical(logits=emission[state]), obs=x[t])

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)
    law = HiddenMarkovModel(initial, moves, dist.Categorical(logits=emission))
    assert float(-law.log_prob(x)) == pytest.approx(loss, rel=1e-5)


def test_pyro_program_traces_predicts_and_learns() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (4, 6))
    lengths = torch.tensor([6, 3, 1, 5])

    def model(given: Tensor | None = None) -> Tensor:
        names = {"initial": (2,), "moves": (2, 2), "emission": (2, 3)}
        a, b, c = (pyro.param(n, lambda shape=shape: torch.randn(shape)) for n, shape in names.items())
        with pyro.plate("data", 4):
            law = HiddenMarkovModel(a, b, dist.Categorical(logits=c), lengths, duration=6)
            found: Tensor = pyro.sample("x", law, obs=given)
            return found

    with pyro.validation_enabled(True):
        trace = pyro.poutine.trace(model).get_trace(x)
        law = trace.nodes["x"]["fn"]
        torch.testing.assert_close(trace.log_prob_sum(), law.log_prob(x).sum())
        svi = SVI(model, lambda given: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        losses = [svi.step(x) for _ in range(20)]
        assert losses[-1] < losses[0]
        drawn = Predictive(model, num_samples=5)()["x"]
    assert drawn.shape == (5, 4, 6)


def test_a_state_that_nothing_follows_has_finite_gradients() -> None:
    moves = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    initial = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    law = HiddenMarkovModel(initial, moves, dist.Categorical(logits=torch.zeros(2, 2, dtype=torch.float64)))
    value = law.log_prob(torch.tensor([0, 1, 1]))
    torch.testing.assert_close(value, torch.tensor([1 / 2 * 1 / 2 * (1 / 2) ** 3], dtype=torch.float64).log()[0])
    for gradient in torch.autograd.grad(value, (initial, moves)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("member", ["mode", "entropy", "mean", "variance"])
def test_intractable_members_raise(member: str) -> None:
    law = HiddenMarkovModel(torch.zeros(2), torch.zeros(2, 2), dist.Categorical(logits=torch.zeros(2, 3)), duration=4)
    with pytest.raises(NotImplementedError):
        getattr(law, member)()


def test_expanded_law_scores_and_samples() -> None:
    law = HiddenMarkovModel(torch.zeros(2), torch.zeros(2, 2), dist.Categorical(logits=torch.zeros(2, 3)), duration=4)
    wide = law.expand((3, 2))
    assert wide.batch_shape == (3, 2)
    x = wide.sample((5,))
    assert x.shape == (5, 3, 2, 4)
    assert len(x.reshape(-1, 4).unique(dim=0)) > 10, "copies are drawn independently"
    torch.testing.assert_close(wide.log_prob(x), law.log_prob(x))


def test_vmap_over_parameters_is_a_loop() -> None:
    torch.manual_seed(0)
    initial, moves, emission = torch.randn(3, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 4)
    x, lengths = torch.randint(0, 4, (2, 5)), torch.tensor([5, 2])

    def value(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return HiddenMarkovModel(a, b, dist.Categorical(logits=c, validate_args=False), lengths).log_prob(x)

    loop = torch.stack([value(*parts) for parts in zip(initial, moves, emission, strict=True)])
    torch.testing.assert_close(torch.func.vmap(value)(initial, moves, emission), loop)


def _law(**change: Any) -> HiddenMarkovModel:
    given: dict[str, Any] = {
        "initial_logits": torch.zeros(2), "transition_logits": torch.zeros(2, 2),
        "observation_dist": dist.Categorical(logits=torch.zeros(2, 3)), "lengths": None, "duration": 4,
    }  # fmt: skip
    return HiddenMarkovModel(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial_logits": torch.tensor(0.0)}, ValueError, "initial_logits"),
        ({"initial_logits": torch.zeros(2, dtype=torch.long)}, TypeError, "initial_logits"),
        ({"transition_logits": torch.zeros(3, 2)}, ValueError, "transition_logits"),
        ({"transition_logits": torch.zeros(2, 2, dtype=torch.long)}, TypeError, "transition_logits"),
        ({"transition_logits": torch.zeros(5, 2, 2)}, ValueError, "transition_logits and duration"),
        ({"observation_dist": dist.Normal(0.0, 1.0)}, ValueError, "observation_dist"),
        ({"observation_dist": dist.Normal(torch.zeros(3), 1.0)}, ValueError, "observation_dist"),
        ({"lengths": torch.tensor([0])}, ValueError, "lengths"),
        ({"lengths": torch.tensor([5])}, ValueError, "lengths"),
        ({"lengths": torch.tensor([1.0])}, TypeError, "lengths"),
        (
            {"initial_logits": torch.zeros(3, 2), "lengths": torch.tensor([4, 4])},
            ValueError,
            r"broadcast: initial_logits \[3\].*lengths \[2\]",
        ),
        ({"lengths": [4]}, TypeError, "lengths: expected a tensor"),
        ({"initial_logits": [0.0, 0.0]}, TypeError, "initial_logits: expected a tensor, got list"),
        ({"observation_dist": torch.zeros(2, 3)}, TypeError, "observation_dist: expected a distribution, got Tensor"),
        ({"duration": 0}, ValueError, "duration"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _law(**change)


@pytest.mark.parametrize(
    ("value", "observed", "error", "message"),
    [
        (torch.zeros(3).long(), None, ValueError, "value: expected 4 steps"),
        (torch.tensor(0), None, ValueError, "value"),
        (torch.zeros(3, 4).long(), None, ValueError, "value: batch shape"),
        (torch.zeros(2, 4).long(), torch.ones(2, 4), TypeError, "observed"),
        (torch.zeros(2, 4).long(), torch.ones(2, 3).bool(), ValueError, "observed"),
    ],
)
def test_bad_values_are_named(value: Tensor, observed: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _law(initial_logits=torch.zeros(2, 2)).log_prob(value, observed)


def test_nan_logits_are_refused_and_a_homogeneous_law_is_not_sampled_without_duration() -> None:
    with pytest.raises(ValueError, match="NaN"):
        _law(transition_logits=torch.tensor([[0.0, math.nan], [0.0, 0.0]])).log_prob(torch.zeros(4).long())
    with pytest.raises(ValueError, match="duration"):
        _law(duration=None).sample()


def test_whatever_stands_on_padding_of_symbols_changes_nothing() -> None:
    torch.manual_seed(0)
    law = HiddenMarkovModel(
        torch.randn(3), torch.randn(3, 3), torch.distributions.Categorical(logits=torch.randn(3, 4)),
        lengths=torch.tensor([4, 2]),
    )  # fmt: skip
    symbols = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 0]])
    padded = torch.tensor([[0, 1, 2, 3], [3, 1, 99, -7]])
    assert torch.equal(law.log_prob(padded), law.log_prob(symbols))
    with pytest.raises(ValueError, match="value: expected symbols from 0 to 3, got -1 to 3"):
        law.log_prob(torch.tensor([[0, 1, 2, -1], [3, 1, 0, 0]]))
