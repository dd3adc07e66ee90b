"""The law of CTC's labels against the enumeration of all paths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions import CTCLabels
from probllm.distributions.ctc_labels import collapse

FRAMES, SIZE = 4, 3


def by_hand(path: tuple[int, ...]) -> tuple[int, ...]:
    """Labels of a path with blank 0."""
    return tuple(z for i, z in enumerate(path) if z != 0 and (i == 0 or path[i - 1] != z))


def padded(labels: tuple[int, ...], width: int = FRAMES) -> Tensor:
    return torch.tensor(labels + (0,) * (width - len(labels)), dtype=torch.long)


def law(seed: int, forbidden: float = 0.0) -> CTCLabels:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, FRAMES, SIZE, generator=generator, dtype=torch.float64)
    scores[..., 1:].masked_fill_(torch.rand(2, FRAMES, SIZE - 1, generator=generator) < forbidden, -torch.inf)
    return CTCLabels(scores.log_softmax(-1), torch.tensor([FRAMES, 2]))


@given(seed=st.integers(0, 2**31), forbidden=st.sampled_from([0.0, 0.4]))
def test_log_prob_sums_the_paths_that_collapse_to_the_labels(seed: int, forbidden: float) -> None:
    distribution = law(seed, forbidden)
    for row, frames in enumerate((FRAMES, 2)):
        total: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(SIZE), repeat=frames):
            p = sum(float(distribution.log_probs[row, t, z]) for t, z in enumerate(path))
            total[by_hand(path)] = total.get(by_hand(path), 0.0) + math.exp(p)
        assert sum(total.values()) == pytest.approx(1.0)
        for labels, p in total.items():
            found = float(distribution.log_prob(padded(labels))[row].exp())
            assert found == pytest.approx(p, abs=1e-12)


def test_more_labels_than_frames_can_hold_have_probability_zero() -> None:
    distribution = law(0)
    assert distribution.log_prob(torch.tensor([1, 1, 1, 0]))[0] == -torch.inf  # needs blanks between
    assert distribution.log_prob(torch.tensor([1, 2, 1, 2, 1]))[0] == -torch.inf
    assert distribution.log_prob(torch.tensor([1, 2, 1]))[1] == -torch.inf


@given(path=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_collapse_drops_repeats_then_blanks(path: list[int]) -> None:
    assert torch.equal(collapse(torch.tensor(path)), padded(by_hand(tuple(path)), len(path)))


def test_samples_have_the_frequencies_of_the_law() -> None:
    torch.manual_seed(0)
    distribution = law(1)
    paths, labels = distribution.sample_joint((20000,))
    assert torch.equal(collapse(paths), labels)
    for value in (padded((1,)), padded((2, 1)), padded(())):
        share = (labels == value).all(-1).double().mean(0)
        torch.testing.assert_close(share, distribution.log_prob(value).exp(), atol=0.015, rtol=0)


def test_posterior_is_bayes_rule_over_paths() -> None:
    distribution = law(2)
    posterior = distribution.posterior(torch.tensor([[1, 2], [2, 0]]))
    torch.testing.assert_close(posterior.log_partition, distribution.log_prob(torch.tensor([[1, 2], [2, 0]])))
    assert posterior.sample((3,)).shape == (3, 2, FRAMES)


def test_best_path_is_the_collapsed_argmax() -> None:
    distribution = law(3)
    for row, frames in enumerate((FRAMES, 2)):
        path = tuple(distribution.log_probs[row, :frames].argmax(-1).tolist())
        assert torch.equal(distribution.best_path()[row], padded(by_hand(path)))


def test_program_observes_and_samples_in_a_plate() -> None:
    scores = torch.zeros(2, FRAMES, SIZE).log_softmax(-1)

    def program(labels: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 2):
            drawn: Tensor = pyro.sample("labels", CTCLabels(scores), obs=labels)
            return drawn

    assert program().shape == (2, FRAMES)
    value = torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0]])
    trace = pyro.poutine.trace(program).get_trace(value)
    torch.testing.assert_close(trace.log_prob_sum(), CTCLabels(scores).log_prob(value).sum())
    wide = CTCLabels(scores[0]).expand((5, 2))
    assert wide.sample().shape == (5, 2, FRAMES)
    assert wide.log_prob(value).shape == (5, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: CTCLabels(torch.zeros(3)), "log_probs: expected shape"),
    (lambda: CTCLabels(torch.zeros(3, 2), blank=2), "blank: expected from 0 to 1"),
    (lambda: CTCLabels(torch.zeros(3, 2), lengths=torch.tensor(4)), "lengths: expected values from 1 to 3"),
    (lambda: CTCLabels(torch.zeros(3, 2)).log_prob(torch.tensor([0, 1])), "a label behind a blank"),
])  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="floating-point"):
        CTCLabels(torch.zeros(3, 2, dtype=torch.long))
