"""Scores of a dependency tree's arcs and of their labels, from the states of the words.

With h the vector of a word as a head and d that of a word as a dependent, each a layer of its own on the word's state,

    arc(i, j) = h_i U d_j + u h_i            label_r(i, j) = [g_i; 1] W_r [e_j; 1]

where the root is a learned vector among the heads. Dozat and Manning (2017), "Deep biaffine attention for neural
dependency parsing", equations 4 to 9; a score of the dependent alone would be the same for all its heads and is left
out. Usable alone, on any network's states: ``ProjectiveDependencyTree(*biaffine(states), lengths=n)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.encoder import check_dropout, check_positive, check_states


class BiaffineArcs(Configurable, nn.Module):
    """Scores of each word as the head of each other, of each as the root, and of the labels of given arcs.

    Args:
        dim: size of the states.
        arc_dim: size of the vectors that arcs are scored by.
        num_labels: number of labels R; 0: arcs alone.
        label_dim: size of the vectors that labels are scored by.
        dropout: probability of dropping a unit of these vectors, at all words of a sentence at once.
    """

    def __init__(
        self, dim: int, arc_dim: int = 256, num_labels: int = 0, label_dim: int = 96, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(dim=dim, arc_dim=arc_dim, label_dim=label_dim)
        check_dropout("dropout", dropout)
        if not isinstance(num_labels, int) or num_labels < 0:
            raise ValueError(f"num_labels is {num_labels!r}; expected a whole number of at least 0")
        self.dim, self.num_labels, self.dropout = dim, num_labels, dropout
        self.arcs = nn.Linear(dim, 2 * arc_dim)  # heads and dependents side by side
        self.root = nn.Parameter(torch.randn(arc_dim) / arc_dim**0.5)
        self.weight = nn.Parameter(torch.randn(arc_dim, arc_dim) / arc_dim)
        self.bias = nn.Parameter(torch.zeros(arc_dim))
        if num_labels:
            self.labels = nn.Linear(dim, 2 * label_dim)
            self.label_root = nn.Parameter(torch.randn(label_dim) / label_dim**0.5)
            # Those of a label side by side, dependents in the rows.
            self.label_weight = nn.Parameter(torch.zeros(label_dim + 1, num_labels * (label_dim + 1)))
            nn.init.normal_(self.label_weight, std=1 / label_dim)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the states ``[B, T, dim]``.

        Returns:
            arcs ``[B, T, T]``, the score of word i as the head of word j at ``[:, i, j]``, and root ``[B, T]``.
        """
        check_states("states", states, self.dim)
        heads, dependents = self._two(self.arcs, states)
        of_dependents = dependents @ self.weight.T + self.bias  # (U d + u) h
        return heads @ of_dependents.transpose(1, 2), of_dependents @ self.root

    def score_labels(self, states: Tensor, heads: Tensor) -> Tensor:
        """Scores ``[..., B, T, R]`` of each label of the arcs to given heads: those of all arcs would be T times more.

        Args:
            states: ``[B, T, dim]``.
            heads: ``[..., B, T]`` long: 0 is the root, words count from 1.
        Raises:
            ValueError: if there are no labels (``num_labels`` is 0), or the heads have another shape.
        """
        check_states("states", states, self.dim)
        if not self.num_labels:
            raise ValueError("num_labels is 0: there are no labels to score")
        if heads.shape[-2:] != states.shape[:2]:
            raise ValueError(
                f"heads has shape {list(heads.shape)}; expected [..., {', '.join(map(str, states.shape[:2]))}]"
            )
        vectors, dependents = self._two(self.labels, states)
        root = self.label_root.expand(len(states), 1, -1)
        vectors = torch.cat([root, vectors], 1)  # [B, 1 + T, label_dim]
        rows = torch.arange(len(states), device=heads.device).unsqueeze(-1)
        chosen = F.pad(vectors[rows, heads], (0, 1), value=1.0)  # [..., B, T, label_dim + 1]
        products = (F.pad(dependents, (0, 1), value=1.0) @ self.label_weight).unflatten(-1, (self.num_labels, -1))
        scores: Tensor = (products @ chosen.unsqueeze(-1)).squeeze(-1)
        return scores

    def _two(self, layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's vectors of the words as heads and as dependents."""
        vectors: Tensor = F.leaky_relu(layer(states), 0.1)
        if self.training and self.dropout:
            vectors = vectors * F.dropout(vectors.new_ones(len(vectors), 1, vectors.shape[2]), self.dropout)
        first, second = vectors.chunk(2, -1)
        return first, second
