"""The law over parse trees of a scored grammar: the battery of a law over structures, and what is its own."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.grammar_tree import GrammarTree
from probllm.distributions.span_tree import SpanTree
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.derivations import chart, derivations, padded, picked
from tests.distributions.sequences import draw_lengths


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, lengths, forbidden parts, scales and ties of every sort."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with_unary = draw(st.booleans())
    size, n, p = draw(st.sampled_from([(3, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 2, 2), (4, 1, 1)]))
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.0, 0.2, 0.5]))
    ties = draw(st.booleans())

    def scores(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        value = scale * (value.round() if ties else value)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    some = (1, *batch[1:]) if batch else ()
    m = n + p
    parts = {"spans": scores(*draw(st.sampled_from([batch, batch, (), some])), size, size, m)}
    for name, shape in (("rules", (n, m, m)), ("root", (n,)), ("unary", (n, p))):
        parts[name] = scores(*draw(st.sampled_from([(), batch])), *shape)
    if not with_unary:
        parts["unary"] = torch.full_like(parts["unary"], -torch.inf)
    lengths = draw_lengths(draw, batch, size, generator)

    def build(**parts: Tensor) -> GrammarTree:
        return GrammarTree(**parts, lengths=lengths)

    law = build(**parts)
    trees = [(t, top, tree) for t in range(1, size + 1) for top, tree in derivations(t, n, p)]
    structures = torch.stack([chart(tree, size, n, p) for _, _, tree in trees])
    ones = (1,) * len(law.batch_shape)
    every = structures.reshape(len(trees), *ones, size, size).expand(-1, *law.batch_shape, -1, -1)
    listed = torch.tensor([t for t, _, _ in trees]).reshape(-1, *ones) == law.lengths
    symbols, rules, unary = (padded([tree[k] for _, _, tree in trees], w) for k, w in enumerate((3, 3, 2)))
    tops = torch.tensor([top for _, top, _ in trees])

    def score(parts: Parts) -> Tensor:
        total = picked(parts["spans"], symbols) + picked(parts["rules"], rules) + picked(parts["unary"], unary)
        total = total + parts["root"][..., tops]
        return total.expand(*law.batch_shape, len(trees)).movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def grammar(n: int, p: int, size: int, *batch: int, unary: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + 10 * p + 100 * size)
    shapes = {"spans": (*batch, size, size, n + p), "rules": (n, n + p, n + p), "root": (n,), "unary": (n, p)}
    parts = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    return parts if unary else {**parts, "unary": torch.full((n, p), -torch.inf, dtype=torch.float64)}


def test_grammar_whose_rules_do_not_matter_is_the_span_law_of_its_symbols() -> None:
    torch.manual_seed(0)
    spans = torch.randn(2, 6, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 4])
    zero = torch.zeros((), dtype=torch.float64)
    spans[:, torch.arange(6), torch.arange(6), :2] = -torch.inf  # leaves are preterminals, and all else nonterminals
    law = GrammarTree(spans, zero.expand(2, 3, 3), zero.expand(2), lengths=lengths)
    off = ~torch.eye(6, dtype=torch.bool)
    wide = spans.clone()
    wide[..., 2] = spans[..., 2].masked_fill(off, -torch.inf)
    other = SpanTree(wide, lengths)
    torch.testing.assert_close(law.log_partition, other.log_partition)
    torch.testing.assert_close(law.marginals, other.marginals)
    assert torch.equal(law.mode, other.mode)
    torch.testing.assert_close(law.entropy(), other.entropy())


def test_sentence_of_one_word_has_a_tree_only_by_a_unary_rule() -> None:
    parts = grammar(2, 2, 1, unary=False)
    law = GrammarTree(**parts)
    assert law.log_partition == -torch.inf
    assert law.sample().item() == law.mode.item() == -1
    unary = torch.full((2, 2), -torch.inf, dtype=torch.float64)
    unary[1, 0] = 0.5
    law = GrammarTree(**{**parts, "unary": unary})
    torch.testing.assert_close(law.log_partition, parts["spans"][0, 0, 1:3].sum() + parts["root"][1] + 0.5)
    assert law.mode.item() == 1 + 4 + 1 * 2 + 0


def test_mirrored_grammar_gives_the_mirrored_law() -> None:
    parts = grammar(2, 3, 6, 2)
    law = GrammarTree(**parts)
    mirrored = {
        **parts,
        "spans": parts["spans"].flip(-3, -2).transpose(-3, -2),
        "rules": parts["rules"].transpose(-1, -2),
    }
    other = GrammarTree(**mirrored)
    torch.testing.assert_close(other.log_partition, law.log_partition)
    torch.testing.assert_close(other.marginals.flip(-3, -2).transpose(-3, -2), law.marginals)
    assert torch.equal(other.mode.flip(-2, -1).transpose(-2, -1), law.mode)


def test_renamed_nonterminals_rename_the_law() -> None:
    parts = grammar(3, 2, 5, 2)
    order = torch.tensor([2, 0, 1])
    symbols = torch.cat([order, torch.tensor([3, 4])])
    renamed = {
        "spans": parts["spans"][..., symbols],
        "rules": parts["rules"][order][:, symbols][:, :, symbols],
        "root": parts["root"][order],
        "unary": parts["unary"][order],
    }
    law, other = GrammarTree(**parts), GrammarTree(**renamed)
    torch.testing.assert_close(other.log_partition, law.log_partition)
    torch.testing.assert_close(other.marginals, law.marginals[..., symbols])


def test_padding_is_the_shorter_law() -> None:
    parts = grammar(2, 2, 5, 2)
    law = GrammarTree(**parts, lengths=torch.tensor([3, 5]))
    short = GrammarTree(**{**parts, "spans": parts["spans"][0, :3, :3]})
    torch.testing.assert_close(law.log_partition[0], short.log_partition)
    torch.testing.assert_close(law.marginals[0, :3, :3], short.marginals)
    assert not law.marginals[0, 3:].any()
    assert not law.marginals[0, :, 3:].any()
    assert torch.equal(law.mode[0, :3, :3], short.mode)


def test_charts_that_are_no_parses_have_probability_zero() -> None:
    law = GrammarTree(**grammar(2, 2, 2))
    good = [[3, 1], [0, 4]]
    assert law.log_prob(torch.tensor(good)) > -torch.inf
    for value in ([[1, 1], [0, 4]], [[3, 4], [0, 4]], [[0, 1], [0, 4]], [[3, 0], [0, 4]], [[3, 5], [0, 4]]):
        assert law.log_prob(torch.tensor(value)) == -torch.inf, value


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spans": torch.zeros(3, 3, 2)}, ValueError, r"spans: expected shape \[\.\.\., T, T, 3\]"),
        ({"spans": torch.zeros(3, 2, 3)}, ValueError, "spans: expected shape"),
        ({"rules": torch.zeros(3, 3, 3)}, ValueError, r"rules: expected shape \[\.\.\., 2, 2 \+ P, 2 \+ P\]"),
        ({"rules": torch.zeros(2, 2, 2)}, ValueError, "rules: expected shape"),
        ({"root": torch.zeros(())}, ValueError, "root: expected shape"),
        ({"root": torch.zeros(0)}, ValueError, "root: expected shape"),
        ({"unary": torch.zeros(2, 2)}, ValueError, r"unary: expected shape \[\.\.\., 2, 1\]"),
        ({"lengths": torch.tensor(4)}, ValueError, "lengths: expected values from 1 to 3"),
        ({"rules": torch.zeros(2, 3, 3, dtype=torch.long)}, TypeError, "rules: expected floating-point"),
        ({"root": torch.zeros(5, 2), "lengths": torch.tensor([1, 2])}, ValueError, "batch shapes do not broadcast"),
    ],
)
def test_bad_input_raises_by_name(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    parts = {"spans": torch.zeros(3, 3, 3), "rules": torch.zeros(2, 3, 3), "root": torch.zeros(2)}
    with pytest.raises(error, match=message):
        GrammarTree(**{**parts, **change})


@pytest.mark.parametrize("name", ["spans", "rules", "root", "unary"])
def test_nan_and_infinite_scores_are_refused_when_summed(name: str) -> None:
    for bad in (torch.nan, torch.inf):
        parts = grammar(2, 2, 3)
        parts[name].view(-1)[0] = bad
        with pytest.raises(ValueError, match=f"{name}: scores must not be NaN"):
            _ = GrammarTree(**parts).log_partition


def test_law_in_a_plate_is_observed_sampled_and_fitted_by_svi() -> None:
    parts = {name: x.float() for name, x in grammar(2, 2, 4, 3).items()}
    lengths = torch.tensor([4, 1, 3])
    observed = GrammarTree(**parts, lengths=lengths).sample()

    def model(trees: Tensor | None = None) -> Tensor:
        rules = pyro.param("rules", torch.zeros(2, 4, 4))
        with pyro.plate("sentences", 3):
            return pyro.sample("trees", GrammarTree(**{**parts, "rules": rules}, lengths=lengths), obs=trees)

    svi = pyro.infer.SVI(model, lambda trees=None: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    losses = [svi.step(observed) for _ in range(20)]
    assert losses[-1] < losses[0]
    drawn = pyro.infer.Predictive(model, {}, num_samples=5)()["trees"]
    assert drawn.shape == (5, 3, 4, 4)
    assert bool(torch.isfinite(GrammarTree(**parts, lengths=lengths).log_prob(drawn)).all())
