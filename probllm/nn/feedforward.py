"""A feed-forward encoder: each position sees the embeddings in a window around it, through a perceptron.

``h_t = f([x_{t-w}, …, x_t, …, x_{t+w}])`` with zeros outside the sentence and at padding. With ``window=0`` each word
is on its own. Source: Collobert et al. (2011), section 3.3.1.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.dropout import Dropout
from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, zero_padding


class FeedForwardEncoder(Encoder):
    """A perceptron on the concatenated embeddings in a window.

    Args:
        embedding: an encoder of the single positions, or a vocabulary size.
        hidden: units of each layer, the last one included; ``dim`` is this.
        layers: number of layers, each linear, GELU and dropout.
        window: positions seen on either side.
        dropout: probability of dropping a unit of the embeddings or of a layer.
    """

    def __init__(
        self, embedding: Encoder | int, hidden: int = 200, layers: int = 1, window: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, layers=layers)
        check_dropout("dropout", dropout)
        if window < 0:
            raise ValueError(f"window is {window}; expected 0 or more positions on either side")
        self.embedding = as_embedding(embedding, hidden)
        self.dim, self.window = hidden, window
        sizes = [self.embedding.dim * (2 * window + 1)] + [hidden] * layers
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.dropout = Dropout(dropout)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """States ``[B, L, dim]``."""
        states: Tensor = self.dropout(self.embedding(inputs, mask))
        length = states.shape[1]
        check_mask(mask, states.shape[:2])
        if self.window:
            padded = F.pad(states, (0, 0, self.window, self.window))
            states = torch.cat([padded[:, i : i + length] for i in range(2 * self.window + 1)], -1)
        for layer in self.layers:
            states = self.dropout(F.gelu(layer(states)))
        return zero_padding(states, mask)
