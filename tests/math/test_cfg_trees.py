"""Compiled best parse trees and draws: against the torch twin, and over the changes that leave a law as it is."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from torch import Tensor

from probllm.distributions.grammar_tree import GrammarTree
from probllm.distributions.inside import InsideDistribution
from probllm.math import cfg_scaled, cfg_torch, cfg_trees
from probllm.math.semirings import MAX
from tests.math.test_cfg import Case, cases

Parts = tuple[Tensor, ...]


def random_parts(rows: int, size: int, n: int, p: int, scale: float = 1.0, groups: int = 1) -> Parts:
    generator = torch.Generator().manual_seed(rows + 10 * size)
    m = n + p
    shapes = [(rows, size, size, m), (groups, n, m, m), (groups, n), (1, n, p)]
    return tuple(scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def with_offsets(parts: Parts, height: float) -> Parts:
    """The same law: what a rule adds for a symbol below it, the rules and words below that symbol take away."""
    spans, rules, root, unary = (x.clone() for x in parts)
    n, m = rules.shape[-3], rules.shape[-1]
    c = height * torch.linspace(-1, 1, m, dtype=torch.float64)
    rules = rules - c[:n, None, None] + c[:, None] + c
    unary = unary - c[:n, None] + c[n:]
    words = torch.arange(spans.shape[1])
    spans[:, words, words, n:] -= c[n:]
    return spans, rules, root + c[:n], unary


@given(cases(low_rank=False))
def test_best_tree_attains_the_maximum(case: Case) -> None:
    parts, lengths = case
    trees = cfg_trees.best(parts, lengths)
    best = cfg_torch.inside(MAX, tuple(MAX.lift(x) for x in parts), lengths)[0]
    score = GrammarTree(*parts, lengths=lengths).score(trees)
    torch.testing.assert_close(torch.where(best > -torch.inf, score, best), best, rtol=1e-12, atol=1e-9)
    assert bool((trees[best == -torch.inf] == -1).all())


@given(cases(low_rank=False))
def test_draws_are_trees_of_the_law(case: Case) -> None:
    parts, lengths = case
    trees = cfg_trees.draw(parts, lengths, 4)
    law = GrammarTree(*parts, lengths=lengths)
    possible = law.log_partition > -torch.inf
    assert bool((trees[:, ~possible] == -1).all())
    assert bool((law.log_prob(trees)[:, possible] > -30.0).all())  # a draw this rare comes once in e^30 / trees


@pytest.mark.parametrize("height", [0.0, 400.0])
def test_draws_follow_the_law_in_either_arithmetic(height: float) -> None:
    lengths, count = torch.tensor([4, 6, 1, 2]), 4000
    plain = random_parts(4, 6, 2, 2, 1.5, groups=4)
    parts = with_offsets(plain, height)
    torch.manual_seed(0)
    trees = cfg_trees.draw(parts, lengths, count)
    law = GrammarTree(*plain, lengths=lengths)
    scores, listed = law.topk(60)
    for row in range(4):
        probabilities = (scores[:, row] - law.log_partition[row]).exp()
        frequent = probabilities * count > 8
        each = (trees[:, row] == listed[frequent, row].unsqueeze(1)).flatten(-2).all(-1).sum(-1)
        found = torch.cat([each, count - each.sum(0, keepdim=True)]).double()
        expected = count * torch.cat([probabilities[frequent], 1 - probabilities[frequent].sum(0, keepdim=True)])
        found, expected = (x if expected[-1] > 8 else x[:-1] for x in (found, expected))
        assert len(expected) > 1
        statistic = float(((found - expected) ** 2 / expected).sum())
        assert scipy.stats.chi2.sf(statistic, len(expected)) > 1e-6


def test_offsets_that_cancel_leave_mode_and_draws_as_they_are() -> None:
    """They are beyond the scaled arithmetic, so that the rows go to logarithms; equal numbers draw equal trees."""
    lengths = torch.tensor([12, 5, 9])
    parts = random_parts(3, 12, 9, 4)
    far = with_offsets(parts, 400.0)
    flags = [
        cfg_scaled.scaled_inside(x[0], x[1], x[2], torch.zeros(3, 12, 13, dtype=torch.float64), lengths).flags
        for x in (parts, far)
    ]
    assert not flags[0].any()
    assert flags[1].all()
    assert torch.equal(cfg_trees.best(parts, lengths), cfg_trees.best(far, lengths))
    drawn = []
    for x in (parts, far):
        torch.manual_seed(1)
        drawn.append(cfg_trees.draw(x, lengths, 20))
    assert torch.equal(*drawn)


def test_forbidden_symbols_and_rules_never_come() -> None:
    spans, rules, root, unary = random_parts(2, 7, 3, 2)
    spans[0, 1, 4, :] = -torch.inf  # a bracket
    rules[:, :, 1, :] = -torch.inf  # symbol 1 as a left child
    parts, lengths = (spans, rules, root, unary), torch.tensor([7, 6])
    trees = torch.cat([cfg_trees.best(parts, lengths)[None], cfg_trees.draw(parts, lengths, 200)])
    assert not trees[:, 0, 1, 4].any()
    law = GrammarTree(*parts, lengths=lengths)
    assert bool((law.score(trees) > -torch.inf).all())


def test_best_of_equal_trees_is_one_tree() -> None:
    parts = tuple(torch.zeros_like(x) for x in random_parts(3, 9, 2, 2))
    lengths = torch.tensor([9, 1, 4])
    trees = cfg_trees.best(parts, lengths)
    assert bool((GrammarTree(*parts, lengths=lengths).score(trees) == 0).all())


def test_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probllm.math.kernels.threads.SMALL", 0.0)
    lengths, found = torch.tensor([6, 2, 1, 5, 6]), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for height in (0.0, 400.0):
            parts = with_offsets(random_parts(5, 6, 3, 2), height)
            torch.manual_seed(0)
            found.append(torch.cat([cfg_trees.best(parts, lengths)[None], cfg_trees.draw(parts, lengths, 7)]))
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_scores_give_the_trees_of_wide_ones(dtype: torch.dtype) -> None:
    parts = tuple(x.to(dtype) for x in random_parts(2, 8, 3, 3))
    wide, lengths = tuple(x.double() for x in parts), torch.tensor([8, 3])
    assert torch.equal(cfg_trees.best(parts, lengths), cfg_trees.best(wide, lengths))


def test_mode_is_that_of_the_semiring_recursion() -> None:
    law = GrammarTree(*random_parts(3, 9, 3, 2), lengths=torch.tensor([9, 4, 1]))
    assert torch.equal(law.mode, InsideDistribution._best(law))
