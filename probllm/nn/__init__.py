"""Encoders, embeddings, attention, potentials: layers from ids and pictures to states, from states to scores."""

from probllm.nn.attention import CrossAttention, SelfAttention
from probllm.nn.biaffine import BiaffineArcs
from probllm.nn.cache import KeyValueCache
from probllm.nn.config import Configurable, from_config, to_config
from probllm.nn.convolution import ConvolutionEncoder
from probllm.nn.decoder import Decoder, DecoderCache
from probllm.nn.embeddings import (
    CharacterCNN,
    FeatureEmbedding,
    TypedWordEmbedding,
    VectorInputs,
    WordEmbedding,
    WordRepresentation,
)
from probllm.nn.encoder import Encoder
from probllm.nn.feedforward import FeedForwardEncoder
from probllm.nn.packing import pack, segment_lengths, unpack
from probllm.nn.patches import PatchEmbedding, PatchEncoder
from probllm.nn.potentials import ChainPotentials, TransitionScores
from probllm.nn.pretrained import (
    CLIP,
    PretrainedEncoder,
    read_bert,
    read_clip,
    read_gpt2,
    read_llama,
    read_vit,
    write_bert,
    write_clip,
    write_gpt2,
    write_llama,
    write_vit,
)
from probllm.nn.recurrent import RecurrentEncoder
from probllm.nn.recurrent_decoder import RecurrentDecoder, RecurrentState
from probllm.nn.segment_scores import SegmentScores
from probllm.nn.spans import SpanScores
from probllm.nn.subwords import SubwordPooling, pool_subwords
from probllm.nn.transformer import TransformerDecoder, TransformerEncoder
from probllm.nn.transformer_layer import TransformerLayer

__all__ = [
    "CLIP",
    "BiaffineArcs",
    "ChainPotentials",
    "CharacterCNN",
    "Configurable",
    "ConvolutionEncoder",
    "CrossAttention",
    "Decoder",
    "DecoderCache",
    "Encoder",
    "FeatureEmbedding",
    "FeedForwardEncoder",
    "KeyValueCache",
    "PatchEmbedding",
    "PatchEncoder",
    "PretrainedEncoder",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "RecurrentState",
    "SegmentScores",
    "SelfAttention",
    "SpanScores",
    "SubwordPooling",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerLayer",
    "TransitionScores",
    "TypedWordEmbedding",
    "VectorInputs",
    "WordEmbedding",
    "WordRepresentation",
    "from_config",
    "pack",
    "pool_subwords",
    "read_bert",
    "read_clip",
    "read_gpt2",
    "read_llama",
    "read_vit",
    "segment_lengths",
    "to_config",
    "unpack",
    "write_bert",
    "write_clip",
    "write_gpt2",
    "write_llama",
    "write_vit",
]
