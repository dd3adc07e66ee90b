"""Sums over projective dependency trees: kernels and twin, the semirings, scores of every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import eisner
from probllm.math.eisner import MANY_ROOTS, ONE_ROOT
from probllm.math.recursion import expected_parts, log_partition
from probllm.math.semirings import COUNT, LOG, MAX, SAMPLING, KMax
from probllm.math.tree_search import best_trees
from tests.distributions.dependencies import trees

either = pytest.mark.parametrize("single_root", [True, False])


@st.composite
def scores(draw: st.DrawFn, greatest: int = 11) -> tuple[Tensor, Tensor]:
    """Arcs ``[4, T, T]`` of every size, some forbidden, and lengths."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    words = draw(st.integers(1, greatest))
    scale, share = draw(st.sampled_from([1.0, 30.0, 1e3, 1e6])), draw(st.sampled_from([0.0, 0.3, 0.6]))
    arcs = scale * torch.randn(4, words, words, generator=generator, dtype=torch.float64)
    arcs = arcs.masked_fill(torch.rand(arcs.shape, generator=generator) < share, -torch.inf)
    return arcs, torch.randint(1, words + 1, (4,), generator=generator)


def totals(arcs: Tensor, single_root: bool) -> Tensor:
    """The scores of all trees over ``[T, T]``."""
    n = len(arcs)
    heads = torch.tensor(trees(n, single_root, True))
    return arcs[torch.where(heads == 0, torch.arange(n), heads - 1), torch.arange(n)].sum(-1)


@either
@given(scores(4))
def test_every_semiring_sums_over_each_tree_once(single_root: bool, case: tuple[Tensor, Tensor]) -> None:
    arcs, lengths = case
    values = {
        name: eisner.inside(semiring, (semiring.lift(x),), lengths, single_root)
        for name, semiring, x in (
            ("log", LOG, arcs),
            ("max", MAX, arcs),
            ("sampling", SAMPLING, arcs),
            ("best", KMax(5), arcs),
            ("count", COUNT, torch.where(arcs == -torch.inf, arcs, 0.0)),
        )
    }
    for b, n in enumerate(lengths.tolist()):
        every = totals(arcs[b, :n, :n], single_root)
        torch.testing.assert_close(values["log"][0, b], every.logsumexp(0))
        torch.testing.assert_close(values["sampling"][0, b], every.logsumexp(0))
        torch.testing.assert_close(values["max"][0, b], every.amax())
        best = torch.cat([every.sort(descending=True).values, every.new_full((5,), -torch.inf)])[:5]
        torch.testing.assert_close(values["best"][:, b], best)
        assert float(values["count"][0, b]) == int((every > -torch.inf).sum())


@either
@given(scores())
def test_kernels_are_their_twin(single_root: bool, case: tuple[Tensor, Tensor]) -> None:
    arcs, lengths = case
    leaf = arcs.clone().requires_grad_()
    found = log_partition(ONE_ROOT if single_root else MANY_ROOTS, (leaf,), lengths)
    again = arcs.clone().requires_grad_()
    expected = eisner.inside(LOG, (LOG.lift(again),), lengths, single_root)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    (gradient,) = torch.autograd.grad(torch.where(found > -torch.inf, found, 0.0).sum(), leaf)
    (twin,) = torch.autograd.grad(torch.where(found > -torch.inf, expected, 0.0).sum(), again)
    torch.testing.assert_close(gradient, twin, rtol=1e-6, atol=1e-10)


@either
@pytest.mark.parametrize("scale", [1.0, 1e6])  # in probability space, and some rows in log space
def test_sentences_that_share_vectors_do_not_see_each_other(single_root: bool, scale: float) -> None:
    words = 12
    arcs = scale ** (torch.arange(19) % 3 / 2).double()[:, None, None] * torch.randn(19, words, words).double()
    arcs = arcs.masked_fill(torch.rand(arcs.shape) < 0.2, -torch.inf)
    lengths = torch.cat([torch.arange(1, words + 1), torch.tensor([12, 11, 1, 2, 12, 7, 3])])
    beyond = torch.arange(words) >= lengths[:, None]
    unused = beyond[:, :, None] | beyond[:, None, :]
    arcs = torch.where(unused, torch.tensor(1e300, dtype=torch.float64), arcs)
    recursion = ONE_ROOT if single_root else MANY_ROOTS
    log_z, (marginals,) = log_partition(recursion, (arcs,), lengths), expected_parts(recursion, (arcs,), lengths)
    for b, n in enumerate(lengths.tolist()):
        own = (arcs[b : b + 1, :n, :n],), lengths[b : b + 1]
        torch.testing.assert_close(log_z[b], log_partition(recursion, *own)[0], rtol=1e-14, atol=1e-13)
        torch.testing.assert_close(marginals[b, :n, :n], expected_parts(recursion, *own)[0][0], rtol=1e-9, atol=1e-13)
    assert bool((marginals[unused | (arcs == -torch.inf)] == 0).all())


@either
def test_kernels_run_in_probability_space_where_scores_are_plain(
    single_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eisner, "_by_gradient", None)
    arcs = 5 * torch.randn(3, 40, 40).masked_fill(torch.rand(3, 40, 40) < 0.2, -torch.inf)
    (marginals,) = expected_parts(ONE_ROOT if single_root else MANY_ROOTS, (arcs,), torch.tensor([40, 17, 39]))
    torch.testing.assert_close(marginals.sum((1, 2)), torch.tensor([40.0, 17.0, 39.0]))


@either
def test_long_sentences_neither_overflow_nor_underflow(single_root: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At scores 0, log Z is the logarithm of the number of trees, by the formula."""
    monkeypatch.setattr(eisner, "_by_gradient", None)
    n = 400
    log_z = log_partition(ONE_ROOT if single_root else MANY_ROOTS, (torch.zeros(1, n, n),), torch.tensor([n]))

    def log_choose(a: int, b: int) -> Tensor:
        a_, b_ = (torch.tensor(float(x), dtype=torch.float64) for x in (a, b))
        return torch.lgamma(a_ + 1) - torch.lgamma(b_ + 1) - torch.lgamma(a_ - b_ + 1)

    one = log_choose(3 * n - 2, n - 1) - torch.tensor(float(n)).double().log()
    many = log_choose(3 * n, n) - torch.tensor(2.0 * n + 1).double().log()
    torch.testing.assert_close(log_z[0], one if single_root else many)


@either
def test_derivatives_of_every_kind_hold(single_root: bool) -> None:
    arcs = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    lengths, recursion = torch.tensor([4, 1, 3]), ONE_ROOT if single_root else MANY_ROOTS
    assert torch.autograd.gradcheck(lambda x: log_partition(recursion, (x,), lengths), arcs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: log_partition(recursion, (x,), lengths), arcs)
    hessian = torch.func.vmap(torch.func.hessian(lambda x, n: log_partition(recursion, (x[None],), n[None])[0]))
    again = torch.autograd.functional.hessian(lambda x: log_partition(recursion, (x,), lengths).sum(), arcs)
    for b in range(3):
        torch.testing.assert_close(hessian(arcs.detach(), lengths)[b], again[b, :, :, b])


@either
@pytest.mark.parametrize("scale", [1.0, 300.0])  # drawn by the kernel, and in log space
def test_samples_have_the_marginals(single_root: bool, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    n, count = 7, 3000
    arcs = 2 * torch.randn(n, n, dtype=torch.float64)
    if scale > 1:  # arcs that lead nowhere, and beside which all others are nothing
        arcs[n - 1, n - 1], arcs[0, n - 1], arcs[n - 1, 0] = -torch.inf, scale, scale
    else:
        monkeypatch.setattr(eisner, "_by_gradient", None)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count, 1))
    heads = eisner.sample_trees(arcs.unsqueeze(0), torch.tensor([n]), seeds, single_root=single_root)[:, 0]
    leaf = arcs.unsqueeze(0).requires_grad_()
    value = eisner.inside(LOG, (LOG.lift(leaf),), torch.tensor([n]), single_root)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    row = torch.where(heads == 0, torch.arange(n), heads - 1)
    found = torch.nn.functional.one_hot(row, n).double().mean(0).T
    deviation = (expected[0] * (1 - expected[0]) / count).sqrt()
    assert bool(((found - expected[0]).abs() <= 5.5 * deviation + 1e-9).all())  # a false alarm in a million


@either
def test_threads_change_nothing(single_root: bool) -> None:
    arcs, lengths = torch.randn(9, 60, 60), torch.randint(1, 61, (9,))
    recursion = ONE_ROOT if single_root else MANY_ROOTS
    seeds = torch.randint(0, 2**60, (20, 9))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        drawn = eisner.sample_trees(arcs.double(), lengths, seeds, single_root=single_root)
        best = best_trees(arcs.double(), lengths, torch.empty(3, 9), single_root=single_root, projective=True)
        sums = log_partition(recursion, (arcs,), lengths), *expected_parts(recursion, (arcs,), lengths)
        found.append((*sums, drawn, best))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
