"""The tagger that structured ones must beat: each word's tag by itself, given all words.

    p(y | x) = prod_t softmax(emissions(x)[t])[y_t]

which is a linear chain without transitions, so that everything a chain offers is there; the verbs take the short way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probllm.models.model import Batch
from probllm.models.tagger import Decoding, Tagger, check_decoding, state_size
from probllm.nn.encoder import Encoder
from probllm.nn.potentials import ChainPotentials


class SoftmaxTagger(Tagger):
    """Independent tags given the words; the batch, the program and the verbs are those of ``Tagger``.

    Args:
        encoder: the network whose states a linear layer scores, or None.
        num_tags: K.
        scores: an encoder of ``dim`` K, whose states are added to the emissions as they are, or None.
    Raises:
        TypeError: if the encoder is no module with ``dim``.
        ValueError: if there is neither an encoder nor scores, or ``scores.dim`` is not ``num_tags``.
    """

    def __init__(self, encoder: Encoder | None, num_tags: int, scores: Encoder | None = None) -> None:
        potentials = ChainPotentials(
            state_size(encoder, num_tags), num_tags, "none", start_end=False, project=encoder is not None
        )
        super().__init__(encoder, num_tags, scores, potentials)

    def log_prob(self, batch: Batch) -> Tensor:
        """As ``Tagger.log_prob``: a sum over the words."""
        emissions = self._scores(batch)[0]
        observed, _ = self._known(batch)
        if observed is None:
            return super().log_prob(batch)
        own = emissions.log_softmax(-1).gather(-1, observed.unsqueeze(-1)).squeeze(-1)
        return torch.where(self._mask(batch, emissions), own, 0.0).sum(-1)

    def predict(self, batch: Batch, decoding: Decoding = "viterbi") -> Tensor:
        """As ``Tagger.predict``; both decodings are the most probable tag of each word."""
        check_decoding(decoding)
        if batch.get("allowed") is not None:
            return super().predict(batch, decoding)
        emissions = self._scores(batch)[0]
        return torch.where(self._mask(batch, emissions), emissions.argmax(-1), 0)

    def marginals(self, batch: Batch) -> Tensor:
        """As ``Tagger.marginals``."""
        if batch.get("allowed") is not None:
            return super().marginals(batch)
        emissions = self._scores(batch)[0]
        return torch.where(self._mask(batch, emissions).unsqueeze(-1), emissions.softmax(-1), 0.0)
