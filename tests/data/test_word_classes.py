"""Every word has a symbol, an unknown one that of the longest suffix known in its shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import WordClasses
from probllm.data.word_classes import MAX_SUFFIX, SHAPES, word_shape

words_strategy = st.lists(st.text("abAB1-é.", min_size=1, max_size=13), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("paris", "x"),
        ("Paris", "Xx"),
        ("I", "Xx"),
        ("UN", "XX"),
        ("U.N.", "XX"),
        ("B2", "XX9"),
        ("well-known", "x-"),
        ("1984", "09"),
        ("9-11", "09-"),
        (",", "0"),
        ("北京", "x"),
        ("iPhone", "x"),
    ],
)
def test_shape_of_a_word(word, shape):
    assert word_shape(word) == shape
    assert shape in SHAPES


@given(words_strategy, words_strategy, st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))
def test_unknown_words_take_the_longest_known_suffix_in_their_shape(train, other, least, rare, shared):
    classes = WordClasses.build(train, least, rare, shared)
    suffixes = set(classes.classes)
    for position, word in enumerate(train + other):
        symbol = classes.encode(["-"] * position + [word])[position]
        small = (position == 0 or (len(word) > 1 and word.isupper())) and train.count(word) < least
        word = word.lower() if small and train.count(word.lower()) >= least else word
        assert (symbol < classes.first_class) == (train.count(word) >= least)
        if symbol < classes.first_class:
            assert classes.name(symbol) == word
            assert classes.counts[symbol - 1] == train.count(word)
        shape, lower = word_shape(word), word.lower()
        known = [lower[-n:] for n in range(1, MAX_SUFFIX + 1) if n <= len(lower) and (shape, lower[-n:]) in suffixes]
        longest = max(known, key=len, default="")
        assert classes.name(classes.class_of(word)) == f"<{shape}:{longest}>"
    for shape, suffix in suffixes:
        alike = {w for w in train if train.count(w) <= rare and word_shape(w) == shape and w.lower().endswith(suffix)}
        assert len(alike) >= shared


def test_frequent_words_lend_no_suffix():
    classes = WordClasses.build(["rare"] * 2 + ["often"] * 3, rare=2, min_class_count=1)
    assert {suffix for _, suffix in classes.classes} == {"e", "re", "are", "rare"}
    assert WordClasses.build(["rare", "bare"]).classes == [("x", "are"), ("x", "e"), ("x", "re")]


@given(words_strategy)
def test_parents_lead_to_the_root_by_shortening_the_suffix(train):
    classes = WordClasses.build(train)
    assert len(classes.parent) == len(classes)
    root = classes.first_class
    for symbol, parent in enumerate(classes.parent):
        if symbol in (0, root):
            assert parent == symbol
        elif symbol < root:
            assert parent == classes.class_of(classes.name(symbol))
        elif parent == root:
            assert classes.name(symbol).endswith(":>")
        else:
            shape, suffix = classes.name(symbol)[1:-1].split(":")
            assert classes.name(parent) == f"<{shape}:{suffix[1:]}>"


def test_capitals_of_the_first_word_and_of_whole_words_say_nothing_new():
    classes = WordClasses.build(["the", "cat", "Paris"])
    the, cat, paris = classes.encode(["the", "cat", "Paris"])
    assert classes.encode(["The", "CAT", "Paris"]) == [the, cat, paris]
    assert classes.encode(["the", "Cat", "PARIS"]) == [the, classes.class_of("Cat"), classes.class_of("PARIS")]


@given(words_strategy)
def test_saved_classes_are_equal(tmp_path_factory, train):
    path = tmp_path_factory.getbasetemp() / "classes.json"
    classes = WordClasses.build(train)
    classes.save(path)
    again = WordClasses.load(path)
    assert again == classes
    assert again.encode([*train, "Neu-1"]) == classes.encode([*train, "Neu-1"])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="as many, got 1 and 0"):
        WordClasses(["a"], [], [])
    with pytest.raises(ValueError, match="must be distinct"):
        WordClasses(["a", "a"], [1, 1], [])
    with pytest.raises(ValueError, match="symbol must lie from 0 to 17, got 18"):
        WordClasses([], [], []).name(18)
