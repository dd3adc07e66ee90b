"""One vector a word from the states of its subwords.

A tokeniser cuts words into pieces; ``word_index[s]`` says which word piece s belongs to, −1 for none (special tokens,
padding). A word is its first piece (Devlin et al., 2019, section 5.3) or the mean of its pieces; one without pieces,
such as one that truncation cut off, is 0.
"""

from typing import Literal

import torch
from torch import Tensor

from probllm.nn.encoder import Encoder, Inputs, check_ids, check_mask, check_states, pick, zero_padding

Pooling = Literal["first", "mean"]


class SubwordPooling(Encoder):
    """An encoder of words out of an encoder of subwords.

    The inputs are a dict: ``subwords`` ``[B, S]``, ids for the inner encoder; ``word_index`` ``[B, S]``; and, where
    there are special tokens, ``subword_mask`` ``[B, S]``, True at real subwords (by default those of a word).

    Args:
        encoder: the encoder of the subwords.
        pooling: ``"first"`` or ``"mean"``.
    """

    def __init__(self, encoder: Encoder, pooling: Pooling = "first") -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise TypeError(f"encoder is a {type(encoder).__name__}; expected a probllm.nn.Encoder")
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling is {pooling!r}; expected 'first' or 'mean'")
        self.encoder, self.pooling, self.dim = encoder, pooling, encoder.dim

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, L, dim]`` for the words that ``mask`` ``[B, L]`` counts; without it, as many as there are."""
        if isinstance(inputs, Tensor):
            raise TypeError("inputs is a tensor; expected a dict with the keys 'subwords' and 'word_index'")
        word_index = pick(inputs, "word_index")
        real = inputs.get("subword_mask", word_index >= 0)
        states = self.encoder(pick(inputs, "subwords"), real)
        length = mask.shape[1] if mask is not None else int(word_index.max()) + 1
        pooled = pool_subwords(states, word_index, length, self.pooling)
        check_mask(mask, pooled.shape[:2])
        return zero_padding(pooled, mask)


def pool_subwords(states: Tensor, word_index: Tensor, length: int, pooling: Pooling = "first") -> Tensor:
    """Vectors of words ``[B, length, dim]`` from states of subwords.

    Args:
        states: ``[B, S, dim]``.
        word_index: ``[B, S]`` long: the word, from 0 to ``length - 1``, of each subword; −1 for none.
        length: number of words.
        pooling: ``"first"`` or ``"mean"`` of a word's subwords.
    """
    check_states("states", states, states.shape[-1])
    if word_index.dtype != torch.long:
        raise TypeError(f"word_index has dtype {word_index.dtype}; expected torch.long")
    if word_index.shape != states.shape[:2]:
        raise ValueError(f"word_index has shape {list(word_index.shape)}; expected {list(states.shape[:2])}")
    if pooling not in ("first", "mean"):
        raise ValueError(f"pooling is {pooling!r}; expected 'first' or 'mean'")
    check_ids("word_index", word_index.clamp(min=0), length, rank=2)
    # One slot more, for the subwords that belong to no word.
    slot = word_index.masked_fill(word_index < 0, length)  # [B, S]
    batch, size, dim = states.shape
    if pooling == "first":
        steps = torch.arange(size, device=states.device).expand(batch, size)
        first = steps.new_full((batch, length + 1), size).scatter_reduce(1, slot, steps, "amin")[:, :length]
        missing = first == size
        chosen = states.gather(1, first.masked_fill(missing, 0).unsqueeze(-1).expand(-1, -1, dim))
        return zero_padding(chosen, ~missing)
    sums = states.new_zeros(batch, length + 1, dim).scatter_add(1, slot.unsqueeze(-1).expand_as(states), states)
    counts = states.new_zeros(batch, length + 1).scatter_add(1, slot, torch.ones_like(slot, dtype=states.dtype))
    return (sums / counts.clamp(min=1).unsqueeze(-1))[:, :length]
