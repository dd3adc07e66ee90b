"""Scores of labels over spans, for ``probllm.distributions.SpanTree``.

Between words stand fenceposts. The first half of a word's state is read as what is known up to it, the second half as
what is known from it on (a bidirectional LSTM's halves are that), and a span is the difference of its fenceposts:

    r(i, j) = [f_j - f_{i-1} ; b_i - b_{j+1}],    score(i, j, k) = w_k . relu(norm(W r(i, j) + v))

with 0 beyond the sentence (Stern, Andreas and Klein 2017; Kitaev and Klein 2018). W r is made of products with single
fenceposts, so that no span is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.encoder import check_positive, check_states


class SpanScores(Configurable, nn.Module):
    """Scores ``[B, T, T, K]`` of K labels over the spans of states: ``SpanTree(scores(states), lengths)``.

    Args:
        dim: size of the states.
        num_labels: K.
        hidden: size of the layer between.
    """

    def __init__(self, dim: int, num_labels: int, hidden: int = 256) -> None:
        super().__init__()
        check_positive(dim=dim, num_labels=num_labels, hidden=hidden)
        if dim < 2:
            raise ValueError(f"dim is {dim}; expected at least 2, one half for each direction")
        self.dim, self.num_labels = dim, num_labels
        self.project = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.score = nn.Linear(hidden, num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """Scores of the states ``[B, T, dim]``; what stands below the diagonal means nothing.

        At the end of a shorter sentence the padding's states should be 0, as those of the encoders are.
        """
        check_states("states", states, self.dim)
        half = self.dim // 2
        until = states[..., :half] @ self.project.weight[:, :half].T  # [B, T, hidden]
        since = states[..., half:] @ self.project.weight[:, half:].T
        nothing = until.new_zeros(until.shape[0], 1, until.shape[-1])
        begin = since - torch.cat([nothing, until[:, :-1]], 1)
        end = until - torch.cat([since[:, 1:], nothing], 1)
        inner: Tensor = self.norm(begin.unsqueeze(2) + end.unsqueeze(1) + self.project.bias)
        found: Tensor = self.score(torch.relu(inner))
        return found
