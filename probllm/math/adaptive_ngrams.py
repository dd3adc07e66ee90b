"""Kneser-Ney that goes on counting as it reads: p(x_t | all before) is that of the counts of the training text and of
x_1 .. x_{t-1} together, with the discounts of the training text.

When w is read after h, c(h w) is raised for the longest history h. Shorter n-grams count the different tokens before
them: they are raised only when the longer one was new. So an update walks from long to short and stops at the first
n-gram that was known, which makes it an exact recount at the cost of a few look-ups a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from probllm.math.kernels import adaptive_ngrams as kernels
from probllm.math.ngrams import count, discounts_of

Array = np.ndarray[Any, Any]

PIECE = 2048  # tokens for which room is made at once


class CountTree(NamedTuple):
    """Counts of a training text, as a tree of n-grams: that of ``NGrams``, with Kneser-Ney counts in place of
    probabilities."""

    size: int
    order: int
    children: Array  # [nodes + 1] long
    tokens: Array  # [nodes] int
    counts: Array  # [nodes] int: Kneser-Ney's
    stats: Array  # [nodes below the order, 4] int: c(h), and how many tokens have counts of 1, 2, and 3 or more after h
    discounts: Array  # [order, 4]: what is taken from counts of 0, 1, 2, and 3 or more after histories of each length

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """What the kernels take."""
        return self.children, self.tokens, self.counts, self.stats


def count_tree(strings: Sequence[Sequence[int] | Array], size: int, order: int) -> CountTree:
    """Count the n-grams of strings of tokens from 0 to size - 1; errors as of ``ngrams.smoothed``."""
    counts, used = count(strings, size, order)
    levels, inner = counts.levels, counts.levels[order]
    children = np.searchsorted(counts.parent[1:], np.arange(levels[-1] + 1)) + 1
    stats = np.zeros((inner, 4), np.int32)
    parent = counts.parent[1:]
    stats[:, 0] = np.bincount(parent, used[1:], minlength=inner)
    for k, those in enumerate((used[1:] == 1, used[1:] == 2, used[1:] >= 3), 1):
        stats[:, k] = np.bincount(parent[those], minlength=inner)
    discounts = np.stack([discounts_of(used[levels[k] : levels[k + 1]]) for k in range(1, order + 1)])
    return CountTree(size, order, children, counts.token.astype(np.int32), used.astype(np.int32), stats, discounts)


class Reader:
    """A text that is being read on top of trained counts."""

    def __init__(self, tree: CountTree) -> None:
        self.tree = tree
        self.entries = np.empty((0, kernels.WIDTH), np.int32)
        self.table = np.full((64, 2), -1, np.int64)
        self.path = np.full((tree.order, 2), -1, np.int64)
        self.path[0, 0] = 0
        if tree.order > 1:
            self.path[1, 0] = tree.size + 1  # the node of the beginning
        self.used = np.array([0, min(2, tree.order)])

    def copy(self) -> Reader:
        """One that goes on from here on its own."""
        twin = object.__new__(Reader)
        twin.tree = self.tree
        twin.entries, twin.table = self.entries[: self.used[0]].copy(), self.table.copy()
        twin.path, twin.used = self.path.copy(), self.used.copy()
        return twin

    def score(self, text: Array) -> Array:
        """Read a text ``[L]``; returns log probability of each token given those before it."""
        found, tree = np.empty(len(text)), self.tree
        for i in range(0, len(text), PIECE):
            part = slice(i, i + PIECE)
            self._make_room(len(text[part]))
            held = self.entries, self.table, self.used
            kernels.score(text[part], tree.size, self.path, tree.discounts, *tree.arrays(), *held, found[part])
        return found

    def laws(self, text: Array) -> Array:
        """Read a text ``[L]``; returns, after each token, log probabilities of the next, ``[L, size]``."""
        found, tree = np.empty((len(text), self.tree.size)), self.tree
        for i in range(0, len(text), PIECE):
            part = slice(i, i + PIECE)
            self._make_room(len(text[part]))
            held = self.entries, self.table, self.used
            kernels.laws(text[part], self.path, tree.discounts, *tree.arrays(), *held, found[part])
        return found

    def next(self) -> Array:
        """Log probabilities of the next token, ``[size]``."""
        found, tree = np.empty(self.tree.size), self.tree
        room = np.zeros(tree.size + 2, np.int64)
        kernels.law(self.path, self.used[1], tree.discounts, *tree.arrays(), self.entries, room, found)
        return np.log(found)

    def _make_room(self, count: int) -> None:
        """Room for what ``count`` tokens may add: an n-gram of each order, and a history that was trained."""
        need = int(self.used[0]) + 2 * self.tree.order * count
        if need > len(self.entries):
            larger = np.empty((max(need, 2 * len(self.entries)), kernels.WIDTH), np.int32)
            larger[: self.used[0]] = self.entries[: self.used[0]]
            self.entries = larger
        if 2 * need > len(self.table):
            table = np.full((1 << (2 * need - 1).bit_length(), 2), -1, np.int64)
            kernels.rehash(self.table, table)
            self.table = table
