"""What a parameter is for: which are tables of vectors, which have sparse gradients, which are hidden matrices.

A hidden matrix stands between two layers: the weight of a linear, recurrent or attention layer that turns one vector
into another. A table of embeddings is none, nor is a head, whose rows are the classes that it scores.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from probllm.nn.decoder import Decoder
from probllm.nn.embeddings import CharacterCNN, WordEmbedding
from probllm.nn.encoder import Encoder

_TABLES = (nn.Embedding, nn.EmbeddingBag)
# Decay regularises these, as it does the other weights of an encoder.
_OUR_TABLES = (WordEmbedding, CharacterCNN)
_LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def embeddings(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that are torch's tables of embeddings."""
    return _in_layers(modules, _TABLES)


def sparse_tables(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters with sparse gradients."""
    return {
        id(p) for layer in _layers(modules) if getattr(layer, "sparse", False) is True for p in layer.parameters(False)
    }


def hidden_matrices(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the hidden matrices.

    In a model on encoders or decoders of ``probllm.nn`` they are the layers' within these, for what reads their states
    scores them. In any other they are all layers' but the last one's.
    """
    hidden: set[int] = set()
    modules = list(modules)
    for module in modules:
        bodies = [layer for layer in module.modules() if isinstance(layer, (Encoder, Decoder))]
        layers = [layer for layer in _layers(bodies or [module]) if isinstance(layer, _LAYERS)]
        for layer in layers if bodies else layers[:-1]:
            hidden |= {id(p) for p in layer.parameters(False) if p.ndim == 2}
    return hidden - _in_layers(modules, (*_TABLES, *_OUR_TABLES))  # a table may be tied to a layer


def _in_layers(modules: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> set[int]:
    return {id(p) for layer in _layers(modules) if isinstance(layer, kinds) for p in layer.parameters(False)}


def _layers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    return (layer for module in modules for layer in module.modules())
