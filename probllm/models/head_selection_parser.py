"""The parser that trees must beat: each word's head by itself, given all words.

    p(heads | x) = prod_j softmax_i(arc(i, j))[heads_j]

Zhang, Cheng and Lapata (2017), "Dependency parsing as head selection"; Dozat and Manning (2017) train so too. What it
says need be no tree: cycles and several roots have probability as well.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor

from probllm.models.parser import Decoding, Parser, Scores, first_where


class HeadSelectionParser(Parser):
    """Independent heads given the words; the batch, the program, the arguments and the verbs are those of ``Parser``.

    Both decodings are the most probable head of each word.
    """

    def law_of(self, scores: Scores) -> TorchDistribution:
        return Categorical(logits=head_logits(scores), validate_args=False).to_event(1)

    def decode(self, law: TorchDistribution, decoding: Decoding) -> Tensor:
        heads: Tensor = law.base_dist.logits.argmax(-1)
        return heads

    def arc_marginals(self, law: TorchDistribution) -> Tensor:
        probabilities: Tensor = law.base_dist.probs  # [B, dependent, 1 + head]
        return probabilities[..., 1:].transpose(-1, -2) + torch.diag_embed(probabilities[..., 0])


def head_logits(scores: Scores) -> Tensor:
    """Scores ``[B, L, 1 + L]`` of the root and of each word as the head of each word; -inf for itself and padding."""
    length = scores.mask.shape[1]
    forbidden = torch.eye(length, dtype=torch.bool, device=scores.mask.device) | ~scores.mask.unsqueeze(-2)
    arcs = scores.arcs.transpose(1, 2).masked_fill(forbidden, -math.inf)
    return first_where(~scores.mask, torch.cat([scores.root.unsqueeze(-1), arcs], -1))
