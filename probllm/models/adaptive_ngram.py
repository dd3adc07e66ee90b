"""An n-gram model that goes on counting while it reads.

    p(x_t | x_1 .. x_{t-1}) = interpolated modified Kneser-Ney of the counts of the training text and of x_1 .. x_{t-1},

with the discounts of the training text: ``math.adaptive_ngrams``. What was read is as good as what was trained on, so
that names, phrases and style of a text are learned on the way. Exact: each probability depends on the tokens before it
alone, so the texts of a length sum to 1. Every text starts from the trained counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math.adaptive_ngrams import CountTree, Reader, count_tree
from probllm.math.masks import lengths_from_mask
from probllm.models.language_model import LanguageModel, check_prefix, check_text
from probllm.models.model import Batch

_ARRAYS = ("tree_children", "tree_tokens", "tree_counts", "tree_stats", "tree_discounts")


class AdaptiveState:
    """What was read of each text."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers

    def select(self, rows: Tensor) -> AdaptiveState:
        """That of these rows; this state is used up."""
        taken: set[int] = set()
        readers = []
        for row in rows.tolist():
            readers.append(self.readers[row].copy() if row in taken else self.readers[row])
            taken.add(row)
        return AdaptiveState(readers)


class AdaptiveNGram(LanguageModel):
    """A Kneser-Ney model of texts whose counts are raised with every token read.

    Before anything is read it is ``NGramModel(size, order)`` of the same data.

    Args:
        size: tokens go from 0 to ``size - 1``; the end of a text, and words that are not known, are among them.
        order: n.
        cache: keep the discounts of the training text, but count each text from nothing. Alone it predicts badly;
            beside others in a ``MixtureLM`` it says what this text is like.
        nodes, inner: how many n-grams there is room for, and how many of them below the order; estimating sets both.
    Before it is estimated it has read nothing.
    """

    def __init__(
        self, size: int, order: int = 8, cache: bool = False, nodes: int | None = None, inner: int | None = None
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size, self.order, self.cache = size, order, cache
        self._hold(count_tree([[]], size, order))  # checks the order
        if nodes is not None and inner is not None:  # saved arrays will be read into these
            for name, length in zip(_ARRAYS, (nodes + 1, nodes, nodes, inner, order), strict=True):
                own = getattr(self, name)
                self.register_buffer(name, own.new_zeros(length, *own.shape[1:]))

    @property
    def tree(self) -> CountTree:
        """The trained counts, as arrays."""
        return CountTree(self.size, self.order, *(getattr(self, name).cpu().numpy() for name in _ARRAYS))

    def _hold(self, tree: CountTree) -> None:
        for name, array in zip(_ARRAYS, (*tree.arrays(), tree.discounts), strict=True):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))
        self.config_arguments.update(nodes=len(tree.tokens), inner=len(tree.stats))

    def estimate(self, data: Any) -> list[dict[str, float]]:
        """Count the n-grams of the ``text`` of each example, whatever was there before.

        Returns:
            nothing to follow: an empty list.
        Raises:
            ValueError: for no data, or tokens out of range.
        """
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one text")
        texts = [np.asarray(data[i]["text"], dtype=np.int64) for i in range(len(data))]
        tree = count_tree(texts, self.size, self.order)
        self._hold(count_tree([[]], self.size, self.order)._replace(discounts=tree.discounts) if self.cache else tree)
        return []

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]`` in float64, in nats; 0 on padding."""
        text, mask, prefix = batch["text"], batch.get("mask"), batch.get("prefix")
        check_text(text, mask, self.size)
        if prefix is not None:
            check_prefix(prefix, text, self.size)
        lengths = [text.shape[1]] * len(text) if mask is None else lengths_from_mask(mask).tolist()
        tree, found = self.tree, torch.zeros(text.shape, dtype=torch.float64)
        for b, length in enumerate(lengths):
            reader = Reader(tree)
            if prefix is not None:
                reader.score(prefix[b].cpu().numpy())
            found[b, :length] = torch.from_numpy(reader.score(text[b, :length].cpu().numpy()))
        return found.to(text.device)

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, AdaptiveState]:
        check_text(prompt, mask, self.size, "prompt")
        tree = self.tree
        state = AdaptiveState([Reader(tree) for _ in range(len(prompt))])
        for b, reader in enumerate(state.readers):
            reader.score((prompt[b] if mask is None else prompt[b][mask[b]]).cpu().numpy())
        found = torch.from_numpy(np.array([reader.next() for reader in state.readers]).reshape(-1, self.size))
        return found.to(prompt.device), state

    def advance(self, tokens: Tensor, state: AdaptiveState, mask: Tensor | None = None) -> tuple[Tensor, AdaptiveState]:  # type: ignore[override]
        check_text(tokens, mask, self.size, "tokens")
        found = torch.zeros(*tokens.shape, self.size, dtype=torch.float64)
        for b, reader in enumerate(state.readers):
            real = torch.ones_like(tokens[b], dtype=torch.bool) if mask is None else mask[b]
            found[b, real.cpu()] = torch.from_numpy(reader.laws(tokens[b][real].cpu().numpy()))
        return found.to(tokens.device), state
