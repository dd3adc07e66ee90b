"""The parsers that the comparison sets side by side: which encoder under which law, and how each is trained.

All read the same words: a vector of the word and one made of its characters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from probllm.data import ParsingVocabulary
from probllm.models import DependencyParser, HeadSelectionParser
from probllm.models.parser import Parser
from probllm.nn import (
    CharacterCNN,
    Encoder,
    RecurrentEncoder,
    TransformerEncoder,
    WordEmbedding,
    WordRepresentation,
)

WORDS = ("words", "characters")

Law = Literal["projective", "spanning", "heads"]


class Setting(NamedTuple):
    """What a parser is built for."""

    vocabulary: ParsingVocabulary
    single_root: bool
    """Whether one word alone depends on the root in every training sentence."""
    small: bool


class Candidate(NamedTuple):
    """A parser that takes part."""

    key: str
    """What it is called on the command line."""
    name: str
    """What it is called in the table."""
    about: str
    encoder: str
    """Candidates with equal encoders differ in their law alone."""
    law: Law
    build: Callable[[Setting], Parser]
    """A fresh model."""
    options: Callable[[Setting], dict[str, Any]]
    """What ``fit`` is told."""


def recurrent(setting: Setting) -> Encoder:
    """A BiLSTM."""
    if setting.small:
        return RecurrentEncoder(words(setting), hidden=100, layers=1, dropout=0.25)
    return RecurrentEncoder(words(setting), hidden=200, layers=3, dropout=0.33)


def transformer(setting: Setting) -> Encoder:
    """A Transformer."""
    if setting.small:
        return TransformerEncoder(words(setting), dim=128, layers=2, heads=4, dropout=0.1)
    return TransformerEncoder(words(setting), dim=256, layers=5, heads=8, dropout=0.2)


def words(setting: Setting) -> Encoder:
    """The words as all parsers read them, before the network."""
    size = 64 if setting.small else 125
    word = WordEmbedding(len(setting.vocabulary.words), size, word_dropout=0.15)
    characters = CharacterCNN(len(setting.vocabulary.characters), 32, filters=size)
    return WordRepresentation([word, characters], dropout=0.1 if setting.small else 0.33)


def parser(encoder: Callable[[Setting], Encoder], law: Law) -> Callable[[Setting], Parser]:
    """A parser with that law on that encoder."""

    def build(setting: Setting) -> Parser:
        labels = setting.vocabulary.num_labels
        sizes: dict[str, Any] = {"arc_dim": 128, "label_dim": 48} if setting.small else {"label_dim": 64}
        if law == "heads":
            return HeadSelectionParser(encoder(setting), labels, **sizes)
        return DependencyParser(encoder(setting), labels, law, setting.single_root, **sizes)

    return build


def for_recurrent(setting: Setting) -> dict[str, Any]:
    """For a BiLSTM."""
    if setting.small:
        return {"epochs": 6, "learning_rate": 5e-3, "max_tokens": 250}
    return {"epochs": 12, "learning_rate": 3e-3, "max_tokens": 400}


def for_transformer(setting: Setting) -> dict[str, Any]:
    """For a Transformer."""
    if setting.small:
        return {"epochs": 6, "learning_rate": 2e-3, "max_tokens": 400, "warmup": 0.1}
    return {"epochs": 15, "learning_rate": 1e-3, "max_tokens": 600, "warmup": 0.1}


LAWS: dict[Law, tuple[str, str]] = {
    "heads": ("head selection", "each word's head by itself"),
    "projective": ("projective", "a law over trees without crossing arcs"),
    "spanning": ("spanning", "a law over all trees"),
}


def _candidates() -> dict[str, Candidate]:
    found = {}
    for encoder, make, options in (
        ("BiLSTM", recurrent, for_recurrent),
        ("Transformer", transformer, for_transformer),
    ):
        for law, (name, about) in LAWS.items():
            key = f"{encoder.lower()}-{law}"
            found[key] = Candidate(key, f"{encoder} {name}", about, encoder, law, parser(make, law), options)
    return found


CANDIDATES = _candidates()
