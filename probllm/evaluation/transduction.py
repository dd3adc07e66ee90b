"""Errors of sequences that were written, such as phonemes: whole ones, and symbols by edit distance.

A prediction is judged against the nearest of several references; it is right if it equals one of them. The symbol error
rate is the sum of edit distances over the sum of the lengths of those nearest references.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class EditErrors(NamedTuple):
    """One number an example."""

    wrong: Ints  # 1 where the prediction is none of the references
    edits: Ints  # least number of symbols to put in, leave out or change
    length: Ints  # of the nearest reference


def edit_errors(
    predictions: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Sequence[Hashable]]]
) -> EditErrors:
    """Errors of each prediction against the nearest of its references, the first of them where several are near.

    Raises:
        ValueError: if the numbers differ, or an example has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"references: expected {len(predictions)}, one a prediction, got {len(references)}")
    found = []
    for index, (predicted, ways) in enumerate(zip(predictions, references, strict=True)):
        if not len(ways):
            raise ValueError(f"references[{index}] is empty: expected at least one reference")
        distance, nearest = min(((edit_distance(predicted, way), way) for way in ways), key=lambda pair: pair[0])
        found.append((int(distance > 0), distance, len(nearest)))
    return EditErrors(*np.array(found, dtype=np.int64).reshape(-1, 3).T)


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """The least number of symbols to put in, leave out or change (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
