"""Attachment scores: counted by hand, and as the CoNLL 2018 convention has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import attachment_counts, attachment_scores

GOLD = [([2, 0, 2], ["nsubj:pass", "root", "punct"]), ([0], ["root"])]
GIVEN = [([2, 0, 1], ["nsubj", "parataxis", "punct"]), (np.array([0]), ["root"])]


def test_every_word_counts_and_subtypes_do_not():
    counts = attachment_counts(GIVEN, GOLD)
    assert counts.heads.tolist() == [2, 1]
    assert counts.labelled.tolist() == [1, 1]
    assert counts.words.tolist() == [3, 1]
    assert counts.trees.tolist() == [0, 1]
    scores = attachment_scores(GIVEN, GOLD)
    assert scores.unlabelled.value == 3 / 4
    assert scores.labelled.value == 2 / 4
    assert scores.labelled.low <= 2 / 4 <= scores.labelled.high


def test_subtypes_count_where_asked():
    assert attachment_counts(GIVEN, GOLD, subtypes=True).labelled.tolist() == [0, 1]


def test_words_that_do_not_count_are_left_out():
    counts = attachment_counts(GIVEN, GOLD, [[True, True, False], [True]])
    assert counts.words.tolist() == [2, 1]
    assert counts.heads.tolist() == [2, 1]
    assert counts.trees.tolist() == [1, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_scores_are_bounded_by_each_other_and_perfect_for_the_right_trees(heads, data):
    labels = data.draw(st.lists(st.sampled_from("abc"), min_size=len(heads), max_size=len(heads)))
    others = data.draw(st.lists(st.integers(0, 3), min_size=len(heads), max_size=len(heads)))
    counts = attachment_counts([(others, labels)], [(heads, labels)])
    assert 0 <= counts.labelled[0] == counts.heads[0] <= counts.words[0] == len(heads)
    assert attachment_scores([(heads, labels)], [(heads, labels)]).labelled.value == 1


@pytest.mark.parametrize(
    ("predicted", "gold", "counted"),
    [
        ([], [], None),
        (GIVEN[:1], GOLD, None),
        ([([2, 0], ["a", "b"]), GIVEN[1]], GOLD, None),
        ([([2, 0, 1], ["a", "b"]), GIVEN[1]], GOLD, None),
        (GIVEN, GOLD, [[True] * 3]),
        (GIVEN, GOLD, [[True] * 2, [True]]),
    ],
)
def test_sentences_that_do_not_fit_are_refused(predicted, gold, counted):
    with pytest.raises(ValueError, match="sentence"):
        attachment_counts(predicted, gold, counted)
