"""Numbers with an exponent of their own are the numbers that exact arithmetic has."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.math.kernels import extended

SCORES = st.one_of(
    st.floats(-40.0, 40.0), st.floats(-1e6, 1e6), st.floats(-1e14, 1e14), st.floats(-1e200, 1e200), st.just(-math.inf)
)
NUMBERS = st.lists(st.tuples(st.floats(0.01, 100.0) | st.just(0.0), st.integers(-2000, 2000)), min_size=1, max_size=40)


def arrays(numbers: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    m = np.array([m for m, _ in numbers])
    return m, np.where(m > 0, np.array([float(e) for _, e in numbers]), extended.NONE)


def near(found: Fraction, expected: Fraction) -> bool:
    """Equal to some digits."""
    return abs(found - expected) <= expected / 10**12


def exact(m: float, e: float) -> Fraction:
    return Fraction(float(m)) * Fraction(2) ** int(e) if m > 0 else Fraction(0)


@given(st.lists(SCORES, min_size=1, max_size=40))
def test_an_exponential_is_split_to_the_digits_its_score_has(scores: list[float]) -> None:
    x, m, e = np.array(scores), np.empty(len(scores)), np.empty(len(scores))
    extended.split(x, m, e)
    for score, mantissa, exponent in zip(scores, m, e, strict=True):
        if score == -math.inf:
            assert (mantissa, exponent) == (0.0, extended.NONE)
            continue
        assert exponent == math.floor(exponent)
        assert math.log(mantissa) + exponent * extended.LN2 == pytest.approx(score, rel=4e-16, abs=4e-16)


@given(NUMBERS)
def test_renewed_numbers_are_the_same_with_mantissas_from_one_to_two(numbers: list[tuple[float, int]]) -> None:
    m, e = arrays(numbers)
    before = [exact(*x) for x in zip(m, e, strict=True)]
    extended.renew(m, e)
    assert [exact(*x) for x in zip(m, e, strict=True)] == before
    assert all(1.0 <= x < 2.0 or x == 0.0 for x in m)


@given(NUMBERS, st.integers(0, 2**31))
def test_products_and_their_sum(numbers: list[tuple[float, int]], seed: int) -> None:
    m, e = arrays(numbers)
    turn = np.random.default_rng(seed).permutation(len(m))
    out = np.empty(len(m))
    top, total = extended.products(m, e, m[turn], e[turn], out)
    firsts, seconds = (list(itertools.starmap(exact, zip(*x, strict=True))) for x in ((m, e), (m[turn], e[turn])))
    expected = [x * y for x, y in zip(firsts, seconds, strict=True)]
    assert near(exact(total, top), sum(expected, Fraction(0)))
    twice_m, twice_e = np.empty(len(m)), np.empty(len(m))
    extended.multiply(m, e, m[turn], e[turn], twice_m, twice_e)
    assert all(near(exact(*x), y) for x, y in zip(zip(twice_m, twice_e, strict=True), expected, strict=True))


@given(NUMBERS, st.integers(0, 2**31))
def test_three_are_joined_as_one_after_the_other(numbers: list[tuple[float, int]], seed: int) -> None:
    size, random = len(numbers), np.random.default_rng(seed)
    m, e = (np.concatenate([x[:1], x[:1], x]) for x in arrays(numbers))
    by_m, by_e = random.random((3, size)), random.integers(-1500, 1500, (3, size)).astype(float)
    out_m, out_e = np.empty(size), np.empty(size)
    extended.join_three(m, e, 2, -1, by_m, by_e, 0, 0, out_m, out_e, 0, size)
    mass, top = np.zeros(size), np.full(size, 2 * extended.NONE)
    for d in range(3):
        extended.highest_exponents(e[2 - d : 2 - d + size], by_e[d], top)
    for d in range(3):
        extended.add_product(m[2 - d : 2 - d + size], e[2 - d : 2 - d + size], by_m[d], by_e[d], top, mass)
    np.testing.assert_allclose(out_m, mass, rtol=1e-14)
    np.testing.assert_array_equal(out_e, top)
    for s in range(size):
        addends = [exact(m[2 + s - d], e[2 + s - d]) * exact(by_m[d, s], by_e[d, s]) for d in range(3)]
        assert near(exact(out_m[s], out_e[s]), sum(addends, Fraction(0)))
