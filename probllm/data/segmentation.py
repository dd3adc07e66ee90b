"""BIO and BIOES tags to segmentations and back: a segmentation ``[T]`` cuts a sentence into labelled segments.

0 continues a segment, 1 + k starts one labelled k; a word outside is a segment of its own, labelled ``O``. What an
entity is in a sequence that breaks the rules of its scheme, ``spans_from_tags`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from probllm.data.bio import (
    Scheme,
    Span,
    segmentation_from_spans,
    spans_from_segmentation,
    spans_from_tags,
    tags_from_spans,
)


def segmentation_from_tags(tags: Sequence[str], labels: Sequence[str], max_duration: int | None = None) -> Tensor:
    """The segmentation, long ``[T]``, that BIO or BIOES tags mark.

    Args:
        tags: names of tags.
        labels: the names of the labels, ``O`` among them unless entities cover every word.
        max_duration: the longest segment there may be; a longer entity becomes several segments of its label.
    Raises:
        ValueError: for a tag of no scheme, a label that ``labels`` lacks, or a ``max_duration`` below 1.
    """
    spans = spans_from_tags(tags)
    if max_duration is not None:
        if max_duration < 1:
            raise ValueError(f"max_duration must be at least 1, got {max_duration}")
        spans = [
            Span(start, min(start + max_duration, span.stop), span.label)
            for span in spans
            for start in range(span.start, span.stop, max_duration)
        ]
    return segmentation_from_spans(spans, len(tags), labels)


def tags_from_segmentation(
    segmentation: Tensor | Sequence[int], labels: Sequence[str], scheme: Scheme = "bio"
) -> list[str]:
    """The tags that a segmentation ``[T]`` (without padding) stands for.

    Raises:
        ValueError: if the first word starts no segment or a number is no label; for an unknown scheme.
    """
    return tags_from_spans(spans_from_segmentation(segmentation, labels), len(segmentation), scheme)


def labels_of_tags(tag_names: Sequence[str]) -> list[str]:
    """The labels of a set of tags: ``O`` first, then those of the entities, sorted."""
    return ["O", *sorted({tag.partition("-")[2] for tag in tag_names} - {""})]
