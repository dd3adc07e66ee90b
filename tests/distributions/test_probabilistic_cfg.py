"""The law over a grammar's sentences, against the list of all derivations of all sentences."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.probabilistic_cfg import ProbabilisticCFG
from tests.distributions.derivations import chart, derivations, padded, picked

Tables = dict[str, Tensor]


@st.composite
def grammars(draw: st.DrawFn, low_rank: bool = False) -> Tables:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, p, v, r = (draw(st.integers(1, 2)) for _ in range(4))
    m, scale = n + p, draw(st.sampled_from([1.0, 10.0, 300.0]))
    share = draw(st.sampled_from([0.0, 0.2, 0.6]))

    def weights(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    tables = {"root": weights(n), "terminals": weights(p, v)}
    if low_rank:
        tables |= {"head": weights(n, r), "left": weights(r, m), "right": weights(r, m)}
    else:
        tables["rules"] = weights(n, m, m)
    if draw(st.booleans()):
        tables["unary"] = weights(n, p)
    return tables


def by_hand(tables: Tables, words: Tensor) -> Tensor:
    """log p(words) ``[sentences]`` of one length, by its derivations."""
    n, p = tables["root"].shape[-1], tables["terminals"].shape[-2]
    trees = derivations(words.shape[-1], n, p)
    symbols, rules, unary = (padded([tree[k] for _, tree in trees], w) for k, w in enumerate((3, 3, 2)))
    total = tables["root"][[top for top, _ in trees]] + picked(tables["rules"], rules)
    if "unary" in tables:
        total = total + picked(tables["unary"], unary)
    else:
        total = total.masked_fill((unary[:, :, 0] >= 0).any(-1), -torch.inf)
    leaf = symbols[..., 2] >= n
    position = torch.where(leaf, symbols[..., 0], 0)
    each = tables["terminals"][torch.where(leaf, symbols[..., 2] - n, 0), words[:, position]]  # [sentences, trees, .]
    return (total + torch.where(leaf, each, 0.0).sum(-1)).logsumexp(-1)


def sentences(v: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(v), repeat=length)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


@given(grammars(), st.integers(1, 3))
def test_log_prob_sums_over_all_derivations(tables: Tables, length: int) -> None:
    words = sentences(tables["terminals"].shape[-1], length)
    law = ProbabilisticCFG(**tables)
    expected = by_hand(tables, words)
    close(law.log_prob(words), expected)
    longer = torch.cat([words, torch.full((len(words), 2), -1)], -1)
    close(law.log_prob(longer), expected)
    close(law.log_prob(longer.clamp_min(0), torch.tensor(length)), expected)
    posterior = law.posterior(longer)
    close(posterior.log_partition, expected)
    close(law.log_weight_of_lengths(length)[-1], expected.logsumexp(0))


def test_log_prob_sums_over_all_derivations_of_four_words() -> None:
    torch.manual_seed(0)
    shapes = {"root": (2,), "rules": (2, 4, 4), "terminals": (2, 2), "unary": (2, 2)}
    tables = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    words = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    close(ProbabilisticCFG(**tables).log_prob(words), by_hand(tables, words))


@given(grammars(), st.integers(1, 3))
def test_gradient_is_that_of_the_enumerated_sum(tables: Tables, length: int) -> None:
    words = sentences(tables["terminals"].shape[-1], length)
    found = []
    for make in (lambda t: ProbabilisticCFG(**t).log_prob(words), lambda t: by_hand(t, words)):
        leaves = {name: x.clone().requires_grad_() for name, x in tables.items()}
        value = make(leaves)
        finite = value > -torch.inf
        total = (
            torch.where(finite, value, 0.0).sum() if bool(finite.any()) else sum(x.sum() * 0 for x in leaves.values())
        )
        found.append(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
    for mine, hand in zip(*found, strict=True):
        if mine is None:
            assert hand is None or not hand.nan_to_num().any()
        else:
            assert bool(torch.isfinite(mine).all())
            close(mine, torch.zeros_like(mine) if hand is None else hand.nan_to_num())


@given(grammars(low_rank=True), st.integers(1, 4))
def test_low_rank_grammar_is_the_explicit_one(tables: Tables, length: int) -> None:
    leaves = {name: x.clone().requires_grad_() for name, x in tables.items()}
    law = ProbabilisticCFG.low_rank(**leaves)
    each = (leaves["head"][:, :, None, None] + leaves["left"][:, :, None] + leaves["right"][:, None]).logsumexp(1)
    close(law.rules.detach(), each.detach())
    rules = law.rules.detach()
    rest = {name: x for name, x in leaves.items() if name in ("root", "terminals", "unary")}
    words = sentences(tables["terminals"].shape[-1], length)[:3]
    explicit = ProbabilisticCFG(rules=rules, **rest)
    close(law.log_prob(words), explicit.log_prob(words))
    close(law.posterior(words).log_partition, law.log_prob(words))
    names = [
        name for name in leaves if name != "unary" or length == 1 or bool((law.log_prob(words) > -torch.inf).any())
    ]
    found = torch.autograd.grad(law.log_prob(words).sum(), [leaves[n] for n in names], allow_unused=True)
    again = torch.autograd.grad(law.posterior(words).log_partition.sum(), [leaves[n] for n in names], allow_unused=True)
    for one, other in zip(found, again, strict=True):
        one, other = torch.broadcast_tensors(
            *(torch.zeros((), dtype=torch.float64) if x is None else x for x in (one, other))
        )
        assert bool(torch.isfinite(one).all())
        close(one, other)


def proper(
    n: int = 2, p: int = 2, v: int = 3, unary: bool = True, seed: int = 0, max_length: int = 4
) -> ProbabilisticCFG:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n,), (n, n + p, n + p), (p, v), (n, p))
    root, rules, terminals, single = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    law = ProbabilisticCFG(root, rules, terminals, single + 1 if unary else None, max_length)
    return law.normalised()


def test_normalised_weights_sum_to_one() -> None:
    law = proper()
    ones = torch.ones(2, dtype=torch.float64)
    close(law.root.exp().sum(), ones[0])
    close(law.rules.exp().sum((-1, -2)) + law.unary.exp().sum(-1), ones)
    close(law.terminals.exp().sum(-1), ones)
    assert float(law.log_weight_of_lengths(60).exp().sum()) <= 1 + 1e-9
    wide = torch.randn(2, 3, dtype=torch.float64)
    thin = ProbabilisticCFG.low_rank(wide[:, 0], wide, torch.randn(3, 4).double(), torch.randn(3, 4).double(), wide)
    close(thin.normalised().rules.exp().sum((-1, -2)), ones)
    nothing = ProbabilisticCFG(*(torch.full(s, -torch.inf) for s in ((2,), (2, 4, 4), (2, 3)))).normalised()
    assert bool((nothing.rules == -torch.inf).all())


@pytest.mark.parametrize("unary", [False, True])
def test_samples_have_the_frequencies_of_the_law_given_the_greatest_length(unary: bool) -> None:
    """Chi-square at a false-alarm rate of one in a million, the seed fixed."""
    law = proper(v=2, unary=unary, max_length=3)
    count = 3000
    trees, words = law.sample_joint((count,))
    assert trees.shape == (count, 3, 3)
    assert words.shape == (count, 3)
    listed = torch.cat(
        [torch.nn.functional.pad(sentences(2, length), (0, 3 - length), value=-1) for length in (1, 2, 3)]
    )
    log_prob = law.log_prob(listed)
    close(log_prob.logsumexp(0), law.log_weight_of_lengths(3).logsumexp(0))
    observed = (words.unsqueeze(1) == listed).all(-1).double().sum(0)
    assert observed.sum() == count
    expected = count * log_prob.softmax(0)
    assert not observed[expected == 0].any()
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-6
    assert bool((law.posterior(words).log_prob(trees) > -torch.inf).all())


def test_trees_are_drawn_by_their_weights() -> None:
    law = proper(n=2, p=1, v=1, max_length=3)
    trees = law.sample_joint((3000,))[0]
    every = [(length, top, tree) for length in (1, 2, 3) for top, tree in derivations(length, 2, 1)]
    listed = torch.stack([chart(tree, 3, 2, 1) for _, _, tree in every])
    weights = torch.stack(
        [
            law.posterior(torch.tensor([0] * n + [-1] * (3 - n))).score(x)
            for (n, _, _), x in zip(every, listed, strict=True)
        ]
    )
    observed = (trees.unsqueeze(1) == listed).flatten(2).all(-1).double().sum(0)
    assert observed.sum() == 3000
    expected = 3000 * weights.softmax(0)
    rare = expected < 5
    observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    statistic = float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-6


def test_batch_of_grammars_is_each_grammar() -> None:
    laws = [proper(seed=seed) for seed in (0, 1)]
    tables = [
        torch.stack(x) for x in zip(*((law.root, law.rules, law.terminals, law.unary) for law in laws), strict=True)
    ]
    both = ProbabilisticCFG(*tables, max_length=4)
    assert both.batch_shape == (2,)
    words = torch.tensor([[0, 1, 2, -1], [2, 2, -1, -1], [1, -1, -1, -1]])
    close(both.log_prob(words.unsqueeze(1)), torch.stack([law.log_prob(words) for law in laws], -1))
    wide = both.expand((3, 2))
    assert wide.log_prob(words.unsqueeze(1)).shape == (3, 2)
    drawn = wide.sample((50,))
    assert drawn.shape == (50, 3, 2, 4)
    assert bool((both.log_prob(drawn) > -torch.inf).all())
    assert len(drawn[:, :, 0].flatten(0, 1).unique(dim=0)) > 3


def test_one_word_needs_a_unary_rule() -> None:
    assert proper(unary=False).log_prob(torch.tensor([1])) == -torch.inf
    law = proper()
    expected = (law.root[:, None] + law.unary + law.terminals[:, 1]).flatten().logsumexp(0)
    close(law.log_prob(torch.tensor([1])), expected)


@pytest.mark.parametrize("name", ["root", "rules", "terminals"])
def test_grammar_that_derives_nothing_has_no_mass_and_no_nan(name: str) -> None:
    tables = {"root": torch.zeros(2), "rules": torch.zeros(2, 4, 4), "terminals": torch.zeros(2, 3)}
    tables[name] = torch.full_like(tables[name], -torch.inf)
    leaves = {name: x.requires_grad_() for name, x in tables.items()}
    law = ProbabilisticCFG(**leaves, max_length=4)
    words = torch.tensor([[0, 1, 2, 0], [1, 2, -1, -1]])
    assert bool((law.log_prob(words) == -torch.inf).all())
    for gradient in torch.autograd.grad(law.log_prob(words).sum(), list(leaves.values())):
        assert not gradient.any()
    trees, drawn = law.sample_joint((3,))
    assert bool((trees == -1).all())
    assert bool((drawn == -1).all())
    posterior = law.posterior(words)
    assert not posterior.marginals.any()
    assert bool((posterior.mode == -1).all())
    assert not posterior.entropy().any()


def test_rules_without_an_end_derive_nothing() -> None:
    """A -> A A, and no nonterminal ever becomes a word."""
    rules = torch.full((1, 2, 2), -torch.inf)
    rules[0, 0, 0] = 0.0
    law = ProbabilisticCFG(torch.zeros(1), rules, torch.zeros(1, 2), max_length=5)
    assert bool((law.log_weight_of_lengths(5) == -torch.inf).all())
    assert bool((law.sample((2,)) == -1).all())


def test_word_that_no_preterminal_has_gives_the_sentence_no_mass() -> None:
    law = proper()
    terminals = law.terminals.clone()
    terminals[:, 2] = -torch.inf
    law = ProbabilisticCFG(law.root, law.rules, terminals, law.unary)
    assert law.log_prob(torch.tensor([[0, 2, 1], [0, 1, 1]])).isinf().tolist() == [True, False]


def test_mode_and_entropy_say_why_there_is_none() -> None:
    law = proper()
    for ask in (lambda: law.mode, law.entropy):
        with pytest.raises(NotImplementedError, match="intractable"):
            ask()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"root": torch.zeros(0)}, ValueError, "root: expected shape"),
        ({"rules": torch.zeros(2, 2, 2)}, ValueError, "rules: expected shape"),
        ({"rules": torch.zeros(2, 4, 3)}, ValueError, "rules: expected shape"),
        ({"terminals": torch.zeros(3, 5)}, ValueError, r"terminals: expected shape \[\.\.\., 2, V\]"),
        ({"terminals": torch.zeros(2, 0)}, ValueError, "terminals: expected shape"),
        ({"unary": torch.zeros(2, 3)}, ValueError, r"unary: expected shape \[\.\.\., 2, 2\]"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1"),
        ({"root": torch.zeros(2, dtype=torch.long)}, TypeError, "root: expected floating-point"),
        ({"root": torch.zeros(3, 2), "terminals": torch.zeros(4, 2, 5)}, ValueError, "batch shapes do not broadcast"),
    ],
)
def test_bad_grammars_raise_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tables = {"root": torch.zeros(2), "rules": torch.zeros(2, 4, 4), "terminals": torch.zeros(2, 5)}
    with pytest.raises(error, match=message):
        ProbabilisticCFG(**{**tables, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": torch.zeros(())}, "root: expected shape"),
        ({"head": torch.zeros(3, 3)}, r"head: expected shape \[\.\.\., 2, R\]"),
        ({"left": torch.zeros(2, 4)}, "left: expected shape"),
        ({"left": torch.zeros(3, 2)}, "left: expected shape"),
        ({"right": torch.zeros(3, 5)}, r"right: expected shape \[\.\.\., 3, 4\]"),
        ({"terminals": torch.zeros(3, 5)}, "terminals: expected shape"),
    ],
)
def test_bad_factors_raise_by_name(change: dict[str, Tensor], message: str) -> None:
    tables = {"root": torch.zeros(2), "head": torch.zeros(2, 3), "left": torch.zeros(3, 4), "right": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        ProbabilisticCFG.low_rank(**{**tables, "terminals": torch.zeros(2, 5), **change})


@pytest.mark.parametrize(
    ("words", "lengths", "error", "message"),
    [
        (torch.zeros(3), None, TypeError, "words: expected integers"),
        (torch.tensor(1), None, ValueError, "words: expected shape"),
        (torch.zeros(2, 0, dtype=torch.long), None, ValueError, "words: expected shape"),
        (torch.tensor([0, 3]), None, ValueError, "words: expected values from 0 to 2, got values from 0 to 3"),
        (torch.tensor([0, -1, 1]), None, ValueError, "words: expected -1 behind the last word alone"),
        (torch.tensor([0, -2]), torch.tensor(2), ValueError, "words: expected values from 0 to 2"),
        (torch.tensor([0, 1]), torch.tensor(3), ValueError, "lengths: expected values from 1 to 2"),
        (torch.zeros(2, 2, dtype=torch.long), torch.tensor([1, 2, 2]), ValueError, "words: batch shape"),
    ],
)
def test_bad_sentences_raise_by_name(
    words: Tensor, lengths: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        proper().log_prob(words, lengths)


def test_sampling_needs_a_greatest_length() -> None:
    law = proper()
    with pytest.raises(ValueError, match="max_length"):
        ProbabilisticCFG(law.root, law.rules, law.terminals).sample()


def test_law_in_a_plate_is_observed_sampled_and_fitted_by_svi() -> None:
    truth = proper(max_length=5)
    observed = truth.sample((20,))

    def model(words: Tensor | None = None) -> Tensor:
        rules = pyro.param("rules", torch.zeros(2, 4, 4, dtype=torch.float64))
        law = ProbabilisticCFG(truth.root, rules, truth.terminals, truth.unary, max_length=5).normalised()
        with pyro.plate("sentences", 20):
            return pyro.sample("words", law, obs=words)

    svi = pyro.infer.SVI(model, lambda words=None: None, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    losses = [svi.step(observed) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert pyro.infer.Predictive(model, {}, num_samples=3)()["words"].shape == (3, 20, 5)


def test_functions_of_the_weights_are_mapped_and_differentiated() -> None:
    law = proper()
    words = torch.tensor([[0, 1, 2], [2, 2, -1]])
    tables = torch.stack([law.rules, law.rules + torch.randn(2, 4, 4, dtype=torch.float64)])

    def value(rules: Tensor) -> Tensor:
        return ProbabilisticCFG(law.root, rules, law.terminals, law.unary).log_prob(words).sum()

    together = torch.func.vmap(torch.func.grad(value))(tables)
    for one, rules in zip(together, tables, strict=True):
        leaf = rules.clone().requires_grad_()
        close(one, torch.autograd.grad(value(leaf), leaf)[0])
