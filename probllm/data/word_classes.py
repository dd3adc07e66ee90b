"""The symbols of a discrete HMM: a known word is itself, an unknown one the class of its ending and shape.

A class is a shape (capitals, digits, hyphen) and a suffix of the lower-cased word, at most ten characters long and seen
among rare training words; an unknown word takes the longest that exists. Each class has a parent, the same shape with
the suffix one character shorter, down to the bare shape and then to one root: what the successive abstraction of
Brants (2000), "TnT: a statistical part-of-speech tagger", section 2.3, needs to smooth their probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product
from typing import Any

from probllm.data.lines import FilePath
from probllm.data.vocabulary import read_json, write_json

MAX_SUFFIX = 10
# Letters: none, small, first capital, all capitals; then 9 for a digit, - for a hyphen.
SHAPES = tuple("".join(parts) for parts in product(("0", "x", "Xx", "XX"), ("", "9"), ("", "-")))


def word_shape(word: str) -> str:
    """Which of the ``SHAPES`` a word has: ``Xx`` for Paris, ``XX9`` for B2, ``x-`` for well-known, ``09`` for 1984."""
    letters = [character for character in word if character.isalpha()]
    if not letters:
        capitals = "0"
    elif all(letter.isupper() for letter in letters) and len(word) > 1:
        capitals = "XX"
    else:
        capitals = "Xx" if letters[0].isupper() else "x"
    return capitals + "9" * any(map(str.isdigit, word)) + "-" * ("-" in word)


class WordClasses:
    """Words and classes of unknown words, numbered together.

    Symbols: 0 is padding, then the known words, then the classes, of which the first is the root.

    Args:
        words: the known words; the i-th is the symbol ``i + 1``.
        counts: how often each was seen in training.
        classes: suffix classes as ``(shape, suffix)`` beside the root and the bare shapes, which always exist.
    """

    def __init__(self, words: Iterable[str], counts: Iterable[int], classes: Iterable[tuple[str, str]]) -> None:
        self.words = list(words)
        self.counts = list(counts)
        if len(self.words) != len(self.counts):
            raise ValueError(f"words and counts must be as many, got {len(self.words)} and {len(self.counts)}")
        self.first_class = len(self.words) + 1
        """The symbol of the root class; from here on every symbol is a class."""
        self.classes = [(str(shape), str(suffix)) for shape, suffix in classes]
        self._word_ids = {word: index for index, word in enumerate(self.words, start=1)}
        names = [(shape, "") for shape in SHAPES] + self.classes
        self._class_ids = {name: index for index, name in enumerate(names, start=self.first_class + 1)}
        if len(self._word_ids) != len(self.words) or len(self._class_ids) != len(names):
            raise ValueError("words and classes must be distinct")
        self.parent: list[int] = [0, *map(self.class_of, self.words), self.first_class]
        """For each symbol the next more general one: for a word the class that it would take were it unknown, for a
        class that of the shorter suffix; the root and padding are their own."""
        for shape, suffix in names:
            self.parent.append(self._class_ids[shape, suffix[1:]] if suffix else self.first_class)

    @classmethod
    def build(cls, words: Iterable[str], min_count: int = 1, rare: int = 10, min_class_count: int = 2) -> WordClasses:
        """Known words and classes from the words of a training text.

        Args:
            min_count: words seen less often are no symbols: they are encoded by class, in training too.
            rare: suffixes come from words seen at most so often.
            min_class_count: suffixes that fewer distinct rare words share are no classes. Two keeps a sixth of those
                that one keeps, which guess tags of unknown words better (English Web Treebank: 68.4 to 67.1 %).
        """
        counts = Counter(words)
        known = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        shared: Counter[tuple[str, str]] = Counter()
        for word, count in counts.items():
            if count <= rare:
                shape, lower = word_shape(word), word.lower()
                shared.update((shape, lower[-size:]) for size in range(1, min(MAX_SUFFIX, len(lower)) + 1))
        classes = sorted(name for name, count in shared.items() if count >= min_class_count)
        return cls(known, [counts[word] for word in known], classes)

    def __len__(self) -> int:
        """The number of symbols, padding included."""
        return self.first_class + 1 + len(self._class_ids)

    def __contains__(self, word: str) -> bool:
        return word in self._word_ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordClasses) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"WordClasses({len(self.words)} words, {len(self) - self.first_class} classes)"

    def class_of(self, word: str) -> int:
        """The class that a word takes when it is unknown: the longest known suffix in its shape."""
        shape, lower = word_shape(word), word.lower()
        for size in range(min(MAX_SUFFIX, len(lower)), 0, -1):
            if (shape, lower[-size:]) in self._class_ids:
                return self._class_ids[shape, lower[-size:]]
        return self._class_ids[shape, ""]

    def encode(self, words: Iterable[str]) -> list[int]:
        """The symbols of a sentence's words.

        The first word, and words all in capitals, are taken for the same in small letters if only that is known.
        """
        return [self._symbol(word, position == 0) for position, word in enumerate(words)]

    def _symbol(self, word: str, first: bool) -> int:
        known = self._word_ids.get(word)
        if known is None and (first or (len(word) > 1 and word.isupper())):
            known = self._word_ids.get(word.lower())
        return self.class_of(word) if known is None else known

    def name(self, symbol: int) -> str:
        """A symbol for reading: the word, or ``<Xx:burg>`` for a class.

        Raises:
            ValueError: for a symbol outside of the range.
        """
        if not 0 <= symbol < len(self):
            raise ValueError(f"symbol must lie from 0 to {len(self) - 1}, got {symbol}")
        if symbol < self.first_class:
            return self.words[symbol - 1] if symbol else "<pad>"
        if symbol == self.first_class:
            return "<unk>"
        index = symbol - self.first_class - 1
        shape, suffix = (SHAPES[index], "") if index < len(SHAPES) else self.classes[index - len(SHAPES)]
        return f"<{shape}:{suffix}>"

    def to_json(self) -> dict[str, Any]:
        """JSON values from which the classes are made again."""
        return {"words": self.words, "counts": self.counts, "classes": [list(name) for name in self.classes]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WordClasses:
        return cls(value["words"], value["counts"], [(shape, suffix) for shape, suffix in value["classes"]])

    def save(self, path: FilePath) -> None:
        """Write words and classes to a JSON file."""
        write_json(path, "WordClasses", self.to_json())

    @classmethod
    def load(cls, path: FilePath) -> WordClasses:
        """Read what ``save`` wrote; ValueError if the file holds something else."""
        return cls.from_json(read_json(path, "WordClasses"))
