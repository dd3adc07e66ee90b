"""Graph-based dependency parsers: one law over whole trees on the biaffine scores of an encoder.

    p(tree | x) = exp(sum over its arcs of arc(x)[head, dependent] + root(x)[its root]) / Z(x)

The projective law sums over trees without crossing arcs (Eisner, 1996), the other one over all trees by a determinant
(Koo et al., 2007; Smith and Smith, 2007; McDonald and Satta, 2007); scores by Dozat and Manning (2017).
"""

from __future__ import annotations

from typing import Literal

from pyro.distributions import TorchDistribution

from probllm.distributions.projective_dependency_tree import ProjectiveDependencyTree
from probllm.distributions.spanning_tree import SpanningTree
from probllm.math.masks import lengths_from_mask
from probllm.models.parser import Parser, Scores
from probllm.nn.encoder import Encoder

LAWS = {"projective": ProjectiveDependencyTree, "spanning": SpanningTree}


class DependencyParser(Parser):
    """A law over trees given the words; the batch, the program and the verbs are those of ``Parser``.

    ``DependencyParser(RecurrentEncoder(...), 37)``. A projective law gives trees with crossing arcs probability 0:
    ``log_prob`` is -inf there and ``loss`` refuses them, so train it on lifted ones
    (``ParsingVocabulary.dataset(..., projective=True)``).

    Args:
        encoder: the network whose states the arcs are scored by.
        num_labels: number of labels R.
        tree: ``"projective"``, trees without crossing arcs, or ``"spanning"``, all trees.
        single_root: whether one word alone depends on the root, as in Universal Dependencies.
        arc_dim, label_dim, dropout: see ``BiaffineArcs``.
    Raises:
        TypeError: if the encoder is no module with ``dim``.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_labels: int,
        tree: Literal["projective", "spanning"] = "projective",
        single_root: bool = True,
        arc_dim: int = 256,
        label_dim: int = 96,
        dropout: float = 0.33,
    ) -> None:
        if tree not in LAWS:
            raise ValueError(f"tree is {tree!r}, expected 'projective' or 'spanning'")
        super().__init__(encoder, num_labels, arc_dim, label_dim, dropout)
        self.tree, self.single_root = tree, single_root

    def law_of(self, scores: Scores) -> TorchDistribution:
        lengths = lengths_from_mask(scores.mask)
        return LAWS[self.tree](scores.arcs, scores.root, self.single_root, lengths)

    def _ruled_out(self) -> str:
        if self.tree == "projective":
            return "their arcs cross, or they are no trees; lift the arcs with probllm.data.projectivise"
        return "they are no trees" + (" with a single root" if self.single_root else "")
