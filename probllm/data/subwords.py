"""Subword units learned from text, through the ``tokenizers`` library.

``bpe``: byte-pair encoding over bytes (Sennrich et al., 2016), lossless on any text. ``wordpiece``: (Wu et al., 2016).
``unigram``: the unigram language model (Kudo, 2018). Ids 0 to 4 are the special units ``<pad>``, ``<unk>``, ``<bos>``,
``<eos>`` and ``<mask>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from probllm.data.lines import FilePath
from probllm.data.vocabulary import UNKNOWN, read_json, write_json

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>")
BOS, EOS, MASK = 2, 3, 4

Kind: TypeAlias = Literal["bpe", "wordpiece", "unigram"]


class WordPieces(NamedTuple):
    """The units of a sentence of words, and for each unit which word it belongs to (from 0); every word has one."""

    ids: list[int]
    words: list[int]


class Subwords:
    """A trained subword tokeniser; made by ``train`` or ``load``."""

    def __init__(self, serialized: str) -> None:
        self.serialized = serialized
        """The tokeniser in the JSON of the ``tokenizers`` library."""
        self.tokenizer: Tokenizer = Tokenizer.from_str(serialized)
        self.tokenizer.encode_special_tokens = True  # in a text, <pad> is text

    @classmethod
    def train(cls, texts: Iterable[str], kind: Kind = "bpe", size: int = 8000) -> Subwords:
        """Learn the units of a text; the same text gives the same units.

        Args:
            texts: sentences or lines.
            size: how many ids at most, special units included; ``bpe`` has 261 before it learns any.
        Raises:
            ValueError: for an unknown kind, a size too small or no text.
        """
        texts = list(texts)
        if kind not in _TRAIN:
            raise ValueError(f"kind must be one of {', '.join(_TRAIN)}, got {kind!r}")
        least = len(SPECIAL) + (256 if kind == "bpe" else 1)
        if size < least:
            raise ValueError(f"size must be at least {least} for {kind}, got {size}")
        if not any(text.strip() for text in texts):
            raise ValueError("texts is empty: there is nothing to learn from")
        tokenizer = _TRAIN[kind](texts, size)
        tokenizer.add_special_tokens(list(SPECIAL))
        return cls(tokenizer.to_str())

    def __len__(self) -> int:
        """The number of ids: the rows of an embedding table."""
        return int(self.tokenizer.get_vocab_size())

    def __repr__(self) -> str:
        return f"Subwords({type(self.tokenizer.model).__name__}, {len(self)} ids)"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without ``<bos>`` and ``<eos>``."""
        return _text_ids(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_words(self, words: Sequence[str]) -> WordPieces:
        """The ids of a sentence that is cut into words already, and the word of each."""
        # Byte-level units carry the space before a word.
        spaced = [f" {word}" for word in words] if isinstance(self.tokenizer.model, models.BPE) else list(words)
        pieces = WordPieces([], [])
        for index, encoding in enumerate(self.tokenizer.encode_batch(spaced, add_special_tokens=False)):
            ids = _text_ids(encoding.ids) or [UNKNOWN]
            pieces.ids.extend(ids)
            pieces.words.extend([index] * len(ids))
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special units are left out."""
        return str(self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=True))

    def units(self, ids: Iterable[int]) -> list[str]:
        """The name of each unit, as the tokeniser holds it.

        Raises:
            ValueError: for an id outside of the vocabulary.
        """
        names = [(int(number), self.tokenizer.id_to_token(int(number))) for number in ids]
        bad = [number for number, name in names if name is None]
        if bad:
            raise ValueError(f"ids must lie from 0 to {len(self) - 1}, got {bad[0]}")
        return [str(name) for _, name in names]

    def save(self, path: FilePath) -> None:
        """Write the tokeniser to a JSON file."""
        write_json(path, "Subwords", self.serialized)

    @classmethod
    def load(cls, path: FilePath) -> Subwords:
        """Read what ``save`` wrote; ValueError if the file holds something else."""
        return cls(read_json(path, "Subwords"))


def _text_ids(ids: list[int]) -> list[int]:
    """A word that reads like a special unit is found among the units by wordpiece and unigram: it is unknown."""
    return [number if number >= len(SPECIAL) else UNKNOWN for number in ids]


def _train_bpe(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _train_wordpiece(texts: list[str], size: int) -> Tokenizer:
    # The library numbers the units ##x in the order of a hash table, which decides ties between merges, so that two
    # trainings differ. Named beforehand as special units, they are numbered in alphabetical order.
    characters = sorted({character for text in texts for word in text.split() for character in word[1:]})
    special = [*SPECIAL, *(f"##{character}" for character in characters)]
    learner = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNKNOWN]))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    learner.train_from_iterator(texts, trainer=trainer)
    tokenizer = Tokenizer(
        models.WordPiece(learner.get_vocab(), unk_token=SPECIAL[UNKNOWN], max_input_chars_per_word=1000)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _train_unigram(texts: list[str], size: int) -> Tokenizer:
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), unk_token=SPECIAL[UNKNOWN], show_progress=False
    )
    learner.train_from_iterator(texts, trainer=trainer)
    # Two trainings differ in the last digits (threads sum in any order) and in how the single characters that it must
    # keep are spread over the 0.0001 steps above the lowest score: rounded, levelled and sorted, they agree.
    units: list[tuple[str, float]] = json.loads(learner.to_str())["model"]["vocab"]
    lowest = min(score for _, score in units)
    kept = lowest + 1e-4 * sum(len(unit) == 1 for unit, _ in units)
    learned = [(unit, round(score if score > kept else lowest, 6)) for unit, score in units[len(SPECIAL) :]]
    learned.sort(key=lambda unit: (-unit[1], unit[0]))
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *learned], UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


_TRAIN: dict[str, Callable[[list[str], int], Tokenizer]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}
