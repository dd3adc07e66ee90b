"""Automata against Python's own regular expressions, hand-made rules, and counts."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data.bio import bio_rules
from probllm.math import automata
from probllm.math.automata import Automaton

NAMES = ["a", "b", "c"]
SEQUENCES = [list(x) for n in range(1, 6) for x in itertools.product(range(3), repeat=n)]


def accepted(automaton: Automaton) -> list[bool]:
    longest = max(map(len, SEQUENCES))
    tags = torch.tensor([x + [0] * (longest - len(x)) for x in SEQUENCES])
    return automaton.accepts(tags, torch.tensor([len(x) for x in SEQUENCES])).tolist()  # type: ignore[no-any-return]


patterns = st.recursive(
    st.sampled_from(["a", "b", "c", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(" ".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from("*+?")).map(lambda two: f"({two[0]}){two[1]}"),
        inner.map(lambda one: f"({one}|)"),
    ),
    max_leaves=6,
)


@given(patterns)
def test_patterns_match_what_regular_expressions_do(pattern: str) -> None:
    ours = accepted(automata.from_pattern(pattern, NAMES))
    theirs = re.compile(pattern.replace(" ", ""))
    assert ours == [theirs.fullmatch("".join(NAMES[i] for i in x)) is not None for x in SEQUENCES]


@given(patterns, patterns)
def test_both_accepts_what_both_accept(one: str, other: str) -> None:
    left, right = automata.from_pattern(one, NAMES), automata.from_pattern(other, NAMES)
    assert accepted(left.both(right)) == [a and b for a, b in zip(accepted(left), accepted(right), strict=True)]


@given(patterns)
def test_expressions_that_say_the_same_give_the_same_automaton(pattern: str) -> None:
    """The smallest automaton is one of a kind, and states are numbered in the order of reading."""
    p = f"({pattern})"
    for one, other in ((p, f"{p} | {p} ()"), (f"{p}*", f"({p}?)+"), (f"{p}+", f"{p} {p}*"), (f"{p}?", f"(| {p})")):
        left, right = automata.from_pattern(one, NAMES), automata.from_pattern(other, NAMES)
        assert torch.equal(left.delta, right.delta)
        assert torch.equal(left.accepting, right.accepting)


def test_counts_are_bounds_on_a_tag() -> None:
    for least, most in ((0, None), (1, None), (0, 0), (0, 2), (2, 3)):
        found = accepted(automata.counting(1, 3, least, most))
        assert found == [least <= x.count(1) <= (9 if most is None else most) for x in SEQUENCES]


def test_rules_are_those_of_the_scheme() -> None:
    names = ["O", "B-x", "I-x"]
    ours = accepted(automata.from_rules(**bio_rules(names)))
    legal = re.compile("(O|BI*)+")
    assert ours == [legal.fullmatch("".join("OBI"[i] for i in x)) is not None for x in SEQUENCES]
    assert automata.from_rules(**bio_rules(["O", "B-x", "I-x", "B-y", "I-y"])).delta.shape[0] == 4


def test_names_may_hold_any_character() -> None:
    automaton = automata.from_pattern(r"PRP\$ (\.|WP\*)+", ["PRP$", ".", "WP*"])
    assert automaton.accepts(torch.tensor([[0, 1, 2], [0, 2, 0], [1, 1, 1]])).tolist() == [True, False, False]


def test_an_empty_language_accepts_nothing() -> None:
    nothing = automata.from_pattern("a", NAMES).both(automata.from_pattern("b", NAMES))
    assert nothing.delta.tolist() == [[-1, -1, -1]]
    assert not any(accepted(nothing))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a d", "'d' is no tag at character 2"),
        ("(a", r"expected '\)' at character 2"),
        ("a)", r"unexpected '\)' at character 1"),
        ("* a", r"expected a tag, '.' or '\(', got '\*' at character 0"),
        ("a|+", r"got '\+' at character 2"),
    ],
)
def test_bad_patterns_say_where(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        automata.from_pattern(pattern, NAMES)


def test_bad_arguments_are_named() -> None:
    yes = torch.ones(2, 2, dtype=torch.bool)
    for make, message in (
        (lambda: automata.counting(3, 3), "tag: expected from 0 to 2"),
        (lambda: automata.counting(0, 3, 2, 1), "at_least, at_most"),
        (lambda: automata.from_rules(yes.long()), "transitions: expected bool"),
        (lambda: automata.from_rules(yes, start=yes), r"start: expected bool \[2\]"),
        (lambda: automata.from_rules(yes).both(automata.counting(0, 3)), "other: expected an automaton over 2 tags"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
