"""Language models mixed exactly, token by token, with weights that go on learning while the text is read.

    p(x_t | before) = prod_m p_m(x_t | before)^w_m / Z(before),       w = w_all + w_token(x_{t-1}) + w_sure(before)

A log-linear mixture: a model that is sure counts for more than in a sum of probabilities, and one that adds nothing to
the others gets weight 0. Z sums over all tokens. The weights have a part for all places, one of the token before and
one of how sure the surest model is. They follow the gradient of log p(x_t) as each token is read (Hinton 1999, products
of experts; Mahoney 2005, mixing in the logistic domain), so that a model that suits this text gains weight within it:
each probability depends on the tokens before it alone, and the texts of a length sum to 1. Weights that stay are the
average of those on the way (Polyak and Juditsky 1992): the last of them suit the end of what was read best. A log p_m
below -100, a forbidden token's among them, counts as -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probllm.math.kernels import log_linear as kernels
from probllm.math.kernels.threads import run_shares
from probllm.models.language_model import LanguageModel, check_text, pieces

# Steps of the weights: rate / sqrt(1 + n / SLOWING) where n tokens have been seen; small where they are to be averaged.
RATE, RATE_OF_AVERAGE, SLOWING = 0.01, 0.001, 100.0


class MixtureState:
    """What each of the models has read, and what the mixture has learned since."""

    def __init__(self, states: list[Any], tensors: list[Tensor], rate: float) -> None:
        # tensors: the token before [B], the models' laws [B, M, size], their mixture [B, size], the weights
        # [B, rows, M], how many tokens each row of weights has seen [B, rows], and where an average is wanted the sum
        # of its weights after each [B, rows, M], else [B, 0, M]
        self.states, self.tensors, self.rate = states, tensors, rate

    def select(self, rows: Tensor) -> MixtureState:
        """That of these rows; this state is used up."""
        states = [state.select(rows) for state in self.states]
        return MixtureState(states, [x[rows.cpu()] for x in self.tensors], self.rate)


class MixtureLM(LanguageModel):
    """A mixture of language models of the same tokens: of counts and networks, fixed or learning as they read.

    ``estimate`` sets the weights; the models stay as they are, and are saved along.

    Args:
        models: what is mixed.
        learns: whether the weights go on learning while a text is read; every text starts from those of ``estimate``.
    Before it is estimated all weights are 1 / M.
    """

    def __init__(self, models: Sequence[LanguageModel], learns: bool = True) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: expected at least one model to mix, got none")
        for i, model in enumerate(models):
            if model.size != models[0].size:
                raise ValueError(f"models[{i}] has {model.size} tokens; expected {models[0].size}, as models[0]")
        self.models, self.size, self.learns = nn.ModuleList(models), models[0].size, learns
        rows = 2 + self.size + kernels.LEVELS
        self.register_buffer("weights", torch.zeros(rows, len(models), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.float64))
        self._forget()

    @property
    def longest(self) -> int | None:
        limits = [model.longest for model in self.models if isinstance(model, LanguageModel)]
        return min((limit for limit in limits if limit is not None), default=None)

    def _forget(self) -> None:
        self.weights.zero_()
        self.weights[0] = 1 / len(self.models)
        self.seen.zero_()

    @torch.no_grad()
    def estimate(self, data: Any, passes: int = 1) -> list[dict[str, float]]:
        """Learn the weights from texts that none of the models was trained on, read one after another.

        Args:
            data: examples with ``text``, and perhaps ``prefix``, which is read but not learned from, as
                ``probllm.data.Dataset`` holds them.
            passes: how often they are read. Weights that do not go on learning are the average over the last pass.
        Returns:
            the ``loss`` of each pass, in nats a token, each token being scored before it is learned from.
        Raises:
            ValueError: for no data, or passes below 1.
        """
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one text")
        if passes < 1:
            raise ValueError(f"passes: expected at least 1, got {passes}")
        self._forget()
        learned = self._learned(1, averaged=not self.learns)  # moved in place, from text to text
        weights, seen, sums = learned
        history, rate = [], RATE if self.learns else RATE_OF_AVERAGE
        for _ in range(passes):
            total, count, before = 0.0, 0, seen.clone()
            sums.zero_()
            for i in range(len(data)):
                example = {key: value.unsqueeze(0) for key, value in data[i].items()}
                check_text(example["text"], None, self.size, "text")
                prefix = example.get("prefix", example["text"][:, :0])
                law, state = self._start(prefix, None, learned, 0.0)
                state.rate = rate
                found = self._scores(example["text"], None, law, state)
                total, count = total - float(found.sum()), count + found.numel()
            history.append({"loss": total / max(1, count)})
        if not self.learns:
            weights = sums / (seen - before).clamp_min(1).unsqueeze(-1)  # a row that nothing was read by is 0
        self.weights.copy_(weights[0])
        self.seen.copy_(seen[0])
        return history

    def _learned(self, batch: int, averaged: bool = False) -> list[Tensor]:
        """The weights, the tokens seen and, if they are to be averaged, room for sums of the weights, for each text."""
        kept = (self.weights, self.seen, torch.zeros_like(self.weights if averaged else self.weights[:0]))
        return [x.cpu().repeat(batch, *[1] * x.dim()) for x in kept]

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, MixtureState]:
        check_text(prompt, mask, self.size, "prompt")
        return self._start(prompt, mask, self._learned(len(prompt)), RATE if self.learns else 0.0)

    def _start(
        self, prompt: Tensor, mask: Tensor | None, learned: list[Tensor], rate: float
    ) -> tuple[Tensor, MixtureState]:
        models: list[Any] = list(self.models)
        read = [model.start(prompt[:, :0]) for model in models]
        laws = torch.stack([law.detach().double().cpu() for law, _ in read], 1).contiguous()
        before, law = torch.full((len(prompt),), self.size), torch.empty(len(prompt), self.size, dtype=torch.float64)
        tensors = [before, laws, law, *learned]
        kernels.begin(*(x.numpy() for x in tensors[:4]))
        state = MixtureState([state for _, state in read], tensors, rate)
        return self._read(prompt, mask, law.to(prompt.device, copy=True), state)  # type: ignore[return-value]

    def advance(self, tokens: Tensor, state: MixtureState, mask: Tensor | None = None) -> tuple[Tensor, MixtureState]:  # type: ignore[override]
        check_text(tokens, mask, self.size, "tokens")
        batch, length = tokens.shape
        models: list[Any] = list(self.models)
        real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu()
        found = torch.empty(batch, length, self.size, dtype=torch.float64)
        states = state.states
        for part in pieces(tokens, len(models) * self.size):
            read = [
                model.advance(tokens[:, part], each, None if mask is None else mask[:, part])
                for model, each in zip(models, states, strict=True)
            ]
            laws = torch.stack([law.detach().double().cpu() for law, _ in read], 2)
            states = [each for _, each in read]
            after = torch.empty(batch, laws.shape[1], self.size, dtype=torch.float64)
            arguments = (
                tokens[:, part].cpu().numpy(), real[:, part].numpy(), laws.numpy(), state.rate, SLOWING,
                *(x.numpy() for x in state.tensors), after.numpy(),
            )  # fmt: skip
            run_shares(kernels.read, arguments, batch, 30.0 * laws.numel())
            found[:, part] = after
        return found.to(tokens.device), MixtureState(states, state.tensors, state.rate)
