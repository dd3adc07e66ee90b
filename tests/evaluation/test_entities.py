"""Span scores against brute force and against the field's own corner cases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import span_counts, span_scores

spans = st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["PER", "LOC"])), max_size=5)


@given(st.lists(st.tuples(spans, spans), min_size=1, max_size=8))
def test_f1_is_brute_force(corpus):
    predicted, gold = [list(p) for p, _ in corpus], [list(g) for _, g in corpus]
    right = sum(span in g for p, g in corpus for span in p)
    guessed, true = sum(len(p) for p in predicted), sum(len(g) for g in gold)
    precision, recall = right / guessed if guessed else 0, right / true if true else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    scores = span_scores(predicted, gold)
    assert [scores.precision.value, scores.recall.value, scores.f1.value] == pytest.approx([precision, recall, f1])


@given(st.lists(st.tuples(spans, spans), min_size=1, max_size=8))
def test_swapping_gold_and_predicted_swaps_precision_and_recall(corpus):
    predicted, gold = [p for p, _ in corpus], [g for _, g in corpus]
    forward, backward = span_scores(predicted, gold), span_scores(gold, predicted)
    assert (forward.precision, forward.recall, forward.f1) == (backward.recall, backward.precision, backward.f1)


def test_a_span_with_a_wrong_end_or_a_wrong_label_is_wrong():
    gold = [[(0, 1, "PER"), (3, 3, "LOC")]]
    assert span_scores([[(0, 0, "PER"), (3, 3, "PER")]], gold).f1.value == 0
    assert span_scores(gold, gold).f1.value == 1
    assert [c.tolist() for c in span_counts([[(0, 1, "PER"), (5, 5, "PER")]], gold)] == [[1], [2], [2]]


def test_the_same_span_said_twice_counts_once():
    assert span_scores([[(0, 0, "PER"), (0, 0, "PER")]], [[(0, 0, "PER")]]).precision.value == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="same sentences"):
        span_scores([[]], [[], []])
    with pytest.raises(ValueError, match="at least one"):
        span_scores([], [])
