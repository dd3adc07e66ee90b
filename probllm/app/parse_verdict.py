"""One trained parser on test sentences: the trees it gives, how sure it is of each arc, and how fast it says so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from probllm.app.verdict import in_batches, reorder
from probllm.data import Dataset, ParsingVocabulary, TreebankSentence, find_cycle
from probllm.evaluation import AttachmentCounts, attachment_counts, expected_calibration_error, unpad

TIMED_PASSES = 2
BATCH = 32

Trees = list[tuple[Any, list[str]]]  # heads [T] and names of relations [T], one a sentence


@dataclass
class Verdict:
    """A parser's answers, one array or number a sentence, in the order of the data."""

    trees: Trees
    marginals: list[npt.NDArray[Any]]  # [1 + T heads, T] each, the root first
    counts: AttachmentCounts
    counts_of_words: AttachmentCounts  # without punctuation
    is_tree: npt.NDArray[np.int64]  # [sentences], whether the heads form a tree
    nll: npt.NDArray[np.float64]  # [sentences], of heads and labels
    confidence: npt.NDArray[np.float64]  # [words of all sentences], of the chosen heads
    right: npt.NDArray[np.bool_]  # [words of all sentences], whether they are right
    words_per_second: float

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the chosen heads."""
        return expected_calibration_error(self.confidence, self.right)


def judge(
    model: Any,
    data: Dataset,
    sentences: Sequence[TreebankSentence],
    vocabulary: ParsingVocabulary,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Parse the data and score the answers.

    Args:
        model: a parser in evaluation mode.
        data: examples with ``inputs``, ``heads`` and ``labels``.
        sentences: which the data were made of, with the right trees.
        vocabulary: the names of the labels.
        device: where the model is.
    """
    order, batches = in_batches(data, BATCH, device)
    seconds = []
    for _ in range(TIMED_PASSES):  # the fastest pass shows the work alone, not compilation or other programs
        started = time.perf_counter()
        parsed = [model.parse(batch) for batch in batches]
        seconds.append(time.perf_counter() - started)
    marginals: list[Any] = []
    log_probs: list[float] = []
    with torch.no_grad():
        for batch in batches:
            # Dependents first, so that padding among them falls away; then as many heads as there are words.
            arcs = unpad(model.marginals(batch).transpose(1, 2).float().cpu(), batch["mask"].cpu())
            marginals += [with_root_first(rows[:, : len(rows)].T) for rows in arcs]
            log_probs += model.log_prob(batch).double().cpu().tolist()
    marginals = reorder(order, marginals)
    trees = named(order, batches, parsed, vocabulary)
    gold = [(sentence.heads, sentence.relations) for sentence in sentences]
    confidence = [arcs[heads, np.arange(len(heads))] for arcs, (heads, _) in zip(marginals, trees, strict=True)]
    right = [
        np.asarray(heads) == np.asarray(sentence.heads) for (heads, _), sentence in zip(trees, sentences, strict=True)
    ]
    return Verdict(
        trees,
        marginals,
        attachment_counts(trees, gold),
        attachment_counts(trees, gold, [words_that_are_no_punctuation(sentence) for sentence in sentences]),
        np.array([not find_cycle(heads.tolist()) for heads, _ in trees], dtype=np.int64),
        -np.array(reorder(order, log_probs)),
        np.concatenate(confidence),
        np.concatenate(right),
        sum(data.lengths) / min(seconds),
    )


def parse(model: Any, data: Dataset, vocabulary: ParsingVocabulary, device: torch.device | str = "cpu") -> Trees:
    """The trees that a model gives the sentences."""
    order, batches = in_batches(data, BATCH, device)
    return named(order, batches, [model.parse(batch) for batch in batches], vocabulary)


def named(order: list[int], batches: list[Any], parsed: list[Any], vocabulary: ParsingVocabulary) -> Trees:
    """Parses of padded batches as heads and names of relations, in the order of the data."""
    trees: Trees = []
    for batch, (heads, labels) in zip(batches, parsed, strict=True):
        mask = batch["mask"].cpu()
        for h, y in zip(unpad(heads.cpu(), mask), unpad(labels.cpu(), mask), strict=True):
            trees.append((h, vocabulary.decode(y.tolist())))
    return reorder(order, trees)


def with_root_first(arcs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``[1 + T, T]`` from ``[T, T]`` with the root's on the diagonal: row h is the head h, as heads count."""
    root = np.diagonal(arcs)
    return np.concatenate([root[None], arcs - np.diag(root)])


def words_that_are_no_punctuation(sentence: TreebankSentence) -> npt.NDArray[np.bool_]:
    """Bool ``[T]``, by the universal part of speech where there is one, else by the relation."""
    if set(sentence.upos) <= {"_"}:
        return np.array([relation.partition(":")[0] != "punct" for relation in sentence.relations], dtype=bool)
    return np.array([tag != "PUNCT" for tag in sentence.upos], dtype=bool)
