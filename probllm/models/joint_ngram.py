"""Joint n-gram model of two sequences, as of a word's letters and its phonemes: an n-gram model of paired chunks.

    p(x, y) = sum over the cuts into pairs of prod_k p(pair_k | pairs before),       y(x) = the best y of p(x, y)

The pairs come from EM over all cuts (``math.chunk_pairs``), the n-grams from the best cut of each training pair
(``math.ngrams``); decoding is a beam search over the pairs that spell x, in which cuts of one target that lead to the
same n-gram context are summed. Bisani and Ney (2008), "Joint-sequence models for grapheme-to-phoneme conversion"; Novak
et al. (2016), "Phonetisaurus".
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from probllm.math.chunk_pairs import CHUNKS, align_chunks
from probllm.math.kernels import ngrams as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.ngrams import NGrams, kneser_ney
from probllm.models.weights import read_tensors, write_atomically, write_weights

_ARRAYS = ("children", "tokens", "logs", "backoffs", "suffixes")  # of the n-grams
PRINT = 0x9E3779B97F4A7C15  # the base of targets' fingerprints


class JointNGram:
    """An n-gram model of paired chunks, estimated from pairs of sequences.

    Args:
        pairs: source and target of each example; symbols are anything hashable (a word is a sequence of letters).
        order: of the n-grams, in pairs.
        chunks: how many symbols of the source and of the target a pair may hold.
        steps: of EM.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[Hashable], Sequence[Hashable]]],
        order: int = 8,
        chunks: Sequence[tuple[int, int]] = CHUNKS,
        steps: int = 12,
    ) -> None:
        if any(a == 0 for a, _ in chunks):
            raise ValueError(f"chunks: expected at least one source symbol in each, got {tuple(chunks)}")
        self.letters = {x: i for i, x in enumerate(dict.fromkeys(x for source, _ in pairs for x in source))}
        sounds = dict.fromkeys(y for _, target in pairs for y in target)
        self.sounds = list(sounds)
        number = {y: i for i, y in enumerate(sounds)}
        found = align_chunks(
            [[self.letters[x] for x in source] for source, _ in pairs],
            [[number[y] for y in target] for _, target in pairs],
            (max(1, len(self.letters)), max(1, len(self.sounds))),
            chunks,
            steps,
        )
        self.pairs, self.log_likelihoods = found.pairs, found.log_likelihoods
        self.ngrams = kneser_ney([cut.tolist() for cut in found.cuts if len(cut)], len(self.pairs), order)
        self._index()

    def _index(self) -> None:
        """The pairs of each chunk of source symbols, by its code, and what the search needs of their targets."""
        self._base, self._longest = len(self.letters) + 1, max((len(u) for u, _ in self.pairs), default=1)
        codes = np.array([self._code(u) for u, _ in self.pairs])
        self._candidates = np.argsort(codes, kind="stable")
        multipliers = [PRINT ** len(v) for _, v in self.pairs]
        appended = [sum((y + 1) * PRINT ** (len(v) - 1 - i) for i, y in enumerate(v)) for _, v in self.pairs]
        wrapped = [[x % 2**64 for x in both] for both in zip(multipliers, appended, strict=True)]
        self._prints = np.array(wrapped, dtype=np.uint64).view(np.int64)  # of targets, as powers modulo 2^64
        self._starts = np.searchsorted(codes[self._candidates], np.arange(self._base**self._longest + 1))

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder: ``config.json`` and the n-grams that it names, as safetensors.

        Raises:
            TypeError: for symbols that are not strings or whole numbers.
        """
        for symbol in (*self.letters, *self.sounds):
            if type(symbol) not in (str, int):
                raise TypeError(f"symbols: expected strings or whole numbers in a saved model, got {symbol!r}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = dict(zip(_ARRAYS, self.ngrams.arrays(), strict=True))
        weights = write_weights({name: torch.from_numpy(x) for name, x in arrays.items()}, folder, "ngrams")
        config = {
            "model": type(self).__name__,
            "letters": list(self.letters),
            "sounds": self.sounds,
            "pairs": self.pairs,
            "order": self.ngrams.order,
            "log_likelihoods": list(map(float, self.log_likelihoods)),
            "ngrams": weights.name,
        }
        write_atomically(folder / "config.json", json.dumps(config).encode())
        for old in folder.glob("ngrams-*.safetensors"):
            if old != weights:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what ``save`` wrote: an equal model. Nothing is unpickled.

        Raises:
            FileNotFoundError: if there is no model.
            ValueError: if what is there is malformed, or another model.
        """
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("model") != cls.__name__:
            raise ValueError(f"{path}: expected a saved {cls.__name__}")
        model = cls.__new__(cls)
        try:
            model.letters = {x: i for i, x in enumerate(config["letters"])}
            model.sounds, model.log_likelihoods = config["sounds"], config["log_likelihoods"]
            model.pairs = [(tuple(u), tuple(v)) for u, v in config["pairs"]]
            file, order = Path(folder) / Path(config["ngrams"]).name, int(config["order"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: malformed ({error!r})") from None
        found = read_tensors(file)
        if sorted(found) != sorted(_ARRAYS):
            raise ValueError(f"{file}: expected the arrays {sorted(_ARRAYS)}, got {sorted(found)}")
        model.ngrams = NGrams(len(model.pairs), order, *(found[name].numpy() for name in _ARRAYS))
        model._index()
        return model

    def _code(self, chunk: Sequence[int]) -> int:
        code = 0
        for x in chunk:
            code = code * self._base + x + 1
        return code

    def best(
        self, sources: Sequence[Sequence[Hashable]], count: int = 1, beam: int = 100, width: float = 12.0
    ) -> list[list[tuple[float, tuple[Hashable, ...]]]]:
        """The best targets of each source, with the log of the sum of the probabilities of their cuts that were found.

        Args:
            count: how many targets are wanted; there may be fewer, or none.
            beam: hypotheses that go on from each source symbol.
            width: nats below the best at which a hypothesis is dropped.
        A source symbol that was never seen says nothing.
        """
        known = [[self.letters[x] for x in source if x in self.letters] for source in sources]
        ends = np.concatenate([[0], np.cumsum([len(x) for x in known], dtype=np.int64)]).astype(np.int64)
        joined = np.array([x for word in known for x in word], dtype=np.int64)
        most, kept = max(1, max(map(len, known), default=1)), max(16, 4 * count)
        strings = np.zeros((len(known), kept, most), dtype=np.int64)
        sizes, scores = np.zeros((len(known), kept), dtype=np.int64), np.full((len(known), kept), -math.inf)
        arguments = (
            joined, ends, self._starts, self._candidates, self._base, self._longest, self._prints,
            self.ngrams.begin, self.ngrams.size + 1, *self.ngrams.arrays(), beam, width, strings, sizes, scores,
        )  # fmt: skip
        run_shares(kernels.decode, arguments, len(known), 1e6 * len(known))
        found = []
        for word, lengths, logs in zip(strings, sizes, scores, strict=True):
            sums: dict[tuple[Hashable, ...], float] = {}
            for string, length, log in zip(word, lengths, logs.tolist(), strict=True):
                if log > -math.inf:
                    target = tuple(self.sounds[y] for pair in string[:length].tolist() for y in self.pairs[pair][1])
                    sums[target] = float(np.logaddexp(sums.get(target, -math.inf), log))
            ranked = sorted(((log, target) for target, log in sums.items()), key=lambda x: -x[0])
            found.append(ranked[:count])
        return found

    def predict(self, sources: Sequence[Sequence[Hashable]], **options: float) -> list[tuple[Hashable, ...]]:
        """The best target of each source; empty where none was found."""
        return [ways[0][1] if ways else () for ways in self.best(sources, **options)]  # type: ignore[arg-type]
