"""A neural language model: a decoder reads the tokens so far, and its state scores the next one.

    p(x_t | x_1 .. x_{t-1}) = softmax(W h_t)[x_t],        h_t = decoder(begin, x_1 .. x_{t-1})_t

With a Transformer it is GPT (Radford et al. 2019), with an LSTM the model of Mikolov et al. (2010).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.models.language_model import LanguageModel, check_prefix, check_text, last_real
from probllm.models.model import Batch
from probllm.nn.decoder import Decoder
from probllm.nn.embeddings import WordEmbedding
from probllm.nn.linear import linear
from probllm.nn.pretrained import Head, read_gpt2, read_llama, write_gpt2, write_llama
from probllm.nn.pretrained.checkpoint import read_config
from probllm.nn.transformer import TransformerDecoder

_READERS = {"gpt2": read_gpt2} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), read_llama)


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

    @property
    def longest(self) -> int | None:
        return self.decoder.longest

    def logits(self, states: Tensor) -> Tensor:
        """Unnormalised scores ``[..., size]`` of the next token from states ``[..., dim]``."""
        weight = self.decoder.token_weight[: self.size] if self.head is None else self.head.weight
        return linear(states, weight)

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
        last = last_real(states, states[:, 0], mask)
        return self._next(last), CausalState(cache, states[:, 1:])

    def advance(self, tokens: Tensor, state: CausalState, mask: Tensor | None = None) -> tuple[Tensor, CausalState]:  # type: ignore[override]
        check_text(tokens, mask, self.size, "tokens")
        if mask is not None and bool(mask.all()):
            mask = None
        states = self.decoder(tokens if mask is None else tokens.where(mask, 0), cache=state.cache, mask=mask)
        return self._next(states), CausalState(state.cache, states)

    def _next(self, states: Tensor) -> Tensor:
        return self.logits(states).float().log_softmax(-1)

    # Checkpoints of the Hugging Face format.

    @classmethod
    def from_huggingface(cls, folder: str | Path, begin: int | None = None) -> Self:
        """A language model out of a folder with ``config.json`` and safetensors: GPT-2, Llama, Mistral, Qwen 2 or 3.

        Args:
            folder: where they are.
            begin: the token read before a text; None: the ``bos_token_id`` of the config, or its ``eos_token_id``.
        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: for another family, a pickle, a corrupt file, or a config that names neither token.
        """
        config = read_config(folder, list(_READERS))
        decoder, head = _READERS[config["model_type"]](folder)
        if begin is None:
            known = [config.get(name) for name in ("bos_token_id", "eos_token_id")]
            begin = next((token for token in known if isinstance(token, int)), None)
        if begin is None:
            raise ValueError(f"begin is None, and the config of {folder} has neither bos_token_id nor eos_token_id")
        model: Self = cls(decoder, begin, tied=head.weight is None)
        if model.head is not None and head.weight is not None:
            model.head.weight = nn.Parameter(head.weight)
        model.eval()
        return model

    def to_huggingface(self, folder: str | Path) -> None:
        """Write a folder that ``transformers`` reads: GPT-2 or one of Llama's family, as the decoder's options say.

        Where ``begin`` is no token of a text here, it is one in the checkpoint, which has a score for every row of the
        embedding.

        Raises:
            TypeError, ValueError: for a decoder that no family has; the message names the first difference.
        """
        if not isinstance(self.decoder, TransformerDecoder):
            raise TypeError(f"decoder is a {type(self.decoder).__name__}; a checkpoint has a TransformerDecoder")
        if self.head is not None and self.size != len(self.decoder.token_weight):
            raise ValueError(f"the output layer has {self.size} rows; a checkpoint has one for each of the embedding's")
        write = write_llama if self.decoder.positions == "rope" else write_gpt2
        weight = None if self.head is None else self.head.weight.detach()
        write(folder, self.decoder, Head(weight, config={"bos_token_id": self.begin}))
