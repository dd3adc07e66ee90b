"""Which keys each query may look at: padding, the future, a sliding window; computed once a call for all layers.

The fused kernels know one case by themselves, the plain triangle. Everything else is a mask, and none is built where
none is needed: a last query sees all that was read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probllm.nn.positions import positions_from_mask


class Visible(NamedTuple):
    """The keys that queries may look at.

    ``triangle`` is the kernels' own causal case. ``allowed`` is bool ``[B or 1, 1, L or 1, S]``, or the same as scores
    to be added, 0 and −inf. ``idle`` marks queries without any key, who are allowed all of them, finitely, and are
    zeroed at the end: some kernels give NaN. ``recent`` is the number of last keys that count, the others being out of
    the window of the single query.
    """

    triangle: bool = False
    allowed: Tensor | None = None
    idle: Tensor | None = None
    recent: int | None = None

    @property
    def hides(self) -> bool:
        """Whether some keys are hidden from some queries by a mask, of ``allowed`` or ``idle``."""
        return self.allowed is not None or self.idle is not None

    def as_scores(self, dtype: torch.dtype) -> Visible:
        """With ``allowed`` as scores to be added, which the CPU's kernel would otherwise make anew in every layer."""
        if self.allowed is None or self.allowed.dtype != torch.bool:
            return self
        zeros = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
        return self._replace(allowed=zeros.masked_fill(~self.allowed, -torch.inf))


def visible_keys(
    length: int,
    size: int,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
    free_padding: bool = False,
) -> Visible:
    """What queries at the last ``length`` of ``size`` positions may see (or any queries, without ``causal``).

    Args:
        length, size: numbers of queries and of keys; query i stands at position ``size - length + i``.
        mask: ``[B, size]``, True at keys that may be seen.
        causal: see the past and oneself only.
        window: see the nearest ``window`` positions only, oneself counted, on either side unless causal. Distances are
            those between real positions: padding takes no room.
        device: of the states.
        free_padding: let queries at padding look anywhere; right where their result counts for nothing.
    """
    if mask is None:
        if window is not None and window < size:
            if causal and length == 1:
                return Visible(recent=window)
            numbers = torch.arange(size, device=device)
            return Visible(allowed=_near(numbers[size - length :], numbers, causal, window)[None, None])
        if not causal or length == 1:
            return Visible()
        if length == size:
            return Visible(triangle=True)
        triangle = torch.ones(length, size, dtype=torch.bool, device=device).tril(size - length)
        return Visible(allowed=triangle[None, None])
    allowed = mask[:, None, None]  # [B, 1, 1, S]
    if causal and length > 1:
        allowed = allowed & torch.ones(length, size, dtype=torch.bool, device=device).tril(size - length)
    if window is not None:
        numbers = positions_from_mask(mask)
        allowed = allowed & _near(numbers[:, size - length :], numbers, causal, window).unsqueeze(1)
    if free_padding:
        # A real query sees itself at least.
        return Visible(allowed=allowed | ~mask[:, None, size - length :, None])
    idle = ~allowed.any(-1, keepdim=True)
    return Visible(allowed=allowed | idle, idle=idle)


def visible_slots(slots: Tensor, mask: Tensor, window: int | None) -> Visible:
    """The same in a static cache: queries at ``slots`` ``[L]`` among the whole storage ``[B, capacity]``."""
    allowed = mask[:, None, None]
    if slots.shape[0] > 1:
        allowed = allowed & (torch.arange(mask.shape[1], device=mask.device) <= slots.unsqueeze(1))
    if window is not None:
        numbers = positions_from_mask(mask)
        allowed = allowed & _near(numbers[:, slots], numbers, True, window).unsqueeze(1)
    return Visible(allowed=allowed | ~mask[:, None, slots, None])


def visible_memory(mask: Tensor | None) -> Visible:
    """What may be seen of a memory with that mask ``[B, S]``; a row without any gets 0."""
    if mask is None:
        return Visible()
    idle = ~mask.any(1)[:, None, None, None]
    return Visible(allowed=mask[:, None, None] | idle, idle=idle)


def _near(queries: Tensor, keys: Tensor, causal: bool, window: int) -> Tensor:
    """``[..., L, S]``: whether a key at ``keys`` ``[..., S]`` is in the window of a query at ``queries``."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (distance < window) & (distance >= 0) if causal else distance.abs() < window
