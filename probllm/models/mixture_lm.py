"""Language models mixed exactly, token by token, with weights that depend on how much the n-gram model knows.

    p(x_t | before) = sum_m w_m(c_t) p_m(x_t | before),         c_t: the class of the n-gram model's history at t

The weights come from held-out text by EM (Jelinek and Mercer 1980): of each class, drawn towards those of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probllm.models.language_model import LanguageModel
from probllm.models.model import Batch
from probllm.models.ngram_model import NGramModel

PRIOR = 20.0  # tokens' worth of the common weights in each class


class MixtureState:
    """What each of the models has read."""

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def select(self, rows: Tensor) -> MixtureState:
        """That of these rows; this state is used up."""
        return MixtureState([state.select(rows) for state in self.states])


class MixtureLM(LanguageModel):
    """A mixture of an n-gram model and other language models of the same tokens.

    ``estimate`` sets the weights; the models stay as they are, and are saved along.

    Args:
        ngram: whose history says which weights hold.
        others: neural models, or n-gram models of another kind.
    """

    def __init__(self, ngram: NGramModel, others: Sequence[LanguageModel]) -> None:
        super().__init__()
        if not others:
            raise ValueError("others: expected at least one model to mix in, got none")
        for i, model in enumerate(others):
            if model.size != ngram.size:
                raise ValueError(f"others[{i}] has {model.size} tokens; expected {ngram.size}, as the n-gram model")
        self.ngram, self.others, self.size = ngram, nn.ModuleList(others), ngram.size
        count = 1 + len(others)
        self.register_buffer("weights", torch.full((3 * (ngram.order + 1), count), 1 / count, dtype=torch.float64))

    def estimate(self, data: Any, iterations: int = 50, batch_size: int = 64) -> list[dict[str, float]]:
        """Set the weights by EM on texts that none of the models was trained on.

        Args:
            data: examples with ``text``, and perhaps ``prefix``; ``data.batches`` as of ``probllm.data.Dataset``.
        Returns:
            the ``loss`` of each iteration, in nats a token.
        """
        classes, scores = [], []
        with torch.no_grad():
            for batch in data.batches(batch_size=batch_size, shuffle=False):
                of_models, of_tokens = self._scored(batch)
                mask = batch["mask"] if "mask" in batch else torch.ones_like(batch["text"], dtype=torch.bool)
                scores.append(of_models[mask])
                classes.append(of_tokens[mask])
        log_probs, index = torch.cat(scores), torch.cat(classes)
        common = self.weights.new_full((log_probs.shape[1],), 1 / log_probs.shape[1])
        for _ in range(iterations):
            common = (common.log() + log_probs).softmax(-1).mean(0)
        history = []
        self.weights.copy_(common.expand_as(self.weights))
        for _ in range(iterations):
            joint = self.weights[index].log() + log_probs
            history.append({"loss": -float(joint.logsumexp(-1).mean())})
            sums = (PRIOR * common).repeat(len(self.weights), 1).index_add_(0, index, joint.softmax(-1))
            self.weights.copy_(sums / sums.sum(-1, keepdim=True))
        return history

    @torch.no_grad()
    def token_shares(self, data: Any, batch_size: int = 64) -> Tensor:
        """The weight of each model ``[M]``, averaged over the tokens of some texts."""
        found = torch.zeros_like(self.weights[0])
        count = 0
        for batch in data.batches(batch_size=batch_size, shuffle=False):
            weights = self.weights[self.ngram.confidence(self.ngram.histories(batch))]
            weights = weights[batch["mask"]] if "mask" in batch else weights.flatten(0, 1)
            found, count = found + weights.sum(0), count + len(weights)
        return found / count

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]`` in float64, in nats; 0 on padding."""
        log_probs, classes = self._scored(batch)
        found: Tensor = (self.weights[classes].log() + log_probs).logsumexp(-1)
        return found if "mask" not in batch else found.where(batch["mask"], 0.0)

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log probabilities under each model ``[B, L, M]`` in float64, and classes ``[B, L]``."""
        models: list[Any] = [self.ngram, *self.others]
        log_probs = torch.stack([model.token_log_probs(batch).double() for model in models], -1)
        return log_probs, self.ngram.confidence(self.ngram.histories(batch))

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, MixtureState]:
        models: list[Any] = [self.ngram, *self.others]
        return self._mixed([model.start(prompt, mask) for model in models])

    def step(self, tokens: Tensor, state: MixtureState) -> tuple[Tensor, MixtureState]:  # type: ignore[override]
        models: list[Any] = [self.ngram, *self.others]
        return self._mixed([model.step(tokens, each) for model, each in zip(models, state.states, strict=True)])

    def _mixed(self, read: list[tuple[Tensor, Any]]) -> tuple[Tensor, MixtureState]:
        weights = self.weights[self.ngram.confidence(read[0][1].nodes)]
        found = torch.stack([log_probs.double() for log_probs, _ in read], -1) + weights.log().unsqueeze(1)
        return found.logsumexp(-1), MixtureState([state for _, state in read])
