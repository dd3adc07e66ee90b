"""The chain's sums at the edges that implementations get wrong: value and gradient, against log space in float64."""

from __future__ import annotations

import gc
import itertools
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from probllm.distributions import LinearChainCRF
from probllm.math import chain_torch
from probllm.math.chain import as_chain, log_partition, marginals
from probllm.math.chain_paths import sample, top_k, viterbi

NAMES = ("emissions", "transitions", "start", "end")


def random_scores(
    rows: int, steps: int, k: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, steps, k), (k, k), (k,), (k,))
    return [scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_twin(scores: list[Tensor], lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """log Z and its gradients by the torch twin in float64 log space."""
    wide = [x.detach().double().requires_grad_() for x in scores]
    log_z = chain_torch.log_partition(*as_chain(*wide, lengths=lengths)[:5])
    return log_z.detach(), torch.autograd.grad(log_z[log_z > -torch.inf].sum(), wide, allow_unused=True)


def agree(
    scores: list[Tensor], lengths: Tensor | None = None, rtol: float = 1e-4, atol: float = 1e-5, by: float | None = None
) -> Tensor:
    """Asserts that value and gradients are those of the twin; returns the value."""
    leaves = [x.detach().clone().requires_grad_() for x in scores]
    log_z = log_partition(*leaves, lengths)
    expected, gradients = by_twin(scores, lengths)
    torch.testing.assert_close(log_z.double().reshape(expected.shape), expected, rtol=rtol, atol=atol)
    for name, found, want in zip(NAMES, torch.autograd.grad(log_z.sum(), leaves), gradients, strict=True):
        want = torch.zeros_like(found) if want is None else want
        torch.testing.assert_close(
            found.double(), want.double(), rtol=by or rtol, atol=by or atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    return log_z.detach()


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@dtypes
def test_a_reachable_state_200_nats_below_an_unreachable_one(dtype: torch.dtype) -> None:
    scores = random_scores(3, 6, 3, dtype=dtype)
    scores[1][:, 0] = -torch.inf  # state 0 cannot be entered
    scores[0][:, 2:4, 1:] -= 200
    log_z = agree(scores)
    assert bool((log_z < -300).all())


@dtypes
def test_a_state_that_sinks_below_underflow_and_comes_back_keeps_its_mass(dtype: torch.dtype) -> None:
    """Each state keeps to itself; state 1 loses 60 nats a step in the first half, and state 0 in the second."""
    scores = random_scores(3, 40, 2, 0.1, dtype=dtype)
    scores[0][:2, :20, 1] -= 60
    scores[0][0, 20:, 0] -= 60
    scores[1].fill_(-torch.inf).fill_diagonal_(0)
    agree(scores)
    torch.testing.assert_close(log_partition(*scores).double(), by_twin(scores)[0])  # no gradient, no way back
    paths = sample(*scores, n=200)[:, 0]
    assert bool((paths == paths[:, :1]).all())
    p = float(marginals(*scores)[0, 0, 1])
    # five standard errors: a false alarm in two million, and the seed is fixed
    assert abs(float(paths[:, 0].double().mean()) - p) < 5 * (p * (1 - p) / 200) ** 0.5


@dtypes
@given(st.integers(0, 1000))
def test_forbidden_tags_and_moves(dtype: torch.dtype, seed: int) -> None:
    scores = random_scores(4, 5, 3, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    scores = [x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, -torch.inf) for x in scores]
    agree(scores, torch.randint(1, 6, (4,), generator=generator))


@dtypes
def test_nothing_is_allowed(dtype: torch.dtype) -> None:
    scores = random_scores(3, 4, 2, dtype=dtype)
    scores[0][1, 2] = -torch.inf
    leaves = [x.clone().requires_grad_() for x in scores]
    law = LinearChainCRF(*leaves)
    assert law.log_partition[1] == -torch.inf
    value = torch.zeros(3, 4, dtype=torch.long)
    log_prob = law.log_prob(value)
    assert log_prob[1] == -torch.inf
    assert not law.marginals[1].any()
    assert not law.pairwise_marginals[1].any()
    assert law.entropy()[1] == 0
    other = LinearChainCRF(*random_scores(3, 4, 2, seed=1, dtype=dtype))
    assert law.cross_entropy(other)[1] == 0
    assert kl_divergence(law, other)[1] == 0
    assert other.cross_entropy(law)[1] == torch.inf
    assert law.log_count[1] == -torch.inf
    assert law.log_prob_partial(torch.ones(3, 4, 2, dtype=torch.bool))[1] == -torch.inf
    for path in (law.mode[1], law.sample((5,))[:, 1], law.min_risk()[1], law.topk(2)[1][:, 1]):
        assert bool((path == -1).all())
    assert law.log_prob(law.sample())[1] == -torch.inf, "its own samples can be scored"
    for one in (law.log_partition[1], log_prob[1], law.entropy()[1], law.topk(2)[0][0, 1]):
        for gradient in torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True):
            assert gradient is None or not gradient.any()
    assert bool(law.log_partition[0].isfinite())


@dtypes
@pytest.mark.parametrize("kind", [(), (3, 1), (3,), (3, 3)])
def test_transitions_that_allow_nothing(dtype: torch.dtype, kind: tuple[int, ...]) -> None:
    """Rows of one step and rows with transitions of their own are allowed still; no gradient is NaN."""
    scores = random_scores(3, 4, 2, dtype=dtype)
    scores[1] = torch.zeros(*kind, 2, 2, dtype=dtype)
    scores[1].view(-1, 2, 2)[-1] = -torch.inf
    log_z = agree(scores, torch.tensor([1, 4, 4]))
    assert log_z[2] == -torch.inf
    assert log_z[0] > -torch.inf


@dtypes
@pytest.mark.parametrize("scale", [1e4, 1e6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_scores(dtype: torch.dtype, scale: float, sign: float) -> None:
    scores = random_scores(4, 6, 3, dtype=dtype)
    scores[0] += sign * scale
    agree(scores, torch.tensor([6, 1, 4, 2]), rtol=1e-6)
    agree(random_scores(4, 6, 3, scale, seed=1, dtype=dtype), torch.tensor([6, 1, 4, 2]), rtol=1e-6)


@dtypes
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 5, 1), (1, 1, 1)])
def test_one_step_and_one_tag(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    agree(random_scores(*shape, dtype=dtype))


@dtypes
def test_a_row_of_length_one_beside_longer_ones_and_all_shorter_than_the_batch(dtype: torch.dtype) -> None:
    agree(random_scores(3, 9, 4, dtype=dtype), torch.tensor([1, 9, 5]))
    scores = random_scores(2, 9, 4, dtype=dtype)
    short = agree(scores, torch.tensor([3, 2]))
    cut = [scores[0][:, :3], *scores[1:]]
    torch.testing.assert_close(log_partition(*cut, torch.tensor([3, 2])), short)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_whatever_stands_on_padding_is_not_looked_at(poison: float) -> None:
    scores = random_scores(3, 6, 3, dtype=torch.float32)
    lengths = torch.tensor([4, 6, 1])
    clean = log_partition(*scores, lengths)
    scores[0][0, 4:], scores[0][2, 1:] = poison, poison
    leaf = scores[0].clone().requires_grad_()
    found = log_partition(leaf, *scores[1:], lengths)
    torch.testing.assert_close(found, clean)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert not gradient[0, 4:].any()
    assert bool(gradient.isfinite().all())
    assert viterbi(*scores, lengths)[2, 1:].tolist() == [0] * 5


@dtypes
def test_ties_give_one_path_and_not_a_blend(dtype: torch.dtype) -> None:
    scores = [torch.zeros_like(x) for x in random_scores(2, 7, 3, dtype=dtype)]
    path = viterbi(*scores)
    assert path.dtype == torch.long
    assert bool(((path >= 0) & (path < 3)).all())
    found, paths = top_k(*scores, k=20)
    assert bool((found == 0).all())
    assert len({tuple(x) for x in paths[:, 0].tolist()}) == 20


@pytest.mark.parametrize(("rows", "steps"), [(2, 10_000), (2, 20_000), (4, 10_000)])  # four rows go side by side
def test_long_chains_in_float32_are_those_of_float64(rows: int, steps: int) -> None:
    narrow = random_scores(rows, steps, 5, dtype=torch.float32)
    wide = [x.double() for x in narrow]
    lengths = torch.full((rows,), steps)
    lengths[1] //= 2
    values, gradients = [], []
    for scores in (narrow, wide):
        leaves = [x.clone().requires_grad_() for x in scores]
        value = log_partition(*leaves, lengths)
        values.append(value.detach().double())
        gradients.append([g.double() for g in torch.autograd.grad(value.sum(), leaves)])
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    twin = chain_torch.log_partition(*as_chain(*wide, lengths=lengths)[:5])
    torch.testing.assert_close(values[1], twin, rtol=1e-12, atol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scores_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    scores = [0.5 * x for x in random_scores(4, 300, 8, dtype=dtype)]
    leaves = [x.clone().requires_grad_() for x in scores]
    value = log_partition(*leaves)
    assert value.dtype == dtype
    expected, gradients = by_twin(scores)
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=digits, atol=0)
    for found, want in zip(torch.autograd.grad(value.sum(), leaves), gradients, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=digits, atol=1e-4)


@dtypes
@given(
    st.sampled_from([20.0, 60.0, 79.0, 81.0, 100.0, 190.0, 200.0, 210.0, 600.0, 700.0, 800.0, 1500.0]),
    st.sampled_from(["emissions", "transitions", "start", "end", "spread", "shared"]),
    st.integers(0, 100),
)
def test_all_arithmetics_agree_at_the_borders_of_the_certificate(
    dtype: torch.dtype, spread: float, where: str, seed: int
) -> None:
    """One score that far below the others, at or across where a recursion passes on to a wider one."""
    scores = random_scores(5, 9, 4, 0.3, seed, dtype)
    if where == "spread":  # a little in each step, so that ranges add up
        scores[0] *= spread / 10
    elif where == "shared":
        scores[0][..., 0] -= spread / 2
        scores[1][0] -= spread / 2
    else:
        scores[NAMES.index(where)][..., 0] -= spread
    agree(scores, torch.tensor([9, 1, 5, 8, 2]), rtol=1e-4 if dtype == torch.float32 else 1e-9)


@given(st.integers(0, 1000))
def test_second_derivatives(seed: int) -> None:
    scores = [x.requires_grad_() for x in random_scores(2, 4, 2, seed=seed)]
    lengths = torch.tensor([4, 2])
    torch.autograd.gradcheck(lambda *x: log_partition(*x, lengths), scores)
    torch.autograd.gradgradcheck(lambda *x: log_partition(*x, lengths), scores)


def test_create_graph_differentiates_the_marginals() -> None:
    scores = [x.requires_grad_() for x in random_scores(2, 4, 3)]
    (gradient,) = torch.autograd.grad(log_partition(*scores).sum(), scores[0], create_graph=True)
    torch.testing.assert_close(gradient, marginals(*scores))
    weights = torch.randn(gradient.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((gradient * weights).sum(), scores),
        torch.autograd.grad((marginals(*scores) * weights).sum(), scores),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert bool(one.any())


def test_hessian_jacobians_and_forward_mode() -> None:
    scores = random_scores(1, 3, 2)
    emissions = scores[0][0]

    def value(e: Tensor) -> Tensor:
        return log_partition(e, *scores[1:])

    def twin(e: Tensor) -> Tensor:
        return chain_torch.log_partition(*as_chain(e, *scores[1:])[:5])[0]

    torch.testing.assert_close(torch.func.hessian(value)(emissions), torch.func.hessian(twin)(emissions))
    torch.testing.assert_close(torch.func.jacrev(value)(emissions), torch.func.jacrev(twin)(emissions))
    torch.testing.assert_close(torch.func.jacfwd(value)(emissions), torch.func.jacrev(twin)(emissions))
    tangents = [torch.randn_like(x) for x in scores]
    change = torch.func.jvp(lambda *x: log_partition(*x), tuple(scores), tuple(tangents))[1]
    by_gradient = sum((g * t).sum() for g, t in zip(by_twin(scores)[1], tangents, strict=True))
    torch.testing.assert_close(change.sum(), torch.as_tensor(by_gradient))


@pytest.mark.parametrize("own", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])])
def test_vmap_of_log_prob_its_gradient_and_jacobian_is_a_loop(own: tuple[int, ...], lengths: Tensor | None) -> None:
    """Over samples of some of the scores, transitions among them, the others shared."""
    scores = random_scores(2, 5, 3)
    samples = [torch.randn(3, *x.shape, dtype=torch.float64) if i in own else x for i, x in enumerate(scores)]
    dims = tuple(0 if i in own else None for i in range(4))
    value = torch.randint(0, 3, (2, 5))

    def log_prob(*x: Tensor) -> Tensor:
        return LinearChainCRF(*x, lengths).log_prob(value)

    def total(*x: Tensor) -> Tensor:
        return log_prob(*x).sum()

    functions: list[Callable[..., Any]] = [
        log_prob, torch.func.grad(total, own), torch.func.jacrev(log_prob, own), torch.func.grad_and_value(total, own)
    ]  # fmt: skip
    for function in functions:
        together = torch.func.vmap(function, dims)(*samples)
        alone = [function(*(x[i] if d == 0 else x for x, d in zip(samples, dims, strict=True))) for i in range(3)]
        flat = [torch.utils._pytree.tree_leaves(x) for x in alone]
        for found, each in zip(torch.utils._pytree.tree_leaves(together), zip(*flat, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(each))


def test_vmap_over_a_dimension_that_is_not_the_first_is_a_loop() -> None:
    scores = random_scores(2, 5, 3)
    samples = [torch.randn(*x.shape, 4, dtype=torch.float64) for x in scores]
    gradient = torch.func.grad(lambda *x: log_partition(*x).sum(), (0, 1, 2, 3))
    together = torch.func.vmap(gradient, -1, -1)(*samples)
    for i in range(4):
        for found, alone in zip(together, gradient(*(x[..., i] for x in samples)), strict=True):
            torch.testing.assert_close(found[..., i], alone)


def test_gradients_of_samples_by_loop_of_autograd_are_those_of_vmap() -> None:
    scores = random_scores(2, 5, 3)
    value = torch.randint(0, 3, (2, 5))
    each = torch.func.vmap(
        torch.func.grad(lambda e, v: LinearChainCRF(e, *scores[1:]).log_prob(v)), randomness="error"
    )(scores[0], value)
    leaf = scores[0].clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(LinearChainCRF(leaf, *scores[1:]).log_prob(value).sum(), leaf)[0], each
    )


@dtypes
@pytest.mark.parametrize("scale", [1.0, 50.0, 1000.0])
def test_backward_twice_gives_the_same_and_what_it_gave_is_the_callers(dtype: torch.dtype, scale: float) -> None:
    """One and several steps: writing into a gradient changes neither another gradient nor the next backward pass."""
    for shape in ((1, 1, 3), (3, 1, 3), (3, 5, 3)):
        generator = torch.Generator().manual_seed(0)
        rows, _, k = shape
        shapes = (shape, (rows, 1, k, k), (rows, k), (rows, k))
        leaves = [(scale * torch.randn(*s, generator=generator, dtype=dtype)).requires_grad_() for s in shapes]
        total = (log_partition(*leaves) * torch.arange(1, rows + 1)).sum()
        total.backward(retain_graph=True)
        first = [x.grad.clone() for x in leaves]
        for leaf, kept in zip(leaves, first, strict=True):
            torch.testing.assert_close(leaf.grad, kept)
            leaf.grad.fill_(1e9)
        for leaf in leaves:
            leaf.grad = None
        total.backward(retain_graph=True)
        for leaf, kept in zip(leaves, first, strict=True):
            torch.testing.assert_close(leaf.grad, kept)
        total.backward()  # adds up
        for leaf, kept in zip(leaves, first, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * kept)
        found = torch.autograd.grad((log_partition(*leaves) * torch.arange(1, rows + 1)).sum(), leaves)
        for i, gradient in enumerate(found):
            gradient.fill_(1e9)
            for other, kept in zip(found[i + 1 :], first[i + 1 :], strict=True):
                torch.testing.assert_close(other, kept)


def test_a_graph_is_freed_with_its_last_name() -> None:
    """Not when the garbage collector comes by: a training loop would pile up the passes of many steps."""
    leaf = random_scores(2, 4, 3)[0].requires_grad_()
    alive, value = weakref.ref(leaf), log_partition(leaf, torch.zeros(3, 3, dtype=torch.float64)).sum()
    gc.collect()
    gc.disable()
    try:
        del leaf, value
        assert alive() is None
    finally:
        gc.enable()


def test_writing_into_marginals_does_not_change_log_prob_or_gradients() -> None:
    leaves = [x.requires_grad_() for x in random_scores(2, 4, 3)]
    law = LinearChainCRF(*leaves)
    before = law.log_partition.detach().clone()
    marginal = marginals(*leaves).detach()
    kept = marginal.clone()
    marginal.zero_()
    torch.testing.assert_close(law.log_partition, before)
    torch.testing.assert_close(torch.autograd.grad(law.log_partition.sum(), leaves[0])[0], kept)


def test_results_first_asked_for_without_gradients_have_them_when_wanted() -> None:
    leaves = [x.requires_grad_() for x in random_scores(2, 4, 3)]
    value = torch.zeros(2, 4, dtype=torch.long)
    expected = torch.autograd.grad(LinearChainCRF(*leaves).log_prob(value).sum(), leaves)
    for context in (torch.no_grad(), torch.inference_mode()):
        law = LinearChainCRF(*leaves)
        with context:
            law.log_prob(value), law.entropy(), law.marginals
        for one, other in zip(torch.autograd.grad(law.log_prob(value).sum(), leaves), expected, strict=True):
            torch.testing.assert_close(one, other)
        assert law.marginals.requires_grad
        assert law.entropy().requires_grad


@pytest.mark.parametrize("kind", [(), (4,), (3, 1), (3, 4)])
def test_expected_transitions_are_the_gradient_for_every_kind_of_transitions(kind: tuple[int, ...]) -> None:
    scores = random_scores(3, 5, 2)
    scores[1] = torch.randn(*kind, 2, 2, dtype=torch.float64)
    agree(scores, torch.tensor([5, 1, 4]), rtol=1e-9, atol=1e-9)
    law = LinearChainCRF(*scores, torch.tensor([5, 1, 4]))
    pairs = law.pairwise_marginals
    torch.testing.assert_close(pairs.sum(-1)[0], law.marginals[0, :-1])
    torch.testing.assert_close(pairs.sum(-2)[0], law.marginals[0, 1:])
    assert not pairs[1].any()
    total = (
        pairs.sum((0, 1))
        if not kind
        else pairs.sum(0)
        if kind == (4,)
        else pairs.sum(1, True)
        if kind == (3, 1)
        else pairs
    )
    torch.testing.assert_close(by_twin(scores, torch.tensor([5, 1, 4]))[1][1], total)


@dtypes
@pytest.mark.parametrize("k", [4, 7, 8, 9, 16, 17, 32, 33, 48, 65, 80])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_width_of_the_register_tiles(dtype: torch.dtype, k: int, rows: int) -> None:
    """Widths are 4, 8 and multiples of 16, walked in strips of 16, 32 and 64; rows in blocks of four, or one alone."""
    scores = random_scores(rows, 4, k, dtype=dtype)
    agree(scores)
    path = viterbi(*scores)
    best = chain_torch.best_paths(*as_chain(*(x.double() for x in scores))[:5])
    law = LinearChainCRF(*(x.double() for x in scores))
    torch.testing.assert_close(law.score(path), law.score(best), rtol=0, atol=1e-5)


@dtypes
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_rows_that_share_transitions_add_up_within_their_group(dtype: torch.dtype, scale: float, steps: int) -> None:
    """Two groups of three rows, in each arithmetic."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 3), (2, 1, steps, 3, 3), (3,), (3,))
    scores = [(scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]
    agree(scores, torch.tensor([[4, 1, 3], [2, 4, 4]]))


@given(st.integers(0, 1000), st.sampled_from([1.0, 30.0]))
def test_minimum_risk_for_a_cost_matrix_is_the_least_of_all(seed: int, scale: float) -> None:
    scores = random_scores(2, 3, 3, scale, seed)
    generator = torch.Generator().manual_seed(seed)
    scores = [x.masked_fill(torch.rand(x.shape, generator=generator) < 0.15, -torch.inf) for x in scores]
    loss = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    law = LinearChainCRF(*scores, torch.tensor([3, 2]))
    found = law.min_risk(loss)
    for row, n in enumerate((3, 2)):
        if law.log_partition[row] == -torch.inf:
            assert found[row].tolist() == [-1] * 3
            continue
        every = torch.tensor([[*z, *[0] * (3 - n)] for z in itertools.product(range(3), repeat=n)])
        p = law.log_prob(every.unsqueeze(1).expand(-1, 2, -1))[:, row].exp()
        cost = loss[every[:, None, :n], every[None, :, :n]].sum(-1) @ p  # predicted in rows, truth in columns
        at = (every == found[row]).all(-1).nonzero().item()
        assert p[at] > 0 or law.score(found)[row] > -torch.inf
        allowed = law.score(every.unsqueeze(1).expand(-1, 2, -1))[:, row] > -torch.inf
        torch.testing.assert_close(cost[at], cost[allowed].min())


def test_condition_on_moves_start_and_end_is_the_law_of_what_is_left() -> None:
    law = LinearChainCRF(*random_scores(2, 4, 3)[:2])
    moves = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
    first, last = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    left = law.condition(transitions=moves, start=first, end=last)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    keep = moves[every[:, :-1], every[:, 1:]].all(-1) & first[every[:, 0]] & last[every[:, -1]]
    scores = law.score(every.unsqueeze(1)).masked_fill(~keep.unsqueeze(-1), -torch.inf)
    torch.testing.assert_close(left.log_partition, scores.logsumexp(0))
    torch.testing.assert_close(left.log_prob(every.unsqueeze(1)), scores.log_softmax(0))
    step = moves.expand(2, 3, 3, 3).clone()
    step[0, 1] = True
    assert law.condition(transitions=step).log_partition[0] > law.condition(transitions=moves).log_partition[0]


def case_of(**change: Any) -> dict[str, Any]:
    scores = dict(zip(NAMES, (torch.zeros(2, 4, 3), torch.zeros(3, 3), torch.zeros(3), torch.zeros(3)), strict=True))
    return {**scores, "lengths": torch.tensor([4, 2]), **change}


BAD = [
    ({"emissions": torch.zeros(3)}, ValueError, "emissions"),
    ({"emissions": torch.zeros(2, 0, 3)}, ValueError, "emissions"),
    ({"emissions": torch.zeros(2, 4, 3, dtype=torch.long)}, TypeError, "emissions"),
    ({"emissions": torch.full((2, 4, 3), math.nan)}, ValueError, "emissions.*NaN"),
    ({"emissions": torch.full((2, 4, 3), math.inf)}, ValueError, "emissions.*inf"),
    ({"transitions": torch.zeros(3)}, ValueError, "transitions"),
    ({"transitions": torch.zeros(3, 2)}, ValueError, "transitions"),
    ({"transitions": torch.zeros(2, 3, 3)}, ValueError, "transitions: expected 3 steps"),
    ({"transitions": torch.zeros(3, 3, dtype=torch.int)}, TypeError, "transitions"),
    ({"transitions": torch.tensor([[0.0, 0, 0], [0, math.nan, 0], [0, 0, 0]])}, ValueError, "transitions.*NaN"),
    ({"transitions": torch.full((3, 3), math.inf)}, ValueError, "transitions.*inf"),
    ({"transitions": torch.zeros(5, 1, 3, 3)}, ValueError, "broadcast.*transitions"),
    ({"start": torch.zeros(2)}, ValueError, "start"),
    ({"start": torch.zeros(5, 3)}, ValueError, "broadcast.*start"),
    ({"start": torch.zeros(3, dtype=torch.bool)}, TypeError, "start"),
    ({"start": torch.tensor([0.0, math.nan, 0.0])}, ValueError, "start.*NaN"),
    ({"end": torch.zeros(4)}, ValueError, "end"),
    ({"end": torch.tensor([0.0, math.inf, 0.0])}, ValueError, "end.*inf"),
    ({"lengths": torch.tensor([0, 2])}, ValueError, "lengths: expected values from 1 to 4"),
    ({"lengths": torch.tensor([5, 2])}, ValueError, "lengths: expected values from 1 to 4"),
    ({"lengths": torch.tensor([4.0, 2.0])}, TypeError, "lengths"),
    ({"lengths": torch.tensor([True, True])}, TypeError, "lengths"),
    ({"lengths": torch.tensor([4, 2, 3])}, ValueError, "broadcast.*lengths"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("function", [log_partition, marginals, viterbi, sample, lambda **x: top_k(**x, k=2)])
def test_bad_scores_are_named(
    function: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        function(**case_of(**change))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2, 4), TypeError, "value: expected integers"),
        (torch.zeros(2, 4, dtype=torch.bool), TypeError, "value: expected integers"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, "value: expected shape"),
        (torch.tensor(0), ValueError, "value: expected shape"),
        (torch.zeros(3, 4, dtype=torch.long), ValueError, "value: batch shape"),
        (torch.full((2, 4), 3), ValueError, "value: expected entries from 0 to 2, got entries from 0 to 3"),
        (torch.full((2, 4), -2), ValueError, "value: expected entries from 0 to 2"),
        (torch.full((2, 4), -1), ValueError, "value: entry -1"),
    ],
)
def test_bad_values_are_named(value: Tensor, error: type[Exception], message: str) -> None:
    law = LinearChainCRF(**case_of())
    for method in (law.log_prob, law.score):
        with pytest.raises(error, match=message):
            method(value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda law: law.topk(0), ValueError, "k: expected at least 1"),
        (lambda law: law.min_risk("f1"), ValueError, "loss"),
        (lambda law: law.min_risk(torch.zeros(2, 2)), ValueError, "loss"),
        (lambda law: law.condition(torch.zeros(2, 4, 3)), TypeError, "allowed"),
        (lambda law: law.condition(torch.ones(2, 4, 2).bool()), ValueError, "allowed"),
        (lambda law: law.condition(start=torch.ones(2).bool()), ValueError, "start"),
        (lambda law: law.condition(transitions=torch.ones(3, 2).bool()), ValueError, "transitions"),
        (lambda law: law.expectation({"arcs": torch.zeros(3)}), ValueError, "part_scores"),
        (lambda law: law.expectation(torch.zeros(5, 3)), ValueError, "part_scores"),
        (lambda law: law.expand((3,)), ValueError, "batch_shape"),
        (lambda law: law.cross_entropy(torch.distributions.Normal(0.0, 1.0)), TypeError, "q: expected LinearChainCRF"),
        (lambda law: law.cross_entropy(LinearChainCRF(torch.zeros(4, 2), torch.zeros(2, 2))), ValueError, "q"),
        (lambda law: law.cross_entropy(LinearChainCRF(torch.zeros(4, 3), torch.zeros(3, 3))), ValueError, "lengths"),
    ],
)
def test_bad_arguments_of_members_are_named(
    call: Callable[[LinearChainCRF], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(LinearChainCRF(**case_of()))
