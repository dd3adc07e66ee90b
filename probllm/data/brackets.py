"""Constituent trees: Penn Treebank brackets, and the charts that the laws over trees take.

A tree such as ``(S (NP (DT the) (NN cat)) (VP (VBZ sits)))`` has words under preterminals (their tags). A chart
``[T, T]`` holds 0, or 1 + label at (first, last) of each span of a binary tree over the words:

- symbols that cover the same words, one below another, are one label, joined by spaces: ``VP VBZ`` over ``sits``;
- of more than two children, all but the first stand under a node without a symbol, again and again: its label is empty.

So a chart and the words give the tree back. Source: Marcus, Santorini and Marcinkiewicz (1993).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from probllm.data.lines import FilePath, malformed, numbered_lines

NO_SYMBOL = ""
"""The label of a node that binarisation made."""

_TOKEN = re.compile(r"[()]|[^\s()]+")


class Constituent(NamedTuple):
    """A symbol over its children, or (a preterminal) over one word."""

    label: str
    children: tuple[Constituent | str, ...]

    def words(self) -> list[str]:
        """The words that it covers, in order."""
        found = []
        for child in self.children:
            found += [child] if isinstance(child, str) else child.words()
        return found

    def __str__(self) -> str:
        """The tree in brackets, on one line."""
        return f"({self.label} {' '.join(map(str, self.children))})"


LabelledSpan: TypeAlias = tuple[int, int, str]


def read_brackets(path: FilePath) -> list[Constituent]:
    """The trees of a file in Penn Treebank brackets, plain or ``.gz``; a tree may take several lines.

    A pair of brackets without a symbol around a whole tree, ``( (S ...) )``, is dropped.

    Raises:
        ValueError: with file and line, for brackets that do not match, a constituent without a symbol or without
            children, words beside constituents, or text outside of all brackets.
    """
    return list(_trees(numbered_lines(path), path))


def parse_brackets(text: str) -> list[Constituent]:
    """The trees of a text, as ``read_brackets``; errors name the line of the text."""
    return list(_trees(enumerate(text.split("\n"), start=1), "brackets"))


def chart_labels(trees: Iterable[Constituent]) -> list[str]:
    """The labels of the trees' charts, sorted; the empty one comes first where there is one."""
    return sorted({label for tree in trees for _, _, label in binary_spans(tree)})


def chart_from_tree(tree: Constituent, labels: Sequence[str], size: int | None = None) -> Tensor:
    """The chart ``[T, T]`` long of a tree, T its number of words, or ``size`` with padding.

    Raises:
        ValueError: for a label that ``labels`` lacks, or a size below the number of words.
    """
    spans = binary_spans(tree)
    words = spans[0][1] + 1
    size = words if size is None else size
    if size < words:
        raise ValueError(f"size: expected at least {words}, the number of words, got {size}")
    number = {label: index for index, label in enumerate(labels)}
    chart = torch.zeros(size, size, dtype=torch.long)
    for first, last, label in spans:
        if label not in number:
            raise ValueError(f"labels lack {label!r}, of words {first} to {last} in {tree}")
        chart[first, last] = 1 + number[label]
    return chart


def tree_from_chart(chart: Tensor, words: Sequence[str], labels: Sequence[str]) -> Constituent:
    """The tree that a chart ``[T, T]`` is of; T may be beyond the number of words, and what is there is ignored.

    Where the whole has no symbol (a parser's mistake), or a word none, it gets the symbol ``X``.

    Raises:
        ValueError: for a chart that is too small, holds a number that is no label, or is no binary tree.
    """
    n = len(words)
    if chart.dim() != 2 or chart.shape[0] != chart.shape[1] or not 1 <= n <= chart.shape[0]:
        raise ValueError(f"chart: expected shape [T, T] with T >= {max(n, 1)} words, got {list(chart.shape)}")
    numbers = chart[:n, :n].tolist()
    bad = [x for row in numbers for x in row if not 0 <= x <= len(labels)]
    if bad:
        raise ValueError(f"chart: expected numbers from 0 to {len(labels)}, got {bad[0]}")
    used = 0

    def nodes(first: int, last: int) -> list[Constituent]:
        """The constituents of a span: one, or several where the span has no symbol."""
        nonlocal used
        if not numbers[first][last]:
            raise ValueError(f"chart: no binary tree has words {first} to {last} without a span that splits them")
        used += 1
        symbols = labels[numbers[first][last] - 1].split()
        if first == last:
            symbols = symbols or ["X"]
            found: tuple[Constituent | str, ...] = (words[first],)
        else:
            split = next((k for k in range(last - 1, first - 1, -1) if numbers[first][k]), None)
            if split is None or not numbers[split + 1][last]:
                raise ValueError(f"chart: words {first} to {last} are not two of its spans side by side")
            found = (*nodes(first, split), *nodes(split + 1, last))
        for symbol in reversed(symbols):
            found = (Constituent(symbol, found),)
        return [x for x in found if isinstance(x, Constituent)]

    top = nodes(0, n - 1)
    if used != sum(1 for row in numbers for x in row if x):
        raise ValueError(f"chart: expected {2 * n - 1} spans of one binary tree, got others beside them")
    return top[0] if len(top) == 1 else Constituent("X", tuple(top))


def binary_spans(tree: Constituent) -> list[LabelledSpan]:
    """First word, last word (from 0) and label of each span of the tree made binary, the whole first."""

    def walk(children: tuple[Constituent | str, ...], label: str, first: int) -> tuple[list[LabelledSpan], int]:
        """Spans of children under one label, and the word behind them."""
        while len(children) == 1 and isinstance(children[0], Constituent):
            label, children = f"{label} {children[0].label}".strip(), children[0].children
        if len(children) == 1:
            return [(first, first, label)], first + 1
        left, middle = walk(children[:1], NO_SYMBOL, first)
        right, end = walk(children[1:], NO_SYMBOL, middle)
        return [(first, end - 1, label), *left, *right], end

    return walk((tree,), NO_SYMBOL, 0)[0]


def _trees(lines: Iterable[tuple[int, str]], path: FilePath) -> Iterator[Constituent]:
    open_: list[tuple[int, str | None, list[Constituent | str]]] = []  # line, symbol, children so far
    number = 0
    for number, line in lines:
        for token in _TOKEN.findall(line):
            if token == "(":
                open_.append((number, None, []))
            elif token == ")":
                if not open_:
                    raise malformed(path, number, "a bracket closes that was not opened")
                begun, label, children = open_.pop()
                node = _closed(path, number, begun, label, children, whole=not open_)
                if open_:
                    open_[-1][2].append(node)
                else:
                    yield node
            elif not open_:
                raise malformed(path, number, f"expected an opening bracket, got {token!r}")
            elif open_[-1][1] is None and not open_[-1][2]:
                open_[-1] = (open_[-1][0], token, [])
            else:
                open_[-1][2].append(token)
    if open_:
        raise malformed(path, number, f"the bracket of line {open_[0][0]} is not closed")


def _closed(
    path: FilePath, number: int, begun: int, label: str | None, children: list[Constituent | str], whole: bool
) -> Constituent:
    """The constituent whose bracket closes."""
    where = "" if begun == number else f" (begun on line {begun})"
    if label is None:
        if whole and len(children) == 1 and isinstance(children[0], Constituent):
            return children[0]
        raise malformed(path, number, f"a constituent without a symbol{where}")
    if not children:
        raise malformed(path, number, f"a constituent {label!r} without children{where}")
    if any(isinstance(child, str) for child in children) and len(children) > 1:
        raise malformed(path, number, f"{label!r} has words beside other children{where}: {children}")
    return Constituent(label, tuple(children))
