"""Parsed sentences to tensors and back: what a parser must remember of its training text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from probllm.data.conll import TreebankSentence
from probllm.data.dataset import Dataset, Example
from probllm.data.dependencies import find_cycle, projectivise
from probllm.data.features import FeatureHasher
from probllm.data.lines import FilePath
from probllm.data.tagging import TaggingVocabulary
from probllm.data.vocabulary import Vocabulary, read_json, write_json

FIELDS = ("words", "characters", "features")


class ParsingVocabulary:
    """Words, characters, hashed features and names of relations, and the tensors that they make of sentences.

    Args:
        inputs: the words' part, with the relations as its tags; best made by ``build``.
    """

    def __init__(self, inputs: TaggingVocabulary) -> None:
        self.inputs = inputs

    @classmethod
    def build(
        cls,
        sentences: Iterable[TreebankSentence],
        *,
        relations: Iterable[str] = (),
        min_count: int = 2,
        bits: int = 18,
    ) -> ParsingVocabulary:
        """A vocabulary from training sentences.

        Args:
            sentences: of a treebank.
            relations: names that may occur elsewhere beside those of the sentences.
            min_count: rarer words get the unknown word's id.
            bits: of the hashed features, see ``FeatureHasher``.
        Raises:
            ValueError: if there is no sentence.
        """
        pairs = [(sentence.words, sentence.relations) for sentence in sentences]
        return cls(TaggingVocabulary.build(pairs, tags=relations, min_count=min_count, bits=bits))

    @property
    def relations(self) -> list[str]:
        """The names of the relations; the i-th is label ``i``."""
        return self.inputs.tags

    @property
    def num_labels(self) -> int:
        return len(self.relations)

    @property
    def words(self) -> Vocabulary:
        return self.inputs.words

    @property
    def characters(self) -> Vocabulary:
        return self.inputs.characters

    @property
    def features(self) -> FeatureHasher:
        return self.inputs.features

    def dataset(
        self,
        sentences: Iterable[TreebankSentence],
        fields: Sequence[str] = FIELDS,
        source: str = "sentences",
        projective: bool = False,
    ) -> Dataset:
        """Examples of ``inputs`` (a dict of the fields, as ``TaggingVocabulary`` makes them), ``heads`` and ``labels``.

        Args:
            sentences: of a treebank; without heads (an empty list, or -1 throughout) they give ``inputs`` alone.
            fields: which inputs to make.
            source: what an error calls the sentences, such as their file.
            projective: replace trees with crossing arcs by projective ones near them (``projectivise``), so that a
                projective law can learn from them; the labels stay.
        Raises:
            ValueError: for a sentence without words, heads that form no tree, or a relation that the training sentences
                lack; for an unknown field.
        """
        sentences = list(sentences)
        annotated = [any(head >= 0 for head in sentence.heads) for sentence in sentences]
        pairs = [(s.words, s.relations if known else None) for s, known in zip(sentences, annotated, strict=True)]
        examples: list[Example] = []
        for number, example in enumerate(self.inputs.dataset(pairs, fields, source)):
            if not annotated[number]:
                examples.append(example)
                continue
            heads = sentences[number].heads
            size = len(sentences[number])
            if len(heads) != size or any(not 0 <= head <= size for head in heads) or find_cycle(heads):
                raise ValueError(f"{source}: sentence {number + 1} of {size} words has no tree: its heads are {heads}")
            heads = projectivise(heads) if projective else heads
            examples.append({"inputs": example["inputs"], "heads": torch.tensor(heads), "labels": example["tags"]})
        return Dataset(examples)

    def decode(self, labels: Tensor | Sequence[int]) -> list[str]:
        """The names of labels ``[T]`` (without padding).

        Raises:
            ValueError: for a number that is no label.
        """
        return self.inputs.decode(labels)

    def save(self, path: FilePath) -> None:
        """Write all of it to a JSON file."""
        write_json(path, "ParsingVocabulary", self.inputs.to_json())

    @classmethod
    def load(cls, path: FilePath) -> ParsingVocabulary:
        """Read what ``save`` wrote; ValueError if the file holds something else."""
        return cls(TaggingVocabulary.from_json(read_json(path, "ParsingVocabulary")))

    def __repr__(self) -> str:
        return f"ParsingVocabulary({self.num_labels} relations, {len(self.words)} words)"
