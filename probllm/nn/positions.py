"""Where a position stands: its number from the mask, and the ways in which a Transformer is told of it.

Rotary positions turn each pair of coordinates of queries and keys by an angle proportional to the position, so that
their product depends on the distance alone (Su et al., 2021). Sinusoids are added to the embeddings (Vaswani et al.,
2017, section 3.5).
"""

import torch
from torch import Tensor


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number of real positions before each one, ``[B, L]``: padding, wherever it stands, takes no number."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def rotate(vectors: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn coordinates ``i`` and ``i + E/2`` of each vector by ``positions · base^(-2i/E)``.

    Args:
        vectors: ``[B, heads, L, E]`` with E even.
        positions: ``[B, L]`` or ``[L]``.
        base: the slowest pair turns once in about ``2π · base`` positions.
    """
    half = vectors.shape[-1] // 2
    # Angles in float32 whatever the states are: in bfloat16 neighbouring positions beyond 256 would coincide.
    exact = torch.promote_types(vectors.dtype, torch.float32)
    frequencies = base ** (-torch.arange(half, device=vectors.device, dtype=exact) / half)
    angles = positions.to(exact).unsqueeze(-1) * frequencies  # [B, L, E/2] or [L, E/2]
    if angles.dim() == 3:
        angles = angles.unsqueeze(1)
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    x, y = vectors[..., :half], vectors[..., half:]
    return torch.cat([x * cos - y * sin, x * sin + y * cos], -1)


def sinusoids(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``sin(p · 10000^(-2i/dim))`` and cos, side by side: ``[..., dim]`` for positions ``[...]``."""
    half = (dim + 1) // 2
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=exact) * 2 / dim)
    angles = positions.to(exact).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :dim].to(dtype)
