"""Training, development and test parts of data that come in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")


class Split(NamedTuple, Generic[Item]):
    """The three parts of a data set."""

    train: list[Item]
    dev: list[Item]
    test: list[Item]


def random_split(
    items: Sequence[Item], fractions: tuple[float, float, float] = (0.9, 0.05, 0.05), seed: int = 0
) -> Split[Item]:
    """Items in the order of ``numpy.random.default_rng(seed).permutation``, cut into three parts.

    The first two parts are rounded down and the third takes the rest. The items of each part are in random order, so a
    smaller setting is ``split.train[:1000]``.

    Raises:
        ValueError: if a fraction is negative or they do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must not be negative and must sum to 1, got {fractions}")
    order = np.random.default_rng(seed).permutation(len(items))
    # A tiny surplus keeps 0.15 of 100 at 15 although the product is 14.999…
    train, dev = (int(len(items) * fraction + 1e-6) for fraction in fractions[:2])
    shuffled = [items[i] for i in order]
    return Split(shuffled[:train], shuffled[train : train + dev], shuffled[train + dev :])
