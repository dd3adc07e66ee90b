"""A neural language model: a decoder reads the tokens so far, and its state scores the next one.

    p(x_t | x_1 .. x_{t-1}) = softmax(W h_t)[x_t],        h_t = decoder(begin, x_1 .. x_{t-1})_t

With a Transformer it is GPT (Radford et al. 2019), with an LSTM the model of Mikolov et al. (2010).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.models.language_model import LanguageModel, check_prefix, check_text
from probllm.models.model import Batch
from probllm.nn.decoder import Decoder
from probllm.nn.embeddings import WordEmbedding


class CausalState:
    """What the decoder has read, and its states of the tokens read last."""

    def __init__(self, cache: Any, hidden: Tensor) -> None:
        self.cache, self.hidden = cache, hidden  # hidden: [B, L, dim]

    def select(self, rows: Tensor) -> CausalState:
        """That of these rows; this state is used up."""
        self.cache.select(rows)
        return CausalState(self.cache, self.hidden[rows])


class CausalLM(LanguageModel):
    """A language model on a decoder.

    Args:
        decoder: without memory; its embedding holds every token.
        begin: the token read before a text. None: the embedding's last, which is then no token of a text.
        tied: score with the embeddings (Press and Wolf 2017), else with weights of their own.
    """

    def __init__(self, decoder: Decoder, begin: int | None = None, tied: bool = True) -> None:
        super().__init__()
        if decoder.memory_dim is not None:
            raise ValueError("decoder has a memory_dim; expected one without memory, as a text alone is read")
        if not isinstance(decoder.embedding, WordEmbedding):
            raise TypeError(f"decoder embeds with a {type(decoder.embedding).__name__}; expected a WordEmbedding")
        count = decoder.embedding.vocabulary_size
        if begin is not None and not 0 <= begin < count:
            raise ValueError(f"begin: expected a token from 0 to {count - 1}, got {begin}")
        self.decoder = decoder
        self.begin, self.size = (count - 1, count - 1) if begin is None else (begin, count)
        if self.size < 1:
            raise ValueError("decoder: expected an embedding of at least one token and the beginning, got one row")
        if tied:
            decoder.token_weight  # noqa: B018 - raises where they cannot be tied
        self.head = None if tied else nn.Linear(decoder.dim, self.size, bias=False)

    def logits(self, states: Tensor) -> Tensor:
        """Unnormalised scores ``[..., size]`` of the next token from states ``[..., dim]``."""
        weight = self.decoder.token_weight[: self.size] if self.head is None else self.head.weight
        return F.linear(states, weight)

    def states(self, batch: Batch) -> Tensor:
        """The states that each token is predicted from, ``[B, L, dim]``."""
        text, mask, prefix = batch["text"], batch.get("mask"), batch.get("prefix")
        check_text(text, mask, self.size)
        if mask is not None:
            text = text.where(mask, 0)
        parts = [text.new_full((len(text), 1), self.begin), text[:, :-1]]
        if prefix is not None:
            check_prefix(prefix, text, self.size)
            parts.insert(1, prefix)
        # what is read at a position predicts the next one, so padding on the right is never read by what counts
        states: Tensor = self.decoder(torch.cat(parts, 1))
        return states[:, -text.shape[1] :]

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]``, in nats; 0 on padding."""
        text, mask = batch["text"], batch.get("mask")
        logits = self.logits(self.states(batch)).float()
        target = text if mask is None else text.where(mask, 0)
        found = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(text.shape)
        return found if mask is None else found.where(mask, 0.0)

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, CausalState]:
        check_text(prompt, mask, self.size, "prompt")
        cache = self.decoder.new_cache(len(prompt))
        begin = prompt.new_full((len(prompt), 1), self.begin)
        if mask is not None:
            prompt, mask = prompt.where(mask, 0), F.pad(mask, (1, 0), value=True)
            if bool(mask.all()):
                mask = None
        states = self.decoder(torch.cat([begin, prompt], 1), cache=cache, mask=mask)
        last = states[:, -1]
        if mask is not None:  # the last real position of each row
            places = torch.arange(mask.shape[1], device=mask.device).where(mask, -1).amax(-1)
            last = states[torch.arange(len(states), device=states.device), places]
        return self._next(last), CausalState(cache, states[:, 1:])

    def step(self, tokens: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:  # type: ignore[override]
        check_text(tokens[:, None], None, self.size, "tokens")
        states = self.decoder(tokens[:, None], cache=state.cache)
        return self._next(states[:, -1]), CausalState(state.cache, states)

    def _next(self, states: Tensor) -> Tensor:
        return self.logits(states).float().log_softmax(-1)
