"""Best, k best and sampled sequences of a chain: the kernels against the torch twin and enumeration."""

from __future__ import annotations

import itertools

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import LinearChainCRF
from probllm.math import chain_torch
from probllm.math.chain import as_chain
from probllm.math.chain_paths import sample, top_k, viterbi


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, steps, k = (
        draw(st.integers(1, 6)),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([1, 2, 3, 5, 8, 9, 17, 33])),
    )
    lead = draw(st.sampled_from([(), (rows, 1), (steps - 1,), (rows, steps - 1)]))
    scale, far = draw(st.sampled_from([1.0, 30.0, 1e4])), draw(st.sampled_from([0.0, 1e4, -1e6]))
    share = draw(st.sampled_from([0.0, 0.0, 0.3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scores = []
    for shape in ((rows, steps, k), (*lead, k, k), (k,), (rows, k)):
        x = scale * torch.randn(*shape, generator=generator) + (far if len(scores) != 1 else 0.0)
        scores.append(x.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf).to(dtype))
    return scores, torch.randint(1, steps + 1, (rows,), generator=generator)


def score_of(scores: list[Tensor], lengths: Tensor, paths: Tensor) -> Tensor:
    return LinearChainCRF(*(x.double() for x in scores), lengths).score(paths)


@given(cases())
def test_compiled_viterbi_attains_the_score_of_the_torch_twin(case: tuple[list[Tensor], Tensor]) -> None:
    scores, lengths = case
    twin = chain_torch.best_paths(*as_chain(*(x.double() for x in scores), lengths)[:5])
    path = viterbi(*scores, lengths)
    assert torch.equal((path == -1).all(-1), (twin == -1).all(-1))
    size = max(
        1.0,
        float(
            max(x[x > -torch.inf].abs().max() for x in scores if bool((x > -torch.inf).any()))
            if any(bool((x > -torch.inf).any()) for x in scores)
            else 1.0
        ),
    )
    rounding = (1e-15 if scores[0].dtype == torch.float64 or size > 2000 else 1e-6) * size * path.shape[-1]
    torch.testing.assert_close(score_of(scores, lengths, path), score_of(scores, lengths, twin), rtol=0, atol=rounding)


@given(cases(), st.sampled_from([1, 2, 5, 40]))
def test_k_best_scores_are_sorted_distinct_and_start_with_the_best(case: tuple[list[Tensor], Tensor], k: int) -> None:
    scores, lengths = case
    found, paths = top_k(*scores, lengths, k=k)
    assert found.dtype == torch.float64
    assert bool((found[:-1] >= found[1:]).all())
    there = found > -torch.inf
    again = score_of(scores, lengths, paths.clamp_min(0))
    torch.testing.assert_close(again[there], found[there], rtol=1e-12, atol=1e-9)
    for row in range(len(lengths)):
        mine = [tuple(x) for x in paths[there[:, row], row].tolist()]
        assert len(set(mine)) == len(mine)
    best = viterbi(*(x.double() for x in scores), lengths)
    torch.testing.assert_close(
        torch.where(there[0], score_of(scores, lengths, best), -torch.inf), found[0], rtol=1e-12, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forbid", [False, True])
def test_kernel_and_twin_draw_from_the_same_law(dtype: torch.dtype, forbid: bool) -> None:
    """Chi-square of each against the enumerated law, at a false-alarm rate of one in a million."""
    generator = torch.Generator().manual_seed(3)
    scores = [2 * torch.randn(*s, generator=generator).to(dtype) for s in ((2, 3, 3), (2, 2, 3, 3), (3,), (2, 3))]
    if forbid:
        scores[1][:, 0, 0, 1] = scores[2][2] = -torch.inf
    lengths, count = torch.tensor([3, 2]), 6000
    uniforms = torch.rand(count, 2, 3, dtype=torch.float64, generator=generator)
    twin = chain_torch.sample_paths(*as_chain(*scores, lengths)[:5], uniforms)
    law = LinearChainCRF(*scores, lengths)
    for drawn in (sample(*scores, lengths, n=count, generator=generator), twin):
        for row, n in enumerate(lengths.tolist()):
            every = torch.tensor([[*z, *[0] * (3 - n)] for z in itertools.product(range(3), repeat=n)])
            expected = count * law.log_prob(every.unsqueeze(1).expand(-1, 2, -1))[:, row].double().exp()
            observed = (drawn[:, row].unsqueeze(1) == every).all(-1).double().sum(0)
            assert observed.sum() == count
            assert not bool(observed[expected == 0].any())
            large = expected >= 5
            o = torch.cat([observed[large], observed[~large].sum()[None]])
            e = torch.cat([expected[large], expected[~large].sum()[None].clamp_min(1e-9)])
            assert scipy.stats.chi2.sf(float(((o - e) ** 2 / e).sum()), len(e) - 1) > 1e-6


def test_samples_come_from_torchs_generator() -> None:
    scores = [torch.randn(2, 5, 3), torch.randn(3, 3)]
    draws = [sample(*scores, n=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("large", ["emissions", "transitions"])
def test_small_differences_beside_large_scores_decide_the_best_path_in_float32(large: str) -> None:
    """Beside 1e5 float32 rounds to 0.008: every path would tie, were such rows not done in float64."""
    generator = torch.Generator().manual_seed(0)
    emissions, transitions = (0.001 * torch.randn(*shape, generator=generator) for shape in ((20, 6, 3), (3, 3)))
    emissions, transitions = (
        (torch.full_like(emissions, 1e5), transitions)
        if large == "emissions"
        else (emissions, torch.full_like(transitions, 1e5))
    )
    start = 0.001 * torch.randn(20, 3, generator=generator)
    wide = [x.double() for x in (emissions, transitions, start)]
    assert torch.equal(viterbi(emissions, transitions, start), viterbi(*wide))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_sequences_under_vmap_are_those_of_a_loop(dims: tuple[int | None, int | None]) -> None:
    generator = torch.Generator().manual_seed(3)
    emissions, transitions = (torch.randn(shape, generator=generator) for shape in ((5, 5, 4, 2), (5, 2, 2)))
    both = list(zip((emissions, transitions), dims, strict=True))
    rows = [tuple(x[0] if d is None else x.select(d, i) for x, d in both) for i in range(5)]
    whole = tuple(x[0] if d is None else x for x, d in both)
    best = torch.func.vmap(viterbi, dims)(*whole)
    assert torch.equal(best, torch.stack([viterbi(*row) for row in rows]))
    scores, paths = torch.func.vmap(lambda e, a: top_k(e, a, k=3), dims)(*whole)
    for i, row in enumerate(rows):
        expected_scores, expected = top_k(*row, k=3)
        torch.testing.assert_close(scores[i], expected_scores)
        assert torch.equal(paths[i], expected)


def test_samples_under_vmap_and_grad_follow_their_own_law() -> None:
    scores = torch.tensor([[[0.0, 30.0]], [[30.0, 0.0]]])  # [2 laws, T = 1, K = 2]: nearly certain
    drawn = torch.func.vmap(lambda e: sample(e, torch.zeros(2, 2), n=50), randomness="different")(scores)
    assert torch.equal(drawn[:, :, 0], torch.tensor([[1], [0]]).expand(2, 50))
    grown = torch.func.grad(lambda e: (sample(e, torch.zeros(2, 2)) * e.sum()).sum())(scores[0])
    torch.testing.assert_close(grown, torch.ones(1, 2))
