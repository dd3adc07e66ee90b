"""Tags and segmentations say the same."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import labels_of_tags, segmentation_from_tags, tags_from_segmentation, tags_from_spans
from tests.data.test_bio import LABELS, schemes, spans_and_length


@given(spans_and_length(), schemes)
def test_tags_come_back_from_their_segmentation(case, scheme):
    tags = tags_from_spans(*case, scheme)
    assert tags_from_segmentation(segmentation_from_tags(tags, LABELS), LABELS, scheme) == tags


@given(spans_and_length(), st.integers(1, 3))
def test_entities_that_are_too_long_are_cut_into_segments_of_their_label(case, longest):
    spans, length = case
    found = segmentation_from_tags(tags_from_spans(spans, length), LABELS, longest).tolist()
    starts = [t for t, number in enumerate(found) if number] + [length]
    assert all(b - a <= longest for a, b in pairwise(starts))
    of_words = list(found)
    for t in range(1, length):
        of_words[t] = of_words[t] or of_words[t - 1]
    expected = [1] * length
    for start, stop, label in spans:
        expected[start:stop] = [1 + LABELS.index(label)] * (stop - start)
        assert found[start] != 0
    assert of_words == expected


def test_labels_are_those_of_the_tags_with_what_is_outside_first():
    assert labels_of_tags(["B-x", "O", "I-x", "S-a-b"]) == ["O", "a-b", "x"]
    assert labels_of_tags([]) == ["O"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segmentation_from_tags(["B-x"], ["O"]), "lack"),
        (lambda: segmentation_from_tags(["x"], ["O"]), "expected a tag"),
        (lambda: segmentation_from_tags(["O"], ["O"], 0), "max_duration must be at least 1, got 0"),
        (lambda: tags_from_segmentation([0, 1], ["O"]), "first word"),
        (lambda: tags_from_segmentation([1, 3], ["O"]), "from 0 to 1"),
    ],
)
def test_bad_arguments_raise_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
