"""The list of all labelled binary trees, for the cases of laws over constituents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

Span = tuple[int, int]
Node = tuple[Span, int]  # a span and its label


def all_bracketings(first: int, last: int) -> Iterator[list[Span]]:
    """The spans of each binary tree over the leaves from first to last."""
    if first == last:
        yield [(first, last)]
        return
    for split in range(first, last):
        for left in all_bracketings(first, split):
            for right in all_bracketings(split + 1, last):
                yield [(first, last), *left, *right]


def all_trees(leaves: int, labels: int) -> Iterator[list[Node]]:
    """The labelled spans of each tree."""
    for spans in all_bracketings(0, leaves - 1):
        for chosen in itertools.product(range(labels), repeat=len(spans)):
            yield list(zip(spans, chosen, strict=True))
