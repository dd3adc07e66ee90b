"""Hashed features are the same everywhere, depend on what their template names and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import TAGGING_TEMPLATES, FeatureHasher
from probllm.data.features import ATTRIBUTES, _parse

word = st.text("abAB1-é.", min_size=1, max_size=8)
sentences_strategy = st.lists(st.lists(word, min_size=1, max_size=6), max_size=5)
SENTENCE = ["The", "U.N.", "café", "closed", "in", "1984"]


@given(sentences_strategy, st.integers(8, 20))
def test_features_lie_in_range_and_do_not_depend_on_other_sentences(sentences, bits):
    hasher = FeatureHasher(bits)
    together = hasher.encode(sentences)
    assert [len(f) for f in together] == [len(s) for s in sentences]
    for sentence, features in zip(sentences, together, strict=True):
        assert features.shape == (len(sentence), len(TAGGING_TEMPLATES))
        assert 0 <= features.min() <= features.max() < hasher.size == 2**bits
        np.testing.assert_array_equal(features, FeatureHasher(bits).encode([sentence])[0])
        np.testing.assert_array_equal(features, hasher.encode([sentence])[0])


@given(st.lists(word, min_size=5, max_size=5), st.lists(word, min_size=5, max_size=5))
def test_a_feature_is_equal_just_when_what_it_looks_at_is_equal(first, second):
    a, b = (FeatureHasher(30).encode([words])[0][2] for words in (first, second))
    for index, template in enumerate(TAGGING_TEMPLATES):
        values = [
            [ATTRIBUTES[name](words[2 + offset]) for name, offset in _parse(template)] for words in (first, second)
        ]
        for value, feature in zip(values, (a[index], b[index]), strict=True):
            assert (None in value) == (feature == 0)
        if None not in values[0] + values[1]:
            assert (values[0] == values[1]) == (a[index] == b[index]), template


def test_neighbours_beyond_the_sentence_are_words_of_their_own():
    hasher = FeatureHasher(30, ["lower[-1]", "lower[1]", "capital[-1]"])
    alone, marked = hasher.encode([["a"], ["<s>", "a", "</s>"]])
    assert (alone != 0).all()
    assert alone[0, 0] != marked[1, 0]
    assert alone[0, 1] != marked[1, 1]
    assert marked[1, 2] == 0


def test_templates_with_one_attribute_differ_and_so_do_orders():
    features = FeatureHasher(30, ["word[0]", "lower[0]", "word[-1] word[0]", "word[0] word[1]"]).encode(
        [["a", "a", "a"]]
    )
    assert len(set(features[0][1].tolist())) == 4
    there, back = FeatureHasher(30, ["word[0] word[1]"]).encode([["a", "b"], ["b", "a"]])
    assert there[0] != back[0]


def test_hashes_are_the_same_in_another_process():
    program = f"from probllm.data import FeatureHasher; print(FeatureHasher().encode([{SENTENCE!r}])[0].tolist())"
    printed = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program], capture_output=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert eval(printed.stdout) == FeatureHasher().encode([SENTENCE])[0].tolist()


def test_hashes_are_the_same_as_when_this_was_written():
    features = FeatureHasher(20, ["word[0]", "suffix3[0]", "lower[-1] lower[0]"]).encode([SENTENCE])[0]
    assert features[:3].tolist() == [[516308, 562059, 863979], [781670, 1046223, 877228], [256814, 634258, 186392]]


def test_each_distinct_word_is_hashed_once(monkeypatch):
    hasher = FeatureHasher(10)
    hashed = []
    monkeypatch.setattr("probllm.data.features._hash", lambda text: hashed.append(text) or 1)
    hasher.encode([["a"]])
    once = len(hashed)
    hasher.encode([["a", "a"], ["a"]])
    assert len(hashed) == once


def test_rebuilt_from_json_is_equal():
    hasher = FeatureHasher(12, ["word[0]", "shape[1]"])
    assert FeatureHasher.from_json(hasher.to_json()) == hasher != FeatureHasher(13, ["word[0]", "shape[1]"])
    assert FeatureHasher().encode([]) == []


@pytest.mark.parametrize("template", ["", "word", "word[x]", "colour[0]", "word[0]lower[0]"])
def test_a_template_that_names_no_attribute_is_refused(template):
    with pytest.raises(ValueError, match="template"):
        FeatureHasher(10, [template])


@pytest.mark.parametrize("bits", [7, 31])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must lie from 8 to 30, got {bits}"):
        FeatureHasher(bits)
