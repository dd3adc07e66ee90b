"""Tagged and parsed sentences in the two common column formats.

CoNLL-U (https://universaldependencies.org/format.html): ten tab-separated columns, comments, multiword ranges (``3-4``)
and empty nodes (``8.1``); the syntactic words alone are kept, so heads count them from 1 and 0 is the root.
Column CoNLL: a word and one or more tags a line, tabs or spaces between, a blank line between sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from probllm.data.dependencies import find_cycle
from probllm.data.lines import FilePath, malformed, numbered_lines

CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


class TaggedSentence(NamedTuple):
    """Words and, one for each, their tags."""

    words: list[str]
    tags: list[str]


@dataclass
class TreebankSentence:
    """A sentence of a treebank: one entry a syntactic word in every list; ``_`` stands where nothing is annotated."""

    words: list[str] = field(default_factory=list)
    lemmas: list[str] = field(default_factory=list)
    upos: list[str] = field(default_factory=list)
    xpos: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    """Which word each depends on: 0 is the root, words count from 1; -1 where nothing is annotated."""
    relations: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    """The lines that begin with ``#``, without it, such as ``sent_id = 3``."""

    def __len__(self) -> int:
        return len(self.words)


TAG_COLUMNS: dict[str, Callable[[TreebankSentence], list[str]]] = {
    "upos": lambda sentence: sentence.upos,
    "xpos": lambda sentence: sentence.xpos,
    "feats": lambda sentence: sentence.features,
    "deprel": lambda sentence: sentence.relations,
    "lemma": lambda sentence: sentence.lemmas,
}


def read_tagged(path: FilePath, column: str | int | None = None) -> list[TaggedSentence]:
    """Tagged sentences of a CoNLL-U or column file, whichever it is (by its name, else by its first line).

    Args:
        path: a file, plain or ``.gz``.
        column: which column holds the tags. CoNLL-U: ``"upos"`` (the default), ``"xpos"``, ``"feats"``, ``"deprel"`` or
            ``"lemma"``; column files: its number from 0 (the word) or from the end, by default -1.
    Raises:
        ValueError: for a malformed line (with file and line), an empty file, a column that the format lacks, or a
            CoNLL-U file in which that column is nowhere annotated.
    """
    if not is_conllu(path):
        if isinstance(column, str):
            raise ValueError(f"{path}: column must be a number in a file of columns, got {column!r}")
        return read_conll(path, -1 if column is None else column)
    name = "upos" if column is None else column
    if name not in TAG_COLUMNS:
        raise ValueError(f"{path}: column must be one of {', '.join(TAG_COLUMNS)} in a CoNLL-U file, got {column!r}")
    tags = TAG_COLUMNS[str(name)]
    sentences = [TaggedSentence(sentence.words, tags(sentence)) for sentence in read_conllu(path)]
    if all(tag == "_" for sentence in sentences for tag in sentence.tags):
        raise ValueError(f"{path}: no word has a value in the column {name!r}")
    return sentences


def is_conllu(path: FilePath) -> bool:
    """Whether a file is CoNLL-U: ``.conllu`` in its name, or a first row of ten columns that begins with a number."""
    if ".conllu" in Path(path).suffixes:
        return True
    for _, line in numbered_lines(path):
        if line.strip() and not (line.startswith("#") and "\t" not in line):
            return line.count("\t") == 9 and re.match(r"\d+([-.]\d+)?\t", line) is not None
    return False


def read_conll(path: FilePath, column: int = -1) -> list[TaggedSentence]:
    """Sentences of a file with a word and its tags a line and blank lines between sentences.

    A line with a tab is cut at tabs, else at spaces; the word is the first column. ``-DOCSTART-`` lines are dropped.

    Args:
        column: the column of the tags, from 0 (the word) or from the end.
    Raises:
        ValueError: for a line with fewer than two or with other than the first line's number of columns, an empty
            word or tag (with file and line), or an empty file.
    """
    sentences = []
    width: int | None = None
    for rows in _blocks(path):
        sentence = TaggedSentence([], [])
        for number, line in rows:
            cells = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
            if cells[0] == "-DOCSTART-":
                continue
            if len(cells) < 2:
                raise malformed(path, number, f"expected a word and its tag, got {line!r}")
            width = width or len(cells)
            if len(cells) != width:
                raise malformed(path, number, f"expected {width} columns as above, got {len(cells)}: {line!r}")
            if not -width <= column < width:
                raise malformed(path, number, f"there is no column {column} among {width}")
            word, tag = cells[0], cells[column].strip()
            if not word.strip(" ") or not tag:
                raise malformed(path, number, f"expected a word and its tag, got {line!r}")
            sentence.words.append(word)
            sentence.tags.append(tag)
        if sentence.words:
            sentences.append(sentence)
    if not sentences:
        raise ValueError(f"{path}: no sentence in the file")
    return sentences


def read_conllu(path: FilePath, trees: bool = False) -> list[TreebankSentence]:
    """Sentences of a CoNLL-U file.

    Args:
        path: a file, plain or ``.gz``.
        trees: whether every word must have a head and a relation, and the heads of a sentence form a tree.
    Raises:
        ValueError: for a line without ten tab-separated columns, an empty column, a number out of order, a head that is
            no other word of the sentence, or, with ``trees``, a word without a head or relation or on a cycle (with
            file and line); or an empty file.
    """
    sentences = []
    for rows in _blocks(path):
        sentence = TreebankSentence()
        numbers: list[int] = []  # the line of each word
        for number, line in rows:
            if line.startswith("#"):
                sentence.comments.append(line[1:].strip())
                continue
            cells = line.split("\t")
            if len(cells) != len(CONLLU_COLUMNS):
                raise malformed(path, number, f"expected 10 tab-separated columns, got {len(cells)}: {line!r}")
            if "" in cells:
                raise malformed(path, number, f"the column {CONLLU_COLUMNS[cells.index('')]} is empty: {line!r}")
            if _is_extra(path, number, cells[0], len(sentence)):
                continue
            head = cells[6]
            if head != "_" and not (head.isascii() and head.isdigit()):
                raise malformed(path, number, f"head must be a number or _, got {head!r}")
            sentence.words.append(cells[1])
            sentence.lemmas.append(cells[2])
            sentence.upos.append(cells[3])
            sentence.xpos.append(cells[4])
            sentence.features.append(cells[5])
            sentence.heads.append(-1 if head == "_" else int(head))
            sentence.relations.append(cells[7])
            numbers.append(number)
        if not sentence.words:
            if any(not line.startswith("#") for _, line in rows):
                raise malformed(path, rows[0][0], "a sentence without words")
            continue  # comments alone, as at the end of some files
        for position, (number, head_number) in enumerate(zip(numbers, sentence.heads, strict=True), start=1):
            if head_number > len(sentence) or head_number == position:
                message = f"head must be another word from 1 to {len(sentence)} or 0, got {head_number}"
                raise malformed(path, number, message)
        if trees:
            _check_tree(path, numbers, sentence)
        sentences.append(sentence)
    if not sentences:
        raise ValueError(f"{path}: no sentence in the file")
    return sentences


def _check_tree(path: FilePath, numbers: Sequence[int], sentence: TreebankSentence) -> None:
    """Raises, with the line, for a word without a head or relation, or on a cycle."""
    for number, head, relation in zip(numbers, sentence.heads, sentence.relations, strict=True):
        if head < 0 or relation == "_":
            raise malformed(path, number, f"the word has no {'head' if head < 0 else 'relation'}; expected a tree")
    cycle = find_cycle(sentence.heads)
    if cycle:
        words = " -> ".join(map(str, [*cycle, cycle[0]]))
        raise malformed(path, numbers[cycle[0] - 1], f"the heads form a cycle, {words}; expected a tree")


def _is_extra(path: FilePath, number: int, identifier: str, words: int) -> bool:
    """Whether a row is a multiword range or an empty node; raises unless a word's number follows the last one's."""
    if re.fullmatch(r"[0-9]+\.[0-9]+", identifier):
        return True
    span = re.fullmatch(r"([0-9]+)-([0-9]+)", identifier)
    if span:
        if int(span[1]) != words + 1 or int(span[2]) < int(span[1]):
            raise malformed(path, number, f"the range {identifier} does not begin at word {words + 1}")
        return True
    if identifier != str(words + 1):
        raise malformed(path, number, f"expected word {words + 1}, got the number {identifier!r}")
    return False


def _blocks(path: FilePath) -> Iterator[list[tuple[int, str]]]:
    """The runs of lines between blank lines, with their numbers."""
    block: list[tuple[int, str]] = []
    for number, line in numbered_lines(path):
        if "\r" in line:  # several lines of an old file, which would be read as the columns of one
            raise malformed(path, number, "a carriage return within the line; lines must end in \\n or \\r\\n")
        if line.strip(" \t"):
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def write_conll(path: FilePath, sentences: Iterable[tuple[Iterable[str], Iterable[str]]]) -> None:
    """Write words and tags in two tab-separated columns, as ``read_conll`` reads them.

    Raises:
        ValueError: if a word or tag is blank or holds a tab or a line end, or words and tags differ in number.
    """
    rows = []
    for words, tags in sentences:
        for word, tag in zip(words, tags, strict=True):
            if not word.strip(" ") or not tag.strip() or any(mark in word + tag for mark in "\t\n\r"):
                raise ValueError(f"a word and tag that two columns cannot hold: {word!r}, {tag!r}")
            rows.append(f"{word}\t{tag}\n")
        rows.append("\n")
    Path(path).write_text("".join(rows), encoding="utf-8", newline="\n")


def write_conllu(path: FilePath, sentences: Iterable[TreebankSentence]) -> None:
    """Write sentences of a treebank, as ``read_conllu`` reads them; a list that is empty becomes a column of ``_``.

    Multiword ranges, empty nodes and the last two columns (``deps``, ``misc``) are not kept.

    Raises:
        ValueError: if a list has another number of entries than there are words, or an entry is empty or holds a tab or
            a line end.
    """
    rows = []
    for number, sentence in enumerate(sentences, start=1):
        rows += [f"# {comment}\n" for comment in sentence.comments]
        heads = ["_" if head < 0 else str(head) for head in sentence.heads]
        lists = [sentence.words, sentence.lemmas, sentence.upos, sentence.xpos, sentence.features, heads]
        columns = [column or ["_"] * len(sentence) for column in (*lists, sentence.relations)]
        if any(len(column) != len(sentence) for column in columns):
            raise ValueError(f"sentence {number} has {len(sentence)} words but columns of {list(map(len, columns))}")
        for position, cells in enumerate(zip(*columns, strict=True), start=1):
            if any(not cell or any(mark in cell for mark in "\t\n\r") for cell in cells):
                raise ValueError(f"sentence {number} has a word that tab-separated columns cannot hold: {cells}")
            rows.append("\t".join([str(position), *cells, "_", "_"]) + "\n")
        rows.append("\n")
    Path(path).write_text("".join(rows), encoding="utf-8", newline="\n")
