"""The base of all language models: p(text) = prod_t p(t-th token | tokens before it).

A batch is ``{"text": [B, L], "mask": [B, L]}``: tokens from 0 to ``size - 1`` and, on the right, padding. The first
token of a row is predicted from nothing; where texts end, the end is a token of its own, which stands in the text.
Given the lengths in ``mask`` the texts of a length sum to 1; a text that is missing is drawn.

A model tells ``token_log_probs`` of whole texts, and goes through a text step by step: ``start`` reads a prompt and
``step`` one token more, both giving the log probabilities of the next. ``decoding.generate`` asks for nothing else.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from probllm.decoding.reader import State
from probllm.distributions.autoregressive import Autoregressive
from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model


class LanguageModel(Model):
    """A law over texts: subclass it, set ``size``, and write ``token_log_probs``, ``start`` and ``step``."""

    size: int

    # What a subclass gives.

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]``, in nats; 0 on padding."""
        raise NotImplementedError(f"{type(self).__name__} has no token_log_probs")

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read prompts ``[B, L]``, L from 0; ``mask`` is False on padding, which may stand on either side.

        Returns:
            log probabilities of the next token, ``[B, size]``, in nats, and the state to go on from.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read step by step")

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token ``[B]`` more; returns as ``start`` does. The state that was given is used up."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read step by step")

    # The Pyro program and the verbs.

    def law(self, batch: Batch) -> Autoregressive:
        """The law of a batch's texts, given their lengths."""
        text, mask = batch.get("text"), batch.get("mask")
        if mask is None:
            if text is None:
                raise ValueError("batch: expected text or mask, to know the lengths; got neither")
            mask = torch.ones_like(text, dtype=torch.bool)
        lengths = lengths_from_mask(mask)

        def score(value: Tensor, rows: Tensor) -> Tensor:
            return self.token_log_probs({"text": value, "mask": mask[rows]})

        def draw(rows: Tensor) -> Tensor:
            return self._draw(len(rows), mask.shape[1])

        return Autoregressive(score, draw, lengths, mask.shape[1], self.size)

    def forward(self, batch: Batch) -> Tensor:
        law = self.law(batch)
        with self.plate(batch):
            text: Tensor = pyro.sample("text", law, obs=batch.get("text"))
        return text

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of each text, ``[B]``, in nats."""
        return self.token_log_probs(batch).sum(-1)

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``n`` texts of the lengths in a batch, ``[n, B, L]``."""
        if batch is None:
            raise ValueError("batch: expected one with a mask, to know the lengths; got None")
        return self.law({"mask": batch["mask"]} if "mask" in batch else batch).sample((n,))

    def _draw(self, rows: int, steps: int) -> Tensor:
        """Texts ``[rows, steps]``, from nothing."""
        device = next((x.device for x in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        log_probs, state = self.start(torch.zeros(rows, 0, dtype=torch.long, device=device))
        text = torch.zeros(rows, steps, dtype=torch.long, device=device)
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
