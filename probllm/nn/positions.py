"""Where a position stands: its number from the mask, and the ways in which a Transformer is told of it.

Rotary positions turn each pair of coordinates of queries and keys by an angle proportional to the position, so that
their product depends on the distance alone (Su et al., 2021). Sinusoids are added to the embeddings (Vaswani et al.,
2017, section 3.5).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probllm.nn.encoder import in_transform


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number of real positions before each one, ``[B, L]``: padding, wherever it stands, takes no number."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Rotation(NamedTuple):
    """The turns of a call's positions, computed once for all layers; each coordinate with its own factor.

    Coordinates ``i`` and ``i + E/2`` are a pair: ``x cos + swapped(x) sin``, sin negative in the first half.
    """

    cos: Tensor  # [B or none, L, 1, E]
    sin: Tensor


def rotation(positions: Tensor, size: int, dtype: torch.dtype, base: float = 10000.0) -> Rotation:
    """The turns by ``positions · base^(-2i/E)`` for positions ``[B, L]`` or ``[L]`` and vectors of ``size`` E."""
    half = size // 2
    # Angles in float32 whatever the states are: in bfloat16 neighbouring positions beyond 256 would coincide.
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=exact) / half)
    angles = (positions.to(exact).unsqueeze(-1) * frequencies).unsqueeze(-2)  # [..., L, 1, E/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def turn(vectors: Tensor, by: Rotation) -> Tensor:
    """``[B, L, heads, E]`` turned: each vector by its position's angles."""
    return torch.addcmul(vectors * by.cos, vectors.roll(vectors.shape[-1] // 2, -1), by.sin)


def rotate(vectors: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn coordinates ``i`` and ``i + E/2`` of each vector by ``positions · base^(-2i/E)``.

    Args:
        vectors: ``[B, heads, L, E]`` with E even.
        positions: ``[B, L]`` or ``[L]``.
        base: the slowest pair turns once in about ``2π · base`` positions.
    """
    by = rotation(positions, vectors.shape[-1], vectors.dtype, base)
    return turn(vectors.transpose(1, 2), by).transpose(1, 2)


def split_and_turn(heads: Tensor, queries: int, keys: int, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of one projection, the first two turned.

    Args:
        heads: ``[B, L, queries + 2 * keys, E]``.
        queries, keys: numbers of heads.
        by: the turns of the positions.
    Returns:
        ``[B, L, queries, E]``, ``[B, L, keys, E]`` and ``[B, L, keys, E]``.
    """
    if torch.is_grad_enabled() and heads.requires_grad and not (torch.compiler.is_compiling() or in_transform(heads)):
        q, k, v = _SplitAndTurn.apply(heads, queries, keys, *by)  # type: ignore[no-untyped-call]
        return q, k, v
    turned = turn(heads[:, :, : queries + keys], by)
    return turned[:, :, :queries], turned[:, :, queries:], heads[:, :, queries + keys :]


class _SplitAndTurn(torch.autograd.Function):
    """The same in two passes over memory, forward and back: the inverse of a turn is the turn by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, queries: int, keys: int, cos: Tensor, sin: Tensor) -> Any:
        ctx.sizes = (queries, keys)
        ctx.save_for_backward(cos, sin)
        # One factor for every coordinate of every head: the loops then run over whole rows, twice as fast.
        turned = queries + keys
        cos, sin = cos.repeat_interleave(turned, -2), sin.repeat_interleave(turned, -2)
        out = _turn_into(torch.empty_like(heads[:, :, :turned]), heads[:, :, :turned], cos, sin)
        return out[:, :, :queries], out[:, :, queries:], heads[:, :, turned:].clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        queries, keys = ctx.sizes
        if any(slope.requires_grad for slope in slopes):
            back = Rotation(cos, -sin)
            return torch.cat([turn(slopes[0], back), turn(slopes[1], back), slopes[2]], 2), None, None, None, None
        out = slopes[0].new_empty(*slopes[0].shape[:2], queries + 2 * keys, slopes[0].shape[-1])
        sizes = (queries, keys)
        for part, slope, size in zip(out.split([queries, keys, keys], 2), slopes, sizes, strict=False):
            _turn_into(part, slope, cos.repeat_interleave(size, -2), -sin.repeat_interleave(size, -2))
        out[:, :, queries + keys :].copy_(slopes[2])
        return out, None, None, None, None


def _turn_into(out: Tensor, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = vectors.shape[-1] // 2
    torch.mul(vectors, cos, out=out)
    out[..., :half].addcmul_(vectors[..., half:], sin[..., :half])
    out[..., half:].addcmul_(vectors[..., :half], sin[..., half:])
    return out


def sinusoids(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``sin(p · 10000^(-2i/dim))`` and cos, side by side: ``[..., dim]`` for positions ``[...]``."""
    half = (dim + 1) // 2
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=exact) * 2 / dim)
    angles = positions.to(exact).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :dim].to(dtype)
