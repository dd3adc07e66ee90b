"""Precision, recall and F1 of predicted spans; as in CoNLL, a span is right if both ends and its label are.

``precision = tp / predicted``, ``recall = tp / gold``, ``F1 = 2 tp / (predicted + gold)``, summed over the corpus
(micro average). Spans are given as tuples, such as ``(first, last, label)``; reading them off BIO tags is the data's
business.

Source: Tjong Kim Sang and De Meulder (2003), section 2.3.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from probllm.evaluation.bootstrap import Estimate, bootstrap
from probllm.evaluation.tagging import Counts


class SpanScores(NamedTuple):
    """Precision, recall and F1 with their bootstrap intervals over sentences."""

    precision: Estimate
    recall: Estimate
    f1: Estimate


def span_counts(
    predicted: Sequence[Iterable[Hashable]], gold: Sequence[Iterable[Hashable]]
) -> tuple[Counts, Counts, Counts]:
    """Count right, predicted and gold spans in each sentence.

    Args:
        predicted: the spans predicted in each sentence.
        gold: the right ones.
    Returns:
        ``(right, predicted, gold)``, each ``[sentences]``.
    Raises:
        ValueError: if the numbers of sentences disagree or there is none.
    """
    if len(predicted) != len(gold) or not gold:
        raise ValueError(f"need the spans of the same sentences, at least one; got {len(predicted)} and {len(gold)}")
    sets = [(set(p), set(g)) for p, g in zip(predicted, gold, strict=True)]
    counts = np.array([(len(p & g), len(p), len(g)) for p, g in sets], dtype=np.int64)
    return counts[:, 0], counts[:, 1], counts[:, 2]


def span_scores(
    predicted: Sequence[Iterable[Hashable]], gold: Sequence[Iterable[Hashable]], *, seed: int = 0
) -> SpanScores:
    """Precision, recall and F1 of spans over a corpus, each with a 95 % bootstrap interval.

    Args:
        predicted: the spans predicted in each sentence, such as ``[(first, last, label), ...]``.
        gold: the right ones.
        seed: of the resampling.
    Returns:
        the three scores between 0 and 1; a score with nothing to count is 0.
    Raises:
        ValueError: if the numbers of sentences disagree or there is none.
    """
    right, guessed, true = span_counts(predicted, gold)
    return SpanScores(
        bootstrap(right, guessed, seed=seed),
        bootstrap(right, true, seed=seed),
        bootstrap(2 * right, guessed + true, seed=seed),
    )
