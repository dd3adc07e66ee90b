"""The base of all language models: p(text) = prod_t p(t-th token | tokens before it).

A batch is ``{"text": [B, L], "mask": [B, L]}``: tokens from 0 to ``size - 1`` and, on the right, padding. The first
token of a row is predicted from nothing; where texts end, the end is a token of its own, which stands in the text.
Given the lengths in ``mask`` the texts of a length sum to 1; a text that is missing is drawn. Tokens that stand before
the text, and are read but not predicted, may be given as ``prefix`` ``[B, P]``: a prompt, or the end of the window
before.

A model goes through a text piece by piece: ``start`` reads a prompt and ``advance`` some tokens more, giving the log
probabilities of the next; ``decoding.generate`` asks for nothing else. A model that learns while it reads keeps in its
state what it learned from this text, and starts anew with the next.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from probllm.decoding.generate import generate
from probllm.decoding.reader import State
from probllm.distributions.autoregressive import Autoregressive
from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model

PIECE = 256  # tokens that are read at once
ROOM = 1 << 24  # numbers that are held at once, where this takes shorter pieces


class LanguageModel(Model):
    """A law over texts: subclass it, set ``size``, and write ``start`` and ``advance``, and ``token_log_probs`` where
    that is faster."""

    size: int

    @property
    def longest(self) -> int | None:
        """How many tokens a text has at most; None: no limit."""
        return None

    # What a subclass gives.

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read prompts ``[B, L]``, L from 0; ``mask`` is False on padding, which may stand on either side.

        Returns:
            log probabilities of the next token, ``[B, size]``, in nats, and the state to go on from.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read piece by piece")

    def advance(self, tokens: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read ``[B, L]`` tokens more, where ``mask`` is True. The state that was given is used up.

        Returns:
            log probabilities of the next token after each, ``[B, L, size]``, unspecified on padding; and the state.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read piece by piece")

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]``, in nats; 0 on padding."""
        text, mask, prefix = batch["text"], batch.get("mask"), batch.get("prefix")
        check_text(text, mask, self.size)
        if prefix is not None:
            check_prefix(prefix, text, self.size)
        return self._scores(text, mask, *self.start(text[:, :0] if prefix is None else prefix))

    def _scores(self, text: Tensor, mask: Tensor | None, law: Tensor, state: State) -> Tensor:
        """Log probability of each token of a text, from the first one's law ``[B, size]`` and the state there."""
        if mask is not None:
            text = text.where(mask, 0)
        found = [law.new_zeros(len(text), 0)]
        for part in pieces(text, self.size):
            tokens = text[:, part]
            laws, state = self.advance(tokens, state, None if mask is None else mask[:, part])
            before = torch.cat([law.unsqueeze(1), laws[:, :-1]], 1)
            found.append(before.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
            law = laws[:, -1]
        log_probs = torch.cat(found, 1)
        return log_probs if mask is None else log_probs.where(mask, 0.0)

    def _read(self, prompt: Tensor, mask: Tensor | None, law: Tensor, state: State) -> tuple[Tensor, State]:
        """The law of the next token ``[B, size]`` and the state after a prompt, from those before it."""
        for part in pieces(prompt, self.size):
            real = None if mask is None else mask[:, part]
            laws, state = self.advance(prompt[:, part], state, real)
            law = last_real(laws, law, real)
        return law, state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token ``[B]`` more; returns as ``start`` does. The state that was given is used up."""
        log_probs, state = self.advance(tokens[:, None], state)
        return log_probs[:, 0], state

    # The Pyro program and the verbs.

    def law(self, batch: Batch) -> Autoregressive:
        """The law of a batch's texts, given their lengths."""
        text, mask, prefix = batch.get("text"), batch.get("mask"), batch.get("prefix")
        if mask is None:
            if text is None:
                raise ValueError("batch: expected text or mask, to know the lengths; got neither")
            mask = torch.ones_like(text, dtype=torch.bool)
        lengths = lengths_from_mask(mask)

        def score(value: Tensor, rows: Tensor) -> Tensor:
            before = {} if prefix is None else {"prefix": prefix[rows]}
            return self.token_log_probs({"text": value, "mask": mask[rows], **before})

        def draw(rows: Tensor) -> Tensor:
            nothing = torch.zeros(len(rows), 0, dtype=torch.long, device=mask.device)
            return self._draw(nothing if prefix is None else prefix[rows], mask.shape[1])

        known = None if text is None else (text, self.token_log_probs(batch))
        return Autoregressive(score, draw, lengths, mask.shape[1], self.size, known)

    def forward(self, batch: Batch) -> Tensor:
        law = self.law(batch)
        with self.plate(batch):
            text: Tensor = pyro.sample("text", law, obs=batch.get("text"))
        return text

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of each text, ``[B]``, in nats."""
        return self.token_log_probs(batch).sum(-1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """The text that greedy decoding finds, of each row's length, ``[B, L]``; 0 on padding. Of a text in the batch
        only the lengths count."""
        mask = batch["mask"] if "mask" in batch else torch.ones_like(batch["text"], dtype=torch.bool)
        prefix = batch.get("prefix")
        prompt = torch.zeros(len(mask), 0, dtype=torch.long, device=mask.device) if prefix is None else prefix
        found = generate(self, prompt, mask.shape[1]).tokens[:, 0]
        return found.where(mask, 0)

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``n`` texts of the lengths in a batch, ``[n, B, L]``."""
        if batch is None:
            raise ValueError("batch: expected one with a mask, to know the lengths; got None")
        bare = {key: value for key, value in batch.items() if key != "text" or "mask" not in batch}
        return self.law(bare).sample((n,))

    def _draw(self, prefix: Tensor, steps: int) -> Tensor:
        """Texts ``[rows, steps]`` that go on from prefixes ``[rows, P]``."""
        log_probs, state = self.start(prefix)
        text = prefix.new_zeros(len(prefix), steps)
        for t in range(steps):
            text[:, t] = torch.distributions.Categorical(logits=log_probs).sample()
            if t + 1 < steps:
                log_probs, state = self.step(text[:, t], state)
        return text


def check_text(text: Tensor, mask: Tensor | None, size: int, name: str = "text") -> None:
    """Raises for texts that are not long integers ``[B, L]``, or with a real token that is out of range."""
    if text.dim() != 2 or text.dtype != torch.long:
        raise ValueError(f"{name}: expected long tokens of shape [B, L], got {text.dtype} of {list(text.shape)}")
    if mask is not None and mask.shape != text.shape:
        raise ValueError(f"mask: expected shape {list(text.shape)}, as {name}, got {list(mask.shape)}")
    real = text if mask is None else torch.where(mask, text, 0)
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < size:
        raise ValueError(f"{name}: expected tokens from 0 to {size - 1}, got {int(real.min())} to {int(real.max())}")


def check_prefix(prefix: Tensor, text: Tensor, size: int) -> None:
    """Raises for prefixes that are not long tokens ``[B, P]`` in range, for texts ``[B, L]``."""
    check_text(prefix, None, size, "prefix")
    if len(prefix) != len(text):
        raise ValueError(f"prefix: expected {len(text)} rows, as of text, got {len(prefix)}")


def pieces(text: Tensor, numbers: int) -> list[slice]:
    """Where to cut texts ``[B, L]`` that are read with this many numbers held for each token."""
    length = max(1, min(PIECE, ROOM // max(1, len(text) * numbers)))
    return [slice(i, i + length) for i in range(0, text.shape[1], length)]


def last_real(log_probs: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
    """Of log probabilities after each token ``[B, L, size]`` those after the last real one of each row; ``first``
    ``[B, size]`` where there is none."""
    if mask is None:
        return log_probs[:, -1]
    last = torch.arange(mask.shape[1], device=mask.device).where(mask, -1).amax(-1)
    found = log_probs[torch.arange(len(mask), device=mask.device), last]
    return found.where((last >= 0).unsqueeze(1), first)
