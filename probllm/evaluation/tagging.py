"""Scores of predicted tags: accuracy, likelihood and the confusion matrix, sentence by sentence.

A corpus is a list with one array a sentence, so that nothing is padded and whole sentences can be resampled.
Likelihoods are in nats: of a token, minus the log of the gold tag's posterior marginal; of a sentence, minus the log
probability of its whole gold tag sequence.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probllm.evaluation.bootstrap import Estimate, Floats, bootstrap

Counts = npt.NDArray[np.int64]


def unpad(values: npt.ArrayLike, mask: npt.ArrayLike) -> list[npt.NDArray[np.generic]]:
    """Split a padded batch into one array a sentence.

    Args:
        values: ``[batch, length, ...]``.
        mask: ``[batch, length]``, true at real positions.
    Returns:
        for each sentence its real positions, ``[length_i, ...]``.
    Raises:
        ValueError: if the shapes disagree.
    """
    array, real = np.asarray(values), np.asarray(mask, dtype=bool)
    if real.ndim != 2 or array.shape[:2] != real.shape:
        raise ValueError(
            f"values must begin with the mask's shape [batch, length]; they are {array.shape} and {real.shape}"
        )
    return [row[keep] for row, keep in zip(array, real, strict=True)]


def correct_tokens(predicted: Sequence[npt.ArrayLike], gold: Sequence[npt.ArrayLike]) -> tuple[Counts, Counts]:
    """How many tags of each sentence are right, and how many there are.

    Args:
        predicted: a tag sequence for each sentence, ``[length_i]``.
        gold: the right ones.
    Returns:
        ``(correct [sentences], tokens [sentences])``, as :func:`bootstrap` and :func:`paired_bootstrap` take them.
    Raises:
        ValueError: if a sentence's lengths disagree, with its number (counted from 0).
    """
    _check_sentences(predicted, gold)
    correct = [int(np.sum(np.asarray(p) == np.asarray(g))) for p, g in zip(predicted, gold, strict=True)]
    return np.array(correct, dtype=np.int64), np.array([np.asarray(g).size for g in gold], dtype=np.int64)


def accuracy(predicted: Sequence[npt.ArrayLike], gold: Sequence[npt.ArrayLike], *, seed: int = 0) -> Estimate:
    """Share of tags that are right, with a 95 % bootstrap interval over sentences.

    Args:
        predicted: a tag sequence for each sentence, ``[length_i]``.
        gold: the right ones.
        seed: of the resampling.
    Returns:
        the accuracy, between 0 and 1, and its interval.
    Raises:
        ValueError: if there is no sentence or a sentence's lengths disagree.
    """
    return bootstrap(*correct_tokens(predicted, gold), seed=seed)


def token_nll(marginals: Sequence[npt.ArrayLike], gold: Sequence[npt.ArrayLike]) -> list[Floats]:
    """Minus the log posterior marginal of each gold tag, in nats.

    Args:
        marginals: for each sentence the tags' probabilities, ``[length_i, tags]``.
        gold: the right tags, ``[length_i]``.
    Returns:
        an array ``[length_i]`` for each sentence; ``inf`` where the gold tag was given probability 0.
    Raises:
        ValueError: if a sentence's shapes disagree or a gold tag is not one of the tags.
    """
    _check_sentences(marginals, gold)
    result = []
    for number, (probabilities, tags) in enumerate(zip(marginals, gold, strict=True)):
        p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(tags, dtype=np.int64)
        if p.ndim != 2 or (y.size and not (y.min() >= 0 and y.max() < p.shape[1])):
            raise ValueError(
                f"sentence {number}: marginals must be [length, tags] and gold tags below tags; {p.shape}, {y}"
            )
        with np.errstate(divide="ignore"):
            result.append(-np.log(p[np.arange(len(y)), y]))
    return result


def confusion_matrix(
    predicted: Sequence[npt.ArrayLike], gold: Sequence[npt.ArrayLike], num_tags: int
) -> npt.NDArray[np.int64]:
    """How often each gold tag was given each predicted tag.

    Args:
        predicted: a tag sequence for each sentence, ``[length_i]``.
        gold: the right ones.
        num_tags: how many tags there are.
    Returns:
        ``[num_tags, num_tags]``, gold in the rows, predicted in the columns.
    Raises:
        ValueError: if a sentence's lengths disagree.
    """
    from sklearn.metrics import confusion_matrix as count

    _check_sentences(predicted, gold)
    flat = [np.concatenate([np.asarray(s, dtype=np.int64) for s in corpus]) for corpus in (gold, predicted)]
    matrix: npt.NDArray[np.int64] = count(*flat, labels=np.arange(num_tags)).astype(np.int64)
    return matrix


def _check_sentences(first: Sequence[npt.ArrayLike], gold: Sequence[npt.ArrayLike]) -> None:
    if len(first) != len(gold):
        raise ValueError(f"there must be one prediction a sentence; there are {len(first)} for {len(gold)} sentences")
    if not len(gold):
        raise ValueError("there must be at least one sentence; there is none")
    for number, (a, b) in enumerate(zip(first, gold, strict=True)):
        if not (np.ndim(a) and np.ndim(b)):
            raise ValueError(f"sentence {number} is a single number; expected a sequence for each sentence")
        if len(np.asarray(a)) != len(np.asarray(b)):
            raise ValueError(f"sentence {number}: {len(np.asarray(a))} predictions for {len(np.asarray(b))} gold tags")
