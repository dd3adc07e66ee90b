"""What both laws over dependency trees share: which heads are a tree, symmetries, padding, bad input, and Pyro."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import ProjectiveDependencyTree, SpanningTree
from probllm.distributions.dependency_tree import DependencyTreeLaw
from tests.distributions import dependencies

LAWS = (ProjectiveDependencyTree, SpanningTree)
both = pytest.mark.parametrize("law_class", LAWS)
either = pytest.mark.parametrize("single_root", [True, False])


def number(n: int, single_root: bool, projective: bool) -> int:
    if projective:
        return math.comb(3 * n - 2, n - 1) // n if single_root else math.comb(3 * n, n) // (2 * n + 1)
    return n ** (n - 1) if single_root else (n + 1) ** (n - 1)


@both
@either
@pytest.mark.parametrize("n", [1, 2, 3, 6, 14])
def test_count_is_the_formula(law_class: type[DependencyTreeLaw], single_root: bool, n: int) -> None:
    count = law_class(torch.randn(n, n), torch.randn(n), single_root).log_count
    expected = math.log(number(n, single_root, law_class._projective))
    torch.testing.assert_close(count, torch.tensor(expected, dtype=torch.float64))


@both
@either
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exactly_the_trees_have_a_probability(law_class: type[DependencyTreeLaw], single_root: bool, n: int) -> None:
    every = torch.tensor(list(itertools.product(range(n + 1), repeat=n)))
    padded = torch.cat([every, torch.zeros(len(every), 1, dtype=torch.long)], -1)
    trees = set(dependencies.trees(n, single_root, law_class._projective))
    expected = torch.tensor([tuple(heads) in trees for heads in every.tolist()])
    assert int(expected.sum()) == number(n, single_root, law_class._projective)
    log_prob = law_class(torch.zeros(n, n), torch.zeros(n), single_root).log_prob(every)
    assert torch.equal(log_prob > -torch.inf, expected)
    law = law_class(torch.zeros(n + 1, n + 1), torch.zeros(n + 1), single_root, torch.tensor(n))
    assert torch.equal(law.log_prob(padded), log_prob)
    padded[:, 0] = n + 1  # a head at padding
    assert bool((law.log_prob(padded) == -torch.inf).all())


@st.composite
def laws(draw: st.DrawFn) -> DependencyTreeLaw:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 9))
    arcs, root = (3 * torch.randn(2, n, *more, generator=generator, dtype=torch.float64) for more in ((n,), ()))
    lengths = torch.tensor([n, draw(st.integers(1, n))])
    return draw(st.sampled_from(LAWS))(arcs, root, draw(st.booleans()), lengths)


def rebuilt(law: DependencyTreeLaw, arcs: Tensor, lengths: Tensor | None = None) -> DependencyTreeLaw:
    return type(law)(arcs, arcs.diagonal(0, -2, -1), law.single_root, lengths)


def renamed(heads: Tensor, order: Tensor) -> Tensor:
    """Heads where word i is now what was word ``order[i]``."""
    new_name = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order.argsort()])
    return new_name[heads[..., order]]


@given(laws())
def test_reversed_sentences_have_the_reversed_law_and_any_order_if_arcs_may_cross(law: DependencyTreeLaw) -> None:
    arcs = law.parts["arcs"]
    n = arcs.shape[-1]
    whole = rebuilt(law, arcs)
    crossing = isinstance(law, SpanningTree)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)) if crossing else torch.arange(n).flip(0)
    other = rebuilt(law, arcs[..., order, :][..., order])
    torch.testing.assert_close(other.log_partition, whole.log_partition)
    torch.testing.assert_close(other.marginals, whole.marginals[..., order, :][..., order])
    torch.testing.assert_close(other.log_prob(renamed(whole.mode, order)), whole.log_prob(whole.mode))
    assert torch.equal(other.mode, renamed(whole.mode, order))


@given(laws())
def test_padding_is_the_shorter_law(law: DependencyTreeLaw) -> None:
    n = int(law.lengths[1])
    arcs = law.parts["arcs"].clone()
    arcs[1, n:], arcs[1, :, n:] = 1e9, -torch.inf  # nobody looks at what lies at padding
    law, short = rebuilt(law, arcs, law.lengths), rebuilt(law, arcs[1, :n, :n])
    torch.testing.assert_close(law.log_partition[1], short.log_partition)
    torch.testing.assert_close(law.marginals[1, :n, :n], short.marginals)
    assert not law.marginals[1, n:].any()
    assert not law.marginals[1, :, n:].any()
    assert torch.equal(law.mode[1, :n], short.mode)
    assert not law.mode[1, n:].any()
    assert not law.sample((5,))[:, 1, n:].any()
    torch.testing.assert_close(law.entropy()[1], short.entropy())
    torch.testing.assert_close(law.topk(3)[0][:, 1], short.topk(3)[0])


@given(laws())
def test_each_word_has_one_head_and_a_single_root_one_child(law: DependencyTreeLaw) -> None:
    for table, n in zip(law.marginals, law.lengths.tolist(), strict=True):
        torch.testing.assert_close(table.sum(0)[:n], torch.ones(n).double())
        if law.single_root:
            torch.testing.assert_close(table.diagonal().sum(), torch.ones(()).double())


@given(laws())
def test_a_score_on_all_heads_of_a_word_moves_log_partition_and_nothing_else(law: DependencyTreeLaw) -> None:
    shift = torch.linspace(-1e5, 1e6, law.event_shape[0], dtype=torch.float64)
    other = rebuilt(law, law.parts["arcs"] + shift, law.lengths)
    moved = torch.stack([shift[: int(n)].sum() for n in law.lengths])
    torch.testing.assert_close(other.log_partition, law.log_partition + moved)
    torch.testing.assert_close(other.marginals, law.marginals, rtol=1e-6, atol=1e-8)


@given(laws())
def test_vmap_is_a_loop(law: DependencyTreeLaw) -> None:
    arcs = law.parts["arcs"]

    def results(arcs: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        one = rebuilt(law, arcs, n)
        return one.log_partition, one.marginals, one.mode

    for a, b in zip(torch.func.vmap(results)(arcs, law.lengths), results(arcs, law.lengths), strict=True):
        torch.testing.assert_close(a, b)
    drawn = torch.func.vmap(lambda x: rebuilt(law, x).sample((3,)), randomness="different")(arcs)
    assert bool((rebuilt(law, arcs).log_prob(drawn.transpose(0, 1)) > -torch.inf).all())


@both
def test_the_diagonal_of_arcs_does_not_count(law_class: type[DependencyTreeLaw]) -> None:
    arcs, root = torch.randn(3, 3), torch.randn(3, requires_grad=True)
    changed = arcs.clone().fill_diagonal_(torch.nan).requires_grad_()
    law, other = law_class(arcs, root), law_class(changed, root)
    torch.testing.assert_close(law.log_partition, other.log_partition)
    by_arcs, by_root = torch.autograd.grad(other.log_partition, [changed, root])
    torch.testing.assert_close(by_root, law.marginals.diagonal())
    torch.testing.assert_close(by_arcs, law.marginals - law.marginals.diagonal().diag())


@both
def test_a_law_with_one_root_and_one_with_many_are_not_compared(law_class: type[DependencyTreeLaw]) -> None:
    one, many = (law_class(torch.zeros(3, 3), torch.zeros(3), single_root) for single_root in (True, False))
    with pytest.raises(ValueError, match="single_root=True, got False"):
        one.cross_entropy(many)


@both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(3)), ValueError, r"arcs: expected shape \[\.\.\., T, T\].*got \[3\]"),
        ((torch.zeros(3, 2), torch.zeros(2)), ValueError, "arcs: expected shape"),
        ((torch.zeros(0, 0), torch.zeros(0)), ValueError, "arcs: expected shape"),
        ((torch.zeros(3, 3), torch.zeros(2)), ValueError, r"root: expected shape \[\.\.\., 3\], got \[2\]"),
        ((torch.zeros(3, 3), torch.tensor(1.0)), ValueError, "root: expected shape"),
        ((torch.zeros(2, 3, 3), torch.zeros(4, 3)), ValueError, "batch shapes do not broadcast"),
        ((torch.zeros(3, 3).long(), torch.zeros(3)), TypeError, "arcs: expected floating-point"),
        ((torch.zeros(3, 3), torch.zeros(3).long()), TypeError, "root: expected floating-point"),
        ((torch.zeros(3, 3), [0.0, 0.0, 0.0]), TypeError, "root: expected a tensor"),
        (
            (torch.zeros(3, 3), torch.zeros(3), True, torch.tensor(4)),
            ValueError,
            "lengths: expected values from 1 to 3",
        ),
        ((torch.zeros(3, 3), torch.zeros(3), True, torch.tensor(2.0)), TypeError, "lengths: expected integers"),
    ],
)
def test_bad_input_raises_by_name(
    law_class: type[DependencyTreeLaw], arguments: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        law_class(*arguments)


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinite_scores_are_refused_when_summed(law_class: type[DependencyTreeLaw], bad: float) -> None:
    for arcs, root in ((torch.zeros(3, 3), torch.full((3,), bad)), (torch.full((3, 3), bad), torch.zeros(3))):
        with pytest.raises(ValueError, match="arcs: scores must not be NaN"):
            _ = law_class(arcs, root).log_partition
        with pytest.raises(ValueError, match="arcs: scores must not be NaN"):
            _ = law_class(arcs, root).mode


@both
def test_law_in_a_plate_is_observed_sampled_and_fitted_by_svi(law_class: type[DependencyTreeLaw]) -> None:
    lengths = torch.tensor([4, 2, 3])
    observed = law_class(torch.randn(3, 4, 4), torch.randn(4), lengths=lengths).sample()

    def model(heads: Tensor | None = None) -> Tensor:
        arcs = pyro.param("arcs", torch.zeros(4, 4))
        with pyro.plate("sentences", 3):
            return pyro.sample("heads", law_class(arcs, arcs.diagonal(), lengths=lengths), obs=heads)

    trace = pyro.poutine.trace(model).get_trace(observed)
    trace.compute_log_prob()
    uniform = law_class(torch.zeros(4, 4), torch.zeros(4), lengths=lengths)
    torch.testing.assert_close(trace.nodes["heads"]["log_prob"], uniform.log_prob(observed))
    svi = pyro.infer.SVI(model, lambda heads=None: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    losses = [svi.step(observed) for _ in range(20)]
    assert losses[-1] < losses[0]
    drawn = pyro.infer.Predictive(model, {}, num_samples=5)()["heads"]
    assert drawn.shape == (5, 3, 4)
    assert bool(torch.isfinite(uniform.log_prob(drawn)).all())


@both
def test_the_same_seed_gives_the_same_samples(law_class: type[DependencyTreeLaw]) -> None:
    law = law_class(torch.randn(6, 6), torch.randn(6))
    pyro.set_rng_seed(3)
    first = law.sample((20,))
    pyro.set_rng_seed(3)
    assert torch.equal(law.sample((20,)), first)
    assert len(first.unique(dim=0)) > 1
