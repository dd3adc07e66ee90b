"""Attachment scores of dependency trees: the share of words with the right head (UAS), and the right label too (LAS).

As in the CoNLL 2018 shared task every word counts, punctuation too, and labels are compared up to their subtype:
``nsubj:pass`` is ``nsubj`` (Zeman et al., 2018, "CoNLL 2018 shared task", section 4). Leaving punctuation out is the
older habit; both can be had.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probllm.evaluation.bootstrap import Estimate, bootstrap

Counts = npt.NDArray[np.int64]
Tree = tuple[Any, Sequence[str]]  # heads [T], 0 the root, words from 1; and the names of their relations


class AttachmentCounts(NamedTuple):
    """What is right in each sentence, ``[sentences]``, as ``bootstrap`` and ``paired_bootstrap`` take it."""

    heads: Counts
    """Words with the right head."""
    labelled: Counts
    """Words with the right head and relation."""
    words: Counts
    """Words that count."""
    trees: Counts
    """1 where all heads are right."""


class AttachmentScores(NamedTuple):
    """Shares from 0 to 1, with 95 % bootstrap intervals over sentences."""

    unlabelled: Estimate
    labelled: Estimate


def attachment_counts(
    predicted: Sequence[Tree],
    gold: Sequence[Tree],
    counted: Sequence[npt.ArrayLike] | None = None,
    *,
    subtypes: bool = False,
) -> AttachmentCounts:
    """Right words of each sentence.

    Args:
        predicted: for each sentence its heads ``[T]`` and relations ``[T]``.
        gold: the right ones.
        counted: for each sentence which words count, bool ``[T]``, as where those of punctuation are False; None: all.
        subtypes: whether relations must agree in what follows a colon too.
    Raises:
        ValueError: if there is no sentence or a sentence's lengths disagree, with its number (counted from 0).
    """
    if not len(gold) or len(predicted) != len(gold) or (counted is not None and len(counted) != len(gold)):
        of_counted = "" if counted is None else f" and {len(counted)} of words that count"
        raise ValueError(f"expected a tree a sentence, one at least; got {len(predicted)} for {len(gold)}{of_counted}")
    rows = []
    for number, ((heads, relations), (gold_heads, gold_relations)) in enumerate(zip(predicted, gold, strict=True)):
        given, right = np.asarray(heads), np.asarray(gold_heads)
        use = np.ones(right.shape, bool) if counted is None else np.asarray(counted[number], bool)
        if not given.shape == right.shape == use.shape == (len(relations),) == (len(gold_relations),):
            raise ValueError(
                f"sentence {number}: {given.shape} heads and {len(relations)} relations for {right.shape} heads and "
                f"{len(gold_relations)} relations, of which {use.shape} count or not"
            )
        pairs = zip(relations, gold_relations, strict=True)
        same = np.array([a == b if subtypes else universal(a) == universal(b) for a, b in pairs], bool)
        attached = given == right
        rows.append(((attached & use).sum(), (attached & same & use).sum(), use.sum(), attached[use].all()))
    return AttachmentCounts(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


def attachment_scores(
    predicted: Sequence[Tree],
    gold: Sequence[Tree],
    counted: Sequence[npt.ArrayLike] | None = None,
    *,
    subtypes: bool = False,
    seed: int = 0,
) -> AttachmentScores:
    """UAS and LAS; the arguments are those of ``attachment_counts``, and the seed of the resampling."""
    counts = attachment_counts(predicted, gold, counted, subtypes=subtypes)
    return AttachmentScores(
        bootstrap(counts.heads, counts.words, seed=seed), bootstrap(counts.labelled, counts.words, seed=seed)
    )


def universal(relation: str) -> str:
    """A relation without its subtype: ``nsubj`` of ``nsubj:pass``."""
    return relation.partition(":")[0]
