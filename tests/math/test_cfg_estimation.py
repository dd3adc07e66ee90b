"""Expected counts by enumeration, and expectation maximisation that never lowers the posterior density."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.probabilistic_cfg import ProbabilisticCFG
from probllm.math.cfg_estimation import Grammar, estimate, expected_counts, random_grammar
from tests.distributions.derivations import derivations


def counts_by_hand(words: list[int], grammar: Grammar) -> list[Tensor]:
    """Expected counts of one sentence: log likelihood, root, rules, terminals, unary."""
    n, p = len(grammar.root), len(grammar.terminals)
    logs, uses = [], []
    for top, tree in derivations(len(words), n, p):
        use = [torch.zeros_like(x) for x in grammar]
        use[0][top] += 1
        for rule in tree.rules:
            use[1][rule] += 1
        for first, last, symbol in tree.symbols:
            if symbol >= n:
                assert first == last
                use[2][symbol - n, words[first]] += 1
        for pair in tree.unary:
            use[3][pair] += 1
        logs.append(
            sum((torch.where(u > 0, u * x, 0.0).sum() for u, x in zip(use, grammar, strict=True)), torch.zeros(()))
        )
        uses.append(use)
    log = torch.stack(logs)
    share = log.softmax(0)
    return [log.logsumexp(0), *(sum(s * u for s, u in zip(share, x, strict=True)) for x in zip(*uses, strict=True))]


@given(st.integers(0, 1000), st.booleans())
def test_expected_counts_are_the_enumerated_ones(seed: int, unary: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    grammar = random_grammar(2, 1, 2, unary, generator)
    sentences = [[0, 1, 1], [1, 0], [1, 1, 0]]
    words = torch.tensor([[0, 1, 1], [1, 0, 7], [1, 1, 0]])
    found = expected_counts(words, grammar, torch.tensor([3, 2, 3]))
    by_hand = [counts_by_hand(sentence, grammar) for sentence in sentences]
    torch.testing.assert_close(found.log_likelihood, torch.stack([x[0] for x in by_hand]))
    for mine, hand in zip(found[1:], zip(*(x[1:] for x in by_hand), strict=True), strict=True):
        torch.testing.assert_close(mine, sum(hand[1:], hand[0]))


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 2.0]), st.booleans())
def test_no_iteration_lowers_the_posterior_density(seed: int, concentration: float, forbid: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    grammar = random_grammar(2, 3, 4, True, generator)
    if forbid:
        grammar.rules[0, 0, :2] = -torch.inf
        grammar.terminals[1, 2] = -torch.inf
    sentences = [torch.randint(0, 4, (int(n),), generator=generator) for n in torch.randint(1, 7, (8,))]
    found = estimate(sentences, grammar, concentration, iterations=12, tolerance=-1.0, max_words=16)
    assert len(found.objective) == 13
    for before, after in zip(found.objective, found.objective[1:], strict=False):
        assert after >= before - 1e-9 * abs(before)
    law = ProbabilisticCFG(*found.grammar)
    likelihood = sum(float(law.log_prob(x)) for x in sentences)
    prior = sum(float(x[x > -torch.inf].sum()) for x in found.grammar) if concentration else 0.0
    assert likelihood + concentration * prior == pytest.approx(found.objective[-1], rel=1e-9)
    for row in (found.grammar.root, found.grammar.terminals):
        torch.testing.assert_close(row.exp().sum(-1), torch.ones(row.shape[:-1], dtype=torch.float64))
    both = found.grammar.rules.exp().sum((-1, -2)) + found.grammar.unary.exp().sum(-1)
    torch.testing.assert_close(both, torch.ones(2, dtype=torch.float64))
    if forbid:
        assert bool((found.grammar.rules[0, 0, :2] == -torch.inf).all())
        assert found.grammar.terminals[1, 2] == -torch.inf


def test_trained_grammar_expects_shorter_codes_than_the_first() -> None:
    torch.manual_seed(0)
    sentences = [torch.tensor([0] * n + [1] * n) for n in (1, 2, 3, 4) for _ in range(3)]  # a^n b^n is context-free
    start = random_grammar(2, 2, 2, generator=torch.Generator().manual_seed(1))
    found = estimate(sentences, start, iterations=150)
    assert found.objective[-1] > found.objective[0] + 10
    law = ProbabilisticCFG(*found.grammar)
    assert float(law.log_prob(torch.tensor([0, 0, 1, 1]))) > float(law.log_prob(torch.tensor([0, 1, 1, 0]))) + 3


def test_symbol_that_no_tree_uses_keeps_its_row() -> None:
    grammar = random_grammar(2, 2, 2, generator=torch.Generator().manual_seed(0))
    grammar.root[1] = -torch.inf
    grammar.rules[:, 1] = grammar.rules[:, :, 1] = -torch.inf  # nothing derives nonterminal 1
    found = estimate([torch.tensor([0, 1, 1])], grammar, iterations=3)
    assert bool(torch.isfinite(found.grammar.rules[1]).any())
    torch.testing.assert_close(found.grammar.rules[1].exp().sum(), torch.ones((), dtype=torch.float64))


def test_bad_input_raises_by_name() -> None:
    grammar = random_grammar(1, 1, 2)
    words = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="words: expected integers"):
        expected_counts(words.double(), grammar)
    with pytest.raises(ValueError, match="words: expected shape"):
        expected_counts(words[0], grammar)
    with pytest.raises(ValueError, match="words: expected values from 0 to 1"):
        expected_counts(words + 2, grammar)
    with pytest.raises(ValueError, match="lengths: expected shape"):
        expected_counts(words, grammar, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="number 1"):
        estimate([torch.tensor([0, 1]), torch.tensor([1])], grammar)
    with pytest.raises(ValueError, match="sentences: expected at least one"):
        estimate([], grammar)
    with pytest.raises(ValueError, match="concentration: expected at least 0"):
        estimate([words[0]], grammar, concentration=-1.0)
    with pytest.raises(ValueError, match="iterations: expected at least 0"):
        estimate([words[0]], grammar, iterations=-1)
