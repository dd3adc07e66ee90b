"""Keys and values of the positions already read, so that a causal Transformer reads each new token once.

The storage is laid out ahead, ``[B, 2 · kv_heads, capacity, E]`` a layer, and each call writes its positions into it.
The cache holds the mask too: a caller gives the mask of the new positions only, and the numbers of positions go on from
the real ones before. The keys and values of a memory (cross-attention) are computed once, by the first call.

Two ways of holding it: growing (the default: the length is a Python number, attention looks at a view of the filled
part, and the storage doubles when it is full) and static (``static=True``: shapes never change, the position is a
tensor and attention looks at the whole storage under a mask, so that ``torch.compile`` sees one graph).
"""

from __future__ import annotations

import torch
from torch import Tensor

from probllm.nn.encoder import in_transform


class KeyValueCache:
    """Grows by the positions of each call; one cache serves one batch and one encoder or decoder.

    >>> cache = KeyValueCache()
    >>> for token in tokens.split(1, dim=1):
    ...     states = encoder(token, cache=cache)

    Args:
        max_length: positions to lay out ahead; without it the storage grows by doubling. ``decoder.new_cache`` knows
            the sizes and can make a static one.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; expected at least 1")
        self.max_length = max_length
        self.static = False
        self.position: Tensor | None = None  # of a static cache: how many positions were read, a tensor without axes
        self.pairs: list[Tensor] = []  # a layer: [B, 2 * kv_heads, capacity, E], keys before values
        self.filled: list[int] = []  # a layer: positions written
        self.memory: list[tuple[Tensor, Tensor]] = []  # a layer: keys and values of the memory [B, kv_heads, S, E]
        self.memory_mask: Tensor | None = None  # [B, S]
        self._sources: Tensor | None = None  # [B]: the number of the memory that each row looks at, once selected
        self._length = 0
        self._mask: Tensor | None = None  # [B, capacity]; None while all positions are real
        self._counts: Tensor | None = None  # [B]: real positions so far, where there is a mask
        self._slots: Tensor | None = None  # of a static cache: where the call writes, [L]

    @classmethod
    def laid_out(
        cls, batch: int, max_length: int, layers: int, kv_heads: int, size: int, like: Tensor
    ) -> KeyValueCache:
        """A static cache, all of its storage laid out, of the dtype and on the device of ``like``."""
        cache = cls(max_length)
        cache.static = True
        cache.position = torch.zeros((), dtype=torch.long, device=like.device)
        cache.pairs = [like.new_zeros(batch, 2 * kv_heads, max_length, size) for _ in range(layers)]
        cache.filled = [0] * layers
        cache._mask = torch.zeros(batch, max_length, dtype=torch.bool, device=like.device)
        cache._counts = torch.zeros(batch, dtype=torch.long, device=like.device)
        return cache

    @property
    def length(self) -> int:
        """Positions read so far (of a static cache on a GPU, asking waits for it)."""
        return self._length if self.position is None else int(self.position)

    @property
    def mask(self) -> Tensor | None:
        """``[B, length]``, True at real positions; None while all are."""
        return None if self._mask is None else self._mask[:, : self.length]

    @property
    def keys(self) -> list[Tensor]:
        """Of each layer ``[B, kv_heads, length, E]``."""
        return [pairs[:, : pairs.shape[1] // 2, :n] for pairs, n in zip(self.pairs, self._lengths(), strict=True)]

    @property
    def values(self) -> list[Tensor]:
        """Of each layer ``[B, kv_heads, length, E]``."""
        return [pairs[:, pairs.shape[1] // 2 :, :n] for pairs, n in zip(self.pairs, self._lengths(), strict=True)]

    def _lengths(self) -> list[int]:
        return self.filled if self.position is None else [self.length] * len(self.pairs)

    def extend(
        self, mask: Tensor | None, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """Take in the mask ``[B, L]`` of the next positions, before the layers bring their keys.

        Returns:
            The mask of all positions so far ``[B, length]`` (None when all are real; of a static cache of the whole
            storage), and the numbers of the new positions, ``[B, L]`` or ``[L]``.
        Raises:
            ValueError: if the batch is not the cache's, or the positions are more than a given ``max_length``.
        """
        if self.pairs and self.pairs[0].shape[0] != batch:
            raise ValueError(f"inputs has {batch} rows; the cache holds {self.pairs[0].shape[0]}")
        if self.max_length is not None and not torch.compiler.is_compiling() and self._room(device) < length:
            raise ValueError(f"inputs has length {self.length + length}; the cache holds {self.max_length}")
        if self.position is not None:
            return self._extend_static(mask, batch, length, device)
        past, self._length = self._length, self._length + length
        if mask is None and self._mask is None:
            return None, torch.arange(past, self._length, device=device)
        if self._mask is None or self._counts is None:
            self._mask = torch.ones(batch, past, dtype=torch.bool, device=device)
            self._counts = torch.full((batch,), past, device=device)
        new = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        self._mask = torch.cat([self._mask, new], 1)
        numbers = self._number(new)
        return self._mask, numbers

    def _room(self, device: torch.device) -> int:
        # A GPU is not asked: there the write itself asserts that it stays inside.
        assert self.max_length is not None
        if self.position is not None and device.type != "cpu":
            return self.max_length
        return self.max_length - self.length

    def _number(self, new: Tensor) -> Tensor:
        assert self._counts is not None
        numbers = (self._counts.unsqueeze(1) + new.cumsum(1) - 1).clamp(min=0)
        self._counts = self._counts + new.sum(1)
        return numbers

    def _extend_static(
        self, mask: Tensor | None, batch: int, length: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        assert self.position is not None
        assert self._mask is not None
        assert self._counts is not None
        self._slots = self.position + torch.arange(length, device=device)
        new = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        numbers = (self._counts.unsqueeze(1) + new.cumsum(1) - 1).clamp(min=0)
        self._mask.index_copy_(1, self._slots, new)
        self._counts.add_(new.sum(1))
        self.position.add_(length)
        return self._mask, numbers

    @property
    def slots(self) -> Tensor | None:
        """Where a static cache writes the positions of the call that is under way, ``[L]``."""
        return self._slots

    def update(self, layer: int, pairs: Tensor) -> Tensor:
        """Take in the keys and values ``[B, 2 * kv_heads, L, E]`` of a layer; returns those of all positions so far."""
        if self.position is not None:
            assert self._slots is not None
            storage = self.pairs[layer]
            storage.index_copy_(2, self._slots, pairs.to(storage.dtype))
            return storage if storage.dtype == pairs.dtype else storage.to(pairs.dtype)
        start = self.filled[layer] if layer < len(self.filled) else 0
        end = start + pairs.shape[2]
        if in_transform(pairs) or (torch.is_grad_enabled() and pairs.requires_grad):
            # What a gradient may still need is not written over.
            whole = torch.cat([self.pairs[layer][:, :, :start], pairs], 2) if start else pairs
            self._keep(layer, whole, end)
            return whole
        storage = self.pairs[layer] if start else pairs
        if not start or end > storage.shape[2]:
            room = max(end, self.max_length or 0, 2 * start, 16)
            larger = pairs.new_empty(pairs.shape[0], pairs.shape[1], room, pairs.shape[3])
            if start:
                larger[:, :, :start] = storage[:, :, :start]
            storage = larger
        storage[:, :, start:end] = pairs
        self._keep(layer, storage, end)
        return storage[:, :, :end]

    def _keep(self, layer: int, storage: Tensor, filled: int) -> None:
        if layer == len(self.pairs):
            self.pairs.append(storage)
            self.filled.append(filled)
        else:
            self.pairs[layer], self.filled[layer] = storage, filled

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order and perhaps repeated: what a beam search does at each step."""
        if self.static:
            for storage in (*self.pairs, self._mask, self._counts):
                assert storage is not None
                if len(rows) != len(storage):
                    raise ValueError(f"rows has {len(rows)} entries; a static cache keeps its {len(storage)} rows")
                storage.copy_(storage[rows])
        else:
            self._mask = None if self._mask is None else self._mask[rows]
            self._counts = None if self._counts is None else self._counts[rows]
            self.pairs = [pairs[rows] for pairs in self.pairs]
        if not self.memory:
            return
        sources = rows if self._sources is None else self._sources[rows]
        # a beam moves among hypotheses of one memory, which need no copy
        if self._sources is None or not torch.equal(sources, self._sources):
            self.memory = [(keys[rows], values[rows]) for keys, values in self.memory]
            self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
        self._sources = sources
