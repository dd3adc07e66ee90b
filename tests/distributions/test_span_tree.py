"""The tree CRF over labelled spans: the battery of a law over structures, and what is its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.span_tree import SpanTree
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import draw_lengths
from tests.distributions.trees import all_trees


def chart(tree: list[tuple[tuple[int, int], int]], size: int) -> Tensor:
    value = torch.zeros(size, size, dtype=torch.long)
    for (i, j), label in tree:
        value[i, j] = 1 + label
    return value


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, lengths, forbidden parts, scales and ties of every sort."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size, k = draw(st.sampled_from([(3, 2), (4, 1), (5, 1), (2, 3), (1, 3), (1, 1), (2, 2)]))
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.0, 0.2, 0.5]))
    ties = draw(st.booleans())
    some = (1, *batch[1:]) if batch else ()
    value = torch.randn(*draw(st.sampled_from([batch, batch, (), some])), size, size, k, generator=generator).double()
    value = scale * (value.round() if ties else value)
    spans = value.masked_fill(torch.rand(value.shape, generator=generator) < share, -torch.inf)
    lengths = draw_lengths(draw, batch, size, generator)

    def build(spans: Tensor) -> SpanTree:
        return SpanTree(spans, lengths)

    law = build(spans)
    trees = [(n, tree) for n in range(1, size + 1) for tree in all_trees(n, k)]
    structures = torch.stack([chart(tree, size) for _, tree in trees])
    leaves = torch.tensor([n for n, _ in trees])
    ones = (1,) * len(law.batch_shape)
    every = structures.reshape(len(trees), *ones, size, size).expand(-1, *law.batch_shape, -1, -1)
    listed = leaves.reshape(-1, *ones) == law.lengths

    none = ((-1, -1), -1)
    nodes = torch.tensor([[(*span, label) for span, label in [*tree, *[none] * (2 * (size - n))]] for n, tree in trees])

    def score(parts: Parts) -> Tensor:
        spans = parts["spans"].expand(*law.batch_shape, size, size, k)
        each = spans[..., nodes[..., 0], nodes[..., 1], nodes[..., 2]]
        return torch.where(nodes[..., 0] < 0, 0.0, each).sum(-1).movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def catalan(n: int) -> int:
    return math.comb(2 * n, n) // (n + 1)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (1, 4), (2, 3), (7, 1), (12, 5), (20, 1)])
def test_count_is_catalan_times_the_labelings(size: int, k: int) -> None:
    count = SpanTree(torch.zeros(size, size, k)).log_count
    expected = math.log(catalan(size - 1) * k ** (2 * size - 1))
    torch.testing.assert_close(count, torch.tensor(expected, dtype=torch.float64))


@st.composite
def laws(draw: st.DrawFn) -> SpanTree:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size, k = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    spans = 3 * torch.randn(2, size, size, k, generator=generator, dtype=torch.float64)
    return SpanTree(spans, torch.tensor([size, draw(st.integers(1, size))]))


@given(laws())
def test_mirrored_scores_give_the_mirrored_law(law: SpanTree) -> None:
    whole = SpanTree(law.parts["spans"])
    mirrored = SpanTree(law.parts["spans"].flip(-3, -2).transpose(-3, -2))
    torch.testing.assert_close(mirrored.log_partition, whole.log_partition)
    torch.testing.assert_close(mirrored.marginals.flip(-3, -2).transpose(-3, -2), whole.marginals)
    assert torch.equal(mirrored.mode.flip(-2, -1).transpose(-2, -1), whole.mode)


@given(laws())
def test_renamed_labels_rename_the_law(law: SpanTree) -> None:
    k = law.parts["spans"].shape[-1]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    renamed = SpanTree(law.parts["spans"][..., order], law.lengths)
    torch.testing.assert_close(renamed.log_partition, law.log_partition)
    torch.testing.assert_close(renamed.marginals, law.marginals[..., order])
    names = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    assert torch.equal(names[renamed.mode], law.mode)


@given(laws())
def test_padding_is_the_shorter_law(law: SpanTree) -> None:
    n = int(law.lengths[1])
    short = SpanTree(law.parts["spans"][1, :n, :n])
    torch.testing.assert_close(law.log_partition[1], short.log_partition)
    torch.testing.assert_close(law.marginals[1, :n, :n], short.marginals)
    assert not law.marginals[1, n:].any()
    assert not law.marginals[1, :, n:].any()
    assert torch.equal(law.mode[1, :n, :n], short.mode)
    torch.testing.assert_close(law.entropy()[1], short.entropy())


@given(laws())
def test_marginals_of_the_spans_of_a_leaf_and_of_the_whole_sum_to_one(law: SpanTree) -> None:
    each = law.marginals.sum(-1)
    for row, n in zip(each, law.lengths.tolist(), strict=True):
        torch.testing.assert_close(row.diagonal()[:n], torch.ones(n).double())
        torch.testing.assert_close(row[0, n - 1], torch.ones(()).double())
        torch.testing.assert_close(row.sum(), torch.tensor(2.0 * n - 1).double())


@pytest.mark.parametrize(
    "value",
    [
        [[1, 0, 1], [0, 1, 0], [0, 0, 1]],  # a span is missing
        [[1, 1, 1], [0, 1, 1], [0, 0, 1]],  # two of them cross
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]],  # not over all leaves
        [[0, 1, 1], [0, 1, 0], [0, 0, 1]],  # a leaf is missing
        [[1, 1, 1], [1, 1, 0], [0, 0, 0]],  # what stands below the diagonal is no span
    ],
)
def test_charts_that_are_no_trees_have_probability_zero(value: list[list[int]]) -> None:
    law = SpanTree(torch.zeros(3, 3, 1))
    assert law.log_prob(torch.tensor(value)) == -torch.inf
    assert law.support.event_dim == 2


def test_what_is_known_of_a_tree_has_the_likelihood_of_the_trees_that_agree() -> None:
    law = SpanTree(torch.zeros(4, 4, 1))
    allowed = torch.ones(4, 4, 1, dtype=torch.bool)
    allowed[0, 2] = allowed[2, 3] = False  # crosses the known span from 1 to 2, or leaves it no room
    allowed[0, 1] = False
    torch.testing.assert_close(law.log_prob_partial(allowed).exp(), torch.tensor(1 / 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 3),), ValueError, r"spans: expected shape \[\.\.\., T, T, K\], got \[3, 3\]"),
        ((torch.zeros(2, 3, 4, 1),), ValueError, "spans: expected shape"),
        ((torch.zeros(3, 3, 0),), ValueError, "spans: expected shape"),
        ((torch.zeros(0, 0, 2),), ValueError, "spans: expected shape"),
        ((torch.zeros(3, 3, 2, dtype=torch.long),), TypeError, "spans: expected floating-point"),
        ((torch.zeros(3, 3, 2), torch.tensor(4)), ValueError, "lengths: expected values from 1 to 3"),
        ((torch.zeros(3, 3, 2), torch.tensor(0)), ValueError, "lengths: expected values from 1 to 3"),
        ((torch.zeros(3, 3, 2), torch.tensor(2.0)), TypeError, "lengths"),
        ((torch.zeros(2, 3, 3, 2), torch.tensor([1, 2, 3])), ValueError, "batch shapes do not broadcast"),
    ],
)
def test_bad_input_raises_by_name(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpanTree(*arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinite_scores_are_refused_when_summed(bad: float) -> None:
    spans = torch.zeros(3, 3, 2)
    spans[0, 2, 1] = bad
    with pytest.raises(ValueError, match="spans: scores must not be NaN"):
        _ = SpanTree(spans).log_partition


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3, 3), TypeError, "value: expected integers"),
        (torch.zeros(3, 2, dtype=torch.long), ValueError, "value: expected shape"),
        (torch.full((3, 3), 3), ValueError, "value: expected entries from 0 to 2"),
        (torch.full((3, 3), -1), ValueError, "value: entry -1"),
    ],
)
def test_values_that_are_no_charts_are_refused(value: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpanTree(torch.zeros(3, 3, 2)).log_prob(value)


def test_law_in_a_plate_is_observed_sampled_and_fitted_by_svi() -> None:
    lengths = torch.tensor([4, 2, 3])
    observed = SpanTree(torch.randn(3, 4, 4, 2), lengths).sample()

    def model(trees: Tensor | None = None) -> Tensor:
        spans = pyro.param("spans", torch.zeros(4, 4, 2))
        with pyro.plate("sentences", 3):
            return pyro.sample("trees", SpanTree(spans, lengths), obs=trees)

    trace = pyro.poutine.trace(model).get_trace(observed)
    trace.compute_log_prob()
    torch.testing.assert_close(
        trace.nodes["trees"]["log_prob"], SpanTree(torch.zeros(4, 4, 2), lengths).log_prob(observed)
    )
    svi = pyro.infer.SVI(model, lambda trees=None: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    losses = [svi.step(observed) for _ in range(20)]
    assert losses[-1] < losses[0]
    drawn = pyro.infer.Predictive(model, {}, num_samples=5)()["trees"]
    assert drawn.shape == (5, 3, 4, 4)
    assert bool(torch.isfinite(SpanTree(torch.zeros(4, 4, 2), lengths).log_prob(drawn)).all())
