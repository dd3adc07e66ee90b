"""Sums over all dependency trees: kernels and twin, scores of every size, cycles that a determinant loses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import matrix_tree
from probllm.math.matrix_tree import MANY_ROOTS, ONE_ROOT, log_partition_torch, marginals_torch
from probllm.math.recursion import expected_parts, log_partition
from probllm.math.semirings import MAX
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


def enumerated(arcs: Tensor, single_root: bool) -> tuple[Tensor, Tensor]:
    """log Z and marginals of ``[T, T]``, by adding up all trees."""
    n = len(arcs)
    heads = torch.tensor(trees(n, single_root, False))
    row = torch.where(heads == 0, torch.arange(n), heads - 1)
    total = arcs[row, torch.arange(n)].sum(-1)
    log_z = total.logsumexp(0)
    p = torch.where(log_z > -torch.inf, (total - log_z).exp(), 0.0)
    marginals = torch.zeros(n, n, dtype=torch.float64)
    for d in range(n):
        marginals[:, d].index_add_(0, row[:, d], p)
    return log_z, marginals


@either
@given(scores(4))
def test_twin_is_the_sum_over_all_trees_each_marginal_to_its_own_digits(
    single_root: bool, case: tuple[Tensor, Tensor]
) -> None:
    arcs, lengths = case
    log_z, marginals = (f(arcs, lengths, single_root) for f in (log_partition_torch, marginals_torch))
    for b, n in enumerate(lengths.tolist()):
        expected_log_z, expected = enumerated(arcs[b, :n, :n], single_root)
        torch.testing.assert_close(log_z[b], expected_log_z, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(marginals[b, :n, :n], expected, rtol=1e-7, atol=0.0)
        assert not marginals[b, n:].any()
        assert not marginals[b, :, n:].any()


@either
@given(scores())
def test_kernels_are_their_twin(single_root: bool, case: tuple[Tensor, Tensor]) -> None:
    arcs, lengths = case
    leaf = arcs.clone().requires_grad_()
    found = log_partition(ONE_ROOT if single_root else MANY_ROOTS, (leaf,), lengths)
    expected = log_partition_torch(arcs, lengths, single_root)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    (gradient,) = torch.autograd.grad(torch.where(expected > -torch.inf, found, 0.0).sum(), leaf)
    torch.testing.assert_close(gradient, marginals_torch(arcs, lengths, single_root), rtol=1e-6, atol=1e-12)


@either
def test_kernels_run_in_probability_space_where_scores_are_plain(
    single_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_tree, "log_kernels", None)
    arcs = 5 * torch.randn(3, 30, 30).masked_fill(torch.rand(3, 30, 30) < 0.2, -torch.inf)
    recursion = ONE_ROOT if single_root else MANY_ROOTS
    (marginals,) = expected_parts(recursion, (arcs,), torch.tensor([30, 17, 29]))
    torch.testing.assert_close(marginals.sum((1, 2)), torch.tensor([30.0, 17.0, 29.0]))


def test_a_pair_of_words_that_want_each_other_keeps_its_digits() -> None:
    """Z = 2 e^s + 1 in units of the roots: the determinant (1 + e^s)^2 - e^2s is 0 in floating point."""
    s = 50.0
    arcs = torch.tensor([[[0.0, s], [s, 0.0]]], dtype=torch.float64)
    lengths = torch.tensor([2])
    table = arcs[0].exp().fill_diagonal_(0.0)
    laplacian = torch.eye(2) + table.sum(0).diag() - table
    assert float(torch.linalg.det(laplacian)) <= 0.0
    for recursion, log_z in ((MANY_ROOTS, math.log(2 * math.exp(s) + 1)), (ONE_ROOT, s + math.log(2))):
        torch.testing.assert_close(
            log_partition(recursion, (arcs,), lengths)[0], torch.tensor(log_z, dtype=torch.float64)
        )
        (marginals,) = expected_parts(recursion, (arcs,), lengths)
        torch.testing.assert_close(marginals, torch.full((1, 2, 2), 0.5).double())


@either
@pytest.mark.parametrize("s", [600.0, 1e6, 1e9])
def test_cycles_of_any_strength_are_summed(single_root: bool, s: float) -> None:
    """Three words in a ring of huge scores, to be left by one word of three: each break of the ring is a third."""
    arcs = torch.full((1, 3, 3), -torch.inf, dtype=torch.float64)
    arcs[0, [0, 1, 2], [1, 2, 0]] = s
    arcs[0].fill_diagonal_(0.0)
    recursion = ONE_ROOT if single_root else MANY_ROOTS
    log_z = log_partition(recursion, (arcs,), torch.tensor([3]))
    torch.testing.assert_close(log_z[0], torch.tensor(2 * s + math.log(3), dtype=torch.float64), rtol=1e-15, atol=1e-9)
    (marginals,) = expected_parts(recursion, (arcs,), torch.tensor([3]))
    expected = torch.eye(3).double() / 3 + torch.where(arcs[0] == s, 2 / 3, 0.0)
    torch.testing.assert_close(marginals[0], expected, rtol=1e-6, atol=0.0)


def test_one_root_is_not_a_penalty_on_roots() -> None:
    """Only the root heads word 0, which heads nothing: no tree has one root, and trees with two do not count."""
    arcs = torch.zeros(1, 3, 3).double()
    arcs[0, 0, 1:] = -torch.inf
    arcs[0, 1:, 0] = -torch.inf
    lengths = torch.tensor([3])
    assert float(log_partition(ONE_ROOT, (arcs,), lengths)) == -torch.inf
    assert not expected_parts(ONE_ROOT, (arcs,), lengths)[0].any()
    torch.testing.assert_close(log_partition(MANY_ROOTS, (arcs,), lengths).exp(), torch.tensor([3.0]).double())
    # where word 0 heads others, it is the root in every tree, whatever the others score as roots
    arcs[0, 0, 1:] = -5.0
    arcs[0].diagonal()[1:] = 1000.0
    (marginals,) = expected_parts(ONE_ROOT, (arcs,), lengths)
    torch.testing.assert_close(marginals[0].diagonal(), torch.tensor([1.0, 0.0, 0.0]).double())


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


def test_other_semirings_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="log space alone"):
        ONE_ROOT.inside(MAX, (torch.zeros(1, 1, 2, 2),), torch.tensor([2]))


def heads_of_samples(arcs: Tensor, single_root: bool, count: int = 4000) -> Tensor:
    seeds = torch.randint(-(2**63), 2**63 - 1, (count, 1))
    return matrix_tree.sample_trees(arcs.unsqueeze(0), torch.tensor([len(arcs)]), seeds, single_root=single_root)[:, 0]


@either
@pytest.mark.parametrize("patience", [0, 64])
def test_samples_have_the_marginals_by_walks_and_word_by_word(
    single_root: bool, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_tree, "PATIENCE", patience)
    torch.manual_seed(1)
    n = 6
    arcs = 2 * torch.randn(n, n, dtype=torch.float64)
    heads = heads_of_samples(arcs, single_root)
    expected = marginals_torch(arcs.unsqueeze(0), torch.tensor([n]), single_root)[0]
    row = torch.where(heads == 0, torch.arange(n), heads - 1)
    found = torch.nn.functional.one_hot(row, n).double().mean(0).T
    deviation = (expected * (1 - expected) / len(heads)).sqrt()
    assert bool(((found - expected).abs() <= 5.5 * deviation + 1e-9).all())  # 36 numbers, a millionth false alarms
    # and pairs of heads, which marginals do not tell: against the law given the first word's head
    mask = arcs.clone()
    best = int(expected[:, 0].argmax())
    mask[torch.arange(n) != best, 0] = -torch.inf
    expected = marginals_torch(mask.unsqueeze(0), torch.tensor([n]), single_root)[0]
    given = row[row[:, 0] == best]
    found = torch.nn.functional.one_hot(given, n).double().mean(0).T
    deviation = (expected * (1 - expected) / len(given)).sqrt()
    assert bool(((found - expected).abs() <= 5.5 * deviation + 1e-9).all())


@either
def test_walks_that_would_not_end_are_replaced(single_root: bool) -> None:
    """Two words that want each other by 1e6 nats: Wilson's walk would go on for ever."""
    arcs = torch.tensor([[0.0, 1e6, -9.0], [1e6, 0.0, -9.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    heads = heads_of_samples(arcs, single_root, 400)
    (marginals,) = expected_parts(ONE_ROOT if single_root else MANY_ROOTS, (arcs[None],), torch.tensor([3]))
    share = (heads[:, 0] == 2).double().mean()
    p = marginals[0, 1, 0]
    assert abs(float(share - p)) < 5 * math.sqrt(float(p * (1 - p)) / 400)
    assert bool(((heads[:, 0] == 2) | (heads[:, 1] == 1)).all())


@either
def test_threads_change_nothing(single_root: bool) -> None:
    arcs, lengths = torch.randn(9, 60, 60), torch.randint(1, 61, (9,))
    recursion = ONE_ROOT if single_root else MANY_ROOTS
    seeds = torch.randint(0, 2**60, (20, 9))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        drawn = matrix_tree.sample_trees(arcs.double(), lengths, seeds, single_root=single_root)
        best = best_trees(arcs.double(), lengths, torch.empty(3, 9), single_root=single_root, projective=False)
        found.append((log_partition(recursion, (arcs,), lengths), *expected_parts(recursion, (arcs,), lengths)))
        found[-1] = (*found[-1], drawn, best)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
