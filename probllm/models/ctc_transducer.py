"""A transducer from one sequence to another that is read in step with it: an encoder, and CTC over its positions.

    states = encoder(inputs),   each position makes ``frames`` frames,   target ~ CTCLabels(log_softmax(W states))

The alignment is summed out exactly (Graves et al. 2006). Letters to phonemes are such a pair: the phonemes follow the
letters' order, some letters make none, some two.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from probllm.decoding.ctc import ctc_beam
from probllm.distributions.ctc_labels import CTCLabels
from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model
from probllm.nn.dropout import Dropout
from probllm.nn.encoder import Encoder


class CTCTransducer(Model):
    """A transducer; targets are ``batch["target"]``, ``[B, U]`` long: labels from 1, 0 behind them.

    Args:
        encoder: reads ``batch["inputs"]``.
        num_labels: of the targets, beside the blank 0.
        frames: that each position of the encoder makes; a target longer than all frames has probability 0, as has one
            whose repeated labels leave no frame for a blank between them.
        dropout: before the last layer.
    """

    def __init__(self, encoder: Encoder, num_labels: int, frames: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        for name, size in (("num_labels", num_labels), ("frames", frames)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.encoder, self.num_labels, self.frames = encoder, num_labels, frames
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(encoder.dim, frames * (num_labels + 1))

    def law(self, batch: Batch) -> CTCLabels:
        """The law of the targets given the inputs."""
        mask = batch["mask"]
        scores = self.output(self.dropout(self.encoder(batch["inputs"], mask)))
        scores = scores.unflatten(-1, (self.frames, self.num_labels + 1)).flatten(-3, -2)  # [B, L frames, V]
        return CTCLabels(scores.log_softmax(-1), self.frames * lengths_from_mask(mask))

    def forward(self, batch: Batch) -> Tensor:
        with self.plate(batch):
            target: Tensor = pyro.sample("target", self.law(batch), obs=batch.get("target"))
            return target

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the targets ``[B]``, in nats, over all alignments."""
        return self.law(batch).log_prob(batch["target"])

    def predict(self, batch: Batch, beam: int = 1) -> Tensor:
        """Labels ``[B, frames L]``, 0 behind them: of the best path, or for a wider beam the most probable that a
        prefix beam search finds, which sums the paths of equal labels."""
        with torch.no_grad():
            law = self.law(batch)
            if beam == 1:
                return law.best_path()
            labels = ctc_beam(law.log_probs, law.lengths, beam)[1][0]
            return labels.to(law.log_probs.device)

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, frames L]`` draws of the targets."""
        if batch is None:
            raise ValueError("batch is None: a transducer needs inputs")
        return self.law(batch).sample((n,))
