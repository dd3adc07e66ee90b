"""Step by step is the same as all at once: every prefix, every lag."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import LinearChainCRF
from probllm.math.streaming import BestPath, Filter

Case = tuple[Tensor, Tensor, Tensor, bool]


@st.composite
def chains(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    own = draw(st.booleans())
    share, scale = draw(st.sampled_from([0.0, 0.25])), draw(st.sampled_from([1.0, 100.0, 1e5]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    return scores(*batch, k), scores(*((steps - 1,) if own else ()), k, k), scores(*batch, steps, k), own


def prefix(case: Case, t: int) -> LinearChainCRF:
    initial, transition, emissions, own = case
    return LinearChainCRF(emissions[..., :t, :], transition[: t - 1] if own else transition, initial)


@given(chains(), st.integers(0, 3))
def test_each_prefix_has_the_batch_s_likelihood_and_smoothed_marginals(case: Case, lag: int) -> None:
    initial, transition, emissions, own = case
    k = initial.shape[-1]
    state = Filter.start(initial, initial.new_zeros(k, k) if own else transition, lag)
    before = None
    for t in range(1, emissions.shape[-2] + 1):
        state, log_p = state.step(emissions[..., t - 1, :], transition[t - 2] if own and t > 1 else None)
        law = prefix(case, t)
        torch.testing.assert_close(state.log_likelihood, law.log_partition)
        if before is not None:
            torch.testing.assert_close(torch.where(before > -torch.inf, before + log_p, before), law.log_partition)
        before = law.log_partition
        torch.testing.assert_close(state.filtered, law.marginals[..., -1, :], rtol=1e-7, atol=1e-7)
        for back in range(min(lag + 1, t)):
            torch.testing.assert_close(state.smoothed(back), law.marginals[..., -1 - back, :], rtol=1e-7, atol=1e-7)
        assert len(state.window) == min(t, lag + 1)


@given(chains(), st.integers(0, 3))
def test_each_prefix_has_the_end_of_a_best_path(case: Case, lag: int) -> None:
    initial, transition, emissions, own = case
    k = initial.shape[-1]
    state = BestPath.start(initial, initial.new_zeros(k, k) if own else transition, lag)
    for t in range(1, emissions.shape[-2] + 1):
        state = state.step(emissions[..., t - 1, :], transition[t - 2] if own and t > 1 else None)
        law, path = prefix(case, t), state.path()
        assert path.shape == (*emissions.shape[:-2], min(t, lag + 1))
        possible = law.log_partition > -torch.inf
        assert torch.equal(path[..., 0] >= 0, possible)
        best = torch.where(possible, law.score(law.mode.clamp_min(0)), -torch.inf)
        torch.testing.assert_close(state.score, best)
        # the law given this end of the sequence still has a sequence of the best score
        allowed = torch.ones(*emissions.shape[:-2], t, k, dtype=torch.bool)
        allowed[..., t - path.shape[-1] :, :] = torch.nn.functional.one_hot(path.clamp_min(0), k).bool()
        left = law.condition(allowed)
        torch.testing.assert_close(torch.where(possible, left.score(left.mode.clamp_min(0)), -torch.inf), best)


def test_likelihood_is_differentiable() -> None:
    torch.manual_seed(0)
    emissions, transition = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    state = Filter.start(torch.zeros(3), transition)
    for x in emissions:
        state, _ = state.step(x)
    expected = torch.autograd.grad(LinearChainCRF(emissions, transition, torch.zeros(3)).log_partition, transition)
    torch.testing.assert_close(torch.autograd.grad(state.log_likelihood, transition), expected)


def test_bad_input_is_named() -> None:
    zero, table = torch.zeros(2), torch.zeros(2, 2)
    for make, message in (
        (lambda: Filter.start(torch.zeros(()), table), "initial: expected"),
        (lambda: Filter.start(zero.long(), table), "initial: expected"),
        (lambda: Filter.start(zero, torch.zeros(3, 3)), r"transition: expected shape \[..., 2, 2\]"),
        (lambda: BestPath.start(zero, table, -1), "lag: expected at least 0"),
        (lambda: Filter.start(zero, table).step(torch.zeros(3)), "log_likelihoods: expected"),
        (lambda: BestPath.start(zero, table, 1).step(zero, torch.zeros(2)), "transition: expected"),
        (lambda: Filter.start(zero, table, 2).step(zero)[0].smoothed(), "lag: expected from 0 to 0 after 1 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
