"""Bootstrap intervals against what is known of them: exact cases, symmetry, coverage on drawn corpora."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import bootstrap, paired_bootstrap


@st.composite
def corpus(draw, systems=1):
    """Correct and total tokens of a few sentences, for one system or several, in one run or several."""
    runs, sentences = draw(st.integers(1, 3)), draw(st.integers(5, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = np.tile(generator.integers(1, 30, size=sentences), (runs, 1))
    correct = [generator.binomial(tokens, generator.uniform(0.1, 0.9)) for _ in range(systems)]
    return tokens, correct


@given(corpus())
def test_interval_holds_the_estimate_and_the_estimate_is_the_ratio_of_sums(case):
    tokens, (correct,) = case
    estimate = bootstrap(correct, tokens, resamples=400)
    assert estimate.value == pytest.approx(correct.sum() / tokens.sum())
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


@given(corpus(systems=2))
def test_paired_bootstrap_is_antisymmetric(case):
    tokens, (a, b) = case
    forward, backward = paired_bootstrap(a, b, tokens, resamples=300), paired_bootstrap(b, a, tokens, resamples=300)
    assert forward.value == pytest.approx(-backward.value)
    assert forward.low == pytest.approx(-backward.high)
    assert forward.high == pytest.approx(-backward.low)
    assert forward.p == backward.p
    assert forward.holds_zero == backward.holds_zero


@given(corpus())
def test_a_system_does_not_differ_from_itself(case):
    tokens, (correct,) = case
    same = paired_bootstrap(correct, correct, tokens, resamples=100)
    assert same == (0.0, 0.0, 0.0, 1.0)
    assert same.holds_zero


def test_a_constant_score_has_an_interval_of_no_width():
    assert bootstrap([3, 6, 9], [4, 8, 12]) == pytest.approx((0.75, 0.75, 0.75))


def test_one_sentence_tells_no_spread_and_no_difference():
    assert bootstrap([3], [4]) == (0.75, -np.inf, np.inf)
    assert paired_bootstrap([[1.0], [2.0]], [[5.0], [4.0]]) == (-3.0, -np.inf, np.inf, 1.0)


def test_a_difference_that_is_not_finite_has_no_p_value():
    with np.errstate(invalid="ignore"):
        assert np.isnan(paired_bootstrap([1.0, np.inf, 2.0], [1.0, 2.0, 3.0]).p)


def test_interval_of_a_mean_has_the_width_of_the_central_limit():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=2000)
    estimate = bootstrap(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.08)


def test_interval_widens_with_the_disagreement_of_runs():
    steady, shaky = np.full((4, 50), 0.5), np.repeat([[0.2], [0.8], [0.3], [0.7]], 50, axis=1)
    assert bootstrap(steady)[1:] == (0.5, 0.5)
    assert bootstrap(shaky).high - bootstrap(shaky).low > 0.2


def test_a_clear_difference_is_significant_and_a_pairing_sharpens_it():
    generator = np.random.default_rng(2)
    difficulty = generator.normal(0, 5, size=300)
    a = difficulty + 0.3 + generator.normal(0, 0.5, size=300)
    b = difficulty + generator.normal(0, 0.5, size=300)
    assert not paired_bootstrap(a, b).holds_zero
    assert paired_bootstrap(a, b).p < 0.01
    assert paired_bootstrap(a, generator.permutation(b)).p > 0.05  # the same scores, pairing lost


def test_p_values_of_equal_systems_are_roughly_uniform():
    generator = np.random.default_rng(3)
    p = [paired_bootstrap(*generator.normal(size=(2, 80)), resamples=200, seed=i).p for i in range(400)]
    # 400 draws at 5 %: 99.99 % of binomial counts lie in 5..39
    assert 5 <= np.sum(np.array(p) <= 0.05) <= 39


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(4).normal(size=50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (([],), {}, "not empty"),
        (([[[1.0]]],), {}, r"\[sentences\] or \[runs, sentences\]"),
        (([1, 2], [1, 2, 3]), {}, "denominators"),
        (([1, 2],), {"level": 1.0}, "level"),
        (([1, 2],), {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input_is_named(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        bootstrap(*arguments, **options)


def test_paired_systems_must_have_scored_the_same_sentences():
    with pytest.raises(ValueError, match="same runs and sentences"):
        paired_bootstrap([1, 2], [1, 2, 3])
