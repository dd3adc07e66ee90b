"""A chain under an automaton: the battery against the list of accepted sequences, and laws that it equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.data.bio import bio_rules
from probllm.distributions.constrained_chain import ConstrainedChain, intersect
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math import automata
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths

PATTERNS = {
    1: ["a*", "a a", "(a a a?)*"],
    2: [".*", "(a b)+ | b*", ". a* b", "(a|b b)*", "a a a b b"],
    3: ["(a | b c)*", ". . (a|c)+", "c? (a b)* c?", "(b+ (a|c))+ b?", ".* b .*"],
}


def is_accepted(delta: list[list[int]], accepting: list[bool], sequence: list[int]) -> bool:
    state = 0
    for tag in sequence:
        state = delta[state][tag]
        if state < 0:
            return False
    return accepting[state]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (5, 2), (3, 3), (4, 3), (2, 3), (1, 3), (3, 1), (1, 1)]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.2]))
    automaton = automata.from_pattern(draw(st.sampled_from(PATTERNS[k])), "abc"[:k])

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    table = draw(st.sampled_from([(), (*batch, steps - 1), (*batch, 1)]))
    parts = {"emissions": scores(*batch, steps, k), "transitions": scores(*table, k, k)}
    for name in draw(st.sampled_from([(), ("start",), ("start", "end")])):
        parts[name] = scores(*draw(st.sampled_from([(), batch])), k)
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Any) -> ConstrainedChain:
        return ConstrainedChain(**given, lengths=lengths, automaton=automaton)

    law = build(**parts)
    n = torch.as_tensor(steps if lengths is None else lengths).long().expand(law.batch_shape)
    structures, every, listed = all_sequences(steps, k, n, law.batch_shape)
    machine = automaton.delta.tolist(), automaton.accepting.tolist()
    legal = torch.tensor([[is_accepted(*machine, x[:m]) for m in range(1, steps + 1)] for x in structures.tolist()])
    legal = legal[:, n - 1]  # [N, *batch]

    def score(given: Parts) -> Tensor:
        z = structures.T
        emissions = given["emissions"].expand(*law.batch_shape, steps, k)
        moves = given["transitions"] if given["transitions"].dim() > 2 else given["transitions"].unsqueeze(0)
        moves = moves.expand(*law.batch_shape, max(steps - 1, moves.shape[-3] and 1), k, k)
        total = emissions[..., 0, z[0]]
        for t in range(1, steps):
            step = emissions[..., t, z[t]] + moves[..., t - 1, z[t - 1], z[t]]
            total = total + torch.where(t < n.unsqueeze(-1), step, 0.0)
        if "start" in given:
            total = total + given["start"].expand(*law.batch_shape, k)[..., z[0]]
        if "end" in given:
            last = structures.T[n - 1]  # [*batch, N]
            total = total + given["end"].expand(*law.batch_shape, k).gather(-1, last)
        return total.movedim(-1, 0).masked_fill(~legal, -torch.inf)

    return Case(law, build, every, listed, score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_rules_as_an_automaton_are_rules_as_masks() -> None:
    torch.manual_seed(0)
    rules = bio_rules(["O", "B-x", "I-x", "B-y", "I-y"])
    chain = LinearChainCRF(torch.randn(3, 6, 5), torch.randn(5, 5), lengths=torch.tensor([6, 1, 4]))
    masked, law = chain.condition(**rules), intersect(chain, automata.from_rules(**rules))
    torch.testing.assert_close(law.log_partition, masked.log_partition)
    torch.testing.assert_close(law.pairwise_marginals, masked.pairwise_marginals)
    torch.testing.assert_close(law.entropy(), masked.entropy())
    assert torch.equal(law.mode, masked.mode)
    assert torch.equal(law.topk(3)[1], masked.topk(3)[1])


def test_automata_intersect_and_their_masses_add_up() -> None:
    """Sequences hold a tag at most once or at least twice; both together leave nothing."""
    torch.manual_seed(0)
    chain = LinearChainCRF(torch.randn(4, 7, 3), torch.randn(3, 3))
    few, many = automata.counting(1, 3, at_most=1), automata.counting(1, 3, at_least=2)
    laws = intersect(chain, few), intersect(chain, many)
    total = torch.logaddexp(laws[0].log_partition, laws[1].log_partition)
    torch.testing.assert_close(total, chain.log_partition)
    assert bool(((laws[0].sample((50,)) == 1).sum(-1) <= 1).all())
    assert bool(((laws[1].sample((50,)) == 1).sum(-1) >= 2).all())
    neither = intersect(laws[0], many)
    assert bool((neither.log_partition == -torch.inf).all())
    assert bool((neither.mode == -1).all())
    three = intersect(laws[1], automata.counting(1, 3, at_most=2)).sample((20,))
    assert bool(((three == 1).sum(-1) == 2).all())


def test_pyro_program_scores_samples_and_differentiates() -> None:
    torch.manual_seed(0)
    emissions = torch.randn(4, 5, 2, requires_grad=True)
    automaton = automata.from_pattern("(a b)* a?", "ab")

    def model(value: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 4):
            return pyro.sample("tags", ConstrainedChain(emissions, torch.zeros(2, 2), automaton=automaton), obs=value)

    drawn = model()
    assert drawn.tolist() == [[0, 1, 0, 1, 0]] * 4
    trace = pyro.poutine.trace(model).get_trace(drawn)
    torch.testing.assert_close(trace.log_prob_sum(), torch.tensor(0.0))
    wrong = ConstrainedChain(emissions, torch.zeros(2, 2), automaton=automaton).log_prob(torch.ones(4, 5).long())
    assert bool((wrong == -torch.inf).all())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="automaton: expected 2 tags, got 3"):
        ConstrainedChain(torch.zeros(3, 2), torch.zeros(2, 2), automaton=automata.counting(0, 3))
    chain = LinearChainCRF(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="same automaton"):
        intersect(chain, automata.counting(0, 2)).cross_entropy(intersect(chain, automata.counting(0, 2, 1)))
