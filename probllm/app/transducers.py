"""The transducers that the comparison sets side by side, and what becomes of each: its answers and its cost.

A joint n-gram model aligns first (EM, then counts on the best cuts), CTC sums over all alignments at every step of
training. Together: the n-gram model's candidates, and CTC's, by the sum of both models' log probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch

from probllm.app.comparison import Training
from probllm.app.verdict import in_batches, reorder
from probllm.data import Pair, TransductionVocabulary
from probllm.models import CTCTransducer
from probllm.models.joint_ngram import JointNGram
from probllm.nn import Encoder, RecurrentEncoder, TransformerEncoder
from probllm.training import Run, fit

FRAMES = 2  # that each letter makes
CANDIDATES = 8  # of the n-gram model that are scored again
BATCH = 128


class Example(NamedTuple):
    """A source and the ways to write it, any of which is right."""

    source: Sequence[str]
    targets: Sequence[Sequence[str]]


@dataclass
class Answers:
    """What a transducer wrote for the test examples, and what it took."""

    written: list[tuple[str, ...]]
    train_seconds: float
    per_second: float
    parameters: int
    run: Run | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """Examples to learn from, to stop by and to be judged on."""

    about: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    vocabulary: TransductionVocabulary


def pairs_of(examples: Sequence[Example]) -> list[Pair]:
    """A pair for each way."""
    return [Pair(example.source, target) for example in examples for target in example.targets]


def fits(pair: Pair) -> bool:
    """Whether the frames of the source can hold the target, with a blank between repeated symbols."""
    repeats = sum(a == b for a, b in zip(pair.target[:-1], pair.target[1:], strict=True))
    return len(pair.target) + repeats <= FRAMES * len(pair.source)


def joint_ngram(task: Task, training: Training) -> Answers:
    """EM alignments, then n-grams of the pairs."""
    begun = time.perf_counter()
    model = JointNGram([(pair.source, pair.target) for pair in pairs_of(task.train)], order=5 if training.small else 8)
    seconds = time.perf_counter() - begun
    sources = [example.source for example in task.test]
    model.best(sources[:1])  # compiled before the clock runs
    begun = time.perf_counter()
    ranked = model.best(sources, CANDIDATES)
    spent = time.perf_counter() - begun
    written = [tuple(map(str, ways[0][1])) if ways else () for ways in ranked]
    size = sum(len(array) for array in model.ngrams.arrays())
    return Answers(written, seconds, len(sources) / spent, size, extra={"model": model, "ranked": ranked})


def recurrent(task: Task, small: bool) -> Encoder:
    """A BiLSTM over letters."""
    letters = len(task.vocabulary.sources)
    return RecurrentEncoder(letters, 128, 1, dropout=0.1) if small else RecurrentEncoder(letters, 256, 2, dropout=0.2)


def transformer(task: Task, small: bool) -> Encoder:
    """A Transformer over letters."""
    letters = len(task.vocabulary.sources)
    if small:
        return TransformerEncoder(letters, dim=96, layers=2, heads=4, dropout=0.1)
    return TransformerEncoder(letters, dim=256, layers=4, heads=4, dropout=0.1)


def ctc(name: str, encoder: Callable[[Task, bool], Encoder], rate: float) -> Callable[[Task, Training], Answers]:
    """CTC on an encoder."""

    def train(task: Task, training: Training) -> Answers:
        pyro.set_rng_seed(training.seed)
        model = CTCTransducer(encoder(task, training.small), task.vocabulary.num_labels, FRAMES)
        learn, stop = (task.vocabulary.dataset(filter(fits, pairs_of(part))) for part in (task.train, task.dev))
        epochs = training.epochs or (6 if training.small else 10)
        run = fit(
            model, learn, stop, epochs=epochs, batch_size=64 if training.small else BATCH, learning_rate=rate,
            folder=training.folder / name / f"seed-{training.seed}", resume=True, seed=training.seed,
            progress=training.progress,
        )  # fmt: skip
        order, batches = in_batches(task.vocabulary.dataset(Pair(x.source, ()) for x in task.test), BATCH, "cpu")
        begun = time.perf_counter()
        rows = [row for batch in batches for row in model.predict(batch)]
        spent = time.perf_counter() - begun
        written = [tuple(task.vocabulary.decode(row)) for row in reorder(order, rows)]
        return Answers(written, run.seconds, len(task.test) / spent, run.parameters, run, {"model": model})

    return train


def together(task: Task, ngram: Answers, neural: Answers) -> Answers:
    """The candidate of the greatest sum of both log probabilities, the n-gram model's weighed as serves the dev set."""
    begun = time.perf_counter()
    dev = ngram.extra["model"].best([x.source for x in task.dev], CANDIDATES)
    known = [
        _scored(task, part, ranked, neural) for part, ranked in ((task.dev, dev), (task.test, ngram.extra["ranked"]))
    ]

    def choose(part: list[list[tuple[float, float, tuple[str, ...]]]], weight: float) -> list[tuple[str, ...]]:
        return [max(ways, key=lambda way: weight * way[0] + way[1])[2] if ways else () for ways in part]

    def right(weight: float) -> int:
        chosen = choose(known[0], weight)
        return sum(written in example.targets for written, example in zip(chosen, task.dev, strict=True))

    weight = max((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0), key=right)
    spent = time.perf_counter() - begun
    seconds = ngram.train_seconds + neural.train_seconds
    size = ngram.parameters + neural.parameters
    per_second = (len(task.dev) + len(task.test)) / spent
    return Answers(choose(known[1], weight), seconds, per_second, size, extra={"weight": weight})


def _scored(
    task: Task, examples: list[Example], ranked: list[list[tuple[float, tuple[str, ...]]]], neural: Answers
) -> list[list[tuple[float, float, tuple[str, ...]]]]:
    """Candidates of each example with the log probability of the n-gram model and that of CTC."""
    model, vocabulary = neural.extra["model"], task.vocabulary
    sources = vocabulary.dataset(Pair(x.source, ()) for x in examples)
    order, batches = in_batches(sources, BATCH, "cpu")
    own = reorder(order, [row for batch in batches for row in model.predict(batch)])
    pairs, logs = [], []
    for index, (example, ways) in enumerate(zip(examples, ranked, strict=True)):
        least = min((log for log, _ in ways), default=0.0)
        candidates = {target: log for log, target in ways}
        candidates.setdefault(tuple(vocabulary.decode(own[index])), least - 2.0)  # below all that were found
        for target, log in candidates.items():
            pairs.append(Pair(example.source, target))
            logs.append((index, log, target))
    order, batches = in_batches(vocabulary.dataset(pairs), 4 * BATCH, "cpu")
    with torch.no_grad():
        scores = reorder(order, [x for batch in batches for x in model.log_prob(batch).tolist()])
    found: list[list[tuple[float, float, tuple[str, ...]]]] = [[] for _ in examples]
    for (index, log, target), score in zip(logs, scores, strict=True):
        found[index].append((log, score, target))
    return found


class Candidate(NamedTuple):
    """A transducer that takes part; ``train`` is None for what is made of two others."""

    key: str
    name: str
    about: str
    train: Callable[[Task, Training], Answers] | None


NGRAM, LSTM, TRANSFORMER, BOTH = "joint-ngram", "ctc-bilstm", "ctc-transformer", "ngram+ctc"
ALL = {
    candidate.key: candidate
    for candidate in (
        Candidate(NGRAM, "joint n-gram", "aligns by EM, then counts n-grams of pairs (Kneser-Ney)", joint_ngram),
        Candidate(LSTM, "BiLSTM-CTC", "sums over all alignments", ctc(LSTM, recurrent, 3e-3)),
        Candidate(TRANSFORMER, "Transformer-CTC", "sums over all alignments", ctc(TRANSFORMER, transformer, 1e-3)),
        Candidate(BOTH, "n-gram + BiLSTM-CTC", "both models' log probabilities, summed", None),
    )
}
