"""What the dependency parsers share: a law over the heads of all words, then a label for each arc.

    heads | words ~ law(arcs(words), root(words)),      labels_t | heads, words ~ Categorical(label scores of the arc)

so that log p(heads, labels | words) is a sum of the two. Heads are ``[B, L]``: 0 is the root, words count from 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor

from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model
from probllm.models.tagger import state_size
from probllm.nn.biaffine import BiaffineArcs
from probllm.nn.encoder import Encoder, check_mask, in_transform

Decoding = Literal["mode", "min_risk"]


class Parse(NamedTuple):
    """Trees with labels, ``[B, L]`` each; 0 at padding."""

    heads: Tensor
    labels: Tensor


class Scores(NamedTuple):
    """What an encoder and ``BiaffineArcs`` make of a batch."""

    states: Tensor  # [B, L, dim]
    arcs: Tensor  # [B, L, L], head first
    root: Tensor  # [B, L]
    mask: Tensor  # [B, L]


class Parser(Model):
    """A law over dependency trees given the words; ``DependencyParser`` and ``HeadSelectionParser`` say which.

    A batch is ``{"inputs": ..., "mask": [B, L], "heads": [B, L], "labels": [B, L]}``, ``inputs`` as the encoder takes
    them. Targets that are missing are sampled; without labels the heads are scored alone.

    Args:
        encoder: the network whose states the arcs are scored by.
        num_labels: number of labels R.
        arc_dim, label_dim, dropout: see ``BiaffineArcs``.
    Raises:
        TypeError: if the encoder is no module with ``dim``.
    """

    def __init__(
        self, encoder: Encoder, num_labels: int, arc_dim: int = 256, label_dim: int = 96, dropout: float = 0.33
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}, expected at least 1")
        self.num_labels = num_labels
        self.encoder = encoder
        self.biaffine = BiaffineArcs(state_size(encoder, 0), arc_dim, num_labels, label_dim, dropout)

    # What a parser gives.

    def law_of(self, scores: Scores) -> TorchDistribution:
        """The law of the heads ``[L]`` under these scores, of batch shape ``[B]``; 0 at padding."""
        raise NotImplementedError(f"{type(self).__name__} has no law_of(scores)")

    def decode(self, law: Any, decoding: Decoding) -> Tensor:
        """The best heads ``[B, L]`` under a law."""
        heads: Tensor = law.mode if decoding == "mode" else law.min_risk()
        return heads

    def arc_marginals(self, law: Any) -> Tensor:
        """Probability of each arc under a law, ``[B, L, L]``, the root's on the diagonal."""
        marginals: Tensor = law.marginals
        return marginals

    # The Pyro program.

    def forward(self, batch: Batch) -> Parse:
        scores = self._scores(batch)
        with self.plate(batch):
            heads = pyro.sample("heads", self.law_of(scores), obs=self._target(batch, "heads", scores.mask))
            observed = self._target(batch, "labels", scores.mask)
            return Parse(heads, pyro.sample("labels", self.label_law(scores, heads), obs=observed))

    def law(self, batch: Batch) -> TorchDistribution:
        """The exact law of the heads given the words, of batch shape ``[B]``."""
        return self.law_of(self._scores(batch))

    def label_law(self, scores: Scores, heads: Tensor) -> TorchDistribution:
        """The law of the labels ``[L]`` of the arcs to these heads, of batch shape ``[..., B]``; 0 at padding."""
        logits = self.biaffine.score_labels(scores.states, heads)
        return Categorical(logits=first_where(~scores.mask, logits), validate_args=False).to_event(1)

    # The verbs.

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the heads and labels given the words, ``[B]``, in nats.

        It is -inf for heads that the law rules out, as a projective one does crossing arcs.

        Raises:
            ValueError: if the batch has no ``heads``.
        """
        scores = self._scores(batch)
        heads, labels = (self._target(batch, name, scores.mask) for name in ("heads", "labels"))
        if heads is None:
            raise ValueError(f"batch has no heads to score; its keys are {sorted(batch)}")
        log_prob: Tensor = self.law_of(scores).log_prob(heads)
        return log_prob if labels is None else log_prob + self._label_log_prob(scores, heads, labels)

    def loss(self, batch: Batch) -> Tensor:
        """The mean over the batch of ``-log_prob``, a scalar, in nats per sentence.

        Raises:
            ValueError: if the law rules out the heads of a sentence; nothing could be learnt from it.
        """
        log_prob = self.log_prob(batch)
        if not in_transform(log_prob) and bool((log_prob == -math.inf).any()):
            rows = (log_prob == -math.inf).nonzero().flatten().tolist()
            raise ValueError(f"heads has trees of probability 0 in the rows {rows}: {self._ruled_out()}")
        return -log_prob.mean()

    def predict(self, batch: Batch, decoding: Decoding = "mode") -> Tensor:
        """Heads ``[B, L]``, 0 at padding; see ``parse``."""
        check_decoding(decoding)
        with torch.no_grad():
            return self.decode(self.law(batch), decoding)

    def parse(self, batch: Batch, decoding: Decoding = "mode") -> Parse:
        """Heads and, given them, the most probable labels.

        Args:
            batch: words; targets in it are not looked at.
            decoding: ``"mode"``, the most probable heads, or ``"min_risk"``, those with the most expected right arcs
                (the minimum Bayes risk for attachment).
        """
        check_decoding(decoding)
        with torch.no_grad():
            scores = self._scores(batch)
            heads = self.decode(self.law_of(scores), decoding)
            labels = self.biaffine.score_labels(scores.states, heads).argmax(-1)
            return Parse(heads, torch.where(scores.mask, labels, 0))

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each word as the head (first) of each other, ``[B, L, L]``, the root's on the diagonal."""
        scores = self._scores(batch)
        return torch.where(scores.mask.unsqueeze(1), self.arc_marginals(self.law_of(scores)), 0.0)

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, L]`` heads drawn given the words."""
        if batch is None:
            raise ValueError("batch is None: a parser needs words, whose heads it draws")
        heads: Tensor = self.law(batch).sample((n,))
        return heads

    # Within.

    def _ruled_out(self) -> str:
        """Which heads the law rules out, and what helps."""
        return "a word is its own head, or its head is not in the sentence"

    def _scores(self, batch: Batch) -> Scores:
        if "inputs" not in batch:
            raise ValueError(f"batch has no inputs; its keys are {sorted(batch)}")
        mask: Tensor | None = batch.get("mask")
        states: Tensor = self.encoder(batch["inputs"], mask)
        check_mask(mask, states.shape[:2])
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        lengths_from_mask(mask)  # which raises for a mask that no lengths stand for
        arcs, root = self.biaffine(states)
        return Scores(states, arcs, root, mask)

    def _target(self, batch: Batch, name: str, mask: Tensor) -> Tensor | None:
        target: Tensor | None = batch.get(name)
        if target is None:
            return None
        if target.dtype not in (torch.long, torch.int):
            raise TypeError(f"{name} has dtype {target.dtype}; expected torch.long")
        if target.shape != mask.shape:
            raise ValueError(f"{name} has shape {list(target.shape)}; expected {list(mask.shape)}, that of the words")
        target = torch.where(mask, target, 0)
        greatest = mask.shape[1] if name == "heads" else self.num_labels - 1
        if not in_transform(target) and target.numel():
            low, high = (int(bound) for bound in torch.aminmax(target))
            if low < 0 or high > greatest:
                raise ValueError(f"{name} lie from {low} to {high}; expected 0 to {greatest}")
        return target

    def _label_log_prob(self, scores: Scores, heads: Tensor, labels: Tensor) -> Tensor:
        own = self.biaffine.score_labels(scores.states, heads).log_softmax(-1).gather(-1, labels.unsqueeze(-1))
        return torch.where(scores.mask, own.squeeze(-1), 0.0).sum(-1)


def first_where(which: Tensor, logits: Tensor) -> Tensor:
    """Logits ``[..., K]`` with all mass on the first of K where ``which`` ``[...]`` is True."""
    only = torch.full((logits.shape[-1],), -math.inf, dtype=logits.dtype, device=logits.device)
    only[0] = 0.0
    return torch.where(which.unsqueeze(-1), only, logits)


def check_decoding(decoding: str) -> None:
    """Raise unless ``decoding`` is one that parsers know."""
    if decoding not in ("mode", "min_risk"):
        raise ValueError(f"decoding is {decoding!r}, expected 'mode' or 'min_risk'")
