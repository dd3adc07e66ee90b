"""A Transformer encoder, normalised before each part: ``x ← x + attention(norm(x))``, ``x ← x + perceptron(norm(x))``.

Bidirectional or causal, with rotary, sinusoidal or learned positions, which are numbered by the mask: padding, on
whichever side, changes nothing. Sources: Vaswani et al. (2017); norms first, Xiong et al. (2020); RMSNorm, Zhang and
Sennrich (2019); SwiGLU, Shazeer (2020).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.attention import SelfAttention
from probllm.nn.cache import KeyValueCache
from probllm.nn.config import Configurable
from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, zero_padding
from probllm.nn.positions import positions_from_mask, sinusoids

Norm = Literal["layer", "rms"]
Positions = Literal["rope", "sinusoidal", "learned", "none"]
Activation = Literal["gelu", "relu", "swiglu"]


class TransformerEncoder(Encoder):
    """A stack of Transformer layers over the embedded positions.

    Args:
        embedding: an encoder of the single positions, or a vocabulary size; projected to ``dim`` if its own differs.
        dim: size of the states.
        layers: number of layers.
        heads: number of attention heads; ``dim`` is a multiple of it.
        kv_heads: number of heads of keys and values (grouped-query attention); ``heads`` if None.
        feedforward: hidden units of the perceptrons; ``4 * dim`` if None.
        norm: ``"layer"`` (LayerNorm) or ``"rms"`` (RMSNorm).
        positions: ``"rope"``, ``"sinusoidal"``, ``"learned"`` (``max_length`` vectors) or ``"none"``.
        activation: of the perceptrons: ``"gelu"``, ``"relu"`` or ``"swiglu"``.
        causal: let a position see itself and the past only.
        dropout: probability of dropping a unit of the embeddings, of a layer's two parts, or of a perceptron.
        attention_dropout: probability of dropping an attention weight; above 0 the CPU's fused kernel cannot serve.
        max_length: the longest input that learned positions can take.
    """

    def __init__(
        self,
        embedding: Encoder | int,
        dim: int = 256,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        feedforward: int | None = None,
        norm: Norm = "layer",
        positions: Positions = "rope",
        activation: Activation = "gelu",
        causal: bool = False,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, layers=layers, max_length=max_length)
        check_dropout("dropout", dropout)
        if positions not in ("rope", "sinusoidal", "learned", "none"):
            raise ValueError(f"positions is {positions!r}; expected 'rope', 'sinusoidal', 'learned' or 'none'")
        self.embedding = as_embedding(embedding, dim)
        self.dim, self.causal, self.positions, self.max_length = dim, causal, positions, max_length
        same = self.embedding.dim == dim
        self.project = nn.Identity() if same else nn.Linear(self.embedding.dim, dim)
        self.position_table = nn.Parameter(torch.randn(max_length, dim) / dim**0.5) if positions == "learned" else None
        rotary = positions == "rope"
        stack = [
            TransformerLayer(
                dim, heads, kv_heads, feedforward, norm, activation, causal, rotary, dropout, attention_dropout
            )
            for _ in range(layers)
        ]
        for layer in stack:
            # The residual branches add up to the same size however many there are (Radford et al., 2019).
            for branch in (layer.attention.output, layer.feedforward.output):
                branch.weight.data.mul_((2 * layers) ** -0.5)
        self.layers = nn.ModuleList(stack)
        self.norm = make_norm(norm, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Inputs, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """States ``[B, L, dim]``.

        Args:
            inputs: what the embedding takes.
            mask: ``[B, L]``, True at real positions, in any pattern.
            cache: of a causal encoder: the positions read before these. The inputs and the mask are those of the new
                positions alone, and the cache takes them in.
        Raises:
            ValueError: if learned positions run out, or a cache is given to an encoder that is not causal.
        """
        if cache is not None and not self.causal:
            raise ValueError("cache was given to an encoder that is not causal: what it has read would change")
        states: Tensor = self.project(self.embedding(inputs, mask))
        batch, length, _ = states.shape
        check_mask(mask, states.shape[:2])
        past = 0 if cache is None else cache.length
        if self.position_table is not None and past + length > self.max_length:
            raise ValueError(f"inputs has length {past + length}; expected at most max_length = {self.max_length}")
        seen = mask
        if cache is not None:
            seen, numbers = cache.extend(mask, batch, length, states.device)
        elif mask is not None:
            numbers = positions_from_mask(mask)
        else:
            numbers = torch.arange(length, device=states.device)
        if self.positions == "sinusoidal":
            states = states * self.dim**0.5 + sinusoids(numbers, self.dim, states.dtype)
        elif self.position_table is not None:
            states = states + F.embedding(numbers, self.position_table)
        states = self.dropout(states)
        for i, layer in enumerate(self.layers):
            states = layer(states, seen, numbers, cache, i)
        return zero_padding(self.norm(states), mask)


class TransformerLayer(Configurable, nn.Module):
    """One layer: self-attention, then a perceptron, each normalised before and added after.

    Args: as in ``TransformerEncoder``; ``rotary`` turns queries and keys by their positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        feedforward: int | None = None,
        norm: Norm = "layer",
        activation: Activation = "gelu",
        causal: bool = False,
        rotary: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, dim)
        self.attention = SelfAttention(dim, heads, kv_heads, causal, rotary, attention_dropout)
        self.feedforward_norm = make_norm(norm, dim)
        self.feedforward = Perceptron(dim, 4 * dim if feedforward is None else feedforward, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """States ``[B, L, dim]`` from states; the arguments are those of ``SelfAttention``."""
        attended = self.attention(self.attention_norm(states), mask, positions, cache=cache, layer=layer)
        states = states + self.dropout(attended)
        result: Tensor = states + self.dropout(self.feedforward(self.feedforward_norm(states)))
        return result


class Perceptron(Configurable, nn.Module):
    """The two linear layers within a Transformer layer: ``W₂ gelu(W₁ x)``, or ``W₂ (silu(W₁ x) · V x)`` for SwiGLU."""

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(dim=dim, feedforward=hidden)
        if activation not in ("gelu", "relu", "swiglu"):
            raise ValueError(f"activation is {activation!r}; expected 'gelu', 'relu' or 'swiglu'")
        self.activation = activation
        self.input = nn.Linear(dim, 2 * hidden if activation == "swiglu" else hidden)
        self.output = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """``[..., dim]`` from ``[..., dim]``."""
        hidden = self.input(states)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden)
        result: Tensor = self.output(self.dropout(hidden))
        return result


def make_norm(norm: Norm, dim: int) -> nn.Module:
    """LayerNorm (``"layer"``) or RMSNorm (``"rms"``) of vectors of ``dim``."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm is {norm!r}; expected 'layer' or 'rms'")
    return nn.LayerNorm(dim) if norm == "layer" else nn.RMSNorm(dim, eps=1e-6)
