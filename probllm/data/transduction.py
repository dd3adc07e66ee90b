"""Pairs of sequences, one read and one written: letters and phonemes, a word and its spelling in another script.

A batch has ``inputs`` ``[B, L]``, ``mask`` ``[B, L]`` and ``target`` ``[B, U]``: ids from 2 (1 is unknown), 0 behind
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from probllm.data.dataset import Dataset
from probllm.data.vocabulary import Vocabulary


class Pair(NamedTuple):
    """What is read, and what is written."""

    source: Sequence[str]
    target: Sequence[str]


class TransductionVocabulary:
    """The symbols of both sides.

    Args:
        sources, targets: their vocabularies.
    """

    def __init__(self, sources: Vocabulary, targets: Vocabulary) -> None:
        self.sources, self.targets = sources, targets

    @classmethod
    def build(cls, pairs: Iterable[Pair]) -> TransductionVocabulary:
        """The symbols that occur in the pairs."""
        pairs = list(pairs)
        return cls(
            Vocabulary.build(x for pair in pairs for x in pair.source),
            Vocabulary.build(y for pair in pairs for y in pair.target),
        )

    @property
    def num_labels(self) -> int:
        """Ids of targets beside 0."""
        return len(self.targets) - 1

    def dataset(self, pairs: Iterable[Pair]) -> Dataset:
        """Examples of ids.

        Raises:
            ValueError: for a pair without source.
        """
        return Dataset(
            {
                "inputs": torch.tensor(self.sources.encode(pair.source), dtype=torch.long),
                "target": torch.tensor(self.targets.encode(pair.target), dtype=torch.long),
            }
            for pair in pairs
        )

    def decode(self, target: torch.Tensor) -> list[str]:
        """The symbols of target ids ``[U]``, up to the first 0."""
        ids = target.tolist()
        return self.targets.decode(ids[: ids.index(0)] if 0 in ids else ids)

    def save(self, path: str | Path) -> None:
        """Write both vocabularies as JSON."""
        both = {"sources": self.sources.to_json(), "targets": self.targets.to_json()}
        Path(path).write_text(json.dumps(both, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TransductionVocabulary:
        """Read what ``save`` wrote."""
        both = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(Vocabulary(both["sources"]), Vocabulary(both["targets"]))
