"""The protocol that every decoder follows: states of a sequence read from left to right, perhaps beside a memory.

``decoder(inputs, memory=None, cache=None, mask=None, memory_mask=None) -> [batch, length, decoder.dim]``. A state
depends on its position and those before, and on the memory, the states of another sequence or picture. Scores of the
next token are ``F.linear(states, decoder.token_weight)`` where the embeddings are tied; the head belongs to the model.
With a cache, which ``decoder.new_cache`` makes, a call reads the new positions alone: reading in pieces is reading at
once.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.embeddings import WordEmbedding
from probllm.nn.encoder import Encoder, Inputs


@runtime_checkable
class DecoderCache(Protocol):
    """What a decoder remembers of the positions read so far."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order and perhaps repeated."""


class Decoder(Configurable, nn.Module):
    """Base class of decoders: a plain module with ``dim``, rebuilt from its config and its weights.

    A subclass sets ``self.dim`` and ``self.embedding``, and defines ``forward`` and ``new_cache``.
    """

    dim: int
    embedding: Encoder
    memory_dim: int | None = None

    def forward(
        self,
        inputs: Inputs,
        memory: Tensor | None = None,
        cache: DecoderCache | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """States ``[B, L, dim]``; 0 where ``mask`` ``[B, L]`` is False.

        Args:
            inputs: what the embedding takes; with a cache, of the new positions alone.
            memory: ``[B, S, memory_dim]``, of a decoder that has one; with a cache, the first call's serves all.
            cache: what ``new_cache`` gave.
            mask: ``[B, L]``, True at real positions.
            memory_mask: ``[B, S]``, True at positions of the memory that may be looked at.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(inputs, memory, cache, mask, memory_mask)"
        )

    def new_cache(
        self,
        batch: int,
        length: int | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> DecoderCache:
        """An empty cache for ``batch`` rows.

        Args:
            batch: number of rows.
            length: positions that will be read at most; None if that is unknown.
            memory, memory_mask: as in ``forward``, which then needs neither.
        """
        raise NotImplementedError(f"{type(self).__name__} must define new_cache(batch, length)")

    @property
    def longest(self) -> int | None:
        """Positions that there are, the one before a text included; None: no limit. So many tokens has the longest text
        that can be written, for nothing follows its last one."""
        return None

    @property
    def token_weight(self) -> nn.Parameter:
        """The token embeddings ``[vocabulary_size, dim]``, which a tied output layer shares.

        Raises:
            TypeError: if the embedding is not one vector a token.
            ValueError: if its size is not that of the states.
        """
        if not isinstance(self.embedding, WordEmbedding):
            raise TypeError(f"embedding is a {type(self.embedding).__name__}; expected a WordEmbedding, to be tied")
        if self.embedding.dim != self.dim:
            raise ValueError(f"embedding has dim {self.embedding.dim}; expected {self.dim}, to be tied to the states")
        return self.embedding.weight

    def check_takes_memory(self, memory: Tensor | None, memory_mask: Tensor | None, known: bool) -> None:
        """Raise unless a memory is given exactly where there is attention to one, or a cache knows it already."""
        if self.memory_dim is None and (memory is not None or memory_mask is not None):
            raise ValueError("memory was given to a decoder that was made without memory_dim")
        if self.memory_dim is not None and memory is None and not known:
            raise ValueError(f"memory is None; expected states [batch, length, {self.memory_dim}] to attend to")
