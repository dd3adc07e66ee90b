"""Greedy and prefix beam decoding of CTC's frames, against every label sequence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.decoding import ctc_beam, ctc_greedy
from probllm.distributions import CTCLabels, MonotonicAlignment


@st.composite
def frames(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, steps, size = (draw(st.integers(*ends)) for ends in ((1, 3), (1, 5), (1, 4)))
    logits = draw(st.sampled_from([0.5, 3.0])) * torch.randn(rows, steps, size, generator=generator).double()
    if draw(st.booleans()):  # but not all of a frame
        logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.2, -torch.inf, logits)
        logits[..., 0] = logits[..., 0].clamp_min(-5.0)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    return logits.log_softmax(-1), lengths, draw(st.integers(0, size - 1))


def every_label_sequence(log_probs: Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """The probability of each label sequence, summed over all paths by hand."""
    found: dict[tuple[int, ...], float] = {}
    p = log_probs.exp().tolist()
    for path in itertools.product(range(log_probs.shape[-1]), repeat=len(log_probs)):
        labels = tuple(k for k, _ in itertools.groupby(path) if k != blank)
        found[labels] = found.get(labels, 0.0) + math.prod(p[t][k] for t, k in enumerate(path))
    return {labels: p for labels, p in found.items() if p > 0}


def written(labels: Tensor, blank: int) -> tuple[int, ...]:
    return tuple(k for k in labels.tolist() if k != blank)


@given(frames())
def test_a_full_beam_sorts_all_label_sequences_by_their_probabilities(case: tuple[Tensor, Tensor, int]) -> None:
    log_probs, lengths, blank = case
    scores, labels = ctc_beam(log_probs, lengths, beam=1500, count=40, blank=blank)
    for row in range(len(log_probs)):
        every = every_label_sequence(log_probs[row, : lengths[row]], blank)
        expected = sorted(every.values(), reverse=True)[:40]
        there = scores[:, row] > -torch.inf
        assert int(there.sum()) == len(expected)
        torch.testing.assert_close(scores[there, row].exp(), torch.tensor(expected).double())
        sequences = [written(x, blank) for x in labels[there, row]]
        assert len(set(sequences)) == len(sequences)
        torch.testing.assert_close([every[x] for x in sequences], expected, check_dtype=False)


@given(frames(), st.integers(1, 4))
def test_a_narrow_beam_gives_lower_bounds_of_the_labels_own_probabilities(
    case: tuple[Tensor, Tensor, int], beam: int
) -> None:
    log_probs, lengths, blank = case
    scores, labels = ctc_beam(log_probs, lengths, beam=beam, count=beam, blank=blank)
    there = scores > -torch.inf
    assert bool(there[0].all())
    own = CTCLabels(log_probs, lengths, blank).log_prob(labels)
    assert bool((scores <= own + 1e-9)[there].all())
    assert bool((scores[:-1] >= scores[1:]).all())


@given(frames())
def test_greedy_labels_are_those_of_the_best_path(case: tuple[Tensor, Tensor, int]) -> None:
    log_probs, lengths, blank = case
    found = ctc_greedy(log_probs, lengths, blank)
    for row in range(len(log_probs)):
        path = log_probs[row, : lengths[row]].argmax(-1).tolist()
        assert written(found[row], blank) == tuple(k for k, _ in itertools.groupby(path) if k != blank)


def test_beam_of_long_rows_finds_more_than_the_best_path() -> None:
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(2, 3, 60, 8)).log_softmax(-1)
    scores, labels = ctc_beam(log_probs, beam=32, count=2)
    assert scores.shape == (2, 2, 3)
    assert labels.shape == (2, 2, 3, 60)
    assert scores.dtype == log_probs.dtype
    greedy = ctc_greedy(log_probs)
    counts = (greedy != 0).sum(-1)
    of_greedy = MonotonicAlignment.ctc(log_probs, greedy, target_lengths=counts).log_partition
    assert bool((CTCLabels(log_probs).log_prob(labels[0]) >= of_greedy).all())


def test_pruned_prefixes_that_come_back_are_one_with_their_descendants() -> None:
    """With random frames prefixes leave the beam while longer ones stay; equal strings never appear twice."""
    torch.manual_seed(1)
    log_probs = torch.randn(20, 30, 3).log_softmax(-1)
    for beam in (2, 3, 5, 8):
        _, labels = ctc_beam(log_probs, beam=beam, count=beam)
        for row in range(20):
            assert len({tuple(x) for x in labels[:, row].tolist()}) == beam


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam": 0}, "beam: expected at least 1, got 0"),
        ({"beam": 2, "count": 3}, "count: expected from 1 to the beam, 2, got 3"),
        ({"blank": 4}, "blank: expected from 0 to 3, got 4"),
        ({"lengths": torch.tensor(6)}, "lengths: expected values from 1 to 5"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ctc_beam(torch.zeros(5, 4), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        ctc_beam(torch.full((5, 4), torch.nan))
