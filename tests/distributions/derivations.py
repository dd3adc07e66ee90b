"""The list of all derivations of sentences by a grammar in Chomsky normal form, written down one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Derivation(NamedTuple):
    """What a parse tree uses; symbols as in the grammar, spans (first, last)."""

    symbols: list[tuple[int, int, int]]  # first, last, symbol
    rules: list[tuple[int, int, int]]
    unary: list[tuple[int, int]]  # nonterminal, preterminal (from 0)

    def __add__(self, other: Derivation) -> Derivation:  # type: ignore[override]
        return Derivation(*(a + b for a, b in zip(self, other, strict=True)))  # type: ignore[arg-type]


def from_symbol(symbol: int, first: int, last: int, n: int, p: int) -> Iterator[Derivation]:
    """All derivations of the words from first to last from a symbol."""
    own = Derivation([(first, last, symbol)], [], [])
    if symbol >= n:
        if first == last:
            yield own
        return
    if first == last:
        for k in range(p):
            yield own + Derivation([(first, last, n + k)], [], [(symbol, k)])
    for split in range(first, last):
        for x in range(n + p):
            for y in range(n + p):
                for left in from_symbol(x, first, split, n, p):
                    for right in from_symbol(y, split + 1, last, n, p):
                        yield own + Derivation([], [(symbol, x, y)], []) + left + right


def derivations(length: int, n: int, p: int) -> list[tuple[int, Derivation]]:
    """Every derivation of a sentence, with its topmost symbol."""
    return [(a, tree) for a in range(n) for tree in from_symbol(a, 0, length - 1, n, p)]


def chart(tree: Derivation, size: int, n: int, p: int) -> Tensor:
    """The derivation as a structure ``[T, T]``."""
    value = torch.zeros(size, size, dtype=torch.long)
    single = {first: symbol for first, last, symbol in tree.symbols if first == last and symbol < n}
    for first, last, symbol in tree.symbols:
        if first == last and first in single:
            if symbol >= n:
                value[first, last] = 1 + n + p + single[first] * p + symbol - n
        else:
            value[first, last] = 1 + symbol
    return value


def padded(items: list[list[tuple[int, ...]]], width: int) -> Tensor:
    """Lists of tuples as ``[len(items), longest, width]``, -1 where a list is shorter."""
    longest = max(1, *(len(x) for x in items))
    return torch.tensor([[*x, *[(-1,) * width] * (longest - len(x))] for x in items])


def picked(scores: Tensor, index: Tensor) -> Tensor:
    """The sum of the scores ``[*batch, ...]`` at the tuples of each item ``[items, longest, width]``:
    ``[*batch, items]``."""
    each = scores[(..., *index.unbind(-1))]
    return torch.where(index[..., 0] < 0, 0.0, each).sum(-1)
