"""The bridge between masks and lengths: encoders take masks (True = real), laws take lengths (padding on the right)."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths_from_mask(mask: Tensor) -> Tensor:
    """Number of real positions in each row of a right-padded mask.

    Args:
        mask: ``[..., L]`` bool, True = real.
    Returns:
        ``[...]`` long, each from 1 to L.
    Raises:
        TypeError: if ``mask`` is not bool.
        ValueError: if a row has no real position, or padding before a real position. Not under ``torch.func.vmap`` over
            the mask, which hides its values.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() < 1:
        raise ValueError("mask: expected shape [..., length], got a scalar")
    lengths = mask.sum(-1)
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return lengths
    if not torch.equal(mask, mask_from_lengths(lengths, mask.shape[-1])):
        raise ValueError(
            "mask: expected padding on the right only (laws take lengths); a row has padding before a word"
        )
    if bool((lengths < 1).any()):
        raise ValueError("mask: expected at least one real position in every row; a row has none")
    return lengths


def mask_from_lengths(lengths: Tensor, length: int) -> Tensor:
    """``[..., length]`` bool, True at the first ``lengths`` positions of each row."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)
