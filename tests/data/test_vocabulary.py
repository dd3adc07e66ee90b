"""Ids lead back to the strings; what is unknown is 1, and only padding is 0."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Vocabulary

tokens = st.lists(st.text(max_size=4), max_size=40)


@given(tokens, tokens, st.integers(1, 3))
def test_known_strings_round_trip_and_the_rest_is_unknown(train, other, least):
    vocabulary = Vocabulary.build(train, least)
    counts = Counter(train)
    ids = vocabulary.encode(train + other)
    assert 0 not in ids
    for token, number in zip(train + other, ids, strict=True):
        known = counts[token] >= least
        assert (number > 1) == known == (token in vocabulary)
        assert vocabulary.decode([number]) == [token if known else "<unk>"]
        assert vocabulary[token] == number < len(vocabulary)


@given(tokens)
def test_order_is_by_frequency_and_does_not_depend_on_the_order_of_the_text(train):
    vocabulary = Vocabulary.build(train)
    assert vocabulary == Vocabulary.build(sorted(train))
    counts = Counter(train)
    frequencies = [counts[entry] for entry in vocabulary.entries]
    assert frequencies == sorted(frequencies, reverse=True)
    assert Vocabulary.build(train, max_size=2).entries == vocabulary.entries[:2]


@given(tokens)
def test_a_saved_vocabulary_is_equal(tmp_path_factory, train):
    path = tmp_path_factory.getbasetemp() / "vocabulary.json"
    vocabulary = Vocabulary.build(train)
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary


def test_a_string_that_reads_like_padding_is_no_padding():
    vocabulary = Vocabulary(["<pad>", "<unk>"])
    assert vocabulary.encode(["<pad>", "<unk>", "x"]) == [2, 3, 1]
    assert Vocabulary([]).encode(["<pad>"]) == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected a saved Vocabulary, got list"),
        ('{"WordClasses": {}}', "expected a saved Vocabulary, got a saved WordClasses"),
        ("{}", "got a saved nothing"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "saved.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"saved.json: .*{message}"):
        Vocabulary.load(path)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"occur twice: \['a'\]"):
        Vocabulary(["a", "b", "a"])
    for number in (4, -1):
        with pytest.raises(ValueError, match=f"ids must lie from 0 to 3, got {number}"):
            Vocabulary(["a", "b"]).decode([number])
