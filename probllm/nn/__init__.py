"""Encoders, embeddings, attention, potentials: layers from ids and pictures to states, from states to scores."""

from probllm.nn.config import Configurable, from_config, to_config
from probllm.nn.convolution import ConvolutionEncoder
from probllm.nn.embeddings import (
    CharacterCNN,
    FeatureEmbedding,
    VectorInputs,
    WordEmbedding,
    WordRepresentation,
)
from probllm.nn.encoder import Encoder
from probllm.nn.feedforward import FeedForwardEncoder
from probllm.nn.potentials import ChainPotentials
from probllm.nn.recurrent import RecurrentEncoder

__all__ = [
    "ChainPotentials",
    "CharacterCNN",
    "Configurable",
    "ConvolutionEncoder",
    "Encoder",
    "FeatureEmbedding",
    "FeedForwardEncoder",
    "RecurrentEncoder",
    "VectorInputs",
    "WordEmbedding",
    "WordRepresentation",
    "from_config",
    "to_config",
]
