"""Calibration: does a model that says 80 % turn out right 80 % of the time?

Predictions are binned by confidence; the expected calibration error is the mean gap between a bin's confidence and
its accuracy, weighted by how many predictions fall into it, ``ECE = sum_b n_b / n |accuracy_b - confidence_b|``.

Source: Naeini, Cooper and Hauskrecht (2015); Guo, Pleiss, Sun and Weinberger (2017), eq. 3.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probllm.evaluation.bootstrap import Floats


class ReliabilityCurve(NamedTuple):
    """What a reliability diagram draws. Bins without a prediction have confidence, accuracy and count 0."""

    edges: Floats  # [bins + 1]
    confidence: Floats  # [bins], mean confidence
    accuracy: Floats  # [bins], share of right predictions
    counts: npt.NDArray[np.int64]  # [bins]


def reliability_curve(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15) -> ReliabilityCurve:
    """Confidence and accuracy in equal-width bins of confidence.

    Args:
        probabilities: ``[n, classes]``, whose largest entry is the prediction and its confidence; or ``[n]``, the
            confidence alone.
        labels: ``[n]``, the right classes; or, with confidences alone, whether each prediction was right.
        bins: how many bins divide [0, 1].
    Returns:
        the curve.
    Raises:
        ValueError: for empty or misshapen input, probabilities outside [0, 1], or fewer than one bin.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim not in (1, 2) or p.size == 0 or y.shape != p.shape[:1]:
        raise ValueError(f"need probabilities [n, classes] or [n] and labels [n], n >= 1; got {p.shape} and {y.shape}")
    if not (np.all(p >= -1e-6) and np.all(p <= 1 + 1e-6)):
        raise ValueError(f"probabilities must lie in [0, 1]; they lie in [{p.min()}, {p.max()}]")
    if bins < 1:
        raise ValueError(f"bins must be at least 1; it is {bins}")
    confidence = np.clip(p if p.ndim == 1 else p.max(axis=1), 0, 1)
    correct = (y.astype(bool) if p.ndim == 1 else p.argmax(axis=1) == y).astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # a bin holds its upper edge
    count = np.bincount(which, minlength=bins)
    safe = np.maximum(count, 1)
    return ReliabilityCurve(
        edges,
        np.bincount(which, weights=confidence, minlength=bins) / safe,
        np.bincount(which, weights=correct, minlength=bins) / safe,
        count.astype(np.int64),
    )


def expected_calibration_error(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, weighted by the bins' counts.

    Args:
        probabilities: ``[n, classes]``, whose largest entry is the prediction and its confidence; or ``[n]``, the
            confidence alone.
        labels: ``[n]``, the right classes; or, with confidences alone, whether each prediction was right.
        bins: how many equal-width bins divide [0, 1].
    Returns:
        the error, between 0 (perfect) and 1.
    Raises:
        ValueError: for empty or misshapen input, probabilities outside [0, 1], or fewer than one bin.
    """
    curve = reliability_curve(probabilities, labels, bins=bins)
    return float(np.sum(curve.counts * np.abs(curve.accuracy - curve.confidence)) / np.sum(curve.counts))
