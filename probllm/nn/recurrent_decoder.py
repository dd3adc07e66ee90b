"""A recurrent decoder: LSTMs or GRUs from left to right, with attention to a memory.

Luong et al. (2015): the top state h_t asks, ``context = softmax(h_tᵀ W m) m``, ``state = tanh(U [context; h_t])``, for
all positions at once. Bahdanau et al. (2015): the state before asks, ``softmax(vᵀ tanh(W h_{t-1} + V m)) m``, and the
context goes into the first layer with x_t, one position after another. Without a memory the top state is the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.attention import check_memory
from probllm.nn.decoder import Decoder, DecoderCache
from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, in_transform, zero_padding
from probllm.nn.linear import Linear
from probllm.nn.recurrent import recurrence, recurrent_layer
from probllm.nn.visibility import visible_memory

Carried = tuple[Tensor, Tensor]  # hidden state and cell of a layer, [B, hidden] each; a GRU's cell is its hidden state


@dataclass
class RecurrentState:
    """What a recurrent decoder remembers: the layers' last states, and the memory with its keys.

    >>> cache = decoder.new_cache(batch)
    >>> for token in tokens.split(1, dim=1):
    ...     states = decoder(token, cache=cache)
    """

    layers: list[Carried] = field(default_factory=list)
    memory: Tensor | None = None  # [B, S, memory_dim]
    keys: Tensor | None = None  # [B, S, hidden]
    memory_mask: Tensor | None = None
    length: int = 0
    _sources: Tensor | None = None  # the number of the memory that each row looks at

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order and perhaps repeated: what a beam search does at each step."""
        self.layers = [(hidden[rows], cell[rows]) for hidden, cell in self.layers]
        if self.memory is None:
            return
        sources = rows if self._sources is None else self._sources[rows]
        # a beam moves among hypotheses of one memory, which need no copy
        if self._sources is None or not torch.equal(sources, self._sources):
            self.memory = self.memory[rows]
            self.keys = None if self.keys is None else self.keys[rows]
            self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
        self._sources = sources


class RecurrentDecoder(Decoder):
    """A recurrent network from left to right over the embedded positions, which attends to a memory if it has one.

    Args:
        embedding: an encoder of the single positions, or a vocabulary size.
        hidden: units of each layer; ``dim`` is this.
        layers: number of layers.
        cell: ``"lstm"`` or ``"gru"``.
        dropout: probability of dropping a unit, in the input of every layer and in the output, at all positions of a
            row at once (variational dropout: Gal and Ghahramani, 2016).
        memory_dim: size of the memory's states; None for a decoder without memory. The first states are then
            ``tanh(W · mean of the memory)``.
        attention: ``"luong"`` or ``"bahdanau"``.
    """

    def __init__(
        self,
        embedding: Encoder | int,
        hidden: int = 256,
        layers: int = 1,
        cell: Literal["lstm", "gru"] = "lstm",
        dropout: float = 0.0,
        memory_dim: int | None = None,
        attention: Literal["luong", "bahdanau"] = "luong",
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, layers=layers)
        check_dropout("dropout", dropout)
        if cell not in ("lstm", "gru"):
            raise ValueError(f"cell is {cell!r}; expected 'lstm' or 'gru'")
        if attention not in ("luong", "bahdanau"):
            raise ValueError(f"attention is {attention!r}; expected 'luong' or 'bahdanau'")
        self.embedding = as_embedding(embedding, hidden)
        self.dim, self.memory_dim, self.cell, self.dropout = hidden, memory_dim, cell, dropout
        self.attention = attention if memory_dim is not None else None
        first = self.embedding.dim
        if memory_dim is not None:
            check_positive(memory_dim=memory_dim)
            first += memory_dim if attention == "bahdanau" else 0
            self.start = Linear(memory_dim, layers * hidden)
            self.query = Linear(hidden, hidden, bias=False) if attention == "bahdanau" else None
            self.key = Linear(memory_dim, hidden, bias=attention == "bahdanau")
            self.score = nn.Parameter(torch.randn(hidden) / hidden**0.5) if attention == "bahdanau" else None
            self.join = Linear(hidden + memory_dim, hidden)
        self.layers = nn.ModuleList(recurrent_layer(cell, n, hidden) for n in [first] + [hidden] * (layers - 1))

    def forward(
        self,
        inputs: Inputs,
        memory: Tensor | None = None,
        cache: DecoderCache | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """States ``[B, L, dim]``; where ``mask`` is False a position is skipped as if it were not there.

        Args: as in ``Decoder.forward``; the cache a ``RecurrentState``.
        Raises:
            ValueError: if a memory is missing, not expected or of another size, or the cache holds another batch.
        """
        if cache is not None and not isinstance(cache, RecurrentState):
            raise TypeError(f"cache is a {type(cache).__name__}; expected a RecurrentState")
        known = cache is not None and cache.memory is not None
        self.check_takes_memory(memory, memory_mask, known)
        states: Tensor = self.embedding(inputs, mask)
        check_mask(mask, states.shape[:2])
        batch = states.shape[0]
        now = RecurrentState() if cache is None else cache
        if memory is not None and not known:
            self._take_memory(now, memory, memory_mask, batch)
        if not now.layers:
            now.layers = self._first(now, states)
        elif now.layers[0][0].shape[0] != batch:
            raise ValueError(f"inputs has {batch} rows; the cache holds {now.layers[0][0].shape[0]}")
        now.length += states.shape[1]
        if self.attention == "bahdanau":
            states = self._attend_before(states, now, mask)
        else:
            states = self._read(states, now, mask)
            if now.memory is not None:
                states = self._attend_after(states, now)
        if self.training and self.dropout:
            states = _drop_units(states, self.dropout)
        return zero_padding(states, mask)

    def new_cache(
        self,
        batch: int,
        length: int | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> RecurrentState:
        """The state before anything is read; it is of the same size whatever ``length`` will be read."""
        check_positive(batch=batch)
        state = RecurrentState()
        if memory is not None:
            self.check_takes_memory(memory, memory_mask, known=False)
            self._take_memory(state, memory, memory_mask, batch)
        return state

    def _take_memory(self, state: RecurrentState, memory: Tensor, mask: Tensor | None, batch: int) -> None:
        assert self.memory_dim is not None
        check_memory(memory, mask, self.memory_dim, batch)
        state.memory = zero_padding(memory, mask)
        state.memory_mask = mask
        state.keys = self.key(state.memory)

    def _first(self, state: RecurrentState, inputs: Tensor) -> list[Carried]:
        """The layers' states before the first position: 0, or from the mean of the memory."""
        nothing = inputs.new_zeros(inputs.shape[0], self.dim)
        if state.memory is None:
            return [(nothing, nothing)] * len(self.layers)
        mask = state.memory_mask
        size: Tensor | int = state.memory.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
        starts = torch.tanh(self.start(state.memory.sum(1) / size)).chunk(len(self.layers), -1)
        return [(start, start if self.cell == "gru" else nothing) for start in starts]

    def _read(self, states: Tensor, state: RecurrentState, mask: Tensor | None) -> Tensor:
        """Layer after layer, all positions of each at once."""
        for i, layer in enumerate(self.layers):
            if self.training and self.dropout:
                states = _drop_units(states, self.dropout)
            states, state.layers[i] = recurrence(self.cell, layer, states, state.layers[i], mask)
        return states

    def _attend_after(self, states: Tensor, state: RecurrentState) -> Tensor:
        assert state.memory is not None
        assert state.keys is not None
        visible = visible_memory(state.memory_mask)
        if in_transform(states, state.memory):
            weights = (states @ state.keys.transpose(1, 2)).unsqueeze(1)
            if visible.allowed is not None:
                weights = weights.masked_fill(~visible.allowed, -torch.inf)
            context = torch.softmax(weights, -1).squeeze(1) @ state.memory
        else:
            q, k, v = states.unsqueeze(1), state.keys.unsqueeze(1), state.memory.unsqueeze(1)
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.allowed, scale=1.0).squeeze(1)
        # A memory that is all masked is 0 everywhere, and so is its context.
        return torch.tanh(self.join(torch.cat([context, states], -1)))

    def _attend_before(self, inputs: Tensor, state: RecurrentState, mask: Tensor | None) -> Tensor:
        """One position after another, all layers at each."""
        assert state.memory is not None
        assert state.keys is not None
        assert self.score is not None
        assert self.query is not None
        allowed = visible_memory(state.memory_mask).allowed
        allowed = None if allowed is None else allowed[:, 0]  # [B, 1, S]
        # Variational dropout: the same units at all positions.
        kept: list[Tensor | None] = [None] * len(self.layers)
        if self.training and self.dropout:
            sizes = [inputs.shape[2] + state.memory.shape[2]] + [self.dim] * (len(self.layers) - 1)
            ones = [inputs.new_ones(inputs.shape[0], 1, size) for size in sizes]
            kept = [F.dropout(one, self.dropout) for one in ones]
        states = []
        for t in range(inputs.shape[1]):
            asked = torch.tanh(self.query(state.layers[-1][0]).unsqueeze(1) + state.keys)  # [B, S, hidden]
            weights = (asked @ self.score).unsqueeze(1)
            if allowed is not None:
                weights = weights.masked_fill(~allowed, -torch.inf)
            context = torch.softmax(weights, -1) @ state.memory  # [B, 1, memory_dim]
            x = torch.cat([inputs[:, t : t + 1], context], -1)
            now = None if mask is None else mask[:, t : t + 1]
            for i, layer in enumerate(self.layers):
                keep = kept[i]
                x = x if keep is None else x * keep
                x, state.layers[i] = recurrence(self.cell, layer, x, state.layers[i], now)
            states.append(torch.tanh(self.join(torch.cat([context, x], -1))))
        return torch.cat(states, 1)


def _drop_units(states: Tensor, probability: float) -> Tensor:
    return states * F.dropout(states.new_ones(states.shape[0], 1, states.shape[2]), probability)
