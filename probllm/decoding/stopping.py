"""When a text has ended: at its end token, or once a string or a sequence of tokens stands in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Stop = str | Sequence[int]


class Stopping:
    """Reads the tokens of each row as they are chosen.

    Args:
        rows: how many there are.
        end: the token that ends a text.
        stop: strings or sequences of tokens, of which the first to be complete ends a text.
        decode: makes a string of tokens.
    Raises:
        ValueError: for an empty stop, or strings without ``decode``.
    """

    def __init__(
        self,
        rows: int,
        end: int | None = None,
        stop: Sequence[Stop] = (),
        decode: Callable[[list[int]], str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if isinstance(stop, str):
            raise TypeError(f"stop: expected a sequence of strings, got the string {stop!r}")
        if any(not len(x) for x in stop):
            raise ValueError("stop: expected strings or sequences of tokens that are not empty")
        self.strings = [x for x in stop if isinstance(x, str)]
        self.sequences = [list(x) for x in stop if not isinstance(x, str)]
        if self.strings and decode is None:
            raise ValueError("decode: expected a function that makes a string of tokens, for the stop strings")
        self.end, self.decode = end, decode
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.read_so_far: list[list[int]] = [[] for _ in range(rows)]

    def read(self, tokens: Tensor) -> Tensor:
        """Which rows have ended with these tokens ``[B]``, or before."""
        if self.end is not None:
            self.ended = self.ended | (tokens == self.end)
        if self.strings or self.sequences:
            going = (~self.ended).tolist()
            for row, token in enumerate(tokens.tolist()):
                if going[row]:
                    self.read_so_far[row].append(token)
                    if self._complete(self.read_so_far[row]):
                        self.ended[row] = True
        return self.ended.clone()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order and perhaps repeated."""
        self.ended = self.ended[rows]
        self.read_so_far = [list(self.read_so_far[row]) for row in rows.tolist()]

    def _complete(self, tokens: list[int]) -> bool:
        if any(tokens[-len(x) :] == x for x in self.sequences):
            return True
        if not self.strings or self.decode is None:
            return False
        text = self.decode(tokens)
        return any(x in text for x in self.strings)
