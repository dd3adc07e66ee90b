"""One Transformer layer for encoders, decoders and both: self-attention, attention to a memory, a perceptron.

Normalised before each part, ``x ← x + part(norm(x))`` (Xiong et al., 2020), or after, ``x ← norm(x + part(x))``
(Vaswani et al., 2017). SwiGLU: Shazeer (2020).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.attention import CrossAttention, SelfAttention, Sight
from probllm.nn.config import Configurable
from probllm.nn.dropout import Dropout
from probllm.nn.encoder import check_positive
from probllm.nn.linear import Linear, perceptron
from probllm.nn.norms import Norm, make_norm
from probllm.nn.visibility import visible_keys

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu"]


class TransformerLayer(Configurable, nn.Module):
    """Self-attention, attention to a memory if ``memory_dim`` is given, then a perceptron, each added to its input.

    Args: as in ``TransformerEncoder`` and ``SelfAttention``; ``rotary`` turns queries and keys by their positions.
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
        norm_first: bool = True,
        window: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        qkv_bias: bool | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float | None = None,
        memory_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        eps = 1e-6 if norm_eps is None else norm_eps
        self.attention_norm = make_norm(norm, dim, norm_eps, bias)
        self.attention = SelfAttention(
            dim, heads, kv_heads, causal, rotary, attention_dropout, bias, window, qk_norm, qkv_bias, head_dim,
            rope_base, eps,
        )  # fmt: skip
        self.memory_norm, self.memory_attention = None, None
        if memory_dim is not None:
            self.memory_norm = make_norm(norm, dim, norm_eps, bias)
            self.memory_attention = CrossAttention(
                dim, memory_dim, heads, kv_heads, attention_dropout, bias, qk_norm, head_dim, eps
            )
        self.feedforward_norm = make_norm(norm, dim, norm_eps, bias)
        self.feedforward = Perceptron(dim, 4 * dim if feedforward is None else feedforward, activation, dropout, bias)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, sight: Sight | None = None, layer: int = 0) -> Tensor:
        """States ``[B, L, dim]`` from states.

        Args:
            states: ``[B, L, dim]``.
            sight: what the stack's layers share; without it every position is real and nothing is turned or remembered.
            layer: the number of this layer in the stack.
        """
        if sight is None:
            length, attention = states.shape[1], self.attention
            visible = visible_keys(length, length, None, attention.causal, attention.window, states.device)
            sight = Sight(visible)
        drop = self.dropout if self.dropout.training and self.dropout.p else None
        attention_norm, memory_norm, feedforward_norm = self.attention_norm, self.memory_norm, self.feedforward_norm
        first = self.norm_first
        part = self.attention.read(attention_norm(states) if first else states, sight, layer)
        states = states + (part if drop is None else drop(part))
        if not first:
            states = attention_norm(states)
        if self.memory_attention is not None and memory_norm is not None:
            part = self.memory_attention.read(memory_norm(states) if first else states, sight, layer)
            states = states + (part if drop is None else drop(part))
            if not first:
                states = memory_norm(states)
        part = self.feedforward(feedforward_norm(states) if first else states)
        states = states + (part if drop is None else drop(part))
        return states if first else feedforward_norm(states)


class Perceptron(Configurable, nn.Module):
    """The two linear layers within a Transformer layer: ``W₂ gelu(W₁ x)``, or ``W₂ (silu(W₁ x) · V x)`` for SwiGLU."""

    def __init__(
        self, dim: int, hidden: int, activation: Activation = "gelu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        check_positive(dim=dim, feedforward=hidden)
        if activation not in get_args(Activation):
            names = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"activation is {activation!r}; expected one of {names}")
        self.activation = activation
        self.input = Linear(dim, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.output = Linear(hidden, dim, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """``[..., dim]`` from ``[..., dim]``."""
        dropping = self.dropout.training and self.dropout.p
        if not dropping and (found := perceptron(states, self.input, self.output, self.activation)) is not None:
            return found
        hidden = self.input(states)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = activate(hidden, self.activation)
        if dropping:
            hidden = self.dropout(hidden)
        result: Tensor = self.output(hidden)
        return result


def activate(hidden: Tensor, activation: str) -> Tensor:
    """GELU, by tanh or as ``x · sigmoid(1.702 x)`` (Hendrycks and Gimpel, 2016) too, or ReLU of each unit."""
    if activation == "relu":
        return F.relu(hidden)
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
