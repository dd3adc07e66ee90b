"""An n-gram model: a token depends on the n - 1 before it. Estimated by counting; exact, normalised, sampled.

    p(w | h) = own(h w) + g(h) p(w | h without its first token)

Kneser-Ney (modified, interpolated), Witten-Bell and additive smoothing: ``math.ngrams``. ARPA files are read and
written, so that the models of KenLM and SRILM serve here and ours there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from probllm.math.masks import lengths_from_mask
from probllm.math.ngrams import NGrams, Smoothing, smoothed
from probllm.models.arpa import read_arpa, write_arpa
from probllm.models.language_model import LanguageModel, check_prefix, check_text
from probllm.models.model import Batch

# of the n-grams, as ``NGrams`` orders them
_ARRAYS = ("tree_children", "tree_tokens", "tree_logs", "tree_backoffs", "tree_suffixes")


class NGramState(NamedTuple):
    """The longest known history of each row."""

    nodes: Tensor  # [B]

    def select(self, rows: Tensor) -> NGramState:
        """That of these rows."""
        return NGramState(self.nodes[rows])


class NGramModel(LanguageModel):
    """An n-gram model of texts.

    Args:
        size: tokens go from 0 to ``size - 1``; the end of a text, and words that are not known, are among them.
        order: n.
        smoothing: ``"kneser-ney"``, ``"witten-bell"`` or ``"additive"``.
        k: what additive smoothing adds to each count.
        nodes: how many n-grams there is room for; estimating and reading set it.
    Before it is estimated all tokens are equally probable.
    """

    def __init__(
        self, size: int, order: int = 5, smoothing: Smoothing = "kneser-ney", k: float = 1.0, nodes: int | None = None
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size, self.order, self.smoothing, self.k = size, order, smoothing, k
        self._hold(smoothed([[]], size, order, smoothing, k))  # checks the other arguments
        if nodes is not None:  # saved arrays will be read into these
            for name in _ARRAYS:
                own = getattr(self, name)
                self.register_buffer(name, own.new_zeros(nodes + 1 if name == "tree_children" else nodes))

    @property
    def ngrams(self) -> NGrams:
        """The n-grams, as arrays."""
        return NGrams(self.size, self.order, *(getattr(self, name).cpu().numpy() for name in _ARRAYS))

    def _hold(self, ngrams: NGrams) -> None:
        for name, array in zip(_ARRAYS, ngrams.arrays(), strict=True):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))
        self.config_arguments["nodes"] = len(ngrams.tokens)

    def estimate(self, data: Any) -> list[dict[str, float]]:
        """Count and smooth the n-grams of the ``text`` of each example, whatever was there before.

        Returns:
            one dict: the ``loss``, in nats a text.
        Raises:
            ValueError: for no data, or tokens out of range.
        """
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one text")
        texts = [np.asarray(data[i]["text"], dtype=np.int64) for i in range(len(data))]
        self._hold(smoothed(texts, self.size, self.order, self.smoothing, self.k))
        found = self.ngrams.token_log_probs(np.concatenate(texts), np.array([len(x) for x in texts]))
        return [{"loss": -float(found.sum()) / len(texts)}]

    def token_log_probs(self, batch: Batch) -> Tensor:
        """Log probability of each token given those before it, ``[B, L]`` in float64, in nats; 0 on padding."""
        text, mask, prefix = batch["text"], batch.get("mask"), batch.get("prefix")
        check_text(text, mask, self.size)
        lengths = torch.full((len(text),), text.shape[1]) if mask is None else lengths_from_mask(mask).cpu()
        before, whole = 0, text
        if prefix is not None:
            check_prefix(prefix, text, self.size)
            before, whole = prefix.shape[1], torch.cat([prefix, text], 1)
        real = torch.arange(whole.shape[1]) < before + lengths[:, None]
        found = torch.zeros(whole.shape, dtype=torch.float64)
        scores = self.ngrams.token_log_probs(whole.cpu()[real].numpy(), (before + lengths).numpy())
        found[real] = torch.from_numpy(scores)
        return found[:, before:].to(text.device)

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, NGramState]:
        check_text(prompt, mask, self.size, "prompt")
        ngrams = self.ngrams
        begin = torch.full((len(prompt),), ngrams.begin, device=prompt.device)
        nodes = self._follow(ngrams, prompt, begin, mask)[:, -1]
        found = torch.from_numpy(ngrams.next_log_probs(nodes))
        return found.to(prompt.device), NGramState(torch.from_numpy(nodes).to(prompt.device))

    def advance(self, tokens: Tensor, state: NGramState, mask: Tensor | None = None) -> tuple[Tensor, NGramState]:  # type: ignore[override]
        check_text(tokens, mask, self.size, "tokens")
        ngrams = self.ngrams
        nodes = self._follow(ngrams, tokens, state.nodes, mask)
        found = torch.from_numpy(ngrams.next_log_probs(nodes[:, 1:].reshape(-1))).view(*tokens.shape, self.size)
        return found.to(tokens.device), NGramState(torch.from_numpy(nodes[:, -1].copy()).to(tokens.device))

    def _follow(self, ngrams: NGrams, tokens: Tensor, nodes: Tensor, mask: Tensor | None) -> np.ndarray:
        """The nodes before and after each token, ``[B, L + 1]``."""
        found = np.empty((len(tokens), tokens.shape[1] + 1), np.int64)
        found[:, 0] = nodes.cpu().numpy()
        for t in range(tokens.shape[1]):
            after = ngrams.follow(found[:, t].copy(), tokens[:, t].cpu().numpy())
            found[:, t + 1] = after if mask is None else np.where(mask[:, t].cpu().numpy(), after, found[:, t])
        return found

    # Files of other toolkits.

    def write_arpa(self, path: str | Path, vocabulary: list[str]) -> None:
        """Write the model in the ARPA format, for KenLM, SRILM and others.

        Args:
            vocabulary: the name of each token; ``</s>`` for the end of a text and ``<unk>`` for unknown words, where
                the model has these.
        Raises:
            ValueError: for names that are not one for each token, that repeat, or that hold white space.
        """
        write_arpa(path, self.ngrams, vocabulary)

    @classmethod
    def from_arpa(cls, path: str | Path) -> tuple[Self, list[str]]:
        """A model from a file in the ARPA format, plain or .gz, and the names of its tokens.

        Raises:
            ValueError: for a malformed file, with the line.
        """
        ngrams, vocabulary = read_arpa(path)
        model = cls(ngrams.size, ngrams.order)
        model._hold(ngrams)
        return model, vocabulary
