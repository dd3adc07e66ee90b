"""A network that goes on training while it reads: dynamic evaluation (Krause et al. 2018).

Text is read in segments. Each is scored with the weights that those before it left, which then take one step on it,

    w <- w - rate g / (r + mean r) + decay (w_0 - w) r / mean r,

g: the gradient of the segment's mean loss; w_0: the trained weights; r: the root mean square of their gradients on the
training text. What predicts a token depends on the tokens before it alone, so the texts of a length sum to 1. Every
text starts from w_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probllm.models.causal_lm import CausalLM
from probllm.models.language_model import LanguageModel, check_text


class Row(NamedTuple):
    """What was read of one text: the weights now, None at first, the tokens before the segment, and those of it."""

    weights: Tensor | None
    context: Tensor
    segment: Tensor


class DynamicState:
    """What was read of each text."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def select(self, rows: Tensor) -> DynamicState:
        """That of these rows."""
        return DynamicState([self.rows[row] for row in rows.tolist()])


class DynamicLM(LanguageModel):
    """A ``CausalLM`` whose weights follow the text that it reads.

    The weights of the model itself stay as they are. ``estimate`` measures r, which is 1 before.

    Args:
        model: trained.
        segment: tokens between two steps.
        context: tokens before a segment that are read along with it.
        rate: of the steps; 0: the weights stay, and long texts are read in windows.
        decay: how much a step draws back to the trained weights.
    """

    def __init__(
        self, model: CausalLM, segment: int = 64, context: int = 64, rate: float = 2e-4, decay: float = 5e-3
    ) -> None:
        super().__init__()
        for name, number, least in (("segment", segment, 1), ("context", context, 0)):
            if number < least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")
        for name, value in (("rate", rate), ("decay", decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number from 0, below 1, got {value}")
        self.model, self.size = model, model.size
        self.segment, self.context, self.rate, self.decay = segment, context, rate, decay
        self.register_buffer("steepness", torch.ones_like(self._flat()))

    def estimate(self, data: Any, windows: int = 200) -> list[dict[str, float]]:
        """Measure how large the gradients of the trained weights are.

        Args:
            data: examples of the training text, as for ``fit``.
            windows: how many of them are looked at, one by one.
        Returns:
            one dict: the ``loss``, in nats a token.
        Raises:
            ValueError: for no data.
        """
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one text")
        squares, losses = torch.zeros_like(self.steepness), []
        with self._holding(None):
            for batch, _ in zip(data.batches(batch_size=1, shuffle=True), range(windows), strict=False):
                tokens = batch["mask"].sum() if "mask" in batch else batch["text"].numel()
                with torch.enable_grad():
                    loss = self.model.loss(batch) / tokens
                squares += self._gradient(loss) ** 2
                losses.append(float(loss.detach()))
        self.steepness.copy_((squares / len(losses)).sqrt())
        return [{"loss": sum(losses) / len(losses)}]

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, DynamicState]:
        check_text(prompt, mask, self.size, "prompt")
        nothing = prompt[0, :0] if len(prompt) else prompt.new_zeros(0)
        state = DynamicState([Row(None, nothing, nothing)] * len(prompt))
        with self._holding(None), torch.no_grad():
            first = self._laws(nothing, nothing).expand(len(prompt), -1)
        return self._read(prompt, mask, first, state)  # type: ignore[return-value]

    def advance(self, tokens: Tensor, state: DynamicState, mask: Tensor | None = None) -> tuple[Tensor, DynamicState]:  # type: ignore[override]
        check_text(tokens, mask, self.size, "tokens")
        found = torch.zeros(*tokens.shape, self.size, device=tokens.device)
        rows = []
        for b, row in enumerate(state.rows):
            places = torch.arange(tokens.shape[1]) if mask is None else mask[b].nonzero().squeeze(1)
            found[b, places], after = self._read_row(tokens[b, places], row)
            rows.append(after)
        return found, DynamicState(rows)

    def _read_row(self, tokens: Tensor, row: Row) -> tuple[Tensor, Row]:
        """Log probabilities of the next token after each of these ``[L]``, and what was read then."""
        weights, context, segment = row
        found, closed = [self.steepness.new_zeros(0, self.size, dtype=torch.float32)], False
        while len(tokens):
            part, tokens = tokens[: self.segment - len(segment)], tokens[self.segment - len(segment) :]
            known, segment = len(segment), torch.cat([segment, part])
            full = len(segment) == self.segment
            learns = full and self.rate > 0
            with self._holding(weights):
                with torch.set_grad_enabled(learns):
                    laws = self._laws(context, segment)
                    loss = -laws[:-1].gather(1, segment.unsqueeze(1)).mean()
                if learns:
                    gradient = self._gradient(loss)
            if learns:
                weights = self._stepped(weights, gradient)
            # what follows a segment is predicted by the weights that it leaves
            found += [laws[: int(closed)].detach(), laws[known + 1 : len(laws) - full].detach()]
            closed = full
            if full:
                before = torch.cat([context, segment])
                context, segment = before[max(0, len(before) - self.context) :], segment[:0]
        if closed:
            with self._holding(weights), torch.no_grad():
                found.append(self._laws(context, segment))
        return torch.cat(found), Row(weights, context, segment)

    def _laws(self, context: Tensor, segment: Tensor) -> Tensor:
        """Log probabilities of each token of a segment, and of the one after it, ``[L + 1, size]``."""
        text = torch.cat([segment, segment.new_zeros(1)]).unsqueeze(0)
        states = self.model.states({"text": text, "prefix": context.unsqueeze(0)})
        found: Tensor = self.model.logits(states)[0].float().log_softmax(-1)
        return found

    def _stepped(self, weights: Tensor | None, gradient: Tensor) -> Tensor:
        """The weights ``[P]`` after a step."""
        trained, mean = self._flat(), self.steepness.mean()
        weights = trained if weights is None else weights
        drawn = self.decay * (trained - weights) * self.steepness / mean
        after: Tensor = weights - self.rate * gradient / (self.steepness + mean) + drawn
        return after

    def _gradient(self, loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([part.flatten() for part in parts]).to(self.steepness.dtype)

    def _flat(self) -> Tensor:
        """The weights of the model, ``[P]``."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    @contextmanager
    def _holding(self, weights: Tensor | None) -> Iterator[None]:
        """The model with these weights ``[P]`` (None: its own), in evaluation mode."""
        model, own = self.model, [parameter.data for parameter in self.model.parameters()]
        training = model.training
        model.eval()
        try:
            if weights is not None:
                parts = weights.split([x.numel() for x in own])
                for parameter, part in zip(model.parameters(), parts, strict=True):
                    parameter.data = part.view(parameter.shape)
            yield
        finally:
            for parameter, data in zip(model.parameters(), own, strict=True):
                parameter.data = data
            model.train(training)
