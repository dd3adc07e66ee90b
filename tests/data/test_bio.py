"""Tags, spans and segmentations say the same; the rules allow exactly the sequences that spans can make."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import (
    Span,
    bio_rules,
    read_tagged,
    segmentation_from_spans,
    spans_from_segmentation,
    spans_from_tags,
    tags_from_spans,
)

LABELS = ["O", "person", "creative-work"]
schemes = st.sampled_from(["bio", "bioes"])


@st.composite
def spans_and_length(draw):
    gaps = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from(LABELS[1:])), max_size=5))
    spans, position = [], 0
    for gap, length, label in gaps:
        spans.append(Span(position + gap, position + gap + length, label))
        position += gap + length
    return spans, position + draw(st.integers(0, 2))


@given(spans_and_length(), schemes)
def test_spans_come_back_from_tags_in_either_scheme(case, scheme):
    spans, length = case
    tags = tags_from_spans(spans, length, scheme)
    assert len(tags) == length
    assert spans_from_tags(tags) == spans


@given(spans_and_length())
def test_spans_come_back_from_a_segmentation_that_covers_the_sentence(case):
    spans, length = case
    segmentation = segmentation_from_spans(spans, length, LABELS)
    assert segmentation.shape == (length,)
    assert segmentation.dtype == torch.long
    assert spans_from_segmentation(segmentation, LABELS) == spans
    outside = length - sum(stop - start for start, stop, _ in spans)
    assert segmentation.eq(1).sum() == outside
    assert segmentation.ne(0).sum() == outside + len(spans)


def test_words_outside_have_the_label_o_wherever_it_stands():
    segmentation = segmentation_from_spans([Span(1, 3, "x")], 4, ["x", "y", "O"])
    assert segmentation.tolist() == [3, 1, 0, 3]
    assert spans_from_segmentation(segmentation, ["x", "y", "O"]) == [(1, 3, "x")]


@pytest.mark.parametrize(("scheme", "marks"), [("bio", "BI"), ("bioes", "BIES")])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_rules_allow_a_sequence_just_when_it_is_the_tags_of_its_own_spans(scheme, marks, length):
    names = ["O"] + [f"{mark}-{label}" for label in ("x", "y") for mark in marks]
    rules = bio_rules(names, scheme)
    allowed = 0
    for sequence in product(range(len(names)), repeat=length):
        legal = rules["start"][sequence[0]] & rules["end"][sequence[-1]]
        for before, after in pairwise(sequence):
            legal = legal & rules["transitions"][before, after]
        tags = [names[i] for i in sequence]
        assert bool(legal) == (tags_from_spans(spans_from_tags(tags), length, scheme) == tags), tags
        allowed += bool(legal)
    assert (
        allowed == [3, 11, 41, 153][length - 1]
    )  # a(n) = 3 a(n-1) + 2 (a(n-2) + … + a(0)): O, or a span of any length


def test_shapes_and_types_of_the_rules_and_no_tag_at_all():
    for names in (["O", "B-x"], ["O"], []):
        rules = bio_rules(names)
        assert {key: value.shape for key, value in rules.items()} == {
            "transitions": (len(names), len(names)),
            "start": (len(names),),
            "end": (len(names),),
        }
        assert all(value.dtype == torch.bool for value in rules.values())


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O I-x I-x O", [(1, 3, "x")]),
        ("B-x I-y", [(0, 1, "x"), (1, 2, "y")]),
        ("I-x B-x I-x", [(0, 1, "x"), (1, 3, "x")]),
        ("B-x E-x E-x", [(0, 2, "x"), (2, 3, "x")]),
        ("S-x I-x", [(0, 1, "x"), (1, 2, "x")]),
        ("B-x S-x", [(0, 1, "x"), (1, 2, "x")]),
        ("B-x O E-y", [(0, 1, "x"), (2, 3, "y")]),
        ("", []),
    ],
)
def test_sequences_that_break_the_rules_are_read_as_conlleval_does(tags, spans):
    assert spans_from_tags(tags.split()) == spans


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bio_rules(["O", "NOUN"]), "expected a tag O or B-, .* got 'NOUN'"),
        (lambda: bio_rules(["O", "B-"]), "got 'B-'"),
        (lambda: bio_rules(["O", "S-x"]), "the scheme 'bio' has no tag 'S-x'"),
        (lambda: bio_rules(["O"], "iob1"), "scheme must be one of bio, bioes, got 'iob1'"),
        (lambda: tags_from_spans([], 2, "iob1"), "scheme must be one of"),
        (lambda: spans_from_tags(["b-x"]), "got 'b-x'"),
        (lambda: tags_from_spans([Span(0, 2, "x"), Span(1, 3, "x")], 3), "must not overlap"),
        (lambda: tags_from_spans([Span(0, 4, "x")], 3), "must lie within 3 words"),
        (lambda: tags_from_spans([Span(1, 1, "x")], 3), "hold at least one"),
        (lambda: segmentation_from_spans([Span(0, 1, "x")], 2, ["x"]), r"lack \['O'\]"),
        (lambda: segmentation_from_spans([Span(0, 1, "y")], 1, ["x"]), r"lack \['y'\]"),
        (lambda: spans_from_segmentation([0, 1], ["x"]), "must start a segment at its first word"),
        (lambda: spans_from_segmentation([1, 2], ["x"]), "must lie from 0 to 1, got 2"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.corpus
def test_wnut17_obeys_the_rules_and_comes_back_from_its_spans(corpora):
    sentences = read_tagged(corpora / "wnut17" / "train.conll.gz")
    names = sorted({tag for sentence in sentences for tag in sentence.tags})
    rules = bio_rules(names)
    for _, tags in sentences:
        ids = [names.index(tag) for tag in tags]
        assert rules["start"][ids[0]]
        assert rules["transitions"][ids[:-1], ids[1:]].all()
        assert tags_from_spans(spans_from_tags(tags), len(tags)) == tags
