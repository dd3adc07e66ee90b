"""Edit errors against their definition."""

import itertools
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import edit_distance, edit_errors

words = st.text("ab", max_size=5)


@cache
def by_definition(one, other):
    if not one or not other:
        return len(one) + len(other)
    return min(
        by_definition(one[1:], other) + 1,
        by_definition(one, other[1:]) + 1,
        by_definition(one[1:], other[1:]) + (one[0] != other[0]),
    )


@given(one=words, other=words)
def test_distance_is_that_of_the_recursive_definition(one, other):
    assert edit_distance(one, other) == by_definition(one, other) == edit_distance(other, one)


@given(one=words, two=words, three=words)
def test_distance_obeys_the_triangle_inequality(one, two, three):
    for a, b, c in itertools.permutations((one, two, three)):
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_nearest_reference_counts():
    found = edit_errors(["abc", "x", ""], [["abd", "ab", "abc"], ["yy", "x y"], ["a"]])
    assert found.wrong.tolist() == [0, 1, 1]
    assert found.edits.tolist() == [0, 2, 1]
    assert found.length.tolist() == [3, 2, 1]


def test_missing_references_are_refused():
    with pytest.raises(ValueError, match="references: expected 2"):
        edit_errors(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[0\] is empty"):
        edit_errors(["a"], [[]])
