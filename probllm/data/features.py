"""Hashed indicator features of the words in a sentence, the usual ones of feature CRFs for tagging.

A template names attributes of the words around a position, such as ``suffix3[0]`` or ``word[-1] word[0]``. Its value at
a position is hashed with the template's name to an id from 1 to ``2**bits - 1`` (Weinberger et al., 2009, "Feature
hashing for large scale multitask learning"); 0 stands where the template does not apply. Strings are hashed with
BLAKE2b, once per distinct word, and mixed in numpy, so ids are the same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AFFIX_LENGTHS = (1, 2, 3, 4, 5)


def _letters(word: str) -> str:
    """Each character by its kind: X capital, x small or without case, 9 digit, itself otherwise."""
    return "".join("9" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in word)


def _prefix(length: int) -> Callable[[str], str | None]:
    return lambda word: word[:length].lower() if len(word) >= length else None


def _suffix(length: int) -> Callable[[str], str | None]:
    return lambda word: word[-length:].lower() if len(word) >= length else None


# What an attribute is of a word; None where it does not apply.
ATTRIBUTES: dict[str, Callable[[str], str | None]] = {
    "word": lambda word: word,
    "lower": lambda word: word.lower(),
    "shape": _letters,
    "pattern": lambda word: re.sub(r"(.)\1+", r"\1", _letters(word)),
    "capital": lambda word: "first" if word[:1].isupper() else None,
    "capitals": lambda word: "all" if len(word) > 1 and word.isupper() else None,
    "digit": lambda word: "some" if any(map(str.isdigit, word)) else None,
    "hyphen": lambda word: "some" if "-" in word else None,
    **{f"prefix{n}": _prefix(n) for n in AFFIX_LENGTHS},
    **{f"suffix{n}": _suffix(n) for n in AFFIX_LENGTHS},
}

# The features of a position: attributes with the offset of the word they look at. A neighbour beyond either end of the
# sentence counts as a word of its own.
TAGGING_TEMPLATES = (
    "word[0]",
    "lower[0]",
    *(f"prefix{n}[0]" for n in AFFIX_LENGTHS),
    *(f"suffix{n}[0]" for n in AFFIX_LENGTHS),
    "shape[0]",
    "pattern[0]",
    "capital[0]",
    "capitals[0]",
    "digit[0]",
    "hyphen[0]",
    "lower[-1]",
    "lower[1]",
    "lower[-2]",
    "lower[2]",
    "suffix3[-1]",
    "suffix3[1]",
    "suffix2[-1]",
    "suffix2[1]",
    "pattern[-1]",
    "pattern[1]",
    "capital[-1]",
    "capital[1]",
    "lower[-1] lower[0]",
    "lower[0] lower[1]",
    "lower[-1] lower[1]",
    "lower[-2] lower[-1]",
    "lower[1] lower[2]",
    "suffix3[-1] suffix3[0]",
    "suffix3[0] suffix3[1]",
    "pattern[-1] pattern[0] pattern[1]",
)

CACHED_WORDS = 1_000_000  # beyond so many distinct words the cache starts anew


class FeatureHasher:
    """Sentences to ids of hashed features.

    Args:
        bits: ids are below ``2**bits``, from 8 to 30; the rows of the table of weights.
        templates: each one or more ``attribute[offset]`` with spaces between.
    Raises:
        ValueError: for a template that names no attribute, or ``bits`` out of range.
    """

    def __init__(self, bits: int = 19, templates: Sequence[str] = TAGGING_TEMPLATES) -> None:
        if not 8 <= bits <= 30:
            raise ValueError(f"bits must lie from 8 to 30, got {bits}")
        self.bits = bits
        self.templates = tuple(templates)
        self._parts = [_parse(template) for template in self.templates]
        self._attributes = sorted({name for parts in self._parts for name, _ in parts})
        self._salts = [_hash(template) for template in self.templates]
        self._clear()

    @property
    def size(self) -> int:
        """The number of ids, 0 included."""
        return 1 << self.bits

    def encode(self, sentences: Iterable[Sequence[str]]) -> list[NDArray[np.int64]]:
        """The features of each word of each sentence.

        Returns:
            an int64 array ``[words, templates]`` a sentence; 0 where a template does not apply.
        """
        sentences = list(sentences)
        if len(self._table) > CACHED_WORDS:
            self._clear()
        reach = max((abs(offset) for parts in self._parts for _, offset in parts), default=0)
        beyond = [["<s>"] * reach, ["</s>"] * reach]
        # All sentences in one row with room between them, so that a neighbour is a shift.
        rows = np.fromiter(
            (
                row
                for sentence in sentences
                for row in self._rows(beyond[0], False) + self._rows(sentence, True) + self._rows(beyond[1], False)
            ),
            dtype=np.int64,
        )
        lengths = [len(sentence) for sentence in sentences]
        starts = np.cumsum([0, *(length + 2 * reach for length in lengths)])[:-1] + reach
        real = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)] or [starts])
        hashes = np.asarray(self._table, dtype=np.uint64).reshape(len(self._table), len(self._attributes))
        column = {name: index for index, name in enumerate(self._attributes)}
        features = np.zeros((len(real), len(self.templates)), dtype=np.int64)
        for index, (parts, salt) in enumerate(zip(self._parts, self._salts, strict=True)):
            mixed = np.full(len(real), salt, dtype=np.uint64)
            applies = np.ones(len(real), dtype=bool)
            for name, offset in parts:
                value = hashes[rows[real + offset], column[name]]
                applies &= value != 0
                mixed = (mixed ^ value) * np.uint64(0x9E3779B97F4A7C15)  # wraps; the shift brings high bits down
                mixed ^= mixed >> np.uint64(29)
            features[:, index] = np.where(applies, mixed % np.uint64(self.size - 1) + np.uint64(1), 0)
        return np.split(features, np.cumsum(lengths)[:-1]) if sentences else []

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "templates": list(self.templates)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FeatureHasher:
        return cls(value["bits"], value["templates"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureHasher) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def _clear(self) -> None:
        self._row_of: dict[tuple[str, bool], int] = {}
        self._table: list[list[int]] = []

    def _rows(self, words: Sequence[str], real: bool) -> list[int]:
        """The row of each word in the table of hashes; a mark beyond the sentence (not ``real``) is no word."""
        rows = []
        for word in words:
            row = self._row_of.get((word, real))
            if row is None:
                row = self._row_of[word, real] = len(self._table)
                self._table.append([self._attribute(name, word, real) for name in self._attributes])
            rows.append(row)
        return rows

    def _attribute(self, name: str, word: str, real: bool) -> int:
        value = ATTRIBUTES[name](word) if real else f"\n{word}"  # no word of a file holds a line end
        return 0 if value is None else _hash(value)


def _parse(template: str) -> list[tuple[str, int]]:
    parts = []
    for part in template.split():
        match = re.fullmatch(r"(\w+)\[([+-]?\d)\]", part)
        if match is None or match[1] not in ATTRIBUTES:
            known = ", ".join(ATTRIBUTES)
            raise ValueError(f"a template consists of attribute[offset], attributes {known}; got {part!r}")
        parts.append((match[1], int(match[2])))
    if not parts:
        raise ValueError("a template is empty")
    return parts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1
