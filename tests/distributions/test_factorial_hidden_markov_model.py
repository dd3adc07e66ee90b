"""The factorial model against the hidden Markov model of its joint states, whose table is written out by hand."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import factorial_hidden_markov_model
from probllm.distributions.factorial_hidden_markov_model import FactorialHiddenMarkovModel
from probllm.distributions.hidden_markov_model import HiddenMarkovModel
from probllm.math import factorial
from probllm.math.semirings import MAX, KMax

Case = tuple[FactorialHiddenMarkovModel, HiddenMarkovModel, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Categorical or normal observations; lengths, missing steps, forbidden states and moves."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    m, k = draw(st.sampled_from([(1, 3), (2, 2), (3, 2), (2, 3), (2, 1)]))
    steps, batch = draw(st.integers(1, 4)), draw(st.sampled_from([(), (2,), (2, 2)]))
    share, size = draw(st.sampled_from([0.0, 0.0, 0.3])), k**m

    def logits(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    initial = logits(*draw(st.sampled_from([(), batch])), m, k)
    moves = logits(*draw(st.sampled_from([(), batch])), m, k, k)
    over = draw(st.sampled_from([(size,), (steps, size), (*batch, steps, size)]))
    observation: Any
    if draw(st.booleans()):
        observation = dist.Categorical(logits=torch.randn(*over, 3, generator=generator, dtype=torch.float64))
        value = torch.randint(0, 3, (*batch, steps), generator=generator)
    else:
        observation = dist.Normal(torch.randn(*over, generator=generator, dtype=torch.float64), 1.0)
        value = torch.randn(*batch, steps, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, steps + 1, batch, generator=generator) if draw(st.booleans()) else None
    observed = torch.rand(*batch, steps, generator=generator) < draw(st.sampled_from([1.0, 0.6]))

    states = list(itertools.product(range(k), repeat=m))
    p, q = (x.softmax(-1).nan_to_num(0.0) for x in (initial, moves))  # a row of which all is forbidden has mass 0
    first = torch.stack([torch.stack([p[..., i, s[i]] for i in range(m)], -1).prod(-1) for s in states], -1)
    table = torch.stack(
        [torch.stack([q[..., i, s[i], r[i]] for i in range(m)], -1).prod(-1) for s in states for r in states], -1
    ).unflatten(-1, (size, size))
    joint = HiddenMarkovModel(first.log(), table.log().unsqueeze(-3), observation, lengths, steps)
    joint.initial, joint.transition = first.log(), table.log().unsqueeze(-3)  # sub-normalised rows stay as they are
    return FactorialHiddenMarkovModel(initial, moves, observation, lengths, steps), joint, value, observed


def chain_by_chain() -> Any:
    """Within it even the smallest models take the way of the large ones."""
    return mock.patch.object(factorial_hidden_markov_model, "COMPILED", 0)


@given(cases(), st.booleans())
def test_likelihood_posterior_and_marginals_are_those_of_the_joint_chain(case: Case, small: bool) -> None:
    with contextlib.nullcontext() if small else chain_by_chain():
        check_likelihood_posterior_and_marginals(*case)


def check_likelihood_posterior_and_marginals(
    law: FactorialHiddenMarkovModel, joint: HiddenMarkovModel, value: Tensor, observed: Tensor
) -> None:
    expected = joint.posterior(value, observed)
    assert law.batch_shape == joint.batch_shape
    torch.testing.assert_close(law.log_prob(value, observed), joint.log_prob(value, observed))
    torch.testing.assert_close(law.posterior(value, observed).log_partition, expected.log_partition)
    torch.testing.assert_close(law.posterior(value, observed).marginals, expected.marginals)
    m, k = law.num_chains, law.chain_initial.shape[-1]
    by_chain = expected.marginals.unflatten(-1, (k,) * m)
    found = law.state_marginals(value, observed)
    for i in range(m):
        others = [j - m for j in range(m) if j != i]
        torch.testing.assert_close(found[..., i, :], by_chain.sum(others) if others else by_chain)


@given(cases())
def test_best_scores_of_the_factored_recursion_are_the_posterior_s(case: Case) -> None:
    law, joint, value, observed = case
    emissions = joint.posterior(value, observed).emissions
    shape = emissions.shape[:-2]
    n = torch.as_tensor(value.shape[len(shape)] if law.lengths is None else law.lengths).expand(shape)
    m, k = law.num_chains, law.chain_initial.shape[-1]
    parts = (emissions, law.chain_initial.expand(*shape, m, k), law.chain_transition.expand(*shape, m, k, k))
    expected = joint.posterior(value, observed).topk(3)[0]
    best = factorial.inside(KMax(3), tuple(KMax(3).lift(x) for x in parts), n)
    torch.testing.assert_close(best, expected)
    torch.testing.assert_close(factorial.inside(MAX, tuple(MAX.lift(x) for x in parts), n)[0], expected[0])


@given(cases())
def test_gradients_are_those_of_the_joint_chain(case: Case) -> None:
    law, _, value, observed = case
    leaves = [x.clone().requires_grad_() for x in (law.chain_initial, law.chain_transition)]
    again = FactorialHiddenMarkovModel(*leaves, law.observation_dist, law.lengths, law.duration)
    found = []
    with chain_by_chain():
        factored = again.log_prob(value, observed)
    for total in (factored, again.log_prob(value, observed), again.posterior(value, observed).log_partition):
        summed = torch.where(total > -torch.inf, total, 0.0).sum() + 0 * sum(x[x > -torch.inf].sum() for x in leaves)
        found.append(torch.autograd.grad(summed, leaves, retain_graph=True))
    for a, b, c in zip(*found, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_sample_joint_has_the_frequencies_of_the_law() -> None:
    torch.manual_seed(0)
    law = FactorialHiddenMarkovModel(
        torch.randn(2, 2), torch.randn(2, 2, 2), dist.Categorical(logits=torch.randn(4, 2)), duration=2
    )
    count = 20_000
    states, observations = law.sample_joint((count,))
    prior = HiddenMarkovModel(law.initial, law.transition, law.observation_dist, duration=2)
    codes = torch.tensor(list(itertools.product(range(4), range(4), range(2), range(2))))
    expected = prior.log_prob_joint(codes[:, :2], codes[:, 2:]).exp() * count
    seen = (states[:, 0] * 4 + states[:, 1]) * 4 + observations[:, 0] * 2 + observations[:, 1]
    statistic = ((seen.bincount(minlength=64) - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(float(statistic), 63) > 1e-6
    assert law.chain_states(states).shape == (count, 2, 2)
    assert torch.equal(law.chain_states(states)[..., 0] * 2 + law.chain_states(states)[..., 1], states)


def test_chains_that_add_up_are_told_apart_and_learnt_by_pyro() -> None:
    torch.manual_seed(0)
    m, k, steps = 2, 2, 40
    codes = factorial.joint_states(m, k)
    means = torch.tensor([[0.0, 1.0], [0.0, 5.0]])
    sticky = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).expand(m, k, k)

    def law(levels: Tensor) -> FactorialHiddenMarkovModel:
        observation = dist.Normal(levels[torch.arange(m), codes].sum(-1), 0.2)
        return FactorialHiddenMarkovModel(torch.zeros(m, k), sticky, observation, duration=steps)

    states, x = law(means).sample_joint((8,))
    found = law(means).state_marginals(x).argmax(-1)
    assert float((found == law(means).chain_states(states)).double().mean()) > 0.97

    def model() -> None:
        levels = pyro.param("levels", torch.tensor([[0.0, 1.5], [0.0, 4.0]]))
        with pyro.plate("rows", 8):
            pyro.sample("x", law(levels), obs=x)

    optimiser = pyro.optim.Adam({"lr": 0.05})
    svi = pyro.infer.SVI(model, lambda: None, optimiser, pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(40)]
    assert losses[-1] < losses[0]
    levels = pyro.param("levels").detach()
    torch.testing.assert_close(levels[:, 1] - levels[:, 0], torch.tensor([1.0, 5.0]), atol=0.15, rtol=0)


def test_filtering_step_by_step_is_the_posterior_of_each_prefix() -> None:
    torch.manual_seed(0)
    law = FactorialHiddenMarkovModel(torch.randn(2, 2), torch.randn(2, 2, 2), dist.Normal(torch.randn(4), 1.0))
    x = torch.randn(5)
    state = law.start()
    for t in range(1, 6):
        state, _ = law.step(state, x[t - 1])
        torch.testing.assert_close(state.log_likelihood, law.log_prob(x[:t]))
        torch.testing.assert_close(state.filtered, law.posterior(x[:t]).marginals[-1])


def test_bad_input_is_named() -> None:
    normal = dist.Normal(torch.zeros(4), 1.0)
    for arguments, message in (
        ((torch.zeros(2), torch.zeros(2, 2, 2), normal), r"initial_logits: expected shape \[..., M, K\]"),
        ((torch.zeros(2, 2), torch.zeros(2, 2), normal), r"transition_logits: expected shape \[..., 2, 2, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2, 2), normal), r"observation_dist: expected batch shape \[..., 8\]"),
        ((torch.zeros(2, 2, 2), torch.zeros(3, 2, 2, 2), normal), "batch shapes do not broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            FactorialHiddenMarkovModel(*arguments)
    with pytest.raises(TypeError, match="initial_logits: expected floating-point"):
        FactorialHiddenMarkovModel(torch.zeros(2, 2).long(), torch.zeros(2, 2, 2), normal)
    with pytest.raises(ValueError, match="duration"):
        FactorialHiddenMarkovModel(torch.zeros(2, 2), torch.zeros(2, 2, 2), normal).sample()
    with pytest.raises(NotImplementedError, match="intractable"):
        FactorialHiddenMarkovModel(torch.zeros(2, 2), torch.zeros(2, 2, 2), normal).entropy()
