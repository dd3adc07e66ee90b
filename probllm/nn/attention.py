"""Attention: ``softmax(q·kᵀ/√E + mask)·v`` with several heads, over the same sequence or over another.

Groups of heads may share keys and values (grouped-query attention: Ainslie et al., 2023). The fused kernels of
``scaled_dot_product_attention`` serve it; plain products take over when the weights are asked for or a ``torch.func``
transform looks on. A position with nothing to attend to gets 0, never NaN. The CPU's fused kernel has no second
derivative: for ``create_graph=True`` use ``torch.func`` or ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
Source: Vaswani et al. (2017), section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from probllm.nn.positions import positions_from_mask, rotate


class SelfAttention(Configurable, nn.Module):
    """Attention of a sequence to itself.

    Args:
        dim: size of the states.
        heads: number of heads; ``dim`` is a multiple of it.
        kv_heads: number of heads of keys and values, each serving ``heads / kv_heads`` heads of queries; ``heads`` if
            None.
        causal: let a position attend to itself and the past only.
        rotary: turn queries and keys by their positions (``nn.positions.rotate``).
        dropout: probability of dropping an attention weight.
        bias: whether the projections have biases.
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
    ) -> None:
        super().__init__()
        self.dim, self.causal, self.rotary, self.dropout = dim, causal, rotary, dropout
        self.heads, self.kv_heads, self.head_dim = _head_sizes(dim, heads, kv_heads)
        check_dropout("dropout", dropout)
        if rotary and self.head_dim % 2:
            raise ValueError(f"dim / heads is {self.head_dim}; expected an even number, for rotary positions")
        self.project = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)

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
        past = 0 if cache is None or layer >= len(cache.keys) else cache.keys[layer].shape[2]
        check_mask(mask, torch.Size([batch, past + length]))
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        heads = self.project(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, L, E]
        q, k, v = heads.split(sizes, 1)
        if self.rotary:
            if positions is None:
                numbers = torch.arange(past + length, device=states.device)
                positions = (numbers if mask is None else positions_from_mask(mask))[..., past:]
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(q, k, v, mask, self.causal, dropout, return_weights)
        result = zero_padding(self.output(mixed.transpose(1, 2).flatten(2)), None if mask is None else mask[:, past:])
        return result if weights is None else (result, weights)


class CrossAttention(Configurable, nn.Module):
    """Attention of a sequence to another, its memory: a decoder's to the source, a text's to a picture.

    Args:
        dim: size of the states, which make the queries.
        memory_dim: size of the memory's states, which make keys and values; ``dim`` if None.
        heads, kv_heads, dropout, bias: as in ``SelfAttention``.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int | None = None,
        heads: int = 4,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.memory_dim, self.dropout = dim, memory_dim or dim, dropout
        self.heads, self.kv_heads, self.head_dim = _head_sizes(dim, heads, kv_heads)
        check_positive(memory_dim=self.memory_dim)
        check_dropout("dropout", dropout)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.project = nn.Linear(self.memory_dim, 2 * self.kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)

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
        check_states("memory", memory, self.memory_dim)
        if memory.shape[0] != states.shape[0]:
            raise ValueError(f"memory has {memory.shape[0]} rows; expected {states.shape[0]}, as many as states")
        check_mask(mask, states.shape[:2])
        check_mask(memory_mask, memory.shape[:2], "memory_mask")
        q = self.query(states).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        pairs = self.project(memory).unflatten(-1, (2 * self.kv_heads, self.head_dim)).transpose(1, 2)
        k, v = pairs.chunk(2, 1)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(q, k, v, memory_mask, False, dropout, return_weights)
        result = zero_padding(self.output(mixed.transpose(1, 2).flatten(2)), mask)
        if memory_mask is not None:
            result = zero_padding(result, memory_mask.any(1, keepdim=True))
        return result if weights is None else (result, weights)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q·kᵀ/√E)·v`` for each head.

    Args:
        q: ``[B, heads, L, E]``.
        k, v: ``[B, kv_heads, S, E]``; query head h takes the keys of head ``h // (heads / kv_heads)``.
        mask: ``[B, S]``, True at keys that may be attended to.
        causal: query i sees the keys up to ``S - L + i``.
        dropout: probability of dropping a weight.
        return_weights: also give the weights, before dropout.
    Returns:
        ``[B, heads, L, E]`` and the weights ``[B, heads, L, S]`` or None. A query without keys gets 0 in both.
    """
    length, size = q.shape[2], k.shape[2]
    fused = not return_weights and not in_transform(q, k, v)
    # One query at the end sees every key; a square with no padding is the kernels' own causal case.
    causal = causal and length > 1
    if fused and (mask is None and (not causal or length == size)):
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return mixed, None
    allowed = None if mask is None else mask[:, None, None]  # [B, 1, 1, S]
    if causal:
        triangle = torch.ones(length, size, dtype=torch.bool, device=q.device).tril(size - length)
        allowed = triangle if allowed is None else allowed & triangle
    idle = None
    if mask is not None and allowed is not None:
        # A query without keys looks at all of them instead, finitely, and is zeroed at the end: some kernels give NaN.
        idle = ~allowed.any(-1, keepdim=True)
        allowed = allowed | idle
    weights = None
    if fused:
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = torch.softmax(scores if allowed is None else scores.masked_fill(~allowed, -torch.inf), -1)
        if idle is not None:
            weights = weights.masked_fill(idle, 0.0)
        mixed = F.dropout(weights, dropout) @ v
    if idle is not None:
        mixed = mixed.masked_fill(idle, 0.0)
    return mixed, weights if return_weights else None


def _head_sizes(dim: int, heads: int, kv_heads: int | None) -> tuple[int, int, int]:
    kv_heads = heads if kv_heads is None else kv_heads
    check_positive(dim=dim, heads=heads, kv_heads=kv_heads)
    if dim % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of dim, {dim}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads is {kv_heads}; expected a divisor of heads, {heads}")
    return heads, kv_heads, dim // heads
