"""EM over cuts into paired chunks, against the law over pair alignments and by its own identities."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.distributions import PairAlignment
from probllm.math.chunk_pairs import align_chunks

SIZES = (3, 4)
CHUNKS = ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2))
words = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 3), max_size=5)), min_size=1, max_size=6
)


def split(pairs: list[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def law_of(x: list[int], y: list[int], table: dict[tuple[tuple[int, ...], tuple[int, ...]], float]) -> PairAlignment:
    scores = torch.full((len(x) + 1, len(y) + 1, len(CHUNKS)), -torch.inf, dtype=torch.float64)
    for i in range(len(x) + 1):
        for j in range(len(y) + 1):
            for m, (a, b) in enumerate(CHUNKS):
                if i >= a and j >= b:
                    scores[i, j, m] = table.get((tuple(x[i - a : i]), tuple(y[j - b : j])), -torch.inf)
    return PairAlignment(scores, CHUNKS)


@given(words)
def test_likelihood_never_falls_and_cuts_spell_the_words(pairs: list[tuple[list[int], list[int]]]) -> None:
    found = align_chunks(*split(pairs), SIZES, CHUNKS, steps=6)
    assert all(b >= a - 1e-9 for a, b in pairwise(found.log_likelihoods))
    for (x, y), cut in zip(pairs, found.cuts, strict=True):
        chunks = [found.pairs[k] for k in cut]
        possible = len(y) <= 2 * len(x)
        if possible:
            assert [s for u, _ in chunks for s in u] == x
            assert [s for _, v in chunks for s in v] == y
        else:
            assert not chunks
        assert all((len(u), len(v)) in CHUNKS for u, v in chunks)


@given(words)
def test_first_step_is_the_law_over_uniform_pairs(pairs: list[tuple[list[int], list[int]]]) -> None:
    """The likelihood before it, and the probabilities after it from the law's expected parts."""
    possible = [(x, y) for x, y in pairs if len(y) <= 2 * len(x) and x]
    if not possible:
        return
    seen = {
        (tuple(x[i - a : i]), tuple(y[j - b : j]))
        for x, y in possible
        for i in range(len(x) + 1)
        for j in range(len(y) + 1)
        for a, b in CHUNKS
        if i >= a and j >= b
    }
    uniform = dict.fromkeys(seen, -math.log(len(seen)))
    laws = [law_of(x, y, uniform) for x, y in possible]
    counts: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for (x, y), law in zip(possible, laws, strict=True):
        for i, j, m in (law.marginals > 0).nonzero().tolist():
            a, b = CHUNKS[m]
            pair = (tuple(x[i - a : i]), tuple(y[j - b : j]))
            counts[pair] = counts.get(pair, 0.0) + float(law.marginals[i, j, m])
    found = align_chunks(*split(possible), SIZES, CHUNKS, steps=1)
    assert found.probabilities.tolist() == pytest.approx([counts[p] / sum(counts.values()) for p in found.pairs])
    mean = sum(float(law.log_partition) for law in laws) / len(laws)
    assert found.log_likelihoods[0] == pytest.approx(mean)


@given(words)
def test_cuts_are_modes_of_the_law_of_the_probabilities(pairs: list[tuple[list[int], list[int]]]) -> None:
    found = align_chunks(*split(pairs), SIZES, CHUNKS, steps=4)
    logs = {p: math.log(q) for p, q in zip(found.pairs, found.probabilities.tolist(), strict=True)}
    for (x, y), cut in zip(pairs, found.cuts, strict=True):
        if len(cut):
            law = law_of(x, y, logs)  # pairs that no best cut uses are left out, and change no best cut
            mine = sum(logs[found.pairs[k]] for k in cut)
            assert mine == pytest.approx(float(law.score(law.mode)))


def test_threads_do_not_change_what_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(0, 3, (n % 7 + 1,), generator=generator).tolist() for n in range(3000)]
    targets = [[(s + n % 2) % 4 for s in x] for n, x in enumerate(sources)]
    torch.set_num_threads(1)
    one = align_chunks(sources, targets, SIZES)
    torch.set_num_threads(3)
    three = align_chunks(sources, targets, SIZES)
    assert three.pairs == one.pairs
    assert three.probabilities.tolist() == pytest.approx(one.probabilities.tolist())


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="targets: expected as many as sources, 1, got 0"):
        align_chunks([[0]], [], SIZES)
    with pytest.raises(ValueError, match="chunks: pairs of up to"):
        align_chunks([[0]], [[0]], (200, 200), ((4, 4),))
