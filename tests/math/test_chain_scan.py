"""The chain as a product of matrices: equal to the recursion in value and derivatives, over every semiring."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import chain_scan, chain_torch
from probllm.math.chain import Chain, as_chain
from probllm.math.semirings import COUNT, EXPECTATION, LOG, MAX, SAMPLING, KMax

Scores = tuple[Chain, list[Tensor]]


@st.composite
def chains(draw: st.DrawFn, dtype: torch.dtype = torch.float64, longest: int = 9) -> Scores:
    """Rows in groups, steps that share transitions or not, ragged lengths, forbidden parts, extreme scores."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.integers(1, longest)), draw(st.integers(1, 4))
    batch = draw(st.sampled_from([(1,), (3,), (2, 3)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e3] if dtype == torch.float32 else [1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf).to(dtype)

    lead = draw(st.sampled_from([(), (batch[0], *(1,) * (len(batch) - 1))]))
    table = draw(st.sampled_from([(), (*lead, 1), (*lead, max(steps - 1, 1))]))
    given_ = [scores(*batch, steps, k), scores(*table, k, k), scores(*batch, k), scores(k)]
    return as_chain(*given_, torch.randint(1, steps + 1, batch, generator=generator)), given_


def gradients(value: Tensor, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    total = torch.where(value > -torch.inf, value, 0.0).sum()
    found = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@given(chains())
def test_value_and_first_and_second_derivatives_are_those_of_the_recursion(scores: Scores) -> None:
    chain = scores[0]
    found = []
    for log_partition in (chain_scan.log_partition, chain_torch.log_partition):
        leaves = [x.detach().clone().requires_grad_() for x in chain[:4]]
        value = log_partition(*leaves, chain.lengths)
        first = gradients(value, leaves, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        along = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
        second = gradients(along.reshape(1), leaves)
        found.append([value, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@given(chains(torch.float32))
def test_float32_is_right_to_its_digits(scores: Scores) -> None:
    chain = scores[0]
    leaves = [x.detach().clone().requires_grad_() for x in chain[:4]]
    wide = [x.detach().double().requires_grad_() for x in chain[:4]]
    value = chain_scan.log_partition(*leaves, chain.lengths)
    expected = chain_torch.log_partition(*wide, chain.lengths)
    finite = torch.cat([x.detach()[x.abs() < torch.inf].abs().flatten() for x in chain[:4]])
    greatest = float(finite.max()) if finite.numel() else 1.0
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5 + 1e-5 * greatest)
    for ours, theirs in zip(gradients(value, leaves), gradients(expected, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 + 3e-5 * greatest)


def test_products_that_no_scaling_certifies_are_done_again_in_log_space() -> None:
    """The way from 0 to 0 is only through 1, and lies a thousand nats below all others of its row and column."""
    for dtype in (torch.float32, torch.float64):
        left = torch.tensor([[-torch.inf, -1000.0], [0.0, 0.0]], dtype=dtype)
        right = torch.tensor([[-torch.inf, 0.0], [-1000.0, 0.0]], dtype=dtype)
        found = chain_scan.log_matmul(left.unsqueeze(0), right.unsqueeze(0))[0]
        torch.testing.assert_close(found, LOG.matmul(left, right))
        torch.testing.assert_close(found[0, 0], torch.tensor(-2000.0, dtype=dtype))


@given(chains(longest=5))
def test_other_semirings_agree_with_the_list_of_all_sequences(scores: Scores) -> None:
    chain = scores[0]
    rows, steps, k = chain.emissions.shape
    table = chain.transitions.repeat_interleave(rows // chain.transitions.shape[0], 0)
    table = table.expand(rows, max(steps - 1, 1), k, k)
    leaves = [x.detach().clone().requires_grad_() for x in (chain.emissions, table, chain.start, chain.end)]
    for row in range(rows):
        n = int(chain.lengths[row])
        paths = torch.tensor(list(itertools.product(range(k), repeat=n)))
        every = chain.start[row, paths[:, 0]] + chain.end[row, paths[:, -1]]
        for t in range(n):
            every = every + chain.emissions[row, t, paths[:, t]]
            if t:
                every = every + table[row, t - 1, paths[:, t - 1], paths[:, t]]
        every = every.sort(descending=True).values
        lifted = [tuple(s.lift(x) for x in leaves) for s in (MAX, KMax(3), EXPECTATION)]
        torch.testing.assert_close(chain_scan.inside(MAX, lifted[0], chain.lengths)[0, row], every[0])
        best = chain_scan.inside(KMax(3), lifted[1], chain.lengths)[:, row]
        torch.testing.assert_close(best[: len(every)], every[:3])
        assert bool((best[len(every) :] == -torch.inf).all())
        torch.testing.assert_close(chain_scan.inside(EXPECTATION, lifted[2], chain.lengths)[0, row], every.logsumexp(0))
    zero = tuple(COUNT.lift(torch.zeros_like(x).masked_fill(x == -torch.inf, -torch.inf)) for x in leaves)
    counts = chain_scan.inside(COUNT, zero, chain.lengths)[0]
    twin = chain_torch.log_partition(*(x.squeeze(0).log() for x in zero), chain.lengths)
    torch.testing.assert_close(counts.log(), twin)


def test_gradients_over_drawn_sums_are_sequences_with_the_law_s_frequencies() -> None:
    torch.manual_seed(0)
    n, scores = 4000, [torch.randn(5, 2), torch.randn(2, 2), torch.randn(2), torch.randn(2)]
    chain = as_chain(*scores)
    leaf = chain.emissions.expand(n, 5, 2).clone().requires_grad_()
    parts = (leaf.unsqueeze(0), chain.transitions, chain.start.unsqueeze(0), chain.end.unsqueeze(0))
    value = chain_scan.inside(SAMPLING, parts, torch.full((n,), 5))
    (drawn,) = torch.autograd.grad(value.sum(), leaf)
    assert bool((drawn.sum(-1) == 1).all())
    expected = chain_torch.expectations(torch.ones(1), *chain[:5])[0][0]
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.03, rtol=0)


def test_long_chains_agree_with_the_recursion() -> None:
    torch.manual_seed(0)
    for dtype, digits in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        chain = as_chain(3 * torch.randn(2, 1500, 5, dtype=dtype), torch.randn(5, 5, dtype=dtype))
        leaf = chain.emissions.clone().requires_grad_()
        value = chain_scan.log_partition(leaf, *chain[1:5])
        wide = [x.double() for x in chain[:4]]
        torch.testing.assert_close(
            value.double(), chain_torch.log_partition(*wide, chain.lengths), rtol=digits, atol=0.0
        )
        (found,) = torch.autograd.grad(value.sum(), leaf)
        expected = chain_torch.expectations(torch.ones(2, dtype=torch.float64), *wide, chain.lengths)[0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=100 * digits)


def test_torch_func_goes_through() -> None:
    torch.manual_seed(0)
    scores, table, zero = torch.randn(4, 3, 6, 2), torch.randn(1, 1, 2, 2), torch.zeros(3, 2)
    lengths = torch.tensor([6, 1, 4])

    def total(emissions: Tensor) -> Tensor:
        return chain_scan.log_partition(emissions, table, zero, zero, lengths).sum()

    found = torch.func.vmap(torch.func.grad(total))(scores)
    for mine, emissions in zip(found, scores, strict=True):
        expected = chain_torch.expectations(torch.ones(3), emissions, table, zero, zero, lengths)[0]
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_matrices_are_multiplied_in_their_order(count: int) -> None:
    torch.manual_seed(0)
    matrices = torch.rand(count, 3, 3, dtype=torch.float64)
    expected = torch.linalg.multi_dot(list(matrices)) if count > 1 else matrices[0]
    torch.testing.assert_close(chain_scan.product(LOG, matrices.log().unsqueeze(0))[0].exp(), expected)
