"""Strings to ids and back, saved as JSON. Id 0 is padding and 1 the unknown string; known strings follow from 2."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from probllm.data.lines import FilePath

PADDING, UNKNOWN = 0, 1


class Vocabulary:
    """The known strings and their ids.

    Args:
        entries: distinct strings; the i-th has the id ``i + 2``. One that reads ``<pad>`` is a string like any other.
    Raises:
        ValueError: if an entry occurs twice.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = list(entries)
        self._ids = {entry: index for index, entry in enumerate(self.entries, start=2)}
        if len(self._ids) != len(self.entries):
            twice = [entry for entry, count in Counter(self.entries).items() if count > 1]
            raise ValueError(f"entries must be distinct, but these occur twice: {twice[:5]}")

    @classmethod
    def build(cls, tokens: Iterable[str], min_count: int = 1, max_size: int | None = None) -> Vocabulary:
        """The strings that occur at least ``min_count`` times, the most frequent first (ties in alphabetical order).

        Args:
            max_size: keep only so many of the most frequent.
        """
        counts = Counter(tokens)
        kept = sorted((token for token, count in counts.items() if count >= min_count), key=lambda t: (-counts[t], t))
        return cls(kept[:max_size])

    def __len__(self) -> int:
        """The number of ids, padding and unknown included: the rows of an embedding table."""
        return len(self.entries) + 2

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def __getitem__(self, token: str) -> int:
        return self._ids.get(token, UNKNOWN)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(tuple(self.entries))

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} ids)"

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The id of each string; 1 for those unknown."""
        return [self._ids.get(token, UNKNOWN) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The string of each id; ``<pad>`` and ``<unk>`` for 0 and 1.

        Raises:
            ValueError: for an id outside of the vocabulary.
        """
        tokens = []
        for number in map(int, ids):
            if not 0 <= number < len(self):
                raise ValueError(f"ids must lie from 0 to {len(self) - 1}, got {number}")
            tokens.append(("<pad>", "<unk>")[number] if number < 2 else self.entries[number - 2])
        return tokens

    def to_json(self) -> list[str]:
        """The entries by id."""
        return self.entries

    @classmethod
    def from_json(cls, value: Sequence[str]) -> Vocabulary:
        return cls(value)

    def save(self, path: FilePath) -> None:
        """Write the entries to a JSON file."""
        write_json(path, "Vocabulary", self.to_json())

    @classmethod
    def load(cls, path: FilePath) -> Vocabulary:
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        return cls.from_json(read_json(path, "Vocabulary"))


def write_json(path: FilePath, kind: str, value: Any) -> None:
    """Write ``value`` under the name of its class, so that a file of another class is refused when read."""
    Path(path).write_text(json.dumps({kind: value}, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: FilePath, kind: str) -> Any:
    """Read what ``write_json`` wrote.

    Raises:
        ValueError: if the file is not JSON or was saved from another class.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict) or list(value) != [kind]:
        found = f"a saved {next(iter(value), 'nothing')}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}: expected a saved {kind}, got {found}")
    return value[kind]
