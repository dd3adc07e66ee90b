"""Tagged sentences to tensors and back: what a tagger must remember of its training text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from probllm.data.dataset import Dataset, Example
from probllm.data.features import TAGGING_TEMPLATES, FeatureHasher
from probllm.data.lines import FilePath
from probllm.data.subwords import Subwords
from probllm.data.vocabulary import Vocabulary, read_json, write_json
from probllm.data.word_classes import WordClasses

FIELDS = ("words", "characters", "features", "symbols")


class TaggingVocabulary:
    """Words, characters, word classes, hashed features and tag names, and the tensors that they make of sentences.

    Args:
        tags: the names of the tags; the i-th is tag ``i`` (tags need no padding id: the mask says what is real).
        words: known words, ``len(words)`` rows of an embedding table.
        characters: known characters.
        classes: symbols of an HMM.
        features: hashed indicator features.
        subwords: a subword tokeniser, for the field ``subwords``.
        max_characters: of longer words only the first and the last half of so many characters are kept.
    """

    def __init__(
        self,
        tags: Sequence[str],
        words: Vocabulary,
        characters: Vocabulary,
        classes: WordClasses,
        features: FeatureHasher,
        subwords: Subwords | None = None,
        max_characters: int = 32,
    ) -> None:
        self.tags = list(tags)
        self._tag_ids = {tag: index for index, tag in enumerate(self.tags)}
        if len(self._tag_ids) != len(self.tags):
            raise ValueError(f"tags must be distinct, got {self.tags}")
        if max_characters < 2:
            raise ValueError(f"max_characters must be at least 2, got {max_characters}")
        self.words = words
        self.characters = characters
        self.classes = classes
        self.features = features
        self.subwords = subwords
        self.max_characters = max_characters

    @classmethod
    def build(
        cls,
        sentences: Iterable[tuple[Sequence[str], Sequence[str]]],
        *,
        tags: Iterable[str] = (),
        min_count: int = 2,
        bits: int = 19,
        templates: Sequence[str] = TAGGING_TEMPLATES,
        subwords: Subwords | None = None,
    ) -> TaggingVocabulary:
        """A vocabulary from training sentences.

        Args:
            sentences: pairs of words and their tags.
            tags: tags that may occur elsewhere beside those of the sentences.
            min_count: rarer words get the unknown word's id, so that its embedding learns from them.
            bits, templates: see ``FeatureHasher``.
            subwords: a trained subword tokeniser, for the field ``subwords``.
        Raises:
            ValueError: if there is no sentence.
        """
        sentences = list(sentences)
        if not sentences:
            raise ValueError("sentences is empty: a vocabulary needs at least one")
        tokens = [word for words, _ in sentences for word in words]
        names = sorted({tag for _, sentence_tags in sentences for tag in sentence_tags}.union(tags))
        return cls(
            names,
            Vocabulary.build(tokens, min_count),
            Vocabulary.build(chain.from_iterable(tokens)),
            WordClasses.build(tokens),
            FeatureHasher(bits, templates),
            subwords,
        )

    @property
    def num_tags(self) -> int:
        return len(self.tags)

    def dataset(
        self,
        sentences: Iterable[tuple[Sequence[str], Sequence[str] | None]],
        fields: Sequence[str] = FIELDS,
        source: str = "sentences",
    ) -> Dataset:
        """Examples of ``inputs`` (a dict of the fields) and, unless they are None, ``tags``.

        ``words``, ``symbols`` and ``tags`` are long ``[T]``, ``characters`` ``[T, C]`` with C the sentence's longest
        word, ``features`` ``[T, templates]``. The field ``subwords`` gives ``subwords`` and ``word_index`` ``[S]``: the
        units of all words, and which word each belongs to.

        Args:
            sentences: pairs of words and their tags, or of words and None.
            fields: which inputs to make: by default all, but ``subwords`` only when named.
            source: what an error calls the sentences, such as their file.
        Raises:
            ValueError: for a sentence without words, with other than one tag a word, or with a tag that the training
                sentences lack; for an unknown field.
        """
        known = (*FIELDS, *(["subwords"] if self.subwords else []))
        if not fields or not set(fields) <= set(known):
            raise ValueError(f"fields must be some of {', '.join(known)}, got {list(fields)}")
        sentences = list(sentences)
        hashed = self.features.encode([words for words, _ in sentences]) if "features" in fields else None
        examples: list[Example] = []
        for number, (words, tags) in enumerate(sentences):
            if not words:
                raise ValueError(f"{source}: sentence {number + 1} has no words")
            inputs: dict[str, Tensor] = {}
            for field in fields:
                if field == "words":
                    inputs[field] = torch.tensor(self.words.encode(words))
                elif field == "symbols":
                    inputs[field] = torch.tensor(self.classes.encode(words))
                elif field == "characters":
                    inputs[field] = self._characters(words)
                elif field == "subwords" and self.subwords is not None:
                    units = self.subwords.encode_words(words)
                    inputs["subwords"], inputs["word_index"] = map(torch.tensor, units)
                elif hashed is not None:
                    inputs[field] = torch.from_numpy(hashed[number])
            if tags is None:
                examples.append({"inputs": inputs})
            else:
                ids = self._encode_tags(words, tags, f"{source}: sentence {number + 1}")
                examples.append({"inputs": inputs, "tags": torch.tensor(ids)})
        return Dataset(examples)

    def decode(self, ids: Tensor | Sequence[int]) -> list[str]:
        """The names of tags ``[T]`` (without padding).

        Raises:
            ValueError: for a number that is no tag.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]
        bad = [number for number in numbers if not 0 <= number < len(self.tags)]
        if bad:
            raise ValueError(f"tags must lie from 0 to {len(self.tags) - 1}, got {bad[0]}")
        return [self.tags[number] for number in numbers]

    def to_json(self) -> dict[str, Any]:
        return {
            "tags": self.tags,
            "words": self.words.to_json(),
            "characters": self.characters.to_json(),
            "classes": self.classes.to_json(),
            "features": self.features.to_json(),
            "subwords": self.subwords.serialized if self.subwords else None,
            "max_characters": self.max_characters,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TaggingVocabulary:
        return cls(
            value["tags"],
            Vocabulary.from_json(value["words"]),
            Vocabulary.from_json(value["characters"]),
            WordClasses.from_json(value["classes"]),
            FeatureHasher.from_json(value["features"]),
            Subwords(value["subwords"]) if value["subwords"] else None,
            value["max_characters"],
        )

    def save(self, path: FilePath) -> None:
        """Write all of it to a JSON file."""
        write_json(path, "TaggingVocabulary", self.to_json())

    @classmethod
    def load(cls, path: FilePath) -> TaggingVocabulary:
        """Read what ``save`` wrote; ValueError if the file holds something else."""
        return cls.from_json(read_json(path, "TaggingVocabulary"))

    def __repr__(self) -> str:
        return f"TaggingVocabulary({self.num_tags} tags, {len(self.words)} words, {len(self.characters)} characters)"

    def _encode_tags(self, words: Sequence[str], tags: Sequence[str], where: str) -> list[int]:
        if len(words) != len(tags):
            raise ValueError(f"{where} has {len(words)} words but {len(tags)} tags")
        for word, tag in zip(words, tags, strict=True):
            if tag not in self._tag_ids:
                raise ValueError(
                    f"{where} gives {word!r} the tag {tag!r}, which the training sentences lack; "
                    f"they have {', '.join(self.tags)} (more can be named in TaggingVocabulary.build(..., tags=...))"
                )
        return [self._tag_ids[tag] for tag in tags]

    def _characters(self, words: Sequence[str]) -> Tensor:
        first = (self.max_characters + 1) // 2
        last = self.max_characters - first
        kept = [w if len(w) <= self.max_characters else w[:first] + w[-last:] for w in words]
        ids = [self.characters.encode(word) for word in kept]
        width = max(map(len, ids))
        return torch.tensor([row + [0] * (width - len(row)) for row in ids])
