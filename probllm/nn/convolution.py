"""A convolutional encoder: residual layers of dilated one-dimensional convolutions, masked at every layer.

``x ← x + dropout(gelu(conv(norm(x))))``. With dilations 1, 2, 4 and width 3 a position sees 7 neighbours on either
side; causal convolutions see only the past. Sources: iterated dilated convolutions, Strubell et al. (2017); causal
ones, van den Oord et al. (2016).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.dropout import Dropout
from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, zero_padding


class ConvolutionEncoder(Encoder):
    """Dilated convolutions with residual connections.

    Args:
        embedding: an encoder of the single positions, or a vocabulary size.
        hidden: channels of every layer; ``dim`` is this.
        width: positions that a filter covers; odd unless causal.
        dilations: one layer for each, with its filter's taps so far apart.
        causal: let a position see itself and the past only.
        dropout: probability of dropping a unit of the embeddings or of a layer.
    """

    def __init__(
        self,
        embedding: Encoder | int,
        hidden: int = 200,
        width: int = 3,
        dilations: Sequence[int] = (1, 2, 4),
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, width=width)
        for dilation in dilations:
            check_positive(dilations=dilation)
        check_dropout("dropout", dropout)
        if width % 2 == 0 and not causal:
            raise ValueError(f"width is {width}; expected an odd number, so that a filter has a middle")
        self.embedding = as_embedding(embedding, hidden)
        self.dim, self.width, self.causal = hidden, width, causal
        self.dilations = tuple(dilations)
        self.project = nn.Linear(self.embedding.dim, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in dilations)
        self.convolutions = nn.ModuleList(nn.Conv1d(hidden, hidden, width, dilation=d) for d in dilations)
        self.dropout = Dropout(dropout)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """States ``[B, L, dim]``."""
        embedded = self.dropout(self.embedding(inputs, mask))
        check_mask(mask, embedded.shape[:2])
        states: Tensor = self.project(embedded)
        for norm, convolution, dilation in zip(self.norms, self.convolutions, self.dilations, strict=True):
            reach = (self.width - 1) * dilation
            sides = (reach, 0) if self.causal else (reach // 2, reach // 2)
            # Zeroed after the norm, whose bias would otherwise make padding differ from the outside of the sentence.
            channels = zero_padding(norm(states), mask).transpose(1, 2)
            states = states + self.dropout(F.gelu(convolution(F.pad(channels, sides)))).transpose(1, 2)
        return zero_padding(states, mask)
