"""The law over alignments of two sequences, the edit distance and the transducer as cases of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from probllm.distributions import PairAlignment
from probllm.distributions.pair_alignment import EDITS
from probllm.math import pair_alignment
from probllm.math.recursion import Recursion, log_partition
from tests.distributions import battery
from tests.distributions.battery import Case, Parts

MOVES = [EDITS, ((1, 0), (0, 1)), ((1, 1),), ((1, 1), (2, 1), (1, 2), (2, 2), (1, 0)), ((0, 2), (3, 0), (1, 1))]


def all_paths(moves: tuple[tuple[int, int], ...], n: int, w: int) -> list[list[int]]:
    """Every sequence of moves (numbered from 1) from (0, 0) to (n, w)."""
    if (n, w) == (0, 0):
        return [[]]
    return [
        [*path, m] for m, (a, b) in enumerate(moves, 1) if a <= n and b <= w for path in all_paths(moves, n - a, w - b)
    ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    moves = draw(st.sampled_from(MOVES))
    u, w = draw(st.sampled_from([(2, 2), (3, 1), (1, 3), (0, 2), (2, 0), (1, 1), (3, 2)]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))
    scores = scale * torch.randn(
        *draw(st.sampled_from([batch, ()])), u + 1, w + 1, len(moves), generator=generator, dtype=torch.float64
    )
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < share, -torch.inf)
    lengths, target_lengths = (
        draw(st.sampled_from([None, torch.randint(0, n + 1, batch, generator=generator)])) for n in (u, w)
    )

    def build(**given: Any) -> PairAlignment:
        return PairAlignment(**given, moves=moves, lengths=lengths, target_lengths=target_lengths)

    law = build(scores=scores)
    ends = list(itertools.product(range(u + 1), range(w + 1)))
    paths = [(end, path) for end in ends for path in all_paths(moves, *end)]
    padded = torch.tensor([path + [0] * (u + w - len(path)) for _, path in paths])
    structures = padded.reshape(-1, *(1,) * len(law.batch_shape), u + w).expand(-1, *law.batch_shape, u + w)
    listed = torch.stack([(law.lengths == torch.tensor(end)).all(-1) for end, _ in paths])

    def score(given: Parts) -> Tensor:
        table = given["scores"].expand(*law.batch_shape, u + 1, w + 1, len(moves))
        # 0, and yet a function of the scores where no path uses any
        nothing = torch.where(torch.zeros_like(table, dtype=torch.bool), table, 0.0).sum((-1, -2, -3))
        totals = []
        for _, path in paths:
            i = j = 0
            total = nothing
            for m in path:
                i, j = i + moves[m - 1][0], j + moves[m - 1][1]
                total = total + table[..., i, j, m - 1]
            totals.append(total)
        return torch.stack(totals)

    return Case(law, build, structures, listed, score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@given(cases())
def test_kernels_are_the_torch_twin(case: Case) -> None:
    law = case.law
    assert isinstance(law, PairAlignment)
    rows, lengths = law._flat("scores", False), law._flat_lengths()
    if not len(rows):
        return

    def run(recursion: Recursion) -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        log_z = log_partition(recursion, (leaf,), lengths)
        total = torch.where(log_z > -torch.inf, log_z, 0.0).sum()
        return log_z, torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)[0]

    recursion = pair_alignment.recursion(law.moves)
    for found, expected in zip(run(recursion), run(Recursion(recursion.inside)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8 * battery.size_of(case))


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_best_score_under_unit_costs_is_the_edit_distance(a: str, b: str) -> None:
    if not a and not b:
        return
    unlike = torch.tensor([[float(x != y) for y in b] for x in a]).reshape(len(a), len(b))
    law = PairAlignment.edit(-unlike, -torch.ones(len(a)), -torch.ones(len(b)))
    assert float(-law.score(law.mode)) == edit_distance(a, b)
    cold = law.with_temperature(1e-3)
    assert float(-cold.log_partition * 1e-3) == pytest.approx(edit_distance(a, b), abs=0.02)


def test_number_of_alignments_is_delannoys() -> None:
    law = PairAlignment(torch.zeros(2, 6, 6, 3), lengths=torch.tensor([5, 3]), target_lengths=torch.tensor([5, 2]))
    torch.testing.assert_close(law.log_count.exp(), torch.tensor([1683.0, 25.0]).double())


def test_rows_with_lengths_are_the_shorter_pairs() -> None:
    match, delete, insert = torch.randn(2, 4, 5), torch.randn(2, 4), torch.randn(2, 5)
    law = PairAlignment.edit(match, delete, insert, torch.tensor([4, 2]), torch.tensor([5, 3]))
    short = PairAlignment.edit(match[1, :2, :3], delete[1, :2], insert[1, :3])
    torch.testing.assert_close(law.log_partition[1], short.log_partition)
    assert law.mode[1, :5].tolist() == short.mode.tolist()


def test_swapping_the_sequences_swaps_deletions_and_insertions() -> None:
    match, delete, insert = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    law, back = PairAlignment.edit(match, delete, insert), PairAlignment.edit(match.T, insert, delete)
    torch.testing.assert_close(law.log_partition, back.log_partition)
    torch.testing.assert_close(law.marginals[..., 1], back.marginals[..., 2].T)


@given(st.integers(0, 10000))
def test_transducer_sums_its_paths(seed: int) -> None:
    """Interleavings of T blanks and U labels that end in a blank."""
    torch.manual_seed(seed)
    frames, count = 3, 2
    log_probs = torch.randn(frames, count + 1, 4, dtype=torch.float64).log_softmax(-1)
    targets = torch.randint(1, 4, (count,))
    scores = []
    for places in itertools.combinations(range(frames + count - 1), count):
        t = u = 0
        total = torch.zeros((), dtype=torch.float64)
        for step in range(frames + count):
            if step in places:
                total, u = total + log_probs[t, u, targets[u]], u + 1
            else:
                total, t = total + log_probs[t, u, 0], t + 1
        scores.append(total)
    found = PairAlignment.transducer(log_probs, targets).log_partition
    torch.testing.assert_close(found, torch.stack(scores).logsumexp(0))
    wide = torch.nn.functional.pad(log_probs, (0, 0, 0, 2, 0, 3))
    labels = torch.nn.functional.pad(targets, (0, 2))
    padded = PairAlignment.transducer(wide, labels, torch.tensor(frames), torch.tensor(count)).log_partition
    torch.testing.assert_close(padded, found)


def test_second_derivatives_and_torch_func() -> None:
    scores = torch.randn(3, 3, 4, 3, dtype=torch.float64, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        return PairAlignment(x).log_partition

    assert torch.autograd.gradcheck(value, scores)
    assert torch.autograd.gradgradcheck(value, scores)
    torch.testing.assert_close(torch.func.vmap(value)(scores), value(scores))
    marginals = PairAlignment(scores).marginals
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(scores.detach()), marginals.detach())


BAD = {
    "scores: expected shape": lambda: PairAlignment(torch.zeros(3, 3)),
    "expected a source or a target": lambda: PairAlignment(torch.zeros(1, 1, 3)),
    "moves: expected different": lambda: PairAlignment(torch.zeros(3, 3, 2), ((1, 1), (0, 0))),
    "lengths: expected values from 0 to 2": lambda: PairAlignment(torch.zeros(3, 3, 3), lengths=torch.tensor(3)),
    "target_lengths: expected a tensor of integers": lambda: PairAlignment(
        torch.zeros(3, 3, 3), target_lengths=torch.tensor(1.0)
    ),
    "scores: scores must not be NaN": lambda: PairAlignment(torch.full((3, 3, 3), torch.nan)).log_partition,
    "delete: expected shape": lambda: PairAlignment.edit(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)),
    "targets: expected labels": lambda: PairAlignment.transducer(torch.zeros(2, 2, 3), torch.tensor([0])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_pair_alignment_as_a_pyro_site() -> None:
    scores = torch.randn(4, 3, 4, 3)

    def model(observed: Tensor | None = None) -> Tensor:
        weight = pyro.param("weight", torch.ones(()))
        with pyro.plate("rows", 4):
            found: Tensor = pyro.sample("path", PairAlignment(weight * scores), obs=observed)
        return found

    drawn = model()
    expected = PairAlignment(scores).log_prob(drawn)
    svi = SVI(model, lambda observed=None: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    assert svi.step(drawn) == pytest.approx(-float(expected.sum()), rel=1e-5)
    assert Predictive(model, num_samples=3)()["path"].shape == (3, 4, 5)
