"""Laws that sum out their states agree with Pyro's own enumeration of the same program, written step by step."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.ops.indexing import Vindex
from torch import Tensor

from probllm.distributions import HiddenMarkovModel, HiddenSemiMarkovModel, LinearChainCRF

STEPS, K, V = 4, 3, 2


def rows(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Initial, transition and emission logits in float64, and symbols ``[2, T]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((K,), (K, K), (K, V))
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return logits[0], logits[1], logits[2], torch.randint(V, (2, STEPS), generator=generator)


def step_by_step(initial: Tensor, transition: Tensor, emission: Tensor, symbols: Tensor) -> list[Tensor]:
    """A hidden Markov model as Pyro enumerates it: one discrete site a step."""
    states: list[Tensor] = []
    with pyro.plate("rows", len(symbols), dim=-1):
        for t in pyro.markov(range(symbols.shape[1])):
            logits = initial if t == 0 else Vindex(transition)[states[-1]]
            states.append(pyro.sample(f"z{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"}))
            pyro.sample(f"x{t}", dist.Categorical(logits=Vindex(emission)[states[-1]]), obs=symbols[:, t])
    return states


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_log_prob_and_its_gradient_are_those_of_enumeration(seed: int) -> None:
    pyro.clear_param_store()
    *logits, symbols = rows(seed)
    leaves = [x.clone().requires_grad_() for x in logits]
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(lambda: step_by_step(*leaves, symbols), lambda: None)
    ours = [x.clone().requires_grad_() for x in logits]
    law = HiddenMarkovModel(ours[0], ours[1], dist.Categorical(logits=ours[2]))
    log_prob = law.log_prob(symbols).sum()
    torch.testing.assert_close(log_prob, -loss)
    for a, b in zip(torch.autograd.grad(log_prob, ours), torch.autograd.grad(-loss, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_posterior_paths_have_the_frequencies_of_pyros_discrete_inference() -> None:
    """Both samplers, each against the exact posterior marginals, and Pyro's MAP states against our mode."""
    initial, transition, emission, symbols = rows(3)
    law = HiddenMarkovModel(initial, transition, dist.Categorical(logits=emission)).posterior(symbols)
    pyro.set_rng_seed(0)
    model = config_enumerate(step_by_step)
    draw = infer_discrete(model, first_available_dim=-2, temperature=1)
    theirs = torch.stack([torch.stack(draw(initial, transition, emission, symbols), -1) for _ in range(300)])
    ours = law.sample((3000,))
    for drawn, tolerance in ((theirs, 0.13), (ours, 0.045)):
        share = torch.nn.functional.one_hot(drawn, K).double().mean(0)
        torch.testing.assert_close(share, law.marginals, atol=tolerance, rtol=0)
    best = infer_discrete(model, first_available_dim=-2, temperature=0)
    assert torch.equal(torch.stack(best(initial, transition, emission, symbols), -1), law.mode)


def test_one_program_trains_alike_with_the_law_and_with_enumeration() -> None:
    """Three steps of SVI from the same start: with exact sums on both sides, the same numbers."""
    initial, transition, emission, symbols = rows(5)
    found = []
    for by_law in (True, False):
        pyro.clear_param_store()

        def model(by_law: bool = by_law) -> None:
            table = [
                pyro.param(name, x.clone())
                for name, x in (("initial", initial), ("transition", transition), ("emission", emission))
            ]
            if by_law:
                law = HiddenMarkovModel(table[0], table[1], dist.Categorical(logits=table[2]))
                with pyro.plate("rows", 2):
                    pyro.sample("x", law, obs=symbols)
            else:
                step_by_step(*table, symbols)

        elbo = Trace_ELBO() if by_law else TraceEnum_ELBO(max_plate_nesting=1)
        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), elbo)
        losses = [svi.step() for _ in range(3)]
        found.append((losses, pyro.param("transition").detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_chain_with_factors_is_enumerated_alike(seed: int) -> None:
    """A conditional random field is what Pyro makes of uniform states and factors."""
    generator = torch.Generator().manual_seed(seed)
    emissions = torch.randn(STEPS, K, generator=generator, dtype=torch.float64)
    transitions = torch.randn(K, K, generator=generator, dtype=torch.float64)

    def model() -> None:
        before: Tensor | None = None
        for t in pyro.markov(range(STEPS)):
            uniform = dist.Categorical(logits=torch.zeros(K, dtype=torch.float64))
            z = pyro.sample(f"z{t}", uniform, infer={"enumerate": "parallel"})
            pyro.factor(f"e{t}", Vindex(emissions[t])[z])
            if before is not None:
                pyro.factor(f"a{t}", Vindex(transitions)[before, z])
            before = z

    loss = torch.tensor(TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)).double()
    log_z = LinearChainCRF(emissions, transitions).log_partition
    torch.testing.assert_close(-loss + STEPS * torch.tensor(float(K)).double().log(), log_z, rtol=1e-6, atol=1e-6)


def test_semi_markov_model_with_counted_down_durations_is_enumerated_alike() -> None:
    """A semi-Markov model is a Markov one over (state, steps left); Pyro enumerates that pair."""
    generator = torch.Generator().manual_seed(0)
    longest = 3
    initial, emission = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((K,), (K, V)))
    transition = torch.randn(K, K, generator=generator, dtype=torch.float64)
    durations = torch.randn(K, longest, generator=generator, dtype=torch.float64)
    symbols = torch.randint(V, (STEPS,), generator=generator)

    first = (initial.log_softmax(-1).unsqueeze(-1) + durations.log_softmax(-1)).flatten()  # pairs (state, left)
    jump = transition.log_softmax(-1).unsqueeze(-1) + durations.log_softmax(-1)  # [from, to, left]
    table = torch.full((K, longest, K, longest), -torch.inf, dtype=torch.float64)
    for k in range(K):
        table[k, 0] = jump[k]
        for left in range(1, longest):
            table[k, left, k, left - 1] = 0.0
    table = table.reshape(K * longest, K * longest)

    def model() -> None:
        pair: Tensor | None = None
        for t in pyro.markov(range(STEPS)):
            logits = first if pair is None else Vindex(table)[pair]
            pair = pyro.sample(f"z{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Categorical(logits=Vindex(emission)[pair // longest]), obs=symbols[t])

    loss = torch.tensor(TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)).double()
    law = HiddenSemiMarkovModel(initial, transition, durations, dist.Categorical(logits=emission), duration=STEPS)
    torch.testing.assert_close(law.log_prob(symbols), -loss, rtol=1e-6, atol=1e-6)
