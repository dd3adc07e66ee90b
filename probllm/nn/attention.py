"""Attention: ``softmax(q·kᵀ/√E + mask)·v`` with several heads, over the same sequence or over another.

Groups of heads may share keys and values (grouped-query attention: Ainslie et al., 2023). The fused kernels of
``scaled_dot_product_attention`` serve it; plain products take over when the weights are asked for or a ``torch.func``
transform looks on. A position with nothing to attend to gets 0, never NaN. The CPU's fused kernel has no second
derivative: for ``create_graph=True`` use ``torch.func`` or ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
Sources: Vaswani et al. (2017), section 3.2; normalised queries and keys, Henry et al. (2020); windows, Beltagy et al.
(2020).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.math.kernels.few_rows import attend_from_one
from probllm.math.kernels.threads import run_shares, shares_of
from probllm.nn.cache import KeyValueCache
from probllm.nn.config import Configurable
from probllm.nn.encoder import (
    check_dropout,
    check_mask,
    check_positive,
    check_states,
    in_transform,
    zero_padding,
)
from probllm.nn.linear import Linear, is_plain
from probllm.nn.norms import RMSNorm
from probllm.nn.positions import Rotation, positions_from_mask, rotation, split_and_turn
from probllm.nn.visibility import Visible, visible_keys, visible_memory

if TYPE_CHECKING:
    from probllm.nn.packing import Packing


class Sight(NamedTuple):
    """What all layers of a stack share in one call: what they may see, and where the positions stand."""

    visible: Visible = Visible()
    rotation: Rotation | None = None
    cache: KeyValueCache | None = None
    packing: Packing | None = None
    memory: Tensor | None = None  # [B, S, memory_dim]
    visible_memory: Visible = Visible()
    memory_packing: Packing | None = None


class SelfAttention(Configurable, nn.Module):
    """Attention of a sequence to itself.

    Args:
        dim: size of the states.
        heads: number of heads; ``dim`` is a multiple of it unless ``head_dim`` is given.
        kv_heads: number of heads of keys and values, each serving ``heads / kv_heads`` heads of queries; ``heads`` if
            None.
        causal: let a position attend to itself and the past only.
        rotary: turn queries and keys by their positions (``nn.positions.rotate``).
        dropout: probability of dropping an attention weight.
        bias: whether the projections have biases.
        window: attend to the nearest ``window`` positions only, oneself counted (on either side unless causal).
        qk_norm: normalise each query and key by its root mean square, with a learned scale for each coordinate.
        qkv_bias: whether the projections to queries, keys and values have biases, if otherwise than ``bias``.
        head_dim: size of a head; ``dim / heads`` if None.
        rope_base: the slowest pair of rotary coordinates turns once in about ``2π · rope_base`` positions.
        norm_eps: added to the mean square by ``qk_norm``.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        kv_heads: int | None = None,
        causal: bool = False,
        rotary: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        window: int | None = None,
        qk_norm: bool = False,
        qkv_bias: bool | None = None,
        head_dim: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.causal, self.rotary, self.dropout = dim, causal, rotary, dropout
        self.heads, self.kv_heads, self.head_dim = _head_sizes(dim, heads, kv_heads, head_dim)
        self.window, self.rope_base = window, rope_base
        check_dropout("dropout", dropout)
        if window is not None:
            check_positive(window=window)
        if rotary and self.head_dim % 2:
            raise ValueError(f"dim / heads is {self.head_dim}; expected an even number, for rotary positions")
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.project = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=qkv_bias)
        self.query_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.output = Linear(heads * self.head_dim, dim, bias=bias)

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        return_weights: bool = False,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            states: ``[B, L, dim]``.
            mask: ``[B, L]``, True at positions that may be attended to; with a cache ``[B, S]`` over all positions so
                far, as ``cache.extend`` gives it.
            positions: ``[B, L]`` or ``[L]``, numbers for the rotation; from the mask if None.
            return_weights: return the attention weights as well.
            cache: keys and values of the positions before these, to which these are added.
            layer: the cache's layer that is this module's.
        Returns:
            ``[B, L, dim]``, 0 at padded positions; with ``return_weights`` also the weights ``[B, heads, L, S]``,
            before dropout, of which each row sums to 1, or to 0 where there is nothing to attend to.
        """
        check_states("states", states, self.dim)
        batch, length, _ = states.shape
        if cache is not None and not self.causal:
            raise ValueError("cache was given to an attention that is not causal: what it has read would change")
        past = 0 if cache is None or layer >= len(cache.filled) else cache.filled[layer]
        check_mask(mask, torch.Size([batch, past + length]))
        turns = None
        if self.rotary:
            if positions is None:
                numbers = torch.arange(past + length, device=states.device)
                positions = (numbers if mask is None else positions_from_mask(mask))[..., past:]
            turns = rotation(positions, self.head_dim, states.dtype, self.rope_base)
        visible = visible_keys(length, past + length, mask, self.causal, self.window, states.device)
        q, k, v = self._split(states, turns, cache, layer)
        mixed, weights = mix(q, k, v, visible, self.dropout if self.training else 0.0, return_weights)
        result = zero_padding(self.output(mixed.transpose(1, 2).flatten(2)), None if mask is None else mask[:, past:])
        return result if weights is None else (result, weights)

    def read(self, states: Tensor, sight: Sight, layer: int = 0) -> Tensor:
        """``[B, L, dim]`` within a stack, whose checks and masks are made once; padding may hold anything finite."""
        dropout = self.dropout if self.training else 0.0
        if sight.packing is not None:
            q, k, v = (part.transpose(1, 2) for part in self._split(states, sight.rotation, None, layer))
            mixed = sight.packing.attend(q, k, v, self.causal, self.window, dropout)
            return self.output(mixed.flatten(2))  # type: ignore[no-any-return]
        q, k, v = self._split(states, sight.rotation, sight.cache, layer)
        mixed, _ = mix(q, k, v, sight.visible, dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(
        self, states: Tensor, turns: Rotation | None, cache: KeyValueCache | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, heads, L, E]``, and keys and values ``[B, kv_heads, S, E]``, those of the cache included."""
        batch, length, _ = states.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        heads = self.project(states).view(batch, length, -1, self.head_dim)  # [B, L, heads + 2 kv_heads, E]
        if self.query_norm is not None and self.key_norm is not None:
            q, k, v = heads.split(sizes, 2)
            heads = torch.cat([self.query_norm(q), self.key_norm(k), v], 2)
        if turns is None:
            q, k, v = heads.split(sizes, 2)
        else:
            q, k, v = split_and_turn(heads, self.heads, self.kv_heads, turns)
        if cache is None:
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        pairs = heads[:, :, self.heads :] if turns is None else torch.cat([k, v], 2)
        pairs = cache.update(layer, pairs.transpose(1, 2))
        k, v = pairs.split(self.kv_heads, 1)
        return q.transpose(1, 2), k, v


class CrossAttention(Configurable, nn.Module):
    """Attention of a sequence to another, its memory: a decoder's to the source, a text's to a picture.

    Args:
        dim: size of the states, which make the queries.
        memory_dim: size of the memory's states, which make keys and values; ``dim`` if None.
        heads, kv_heads, dropout, bias, qk_norm, head_dim, norm_eps: as in ``SelfAttention``.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int | None = None,
        heads: int = 4,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        head_dim: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.memory_dim, self.dropout = dim, dim if memory_dim is None else memory_dim, dropout
        self.heads, self.kv_heads, self.head_dim = _head_sizes(dim, heads, kv_heads, head_dim)
        check_positive(memory_dim=self.memory_dim)
        check_dropout("dropout", dropout)
        self.query = Linear(dim, heads * self.head_dim, bias=bias)
        self.project = Linear(self.memory_dim, 2 * self.kv_heads * self.head_dim, bias=bias)
        self.query_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.output = Linear(heads * self.head_dim, dim, bias=bias)

    def forward(
        self,
        states: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            states: ``[B, L, dim]``.
            memory: ``[B, S, memory_dim]``.
            mask: ``[B, L]``, True at real positions of the states.
            memory_mask: ``[B, S]``, True at positions of the memory that may be attended to.
            return_weights: return the attention weights as well.
        Returns:
            ``[B, L, dim]``, 0 at padded positions and where a row's memory is all masked; with ``return_weights`` also
            the weights ``[B, heads, L, S]``.
        """
        check_states("states", states, self.dim)
        check_memory(memory, memory_mask, self.memory_dim, states.shape[0])
        check_mask(mask, states.shape[:2])
        q, (k, v) = self.queries(states), self.keys_and_values(memory)
        visible = visible_memory(memory_mask)
        mixed, weights = mix(q, k, v, visible, self.dropout if self.training else 0.0, return_weights)
        result = zero_padding(self._join(mixed, visible), mask)
        return result if weights is None else (result, weights)

    def read(self, states: Tensor, sight: Sight, layer: int = 0) -> Tensor:
        """``[B, L, dim]`` within a stack; the memory's keys and values are the cache's, if it has them."""
        dropout = self.dropout if self.training else 0.0
        cache, memory = sight.cache, sight.memory
        if cache is not None and layer < len(cache.memory):
            k, v = cache.memory[layer]
        else:
            assert memory is not None
            k, v = self.keys_and_values(memory)
            if cache is not None:
                cache.memory.append((k, v))
        q = self.queries(states)
        if sight.memory_packing is not None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            mixed = sight.memory_packing.attend(q, k, v, False, None, dropout)
            return self.output(mixed.flatten(2))  # type: ignore[no-any-return]
        mixed, _ = mix(q, k, v, sight.visible_memory, dropout)
        return self._join(mixed, sight.visible_memory)

    def queries(self, states: Tensor) -> Tensor:
        """``[B, heads, L, E]`` from states ``[B, L, dim]``."""
        q: Tensor = self.query(states).unflatten(-1, (self.heads, self.head_dim))
        return (q if self.query_norm is None else self.query_norm(q)).transpose(1, 2)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Each ``[B, kv_heads, S, E]`` from a memory ``[B, S, memory_dim]``."""
        k, v = self.project(memory).unflatten(-1, (2 * self.kv_heads, self.head_dim)).chunk(2, 2)
        return (k if self.key_norm is None else self.key_norm(k)).transpose(1, 2), v.transpose(1, 2)

    def _join(self, mixed: Tensor, visible: Visible) -> Tensor:
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result if visible.idle is None else result.masked_fill(visible.idle.squeeze(1), 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    return_weights: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q·kᵀ/√E)·v`` for each head.

    Args:
        q: ``[B, heads, L, E]``.
        k, v: ``[B, kv_heads, S, E]``; query head h takes the keys of head ``h // (heads / kv_heads)``.
        mask: ``[B, S]``, True at keys that may be attended to.
        causal: query i sees the keys up to ``S - L + i``.
        dropout: probability of dropping a weight.
        return_weights: also give the weights, before dropout.
        window: query i sees the keys nearer than ``window`` to ``S - L + i``; distances count the keys that the mask
            leaves.
    Returns:
        ``[B, heads, L, E]`` and the weights ``[B, heads, L, S]`` or None. A query without keys gets 0 in both.
    """
    visible = visible_keys(q.shape[2], k.shape[2], mask, causal, window, q.device)
    return mix(q, k, v, visible, dropout, return_weights)


def mix(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float = 0.0, return_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``attend`` over what is ``visible``."""
    if visible.recent is not None and not return_weights:
        k, v = k[:, :, -visible.recent :], v[:, :, -visible.recent :]
    allowed, grouped = visible.allowed, q.shape[1] != k.shape[1]
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if q.shape[2] == 1 and not (traced or return_weights or dropout or visible.hides) and is_plain(q, k, v):
        return one_query(q, k, v), None
    weights = None
    if not return_weights and not in_transform(q, k, v):
        dtype = q.dtype
        # the CPU's kernel has no gradient worth its time in bfloat16: 25 times that in float32, measured
        low = dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
        wide = low and q.device.type == "cpu" and torch.is_grad_enabled()
        if wide:
            q, k, v = q.float(), k.float(), v.float()
        if allowed is not None and allowed.dtype not in (torch.bool, q.dtype):
            allowed = allowed.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False) if wide else nullcontext():
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=visible.triangle, enable_gqa=grouped
            )
        if wide:
            mixed = mixed.to(dtype)
    else:
        if grouped:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if visible.triangle:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        elif visible.recent is not None:
            size = k.shape[2]
            allowed = torch.arange(size, device=q.device) >= size - visible.recent
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        weights = torch.softmax(scores, -1)
        if visible.idle is not None:
            weights = weights.masked_fill(visible.idle, 0.0)
        mixed = F.dropout(weights, dropout) @ v
    if visible.idle is not None:
        mixed = mixed.masked_fill(visible.idle, 0.0)
    return mixed, weights if return_weights else None


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query a row ``[B, heads, 1, E]`` to all keys, as fast as these can be read from memory."""
    (rows, heads, _, size), many = q.shape, k.shape[2]
    found = torch.empty(rows, heads, 1, size)
    strides = np.array([k.stride()[:3], v.stride()[:3], (k.shape[1], 0, 0)])
    work = rows * heads * many * size
    shares = shares_of(rows * heads, 0.2 * work)
    room = np.empty((shares, many), np.float32)
    flat = [x.as_strided((x.untyped_storage().nbytes() // 4 - x.storage_offset(),), (1,)).numpy() for x in (k, v)]
    arguments = (
        q.reshape(rows, heads, size).contiguous().numpy(),
        *flat,
        strides,
        room,
        found.numpy().reshape(rows, heads, size),
    )
    run_shares(attend_from_one, arguments, rows * heads, 0.2 * work)
    return found


def check_memory(memory: Tensor, mask: Tensor | None, dim: int, batch: int) -> None:
    """Raise unless ``memory`` is ``[batch, S, dim]`` and ``mask`` None or bool ``[batch, S]``."""
    check_states("memory", memory, dim)
    if memory.shape[0] != batch:
        raise ValueError(f"memory has {memory.shape[0]} rows; expected {batch}, as many as states")
    check_mask(mask, memory.shape[:2], "memory_mask")


def _head_sizes(dim: int, heads: int, kv_heads: int | None, head_dim: int | None) -> tuple[int, int, int]:
    kv_heads = heads if kv_heads is None else kv_heads
    check_positive(dim=dim, heads=heads, kv_heads=kv_heads)
    if head_dim is not None:
        check_positive(head_dim=head_dim)
    elif dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of dim, {dim}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads is {kv_heads}; expected a divisor of heads, {heads}")
    return heads, kv_heads, dim // heads if head_dim is None else head_dim
