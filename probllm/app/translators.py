"""The encoder-decoders that the comparison sets side by side, and how symbols or subwords go in and come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro
import torch

from probllm.app.comparison import Training
from probllm.app.transducers import Example
from probllm.app.verdict import in_batches, reorder
from probllm.data import Dataset, Subwords, TransductionVocabulary
from probllm.data.subwords import BOS, EOS
from probllm.data.transduction import Pair
from probllm.decoding import Beam, Greedy
from probllm.decoding.generate import Method
from probllm.models import Seq2Seq
from probllm.nn import RecurrentDecoder, RecurrentEncoder, TransformerDecoder, TransformerEncoder, WordEmbedding
from probllm.training import Run, fast_bfloat16, fit

BEAM = Beam(5, length_penalty=1.0)
BATCH = 64  # that are written at a time
CLIP = 20.0  # the loss is a sum over a target's tokens


class Codec(Protocol):
    """Text to ids and back."""

    sources: int
    """Ids of sources."""
    targets: int
    """Ids of targets, and of the token that is read before them."""
    end: int
    begin: int
    shared: bool
    """Whether both sides have the same ids."""

    def dataset(self, pairs: Iterable[tuple[Any, Any]]) -> Dataset: ...
    def decode(self, ids: Sequence[int]) -> Any: ...


class Symbols:
    """Sequences of symbols, such as letters and phonemes; each side has its own."""

    shared = False

    def __init__(self, vocabulary: TransductionVocabulary) -> None:
        self.vocabulary = vocabulary
        self.sources = len(vocabulary.sources)
        self.end, self.begin = len(vocabulary.targets), len(vocabulary.targets) + 1
        self.targets = self.begin + 1

    def dataset(self, pairs: Iterable[tuple[Any, Any]]) -> Dataset:
        """Examples of sources and targets, ``end`` behind these."""
        found = self.vocabulary.dataset(Pair(*pair) for pair in pairs)
        end = torch.tensor([self.end])
        return Dataset({**example, "target": torch.cat([example["target"], end])} for example in found)  # type: ignore[list-item]

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The symbols of a target."""
        return tuple(self.vocabulary.targets.decode(i for i in ids if i not in (self.begin, self.end)))


class Pieces:
    """Sentences in subwords that both languages share."""

    shared = True
    begin, end = BOS, EOS

    def __init__(self, subwords: Subwords) -> None:
        self.subwords = subwords
        self.sources = self.targets = len(subwords)

    def dataset(self, pairs: Iterable[tuple[Any, Any]]) -> Dataset:
        """Examples of sources and targets, ``end`` behind both."""
        encode = self.subwords.encode
        return Dataset(
            {"inputs": torch.tensor([*encode(source), EOS]), "target": torch.tensor([*encode(target), EOS])}
            for source, target in pairs
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a target."""
        return self.subwords.decode(ids).strip()


@dataclass
class Task:
    """Pairs to learn from and to stop by, sources to be judged on, and how to encode them."""

    about: str
    train: list[tuple[Any, Any]]
    dev: list[tuple[Any, Any]]
    test: list[Example]
    codec: Codec


@dataclass
class Answers:
    """What a model wrote for the test sources, and what it took."""

    written: list[Any]
    nats: float
    """Minus the log probability of the first right target of the test sources, a token, ``end`` counted."""
    per_second: float
    run: Run


class Size(NamedTuple):
    """Of the models and their training."""

    dim: int
    layers: int
    hidden: int  # units of the recurrent decoder, and of both directions of its encoder
    dropout: float
    batch: int
    epochs: int
    smoothing: float


def size_of(task: Task, small: bool) -> Size:
    """By setting, and by whether words or letters are written."""
    if task.codec.shared:
        return Size(128, 2, 192, 0.1, 32, 4, 0.1) if small else Size(256, 3, 384, 0.3, 64, 18, 0.1)
    return Size(96, 2, 128, 0.1, 32, 6, 0.0) if small else Size(256, 3, 320, 0.1, 128, 14, 0.1)


def embeddings(task: Task, dim: int) -> tuple[WordEmbedding, WordEmbedding]:
    """Of sources and targets: one and the same where both have the same ids."""
    target = WordEmbedding(task.codec.targets, dim)
    return (target if task.codec.shared else WordEmbedding(task.codec.sources, dim)), target


def recurrent(task: Task, size: Size) -> Seq2Seq:
    """A BiLSTM that is read, an LSTM with attention that writes."""
    source, target = embeddings(task, size.hidden)
    encoder = RecurrentEncoder(source, size.hidden // 2, 1 if size.layers < 3 else 2, dropout=size.dropout)
    decoder = RecurrentDecoder(target, size.hidden, 1, dropout=size.dropout, memory_dim=encoder.dim)
    return Seq2Seq(encoder, decoder, task.codec.end, task.codec.begin, label_smoothing=size.smoothing)


def transformer(task: Task, size: Size) -> Seq2Seq:
    """Transformers with rotary positions on both sides."""
    source, target = embeddings(task, size.dim)
    encoder = TransformerEncoder(source, size.dim, size.layers, 4, dropout=size.dropout)
    decoder = TransformerDecoder(target, size.dim, size.layers, 4, dropout=size.dropout, memory_dim=size.dim)
    return Seq2Seq(encoder, decoder, task.codec.end, task.codec.begin, label_smoothing=size.smoothing)


class Candidate(NamedTuple):
    """A model of the comparison; those of one ``key`` are one model whose targets are found in different ways."""

    name: str
    about: str
    make: Callable[[Task, Size], Seq2Seq]
    rate: float
    method: Method
    trained_as: str


CANDIDATES = {
    "lstm": Candidate("LSTM", "with attention (Luong), greedy", recurrent, 2e-3, Greedy(), "lstm"),
    "lstm-beam": Candidate("LSTM, beam", "the same, a beam of 5", recurrent, 2e-3, BEAM, "lstm"),
    "transformer": Candidate("Transformer", "rotary positions, greedy", transformer, 1e-3, Greedy(), "transformer"),
    "transformer-beam": Candidate("Transformer, beam", "the same, a beam of 5", transformer, 1e-3, BEAM, "transformer"),
}


def learn(task: Task, training: Training, candidate: Candidate) -> tuple[Seq2Seq, Run]:
    """A model, trained, and its run."""
    size = size_of(task, training.small)
    pyro.set_rng_seed(training.seed)
    model = candidate.make(task, size)
    place = training.folder / candidate.trained_as / f"seed-{training.seed}"
    run = fit(
        model, task.codec.dataset(task.train), task.codec.dataset(task.dev), epochs=training.epochs or size.epochs,
        batch_size=size.batch, learning_rate=candidate.rate, folder=place, resume=True, seed=training.seed,
        progress=training.progress, mixed_precision=not training.small and fast_bfloat16(), clip=CLIP,
    )  # fmt: skip
    return model, run


@torch.no_grad()
def answer(task: Task, model: Seq2Seq, run: Run, method: Method) -> Answers:
    """What a trained model writes, and how probable it finds what is right."""
    pairs = [(source, targets[0]) for source, targets in task.test]
    order, batches = in_batches(task.codec.dataset(pairs), BATCH, "cpu")
    begun = time.perf_counter()
    rows = [row for batch in batches for row in model.predict(batch, method).tolist()]
    spent = time.perf_counter() - begun
    written = [task.codec.decode(row[: row.index(0)] if 0 in row else row) for row in reorder(order, rows)]
    nats = -sum(float(model.log_prob(batch).sum()) for batch in batches)
    tokens = sum(int((batch["target"] != 0).sum()) for batch in batches)
    return Answers(written, nats / tokens, len(pairs) / spent, run)
