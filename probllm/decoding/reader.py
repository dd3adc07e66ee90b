"""What decoding asks of a model: to read a prompt, and then one token after another."""

from __future__ import annotations

from typing import Any, Protocol, Self

from torch import Tensor


class State(Protocol):
    """What a model has read so far, of each row of a batch."""

    def select(self, rows: Tensor) -> Self:
        """The state of these rows ``[N]`` of the batch, in this order and perhaps repeated."""
        ...


class Reader(Protocol):
    """A model that gives the log probabilities of the next token, ``[B, size]`` in nats, from what it has read.

    It may say in ``longest`` of how many tokens a text has at most; without it, or with None, there is no limit.
    """

    size: int

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read prompts ``[B, L]``, L from 0; ``mask`` is False on padding. Returns the log probabilities and a
        ``State``."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one token ``[B]`` more; the state that was given is used up."""
        ...
