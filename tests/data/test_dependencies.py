"""Trees: projective ones counted by formula, lifting against its definition, cycles named."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import find_cycle, is_projective, projectivise


@st.composite
def trees(draw, most=9):
    """The words in random order, each hung on the root or on one before it."""
    order = draw(st.permutations(range(1, draw(st.integers(1, most)) + 1)))
    heads = [0] * len(order)
    for place, word in enumerate(order):
        heads[word - 1] = draw(st.sampled_from([0, *order[:place]]))
    return heads


def every_tree(size):
    return [heads for heads in itertools.product(range(size + 1), repeat=size) if not find_cycle(heads)]


def crosses(heads):
    arcs = [tuple(sorted(arc)) for arc in enumerate(heads, start=1)]
    return any(a < c < b < d for a, b in arcs for c, d in arcs)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_trees_and_projective_trees_are_as_many_as_the_formulas_say(size):
    found = every_tree(size)
    assert len(found) == (size + 1) ** (size - 1)
    assert sum(map(is_projective, found)) == math.comb(3 * size, size) // (2 * size + 1)
    with_one_root = [heads for heads in found if heads.count(0) == 1]
    assert sum(map(is_projective, with_one_root)) == math.comb(3 * size - 2, size - 1) // size


@given(trees())
def test_a_tree_is_projective_where_no_arcs_cross(heads):
    assert is_projective(heads) == (not crosses(heads))


@given(trees())
def test_lifting_gives_a_projective_tree_that_moves_words_up_alone(heads):
    lifted = projectivise(heads)
    assert is_projective(lifted)
    assert projectivise(lifted) == lifted
    if is_projective(heads):
        assert lifted == heads
    for word, (before, after) in enumerate(zip(heads, lifted, strict=True), start=1):
        above = [word]
        while above[-1]:
            above.append(heads[above[-1] - 1])
        assert after in above[1:], "a word is hung on an ancestor"
        assert before != 0 or after == 0


def test_the_shortest_arc_is_lifted_first():
    # 5 -> 3 and 2 -> 5 pass over 4, whose head is 1; lifting 5 first would leave 3 hanging higher.
    assert projectivise([0, 1, 5, 1, 2]) == [0, 1, 2, 1, 1]
    assert projectivise([0, 1, 1, 2]) == [0, 1, 1, 1]


def test_cycles_are_found_and_refused():
    assert find_cycle([2, 3, 1]) == [1, 2, 3]
    assert find_cycle([0, 3, 2, 1]) == [2, 3]
    assert find_cycle([2, 0, 2]) == []
    for heads in ([2, 1], [1], [0, 3], [-1]):
        with pytest.raises(ValueError, match="heads must"):
            is_projective(heads)
        with pytest.raises(ValueError, match="heads must"):
            projectivise(heads)
