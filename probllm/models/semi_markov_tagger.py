"""Semi-Markov CRF taggers: one law over the ways to cut a sentence into labelled segments, such as entities.

    p(x | words) = exp(start[k_1] + sum_i (segments[t_i, d_i, k_i] + transitions[k_i, k_i+1]) + end[k_m]) / Z

Sarawagi and Cohen (2004); on neural states, Kong, Dyer and Smith (2016), "Segmental recurrent neural networks". See
``probllm.nn.SegmentScores`` for what a segment scores. Segmentations are made of tags by ``segmentation_from_tags``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pyro
import torch
from torch import Tensor

from probllm.distributions import SemiMarkovCRF
from probllm.math.masks import lengths_from_mask
from probllm.models.model import Batch, Model
from probllm.models.tagger import state_size
from probllm.nn.encoder import Encoder, check_mask, in_transform
from probllm.nn.segment_scores import SegmentScores


class SemiMarkovTagger(Model):
    """A semi-Markov CRF given the words.

    A batch is ``{"inputs": ..., "mask": [B, L], "segmentation": [B, L]}``, ``inputs`` as the encoders take them. In a
    segmentation 0 continues a segment and 1 + k starts one labelled k; one that is missing is sampled.

    ``SemiMarkovTagger(RecurrentEncoder(...), 7, 8)``; on indicator features alone
    ``SemiMarkovTagger(None, 7, 8, FeatureEmbedding(2**18, 3 * 7))``.

    Args:
        encoder: the network whose states a linear layer scores, or None.
        num_labels: K, with the label of what is outside.
        max_duration: the most words of a segment; or one number a label, as 1 for what is outside.
        scores: an encoder of ``dim`` 3 K, whose states are added to the scores of the words (K to begin, to be inside
            and to finish a segment), or None.
    Raises:
        TypeError: if the encoder is no module with ``dim``.
        ValueError: if there is neither an encoder nor scores, or ``scores.dim`` is not 3 K.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        num_labels: int,
        max_duration: int | Sequence[int],
        scores: Encoder | None = None,
    ) -> None:
        super().__init__()
        if encoder is None and scores is None:
            raise ValueError("encoder and scores are both None: expected at least one of them")
        if scores is not None and scores.dim != 3 * num_labels:
            raise ValueError(f"scores.dim is {scores.dim}, expected 3 * num_labels = {3 * num_labels}")
        self.num_labels = num_labels
        self.encoder, self.scores = encoder, scores
        dim = state_size(encoder, 3 * num_labels)
        self.potentials = SegmentScores(dim, num_labels, max_duration, project=encoder is not None)
        if "max_duration" in self.config_arguments and not isinstance(max_duration, int):
            self.config_arguments["max_duration"] = list(max_duration)

    # The Pyro program.

    def forward(self, batch: Batch) -> Tensor:
        law = self.law(batch)
        with self.plate(batch):
            found: Tensor = pyro.sample("segmentation", law, obs=self._observed(batch))
            return found

    def law(self, batch: Batch) -> SemiMarkovCRF:
        """The exact law of the segmentation given the words, of batch shape ``[B]``."""
        if "inputs" not in batch:
            raise ValueError(f"batch has no inputs; its keys are {sorted(batch)}")
        inputs, mask = batch["inputs"], batch.get("mask")
        direct = None if self.scores is None else self.scores(inputs, mask)
        if self.encoder is None:
            segments, transitions, start, end = self.potentials(direct)
        else:
            segments, transitions, start, end = self.potentials(self.encoder(inputs, mask), direct)
        check_mask(mask, segments.shape[:2])  # an encoder of the user's own may not have looked
        lengths = None if mask is None else lengths_from_mask(mask)
        return SemiMarkovCRF(segments, transitions, start, end, lengths)

    # The verbs.

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the segmentation given the words, ``[B]``, in nats.

        Raises:
            ValueError: if the batch has no ``segmentation``.
        """
        observed = self._observed(batch)
        if observed is None:
            raise ValueError(f"batch has no segmentation to score; its keys are {sorted(batch)}")
        return self.law(batch).log_prob(observed)

    def loss(self, batch: Batch) -> Tensor:
        """The mean over the batch of ``-log_prob``, a scalar, in nats per sentence.

        Raises:
            ValueError: for a segmentation of probability 0, as one with a segment that is too long; nothing could be
                learnt from it.
        """
        log_prob = self.log_prob(batch)
        if not in_transform(log_prob) and bool((log_prob == -math.inf).any()):
            rows = (log_prob == -math.inf).nonzero().flatten().tolist()
            raise ValueError(
                f"segmentation has probability 0 in the rows {rows}: it must start a segment at the first word, and "
                "have none longer than max_duration (segmentation_from_tags cuts longer ones)"
            )
        return -log_prob.mean()

    def predict(self, batch: Batch, decoding: Literal["mode", "min_risk"] = "mode") -> Tensor:
        """Segmentations ``[B, L]``, 0 at padding; a segmentation in the batch is not looked at.

        Args:
            batch: words.
            decoding: ``"mode"``, the most probable one, or ``"min_risk"``, the one with the most expected right
                segments less wrong ones.
        """
        if decoding not in ("mode", "min_risk"):
            raise ValueError(f"decoding is {decoding!r}, expected 'mode' or 'min_risk'")
        with torch.no_grad():
            law = self.law(batch)
            found: Tensor = law.mode if decoding == "mode" else law.min_risk()
            return found

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each segment, ``[B, L, D, K]``."""
        return self.law(batch).marginals

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, L]`` segmentations drawn given the words."""
        if batch is None:
            raise ValueError("batch is None: a tagger needs words, which it cuts into segments")
        return self.law(batch).sample((n,))

    def _observed(self, batch: Batch) -> Tensor | None:
        found: Tensor | None = batch.get("segmentation")
        if found is not None and found.dtype not in (torch.long, torch.int):
            raise TypeError(f"segmentation has dtype {found.dtype}; expected torch.long")
        return found
