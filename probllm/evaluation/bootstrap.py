"""Bootstrap intervals of a score over sentences, and of the difference between two systems on the same sentences.

Every score here is a ratio of sums over sentences, ``sum(numerators) / sum(denominators)``: accuracy is correct
tokens over tokens, entity F1 is ``2 tp`` over ``gold + predicted``, a likelihood per token is nats over tokens. A
resample draws whole sentences with replacement, since the tokens of one sentence are not independent; where a system
was trained several times (``[runs, sentences]``) it draws runs with replacement too. Intervals are percentiles. The
paired test resamples the same sentences for both systems. One sentence says nothing of the spread among sentences: its
interval is the whole line, and its p-value 1.

Source: Efron and Tibshirani (1993), chapters 13 and 16; Berg-Kirkpatrick, Burkett and Klein (2012) for the paired
test in NLP.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A score and its bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference ``a - b`` of two systems' scores, its bootstrap interval, and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds zero, that is, whether the data cannot tell the two systems apart."""
        return self.low <= 0.0 <= self.high


def bootstrap(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval of ``sum(numerators) / sum(denominators)``.

    Args:
        numerators: one number a sentence, ``[sentences]``, or ``[runs, sentences]`` for a system trained several times.
        denominators: the same shape; ones by default, which makes the score a mean over sentences.
        resamples: how many resamples to draw.
        level: the interval's coverage, between 0 and 1.
        seed: of the resampling.
    Returns:
        the score with its interval. With several runs the score is that of all runs together.
    Raises:
        ValueError: for empty or misshapen input, or a level outside (0, 1).
    """
    top, bottom = _ratio("numerators", numerators, denominators)
    value = float(_divide(top.sum(), bottom.sum()))
    draws = resample(top.shape, resamples, seed, lambda weigh: _divide(weigh(top), weigh(bottom)))
    return estimate(value, draws, level, top.shape[1])


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    a_denominators: npt.ArrayLike | None = None,
    b_denominators: npt.ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of the difference between system ``a``'s score and system ``b``'s on the same sentences.

    Args:
        a: system a's numerators, ``[sentences]`` or ``[runs, sentences]``; run r of a is paired with run r of b.
        b: system b's, the same shape.
        a_denominators: the same shape; ones by default.
        b_denominators: the same shape; ``a_denominators`` by default.
        resamples: how many resamples to draw.
        level: the interval's coverage, between 0 and 1.
        seed: of the resampling.
    Returns:
        ``a - b`` with its interval; ``p`` is the share of resampled differences that lie at least as far from the
        observed one as that lies from zero (the shift method), counted with one more resample so that it is never 0.
        It is NaN where the difference is not finite.
    Raises:
        ValueError: for empty or misshapen input, or a level outside (0, 1).
    """
    a_top, a_bottom = _ratio("a", a, a_denominators)
    b_top, b_bottom = _ratio("b", b, a_denominators if b_denominators is None else b_denominators)
    if a_top.shape != b_top.shape:
        raise ValueError(f"a and b must score the same runs and sentences; a is {a_top.shape}, b is {b_top.shape}")
    value = float(_divide(a_top.sum(), a_bottom.sum()) - _divide(b_top.sum(), b_bottom.sum()))
    draws = resample(
        a_top.shape,
        resamples,
        seed,
        lambda weigh: _divide(weigh(a_top), weigh(a_bottom)) - _divide(weigh(b_top), weigh(b_bottom)),
    )
    return difference(value, draws, level, a_top.shape[1])


def estimate(value: float, draws: Floats, level: float, sentences: int) -> Estimate:
    """A score with the interval of its resampled values."""
    low, high = _percentiles(draws, level)
    return Estimate(value, low, high) if sentences > 1 else Estimate(value, -math.inf, math.inf)


def difference(value: float, draws: Floats, level: float, sentences: int) -> Difference:
    """A difference with the interval and the p-value of its resampled values."""
    low, high = _percentiles(draws, level)
    if sentences == 1:
        return Difference(value, -math.inf, math.inf, 1.0)
    if not math.isfinite(value):
        return Difference(value, low, high, math.nan)
    slack = 1e-12 * max(1.0, abs(value))  # a difference of exactly 0 in every resample must give p = 1, not chance
    p = (1 + int(np.sum(np.abs(draws - value) >= abs(value) - slack))) / (1 + len(draws))
    return Difference(value, low, high, p)


def _ratio(name: str, numerators: npt.ArrayLike, denominators: npt.ArrayLike | None) -> tuple[Floats, Floats]:
    top = np.atleast_2d(np.asarray(numerators, dtype=np.float64))
    bottom = np.ones_like(top) if denominators is None else np.atleast_2d(np.asarray(denominators, dtype=np.float64))
    if top.ndim != 2 or top.size == 0:
        raise ValueError(
            f"{name} must be [sentences] or [runs, sentences] and not empty; its shape is {np.shape(numerators)}"
        )
    if bottom.shape != top.shape:
        raise ValueError(f"the denominators of {name} must have its shape {top.shape}; theirs is {bottom.shape}")
    return top, bottom


def _divide(top: Any, bottom: Any) -> Any:
    """A ratio whose 0/0 is 0: no entities anywhere make an F1 of 0, by the field's convention."""
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=np.asarray(bottom) != 0)


def resample(
    shape: tuple[int, ...], resamples: int, seed: int, score: Callable[[Callable[[Floats], Floats]], Floats]
) -> Floats:
    """``score`` at every resample; ``weigh`` sums a ``[runs, sentences]`` array under the resample's weights."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; it is {resamples}")
    runs, sentences = shape
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // sentences)  # counts of at most 32 MB at a time
    draws = []
    for first in range(0, resamples, chunk):
        count = min(chunk, resamples - first)
        sentence_weights = generator.multinomial(sentences, np.full(sentences, 1 / sentences), size=count).astype(
            np.float64
        )
        run_weights = generator.multinomial(runs, np.full(runs, 1 / runs), size=count).astype(np.float64)

        def weigh(values: Floats, by_run: Floats = run_weights, by_sentence: Floats = sentence_weights) -> Floats:
            totals: Floats = np.sum((by_sentence @ values.T) * by_run, axis=1)
            return totals

        draws.append(score(weigh))
    return np.concatenate(draws)


def _percentiles(draws: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; it is {level}")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
