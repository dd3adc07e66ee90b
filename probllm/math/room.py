"""Arrays made of memory that earlier calls are done with.

A recursion fills a few MB and drops them at once. The system's allocator gives such memory back to the kernel when the
program's other tensors are large, and has it anew page by page, which can take longer than the recursion. So large
blocks are kept, at most ``MOST`` bytes a thread. A block is free when nothing refers to it but the list here: an array
keeps the block alive that it is a view of, and a tensor its array.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

LEAST, MOST = 1 << 19, 1 << 26
# vectors that begin at a cache line never straddle two
ALIGNMENT = 64


class _Blocks(threading.local):
    """The blocks of one thread and where their first cache line begins, the one used last behind the others."""

    def __init__(self) -> None:
        self.known: list[tuple[np.ndarray, int]] = []

    def take(self, size: int) -> tuple[np.ndarray, int]:
        """A free block of at least ``size`` bytes, and of not much more."""
        known = self.known
        for i in range(len(known) - 1, -1, -1):
            if size <= known[i][0].size <= 2 * size and sys.getrefcount(known[i][0]) == _IDLE:
                known.append(known.pop(i))
                return known[-1]
        block = np.empty(size, np.uint8)
        place = block, -block.ctypes.data % ALIGNMENT
        if size <= MOST:
            total = size + sum(x.size for x, _ in known)
            while total > MOST:
                total -= known.pop(0)[0].size
            known.append(place)
        return place


_blocks = _Blocks()
_blocks.known.append((np.empty(0, np.uint8), 0))
_IDLE = sys.getrefcount(_blocks.known[0][0])
_blocks.known.clear()


def empty(shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """Like ``numpy.empty``."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LEAST:
        return np.empty(shape, dtype)
    block, at = _blocks.take(size + ALIGNMENT)
    return np.ndarray(shape, dtype, block, at)


def zeros(shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """Like ``numpy.zeros``."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


def forget() -> None:
    """Gives back what this thread keeps and nothing refers to."""
    _blocks.known.clear()
