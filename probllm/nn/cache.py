"""Keys and values of the positions already read, so that a causal Transformer reads each new token once.

The cache holds the mask too: a caller gives the mask of the new positions only, and the numbers of positions go on from
the real ones before.
"""

import torch
from torch import Tensor

from probllm.nn.positions import positions_from_mask


class KeyValueCache:
    """Grows by the positions of each call; one cache serves one batch and one encoder.

    >>> cache = KeyValueCache()
    >>> for token in tokens.split(1, dim=1):
    ...     states = encoder(token, cache=cache)
    """

    def __init__(self) -> None:
        self.length = 0
        self.mask: Tensor | None = None  # [B, length]; None while all positions are real
        self.keys: list[Tensor] = []  # a layer: [B, kv_heads, length, E]
        self.values: list[Tensor] = []

    def extend(
        self, mask: Tensor | None, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """Take in the mask ``[B, L]`` of the next positions, before the layers bring their keys.

        Returns:
            The mask of all positions so far ``[B, length]`` (None when all are real), and the numbers of the new
            positions, ``[B, L]`` or ``[L]``.
        """
        if self.keys and self.keys[0].shape[0] != batch:
            raise ValueError(f"inputs has {batch} rows; the cache holds {self.keys[0].shape[0]}")
        past, self.length = self.length, self.length + length
        if mask is None and self.mask is None:
            return None, torch.arange(past, self.length, device=device)
        before = torch.ones(batch, past, dtype=torch.bool, device=device) if self.mask is None else self.mask
        new = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        self.mask = torch.cat([before, new], 1)
        return self.mask, positions_from_mask(self.mask)[:, past:]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values ``[B, kv_heads, L, E]`` of a layer; returns those of all positions so far."""
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys], 2)
            self.values[layer] = torch.cat([self.values[layer], values], 2)
        return self.keys[layer], self.values[layer]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order and perhaps repeated: what a beam search does at each step."""
        self.mask = None if self.mask is None else self.mask[rows]
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
