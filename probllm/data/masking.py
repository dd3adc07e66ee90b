"""Texts with tokens hidden, to be told from the others; texts with spans cut out, to be written; texts cut in two.

``Masked`` gives what a masked language model learns from: of the tokens that are picked, four fifths are replaced by
the mask, a tenth by any token, a tenth stay (Devlin et al. 2019). Single tokens are picked, whole words (their later
version), or spans of random length (Joshi et al. 2020). ``span_denoising`` and ``prefix_pairs`` give an encoder-decoder
sources and targets (Raffel et al. 2020).

Everything is a function of seed and epoch, so that a run which was killed goes on with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from probllm.data.dataset import Batch, Dataset
from probllm.data.windows import Windows

Unit = Literal["token", "word", "span"]
_SPAN_SUCCESS, _LONGEST_SPAN = 0.2, 10  # of the geometric law of a span's length: 3.8 tokens in the mean (Joshi et al.)


class Masked:
    """Batches of another data set with tokens hidden: ``{"inputs", "mask", "hidden", "target"}``, each ``[B, L]``.

    Args:
        data: ``Windows``, whose texts are taken, or a ``Dataset`` with ``inputs`` ``[L]`` of ids; there ``word_index``
            ``[L]``, if the examples have it, says which word a token belongs to (-1: none, and never hidden).
        mask_token: stands for what is hidden.
        size: tokens that may take the place of a hidden one go from ``first`` to ``size - 1``.
        first: tokens below, such as padding and marks, are never hidden, nor put in place of others.
        rate: the share of the tokens that is hidden.
        unit: what is picked: ``"token"``, ``"word"`` (which needs ``word_index``), or ``"span"``.
    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        data: Dataset | Windows,
        mask_token: int,
        size: int,
        first: int = 0,
        rate: float = 0.15,
        unit: Unit = "token",
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate: expected a number in (0, 1], got {rate}")
        if unit not in ("token", "word", "span"):
            raise ValueError(f"unit: expected 'token', 'word' or 'span', got {unit!r}")
        if not 0 <= first < size:
            raise ValueError(f"first: expected a token from 0 to {size - 1}, got {first}")
        if unit == "word" and not (isinstance(data, Dataset) and len(data) and "word_index" in data[0]):
            raise ValueError("unit: 'word' needs examples with a word_index")
        self.data, self.mask_token, self.size, self.first, self.rate, self.unit = (
            data, mask_token, size, first, rate, unit,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        whole = Dataset.collate([self.data[index]])
        return {name: x[0] for name, x in self.hide(whole, np.random.default_rng([index])).items()}

    def batches(
        self,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ) -> MaskedBatches:
        """The batches of one epoch, hidden anew in each; arguments as of the data's own ``batches``."""
        inner: Sequence[Any] = self.data.batches(batch_size, max_tokens, shuffle, seed, epoch)
        return MaskedBatches(self, inner, [(seed, epoch, i) for i in range(len(inner))])

    def hide(self, batch: Batch, random: np.random.Generator) -> dict[str, Tensor]:
        """Hide tokens of a batch that has ``text``, or ``inputs`` and ``mask``."""
        text = batch["text"] if "text" in batch else batch["inputs"]
        if not isinstance(text, Tensor):
            raise TypeError("inputs: expected ids [B, L], got a dict; give the data set of its subwords")
        mask = batch.get("mask")
        mask = torch.ones_like(text, dtype=torch.bool) if not isinstance(mask, Tensor) else mask
        allowed = (mask & (text >= self.first)).numpy()
        words = batch.get("word_index")
        rows = []
        for row, may in enumerate(allowed):
            if self.unit == "word":
                assert isinstance(words, Tensor)
                rows.append(_words(may, words[row].numpy(), self.rate, random))
            elif self.unit == "span":
                rows.append(_spans(may, self.rate, random))
            else:
                rows.append(may & (random.random(len(may)) < self.rate))
        hidden = torch.from_numpy(np.stack(rows))
        fate = torch.from_numpy(random.random(text.shape))
        other = torch.from_numpy(random.integers(self.first, self.size, text.shape))
        inputs = torch.where(hidden & (fate < 0.8), self.mask_token, text)
        inputs = torch.where(hidden & (fate >= 0.9), other, inputs)
        return {"inputs": inputs, "mask": mask, "hidden": hidden, "target": text.where(hidden, 0)}


class MaskedBatches(Sequence[dict[str, Tensor]]):
    """Batches with tokens hidden when asked for; a slice is again MaskedBatches."""

    def __init__(self, masked: Masked, inner: Sequence[Any], keys: Sequence[tuple[int, int, int]]) -> None:
        self.masked, self.inner, self.keys = masked, inner, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> MaskedBatches: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | MaskedBatches:
        if isinstance(index, slice):
            return MaskedBatches(self.masked, self.inner[index], self.keys[index])
        return self.masked.hide(self.inner[index], np.random.default_rng(self.keys[index]))


def _words(may: np.ndarray, words: np.ndarray, rate: float, random: np.random.Generator) -> np.ndarray:
    """Words are picked each with the probability ``rate``, and all their tokens hidden."""
    picked = random.random(max(1, int(words.max(initial=-1)) + 1)) < rate
    found: np.ndarray = may & (words >= 0) & picked[np.maximum(words, 0)]
    return found


def _spans(may: np.ndarray, rate: float, random: np.random.Generator) -> np.ndarray:
    """Spans of geometric length are hidden until a share ``rate`` of the tokens is, rounded at random."""
    hidden, places = np.zeros(len(may), dtype=bool), np.flatnonzero(may)
    budget = int(len(places) * rate + random.random())
    while budget > 0:
        length = min(int(random.geometric(_SPAN_SUCCESS)), _LONGEST_SPAN, budget)
        begin = int(random.integers(0, max(1, len(places) - length + 1)))
        new = [p for p in places[begin : begin + length] if not hidden[p]]
        hidden[new] = True
        budget -= len(new)
    return hidden


def span_denoising(
    texts: Iterable[Sequence[int]],
    sentinels: Sequence[int],
    end: int,
    rate: float = 0.15,
    mean_length: float = 3.0,
    seed: int = 0,
) -> Dataset:
    """Sources with spans cut out, and targets that write these (Raffel et al. 2020, section 3.1.4).

    Each span gives its place to a sentinel of its own, the first to the first; the target is each sentinel with its
    span behind it, then ``end``.

    Args:
        texts: tokens each.
        sentinels: tokens that stand for spans; there are at most so many spans a text.
        end: the last token of every target.
        rate: the share of the tokens that is cut out, at least one and less than all.
        mean_length: of the spans.
        seed: the same seed cuts the same spans.
    Returns:
        examples of ``inputs`` and ``target``; a text of one token is left out.
    Raises:
        ValueError: for numbers out of range.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a number in (0, 1), got {rate}")
    if mean_length < 1:
        raise ValueError(f"mean_length: expected at least 1, got {mean_length}")
    if not len(sentinels):
        raise ValueError("sentinels: expected at least one token, got none")
    random, examples = np.random.default_rng(seed), []
    for text in texts:
        n = len(text)
        if n < 2:
            continue
        noise = min(max(round(n * rate), 1), n - 1)
        spans = min(max(round(noise / mean_length), 1), noise, n - noise, len(sentinels))
        # kept and cut stretches alternate, beginning with a kept one; each has at least one token
        cut, kept = _parts(noise, spans, random), _parts(n - noise, spans, random)
        source: list[int] = []
        target: list[int] = []
        at = 0
        for sentinel, keep, drop in zip(sentinels, kept, cut, strict=False):
            source += [*text[at : at + keep], sentinel]
            target += [sentinel, *text[at + keep : at + keep + drop]]
            at += keep + drop
        examples.append({"inputs": torch.tensor(source), "target": torch.tensor([*target, end])})
    return Dataset(examples)


def prefix_pairs(texts: Iterable[Sequence[int]], end: int, seed: int = 0) -> Dataset:
    """Each text cut in two at a random place: the beginning is read, the rest and ``end`` are written.

    Returns:
        examples of ``inputs`` and ``target``; a text of one token is left out.
    """
    random, examples = np.random.default_rng(seed), []
    for text in texts:
        if len(text) > 1:
            cut = int(random.integers(1, len(text)))
            examples.append({"inputs": torch.tensor(text[:cut]), "target": torch.tensor([*text[cut:], end])})
    return Dataset(examples)


def _parts(total: int, count: int, random: np.random.Generator) -> list[int]:
    """``total`` as a sum of ``count`` numbers of at least 1, every such sum equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, dtype=int)
    parts: list[int] = np.diff(np.concatenate([[0], cuts, [total]])).astype(int).tolist()
    return parts
