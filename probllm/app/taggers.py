"""The taggers that the comparison sets side by side: which encoder under which law, and how each is trained.

All neural ones read the same words: a vector for the word itself, one made of its characters, and one summed over
hashed features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from probllm.data import TaggingVocabulary
from probllm.data.bio import bio_rules
from probllm.models import CRFTagger, HMMTagger, SoftmaxTagger
from probllm.models.model import Model
from probllm.nn import (
    CharacterCNN,
    Encoder,
    FeatureEmbedding,
    RecurrentEncoder,
    TransformerEncoder,
    WordEmbedding,
    WordRepresentation,
)

WORDS = ("words", "characters", "features")


class Candidate(NamedTuple):
    """A model that takes part."""

    key: str
    """What it is called on the command line."""
    name: str
    """What it is called in the table."""
    about: str
    encoder: str
    """Candidates with equal encoders differ in their law alone."""
    law: str
    fields: tuple[str, ...]
    """The inputs that it reads."""
    build: Callable[[TaggingVocabulary, bool], Model]
    """A fresh model for a vocabulary, at the small or the full setting."""
    options: Callable[[bool], dict[str, Any]]
    """What ``fit`` is told."""
    in_small: bool = True
    """Whether it takes part in the small setting without being asked for."""


def words(vocabulary: TaggingVocabulary, small: bool) -> Encoder:
    """The words as all neural taggers read them."""
    size = 32 if small else 100
    parts: list[Encoder] = [
        WordEmbedding(len(vocabulary.words), size, word_dropout=0.1),
        CharacterCNN(len(vocabulary.characters), 32, 32 if small else 64),
        FeatureEmbedding(vocabulary.features.size, 32),
    ]
    return WordRepresentation(parts, dropout=0.3)


def recurrent(vocabulary: TaggingVocabulary, small: bool) -> Encoder:
    return RecurrentEncoder(words(vocabulary, small), hidden=64 if small else 128, dropout=0.3)


def transformer(vocabulary: TaggingVocabulary, small: bool) -> Encoder:
    return TransformerEncoder(words(vocabulary, small), dim=96 if small else 192, layers=2, heads=4, dropout=0.2)


def hmm(vocabulary: TaggingVocabulary, small: bool) -> Model:
    return HMMTagger(vocabulary.num_tags, len(vocabulary.classes), order=2, parents=vocabulary.classes.parent)


def feature_crf(vocabulary: TaggingVocabulary, small: bool) -> Model:
    return CRFTagger(FeatureEmbedding(vocabulary.features.size, vocabulary.num_tags), vocabulary.num_tags)


def feature_softmax(vocabulary: TaggingVocabulary, small: bool) -> Model:
    return SoftmaxTagger(FeatureEmbedding(vocabulary.features.size, vocabulary.num_tags), vocabulary.num_tags)


def with_crf(encoder: Callable[[TaggingVocabulary, bool], Encoder]) -> Callable[[TaggingVocabulary, bool], Model]:
    """A CRF on an encoder."""
    return lambda vocabulary, small: CRFTagger(encoder(vocabulary, small), vocabulary.num_tags)


def with_softmax(encoder: Callable[[TaggingVocabulary, bool], Encoder]) -> Callable[[TaggingVocabulary, bool], Model]:
    """An independent decision at each word, on an encoder."""
    return lambda vocabulary, small: SoftmaxTagger(encoder(vocabulary, small), vocabulary.num_tags)


def counted(small: bool) -> dict[str, Any]:
    return {}


def linear(small: bool) -> dict[str, Any]:
    return {"epochs": 6, "optimiser": "adagrad", "learning_rate": 0.1, "weight_decay": 0.0}


def neural(small: bool) -> dict[str, Any]:
    return {"epochs": 8 if small else 12, "learning_rate": 3e-3}


CANDIDATES = {
    candidate.key: candidate
    for candidate in (
        Candidate("hmm", "HMM", "second order, counted", "symbols", "HMM", ("symbols",), hmm, counted),
        Candidate(
            "feature-softmax",
            "feature softmax",
            "linear in hashed features",
            "features",
            "softmax",
            ("features",),
            feature_softmax,
            linear,
            in_small=False,
        ),
        Candidate(
            "feature-crf",
            "feature CRF",
            "linear in hashed features",
            "features",
            "CRF",
            ("features",),
            feature_crf,
            linear,
        ),
        Candidate(
            "bilstm-softmax",
            "BiLSTM softmax",
            "words, characters, features",
            "BiLSTM",
            "softmax",
            WORDS,
            with_softmax(recurrent),
            neural,
            in_small=False,
        ),
        Candidate(
            "bilstm-crf",
            "BiLSTM-CRF",
            "words, characters, features",
            "BiLSTM",
            "CRF",
            WORDS,
            with_crf(recurrent),
            neural,
        ),
        Candidate(
            "transformer-softmax",
            "Transformer softmax",
            "words, characters, features",
            "Transformer",
            "softmax",
            WORDS,
            with_softmax(transformer),
            neural,
        ),
        Candidate(
            "transformer-crf",
            "Transformer-CRF",
            "words, characters, features",
            "Transformer",
            "CRF",
            WORDS,
            with_crf(transformer),
            neural,
        ),
    )
}
