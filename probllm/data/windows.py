"""A long text cut into windows, each with the tokens before it: what a language model is trained and judged on.

A window is ``{"prefix": [P], "text": [L]}``: ``text`` is predicted, ``prefix`` only read. Windows do not overlap in
``text``, so that an epoch predicts each token once; where they begin differs from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor


class Windows:
    """Windows over a text, as data for ``fit``.

    Args:
        text: ``[N]`` tokens.
        length: tokens of a window that are predicted.
        prefix: tokens before them that are read only.
    Raises:
        ValueError: for a text that has not one window, or numbers below 1.
    """

    def __init__(self, text: Tensor, length: int, prefix: int = 1) -> None:
        if text.dim() != 1 or text.dtype != torch.long:
            raise ValueError(f"text: expected long tokens of shape [N], got {text.dtype} of {list(text.shape)}")
        for name, number in (("length", length), ("prefix", prefix)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if len(text) < length + prefix:
            raise ValueError(f"text: expected at least length + prefix = {length + prefix} tokens, got {len(text)}")
        self.text, self.length, self.prefix = text, length, prefix

    def __len__(self) -> int:
        return (len(self.text) - self.prefix) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows, got {index}")
        return {name: x[0] for name, x in self._cut(np.array([self.prefix + index * self.length])).items()}

    def batches(
        self,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ) -> WindowBatches:
        """The batches of one epoch; the order depends on seed and epoch alone. Arguments as of ``Dataset.batches``."""
        size = batch_size if batch_size is not None else 32 if max_tokens is None else len(self)
        if max_tokens is not None:
            size = min(size, max_tokens // self.length)
        if size < 1:
            raise ValueError(f"max_tokens={max_tokens}, but a window alone has {self.length} tokens")
        places = self.prefix + self.length * np.arange(len(self))
        if shuffle:
            random = np.random.default_rng([seed, epoch])
            spare = len(self.text) - self.prefix - self.length * len(self)
            shift = int(random.integers(0, self.length + spare))
            places = places[:-1] + shift if shift > spare else places + shift
            places = random.permutation(places)
        return WindowBatches(self, [places[i : i + size] for i in range(0, len(places), size)])

    def _cut(self, places: np.ndarray) -> dict[str, Tensor]:
        whole = torch.from_numpy(places)[:, None] + torch.arange(-self.prefix, self.length)
        tokens = self.text[whole]
        return {"prefix": tokens[:, : self.prefix], "text": tokens[:, self.prefix :]}


class WindowBatches(Sequence[dict[str, Tensor]]):
    """Batches of windows, cut when asked for; a slice is again WindowBatches."""

    def __init__(self, windows: Windows, places: Sequence[np.ndarray]) -> None:
        self.windows, self.places = windows, list(places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> WindowBatches: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | WindowBatches:
        if isinstance(index, slice):
            return WindowBatches(self.windows, self.places[index])
        return self.windows._cut(self.places[index])
