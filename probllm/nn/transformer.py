"""Transformers of three shapes out of one layer: an encoder (BERT), a decoder (GPT), and a decoder beside an encoder.

Rotary, sinusoidal or learned positions are numbered by the mask: padding, on whichever side, changes nothing. Sequences
may also lie packed in one row (``segments``), or come in pieces (``cache``).
Sources: Vaswani et al. (2017); Devlin et al. (2019); Radford et al. (2019).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probllm.nn.attention import Sight, check_memory
from probllm.nn.cache import KeyValueCache
from probllm.nn.decoder import Decoder, DecoderCache
from probllm.nn.dropout import Dropout
from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, in_transform, zero_padding
from probllm.nn.norms import Norm, make_norm
from probllm.nn.packing import Packing
from probllm.nn.positions import positions_from_mask, rotation, sinusoids
from probllm.nn.transformer_layer import Activation, TransformerLayer
from probllm.nn.visibility import visible_keys, visible_memory, visible_slots

Positions = Literal["rope", "sinusoidal", "learned", "none"]


class _Stack(nn.Module):
    """What the shapes share: embedded positions, layers, and the norm at the end."""

    dim: int

    def _build(
        self,
        embedding: Encoder | int,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None,
        feedforward: int | None,
        norm: Norm,
        positions: Positions,
        activation: Activation,
        causal: bool,
        dropout: float,
        attention_dropout: float,
        max_length: int,
        norm_first: bool,
        window: int | None,
        qk_norm: bool,
        bias: bool,
        qkv_bias: bool | None,
        head_dim: int | None,
        rope_base: float,
        norm_eps: float | None,
        embedding_norm: bool,
        checkpointing: bool,
        memory_dim: int | None = None,
    ) -> None:
        check_positive(dim=dim, layers=layers, max_length=max_length)
        check_dropout("dropout", dropout)
        if positions not in ("rope", "sinusoidal", "learned", "none"):
            raise ValueError(f"positions is {positions!r}; expected 'rope', 'sinusoidal', 'learned' or 'none'")
        self.embedding = as_embedding(embedding, dim)
        self.dim, self.causal, self.positions, self.max_length = dim, causal, positions, max_length
        self.checkpointing, self.rope_base = checkpointing, rope_base
        same = self.embedding.dim == dim
        self.project = nn.Identity() if same else nn.Linear(self.embedding.dim, dim)
        self.position_table = nn.Parameter(torch.randn(max_length, dim) / dim**0.5) if positions == "learned" else None
        self.embedding_norm = make_norm(norm, dim, norm_eps, bias) if embedding_norm else None
        rotary = positions == "rope"
        stack = [
            TransformerLayer(
                dim, heads, kv_heads, feedforward, norm, activation, causal, rotary, dropout, attention_dropout,
                norm_first, window, qk_norm, bias, qkv_bias, head_dim, rope_base, norm_eps, memory_dim,
            )
            for _ in range(layers)
        ]  # fmt: skip
        for layer in stack:
            # The residual branches add up to the same size however many there are (Radford et al., 2019).
            branches = [layer.attention.output, layer.feedforward.output]
            if layer.memory_attention is not None:
                branches.append(layer.memory_attention.output)
            for branch in branches:
                branch.weight.data.mul_((len(branches) * layers) ** -0.5)
        self.layers = nn.ModuleList(stack)
        self.window, self.head_dim, self.kv_heads = (
            window, stack[0].attention.head_dim, stack[0].attention.kv_heads,
        )  # fmt: skip
        # After-norms leave nothing to be normalised at the end.
        self.norm = make_norm(norm, dim, norm_eps, bias) if norm_first else None
        self.dropout = Dropout(dropout)

    def _run(
        self,
        inputs: Inputs,
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
        segments: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_segments: Tensor | None = None,
    ) -> Tensor:
        states: Tensor = self.embedding(inputs, mask)
        if states.shape[-1] != self.dim:
            states = self.project(states)
        batch, length, _ = states.shape
        check_mask(mask, states.shape[:2])
        packing = memory_packing = None
        if segments is not None:
            packing = self._pack(segments, states, mask, cache)
            if memory is not None:
                if memory_segments is None:
                    raise ValueError("memory_segments is None; expected the lengths of the memory's packed sequences")
                memory_packing = Packing(segments, length, memory_segments, memory.shape[1])
        elif memory_segments is not None:
            raise ValueError("memory_segments was given without segments, which are packed in the same order")
        longest = length if packing is None else self._longest(packing)
        if self.position_table is not None:
            self._check_room(longest, cache)
        if memory is not None:
            memory_rows = memory.shape[0] if packing is not None else batch
            check_memory(memory, memory_mask, memory.shape[-1], memory_rows)

        seen = mask
        if cache is not None:
            seen, numbers = cache.extend(mask, batch, length, states.device)
        elif packing is not None:
            numbers = packing.positions(states.device)
        elif mask is not None:
            numbers = positions_from_mask(mask)
        else:
            numbers = torch.arange(length, device=states.device)
        sight = Sight(cache=cache, packing=packing, memory=memory, memory_packing=memory_packing)
        if packing is None:
            if cache is not None and cache.slots is not None and seen is not None:
                visible = visible_slots(cache.slots, seen, self.window)
            else:
                size = length if cache is None else cache.length
                visible = visible_keys(length, size, seen, self.causal, self.window, states.device, free_padding=True)
            fused = not (torch.is_autocast_enabled(states.device.type) or in_transform(states))
            sight = sight._replace(visible=visible.as_scores(states.dtype) if fused else visible)
        if memory is not None or cache is not None:
            seen_memory = cache.memory_mask if cache is not None and cache.memory else memory_mask
            sight = sight._replace(visible_memory=visible_memory(seen_memory))
            if cache is not None and not cache.memory:
                cache.memory_mask = memory_mask

        if self.positions == "rope":
            sight = sight._replace(rotation=rotation(numbers, self.head_dim, states.dtype, self.rope_base))
        elif self.positions == "sinusoidal":
            states = states * self.dim**0.5 + sinusoids(numbers, self.dim, states.dtype)
        elif self.position_table is not None:
            states = states + F.embedding(numbers, self.position_table)
        if self.embedding_norm is not None:
            states = self.embedding_norm(states)
        if self.dropout.training and self.dropout.p:
            states = self.dropout(states)
        if self.checkpointing and cache is None and torch.is_grad_enabled():
            for i, layer in enumerate(self.layers):
                states = checkpoint(layer, states, sight, i, use_reentrant=False)
        else:
            for i, layer in enumerate(self.layers):
                states = layer(states, sight, i)
        return zero_padding(states if self.norm is None else self.norm(states), mask)

    @property
    def stack(self) -> list[TransformerLayer]:
        """The layers, from the first to the last."""
        return [layer for layer in self.layers if isinstance(layer, TransformerLayer)]

    def _pack(self, segments: Tensor, states: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Packing:
        if mask is not None or cache is not None:
            raise ValueError(f"segments was given with a {'mask' if cache is None else 'cache'}; packed rows have none")
        if states.shape[0] != 1:
            raise ValueError(f"inputs has {states.shape[0]} rows; expected one, in which the segments are packed")
        return Packing(segments, states.shape[1])

    def _longest(self, packing: Packing) -> int:
        if self.position_table is None or torch.compiler.is_compiling() or in_transform(packing.lengths):
            return 0
        return int(packing.lengths.max())

    def _check_room(self, length: int, cache: KeyValueCache | None) -> None:
        if cache is not None and not cache.static:
            length += cache.length
        if length > self.max_length:
            raise ValueError(f"inputs has length {length}; expected at most max_length = {self.max_length}")


class TransformerEncoder(_Stack, Encoder):
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
        activation: of the perceptrons: ``"gelu"``, its approximations ``"gelu_tanh"`` (GPT-2) and ``"quick_gelu"``
            (CLIP), ``"relu"`` or ``"swiglu"``.
        causal: let a position see itself and the past only.
        dropout: probability of dropping a unit of the embeddings, of a layer's parts, or of a perceptron.
        attention_dropout: probability of dropping an attention weight; above 0 the CPU's fused kernel cannot serve.
        max_length: the longest input that learned positions can take.
        norm_first: normalise before each part and once at the end, or after each part.
        window: attend to the nearest ``window`` positions only, oneself counted (on either side unless causal).
        qk_norm: normalise queries and keys.
        bias: whether linear layers and LayerNorms have biases.
        qkv_bias: whether the projections to queries, keys and values have them, if otherwise than ``bias``.
        head_dim: size of a head; ``dim / heads`` if None.
        rope_base: the slowest rotary pair turns once in about ``2π · rope_base`` positions.
        norm_eps: added to the variance by the norms; 1e-5 (LayerNorm) or 1e-6 (RMSNorm) if None.
        embedding_norm: normalise the embeddings, positions included, before the first layer.
        checkpointing: keep the layers' inputs only and compute each layer again when gradients are needed: less memory,
            a third more time.
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
        norm_first: bool = True,
        window: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        qkv_bias: bool | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float | None = None,
        embedding_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self._build(
            embedding, dim, layers, heads, kv_heads, feedforward, norm, positions, activation, causal, dropout,
            attention_dropout, max_length, norm_first, window, qk_norm, bias, qkv_bias, head_dim, rope_base, norm_eps,
            embedding_norm, checkpointing,
        )  # fmt: skip

    def forward(
        self,
        inputs: Inputs,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """States ``[B, L, dim]``.

        Args:
            inputs: what the embedding takes.
            mask: ``[B, L]``, True at real positions, in any pattern.
            cache: of a causal encoder: the positions read before these. The inputs and the mask are those of the new
                positions alone, and the cache takes them in.
            segments: ``[n]``, lengths of the sequences that are packed in the single row (``nn.packing``).
        Raises:
            ValueError: if learned positions run out, or a cache is given to an encoder that is not causal.
        """
        if cache is not None and not self.causal:
            raise ValueError("cache was given to an encoder that is not causal: what it has read would change")
        return self._run(inputs, mask, cache, segments)


class TransformerDecoder(_Stack, Decoder):
    """A stack of causal Transformer layers, which attend to a memory as well if ``memory_dim`` is given.

    Args: as in ``TransformerEncoder``, and
        memory_dim: size of the memory's states; None for a decoder without memory, such as a language model's.
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
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        max_length: int = 512,
        norm_first: bool = True,
        window: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        qkv_bias: bool | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float | None = None,
        embedding_norm: bool = False,
        checkpointing: bool = False,
        memory_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.memory_dim = memory_dim
        self._build(
            embedding, dim, layers, heads, kv_heads, feedforward, norm, positions, activation, True, dropout,
            attention_dropout, max_length, norm_first, window, qk_norm, bias, qkv_bias, head_dim, rope_base, norm_eps,
            embedding_norm, checkpointing, memory_dim,
        )  # fmt: skip

    @property
    def longest(self) -> int | None:
        return None if self.position_table is None else self.max_length

    def forward(
        self,
        inputs: Inputs,
        memory: Tensor | None = None,
        cache: DecoderCache | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        segments: Tensor | None = None,
        memory_segments: Tensor | None = None,
    ) -> Tensor:
        """States ``[B, L, dim]``.

        Args:
            inputs, memory, cache, mask, memory_mask: as in ``Decoder.forward``; the cache a ``KeyValueCache``.
            segments: ``[n]``, lengths of the sequences that are packed in the single row (``nn.packing``).
            memory_segments: ``[n]``, lengths of the memories packed in the memory's single row, in the same order.
        Raises:
            ValueError: if learned positions run out, or a memory is missing, not expected or of another size.
        """
        if cache is not None and not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache is a {type(cache).__name__}; expected a KeyValueCache")
        self.check_takes_memory(memory, memory_mask, known=cache is not None and bool(cache.memory))
        if memory is not None and self.memory_dim is not None:
            if cache is not None and cache.memory:
                memory = memory_mask = None  # its keys and values are known
            else:
                check_memory(memory, memory_mask, self.memory_dim, memory.shape[0])
        return self._run(inputs, mask, cache, segments, memory, memory_mask, memory_segments)

    def new_cache(
        self,
        batch: int,
        length: int | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        static: bool = False,
    ) -> KeyValueCache:
        """An empty cache: growing, or with ``static`` of shapes that never change, for ``torch.compile``."""
        check_positive(batch=batch)
        if static:
            if length is None:
                raise ValueError("length is None; a static cache is laid out for a number of positions")
            like: Tensor = self.stack[0].attention.project.weight.detach()
            if torch.is_autocast_enabled(like.device.type):
                like = like.to(torch.get_autocast_dtype(like.device.type))
            cache = KeyValueCache.laid_out(batch, length, len(self.layers), self.kv_heads, self.head_dim, like)
        else:
            cache = KeyValueCache(length)
        if memory is not None:
            self.check_takes_memory(memory, memory_mask, known=False)
            assert self.memory_dim is not None
            check_memory(memory, memory_mask, self.memory_dim, batch)
            for layer in self.stack:
                assert layer.memory_attention is not None
                cache.memory.append(layer.memory_attention.keys_and_values(memory))
            cache.memory_mask = memory_mask
        return cache
