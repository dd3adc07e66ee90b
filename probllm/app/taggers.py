"""The taggers that the comparison sets side by side: which encoder under which law, and how each is trained.

All see the same words. The neural ones read a vector of the word and one made of its characters, and add the scores of
the hashed features to those of the network; the feature taggers have the features alone, the HMM words and suffixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from probllm.data import TaggingVocabulary
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


class Setting(NamedTuple):
    """What a model is built for."""

    vocabulary: TaggingVocabulary
    rules: Mapping[str, Tensor] | None
    """Which tags may follow which, where the tags are BIO and the data keep to it."""
    spans: bool
    """Whether the tags are BIO."""
    small: bool


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
    build: Callable[[Setting], Model]
    """A fresh model."""
    options: Callable[[Setting], dict[str, Any]]
    """What ``fit`` is told."""
    in_small: bool = True
    """Whether it takes part in the small setting without being asked for."""


def recurrent(setting: Setting) -> Encoder:
    """A BiLSTM."""
    return RecurrentEncoder(words(setting), hidden=64 if setting.small else 128, dropout=0.4)


def transformer(setting: Setting) -> Encoder:
    """A Transformer of two layers."""
    return TransformerEncoder(words(setting), dim=96 if setting.small else 128, layers=2, heads=4, dropout=0.2)


def words(setting: Setting) -> Encoder:
    """The words as all neural taggers read them, before the network."""
    word = WordEmbedding(len(setting.vocabulary.words), 48 if setting.small else 100, word_dropout=0.15)
    characters = CharacterCNN(len(setting.vocabulary.characters), 32, filters=32 if setting.small else 64)
    return WordRepresentation([word, characters], dropout=0.1)


def features(setting: Setting) -> Encoder:
    """The scores of the hashed features, one a tag."""
    return FeatureEmbedding(setting.vocabulary.features.size, setting.vocabulary.num_tags)


def hmm(setting: Setting) -> Model:
    classes = setting.vocabulary.classes
    return HMMTagger(setting.vocabulary.num_tags, len(classes), order=2, parents=classes.parent)


def crf(encoder: Callable[[Setting], Encoder] | None) -> Callable[[Setting], Model]:
    """A CRF on features and, perhaps, an encoder."""
    return lambda s: CRFTagger(encoder and encoder(s), s.vocabulary.num_tags, features(s), rules=s.rules)


def softmax(encoder: Callable[[Setting], Encoder] | None) -> Callable[[Setting], Model]:
    """A decision at each word, on features and, perhaps, an encoder."""
    return lambda s: SoftmaxTagger(encoder and encoder(s), s.vocabulary.num_tags, features(s))


# Entities are rare, and the next ones have other names: where each rare feature takes Adam's full steps they are learnt
# by heart, while plain gradients leave it small (measured on WNUT 2017: four times the F1).
PLAIN = {"optimiser": "sgd", "learning_rate": 0.3, "weight_decay": 1e-4, "batch_size": 16}


def counted(setting: Setting) -> dict[str, Any]:
    """Nothing: counts are exact."""
    return {}


def linear(setting: Setting) -> dict[str, Any]:
    """For scores of features alone."""
    if setting.spans:
        return {"epochs": 4, **PLAIN}
    return {"epochs": 4 if setting.small else 3, "learning_rate": 0.015, "batch_size": 32 if setting.small else 64}


def for_recurrent(setting: Setting) -> dict[str, Any]:
    """For a BiLSTM beside the features."""
    if setting.spans:
        return {"epochs": 6, **PLAIN}
    return {"epochs": 8 if setting.small else 6, "learning_rate": 3e-3, "weight_decay": 0.05}


def for_transformer(setting: Setting) -> dict[str, Any]:
    """For a Transformer beside the features."""
    if setting.spans:
        return {"epochs": 6, "learning_rate": 5e-4, "weight_decay": 0.05, "batch_size": 16}
    rate = 2e-3 if setting.small else 1e-3
    return {"epochs": 10 if setting.small else 6, "learning_rate": rate, "weight_decay": 0.05}


NEURAL = "on words and characters, plus features"
_ALL = (
    Candidate("hmm", "HMM", "second order, counted, suffixes", "symbols", "HMM", ("symbols",), hmm, counted),
    Candidate(
        "feature-softmax",
        "feature softmax",
        "hashed features",
        "none",
        "softmax",
        ("features",),
        softmax(None),
        linear,
        False,
    ),
    Candidate("feature-crf", "feature CRF", "hashed features", "none", "CRF", ("features",), crf(None), linear),
    Candidate(
        "bilstm-softmax", "BiLSTM softmax", NEURAL, "BiLSTM", "softmax", WORDS, softmax(recurrent), for_recurrent, False
    ),
    Candidate("bilstm-crf", "BiLSTM-CRF", NEURAL, "BiLSTM", "CRF", WORDS, crf(recurrent), for_recurrent),
    Candidate(
        "transformer-softmax",
        "Transformer softmax",
        NEURAL,
        "Transformer",
        "softmax",
        WORDS,
        softmax(transformer),
        for_transformer,
    ),
    Candidate(
        "transformer-crf", "Transformer-CRF", NEURAL, "Transformer", "CRF", WORDS, crf(transformer), for_transformer
    ),
)
CANDIDATES = {candidate.key: candidate for candidate in _ALL}
