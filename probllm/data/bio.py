"""Entities as tags (BIO, BIOES), as spans and as a segmentation.

BIO: ``B-x`` begins an entity labelled x, ``I-x`` continues it, ``O`` is outside (Ramshaw and Marcus, 1995). BIOES
marks also the last word, ``E-x``, and an entity of one word, ``S-x``. A segmentation ``[T]`` cuts the whole sentence:
0 continues, 1 + k starts a segment labelled k; words outside are segments of one word labelled ``O``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Scheme: TypeAlias = Literal["bio", "bioes"]
OUTSIDE = "O"

# The marks of each scheme, those that may stand first and last, and those that continue an entity after each mark.
_MARKS = {"bio": "BI", "bioes": "BIES"}
_OPENS = {"bio": "B", "bioes": "BS"}
_CLOSES = {"bio": "BI", "bioes": "ES"}
_CONTINUES = {"bio": {"B": "I", "I": "I"}, "bioes": {"B": "IE", "I": "IE"}}


class Span(NamedTuple):
    """An entity: the words ``start`` to ``stop - 1`` (from 0) and its label."""

    start: int
    stop: int
    label: str


def bio_rules(tag_names: Sequence[str], scheme: Scheme = "bio") -> dict[str, Tensor]:
    """Which tag may follow which, as ``LinearChainCRF.condition(**bio_rules(names))`` takes it.

    Returns:
        bool tensors, True = allowed: ``transitions`` ``[K, K]`` (from, to), ``start`` ``[K]`` and ``end`` ``[K]``.
    Raises:
        ValueError: for a tag that the scheme lacks, or an unknown scheme.
    """
    if scheme not in _MARKS:
        raise ValueError(f"scheme must be one of {', '.join(_MARKS)}, got {scheme!r}")
    parts = [_mark_and_label(tag) for tag in tag_names]
    for tag, (mark, _) in zip(tag_names, parts, strict=True):
        if mark not in _MARKS[scheme] + OUTSIDE:
            raise ValueError(f"tag_names: the scheme {scheme!r} has no tag {tag!r}")
    start = [mark in _OPENS[scheme] + OUTSIDE for mark, _ in parts]
    end = [mark in _CLOSES[scheme] + OUTSIDE for mark, _ in parts]
    transitions = [
        [
            (may_end and may_start) or (label == next_label and next_mark in _CONTINUES[scheme].get(mark, ""))
            for (next_mark, next_label), may_start in zip(parts, start, strict=True)
        ]
        for (mark, label), may_end in zip(parts, end, strict=True)
    ]
    return {
        "transitions": torch.tensor(transitions, dtype=torch.bool).reshape(len(parts), len(parts)),
        "start": torch.tensor(start, dtype=torch.bool),
        "end": torch.tensor(end, dtype=torch.bool),
    }


def spans_from_tags(tags: Sequence[str]) -> list[Span]:
    """The entities that BIO or BIOES tags mark.

    A sequence that breaks the rules is read as conlleval does: an entity begins where none of its label is open, and an
    open one ends before any tag that does not continue it.

    Raises:
        ValueError: for a tag other than ``O`` and ``B-``, ``I-``, ``E-`` or ``S-`` with a label.
    """
    spans: list[Span] = []
    begun: int | None = None
    open_label = ""
    for position, tag in enumerate(tags):
        mark, label = _mark_and_label(tag)
        continues = begun is not None and mark in ("I", "E") and label == open_label
        if begun is not None and not continues:
            spans.append(Span(begun, position, open_label))
            begun = None
        if mark != OUTSIDE and not continues:
            begun, open_label = position, label
        if begun is not None and mark in ("E", "S"):
            spans.append(Span(begun, position + 1, open_label))
            begun = None
    if begun is not None:
        spans.append(Span(begun, len(tags), open_label))
    return spans


def tags_from_spans(spans: Iterable[Span], length: int, scheme: Scheme = "bio") -> list[str]:
    """The tags of a sentence of ``length`` words with these entities.

    Raises:
        ValueError: for a span that is empty, goes beyond the sentence or overlaps another; for an unknown scheme.
    """
    if scheme not in _MARKS:
        raise ValueError(f"scheme must be one of {', '.join(_MARKS)}, got {scheme!r}")
    tags = [OUTSIDE] * length
    for start, stop, label in _checked(spans, length):
        tags[start:stop] = [f"B-{label}"] + [f"I-{label}"] * (stop - start - 1)
        if scheme == "bioes":
            tags[stop - 1] = f"S-{label}" if stop - start == 1 else f"E-{label}"
    return tags


def segmentation_from_spans(spans: Iterable[Span], length: int, labels: Sequence[str]) -> Tensor:
    """The segmentation, long ``[length]``, in which word by word what no span covers is labelled ``O``.

    Args:
        labels: the names of the labels, ``O`` among them unless the spans cover every word.
    Raises:
        ValueError: as ``tags_from_spans``, and for a label that ``labels`` lacks.
    """
    number = {label: index for index, label in enumerate(labels)}
    checked = _checked(spans, length)
    covered = sum(stop - start for start, stop, _ in checked)
    missing = {label for _, _, label in checked}.union([OUTSIDE] if covered < length else []) - number.keys()
    if missing:
        raise ValueError(f"labels {list(labels)} lack {sorted(missing)}")
    segmentation = torch.full((length,), 1 + number.get(OUTSIDE, 0), dtype=torch.long)
    for start, stop, label in checked:
        segmentation[start:stop] = 0
        segmentation[start] = 1 + number[label]
    return segmentation


def spans_from_segmentation(segmentation: Tensor | Sequence[int], labels: Sequence[str]) -> list[Span]:
    """The segments of a segmentation ``[T]`` (without padding), those labelled ``O`` left out.

    Raises:
        ValueError: if the first word starts no segment or a number is no label.
    """
    numbers = segmentation.tolist() if isinstance(segmentation, Tensor) else [int(number) for number in segmentation]
    if numbers and numbers[0] == 0:
        raise ValueError("segmentation must start a segment at its first word, got 0 (continues)")
    bad = [number for number in numbers if not 0 <= number <= len(labels)]
    if bad:
        raise ValueError(f"segmentation must lie from 0 to {len(labels)}, got {bad[0]}")
    starts = [position for position, number in enumerate(numbers) if number]
    segments = pairwise([*starts, len(numbers)])
    spans = [Span(start, stop, labels[numbers[start] - 1]) for start, stop in segments]
    return [span for span in spans if span.label != OUTSIDE]


def _checked(spans: Iterable[Span], length: int) -> list[Span]:
    ordered = sorted(spans)
    end = 0
    for span in ordered:
        if not 0 <= span.start < span.stop <= length:
            raise ValueError(f"spans must lie within {length} words and hold at least one, got {span}")
        if span.start < end:
            raise ValueError(f"spans must not overlap, got {span} after one that ends at {end}")
        end = span.stop
    return ordered


def _mark_and_label(tag: str) -> tuple[str, str]:
    mark, dash, label = tag.partition("-")
    if tag != OUTSIDE and not (mark in ("B", "I", "E", "S") and dash and label):
        raise ValueError(f"expected a tag O or B-, I-, E- or S- with a label, got {tag!r}")
    return mark, label
