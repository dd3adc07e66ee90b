"""Calibration error against worlds whose calibration is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import expected_calibration_error, reliability_curve


@st.composite
def predictions(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes, n = draw(st.integers(2, 6)), draw(st.integers(1, 200))
    p = generator.dirichlet(np.full(classes, draw(st.sampled_from([0.05, 0.5, 1.0, 20.0]))), size=n)
    return p, generator.integers(0, classes, size=n), draw(st.integers(1, 20))


@given(predictions())
def test_error_lies_between_zero_and_one_and_is_the_curves_weighted_gap(case):
    p, labels, bins = case
    curve = reliability_curve(p, labels, bins=bins)
    assert curve.counts.sum() == len(p)
    error = expected_calibration_error(p, labels, bins=bins)
    assert error == pytest.approx(np.sum(curve.counts / len(p) * np.abs(curve.accuracy - curve.confidence)))
    assert 0 <= error <= 1


@given(predictions())
def test_error_is_at_least_the_gap_between_mean_confidence_and_accuracy(case):
    p, labels, bins = case
    gap = abs(p.max(1).mean() - np.mean(p.argmax(1) == labels))
    assert expected_calibration_error(p, labels, bins=bins) >= gap - 1e-9
    assert expected_calibration_error(p, labels, bins=1) == pytest.approx(gap)


@given(predictions())
def test_each_prediction_falls_into_the_bin_that_holds_its_confidence(case):
    p, labels, bins = case
    confidence, correct = p.max(1), p.argmax(1) == labels
    curve = reliability_curve(confidence, correct, bins=bins)
    for b in range(bins):
        inside = (confidence > curve.edges[b]) & (confidence <= curve.edges[b + 1])
        assert curve.counts[b] == inside.sum()
        if inside.any():
            assert curve.confidence[b] == pytest.approx(confidence[inside].mean())
            assert curve.accuracy[b] == pytest.approx(correct[inside].mean())


def test_a_bin_holds_its_upper_edge_and_the_first_bin_0():
    curve = reliability_curve([0.0, 0.25, 0.5, 0.75, 1.0], [1, 0, 1, 0, 1], bins=4)
    assert curve.counts.tolist() == [2, 1, 1, 1]
    assert curve.accuracy.tolist() == [0.5, 1.0, 0.0, 1.0]


def test_a_model_whose_labels_are_drawn_from_its_own_probabilities_is_calibrated():
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(4), size=40_000)
    labels = (p.cumsum(1) > generator.random((len(p), 1))).argmax(1)
    # each of 15 bins strays by about sqrt(0.25 / 2667) = 0.01 at most on average; 0.02 is far out
    assert expected_calibration_error(p, labels) < 0.02
    assert expected_calibration_error(p**4 / (p**4).sum(1, keepdims=True), labels) > 0.15


def test_certainty_that_is_always_wrong_has_error_one_and_always_right_zero():
    assert expected_calibration_error([[1.0, 0.0]] * 3, [1, 1, 1]) == 1
    assert expected_calibration_error([[1.0, 0.0]] * 3, [0, 0, 0]) == 0


@pytest.mark.parametrize(
    ("p", "labels", "bins", "says"),
    [
        ([], [], 15, "n >= 1"),
        ([[0.5, 0.5]], [0, 1], 15, "labels"),
        ([[1.5, -0.5]], [0], 15, r"\[0, 1\]"),
        ([[np.nan, 0.5]], [0], 15, r"\[0, 1\]"),
        ([[0.5, 0.5]], [0], 0, "bins"),
    ],
)
def test_bad_input_is_named(p, labels, bins, says):
    with pytest.raises(ValueError, match=says):
        expected_calibration_error(p, labels, bins=bins)
