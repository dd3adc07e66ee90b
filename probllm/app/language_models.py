"""The language models that the comparison sets side by side: counts, an LSTM, a Transformer, and their mixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from probllm.data import Dataset, Windows
from probllm.models import CausalLM, LanguageModel, MixtureLM, NGramModel
from probllm.nn import RecurrentDecoder, TransformerDecoder
from probllm.nn.decoder import Decoder
from probllm.training import Run, fit

ORDERS = (3, 4, 5, 6, 7, 8, 10)  # among which the dev text chooses


@dataclass
class Task:
    """A text to learn from, one to choose by and one to be judged on, as tokens."""

    about: str
    vocabulary: list[str]
    train: Tensor
    dev: Tensor
    test: Tensor


class Training(NamedTuple):
    """How the models are trained."""

    small: bool
    epochs: int | None
    folder: Path
    progress: bool
    seed: int


@dataclass
class Learned:
    """A model, and what it took."""

    model: LanguageModel
    train_seconds: float
    parameters: int
    run: Run | None = None
    note: str = ""


class Size(NamedTuple):
    """Of the neural models and their training."""

    window: int
    batch: int
    epochs: int
    dim: int
    layers: int
    hidden: int  # units of the LSTM, so that both have about as many weights
    dropout: float


SMALL, FULL = Size(64, 8, 3, 96, 3, 144, 0.0), Size(128, 16, 6, 256, 4, 440, 0.1)


def size_of(training: Training) -> Size:
    """The setting's."""
    return SMALL if training.small else FULL


def counted(order: int | None) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """Kneser-Ney of an order; None: the one that predicts the dev text best."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        begun = time.perf_counter()
        best: tuple[float, NGramModel] | None = None
        for n in ORDERS if order is None else (order,):
            model = NGramModel(len(task.vocabulary), n)
            model.estimate(Dataset([{"text": task.train}]))
            loss = -float(model.token_log_probs({"text": task.dev.unsqueeze(0)}).mean())
            if best is None or loss < best[0]:
                best = loss, model
        assert best is not None
        seconds, model = time.perf_counter() - begun, best[1]
        return Learned(model, seconds, len(model.tree_logs), note=f"order {model.order}")

    return learn


def recurrent(task: Task, size: Size) -> Decoder:
    """An LSTM of two layers."""
    return RecurrentDecoder(len(task.vocabulary) + 1, size.hidden, 2, dropout=size.dropout)


def transformer(task: Task, size: Size) -> Decoder:
    """A Transformer with rotary positions, which looks back as far as a window of training goes."""
    return TransformerDecoder(
        len(task.vocabulary) + 1, size.dim, size.layers, 4, dropout=size.dropout, window=size.window
    )


def neural(
    name: str, decoder: Callable[[Task, Size], Decoder], rate: float
) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """A neural model, trained on windows of the text."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        size = size_of(training)
        pyro.set_rng_seed(training.seed)
        model = CausalLM(decoder(task, size))
        run = fit(
            model, Windows(task.train, size.window), Windows(task.dev, size.window),
            epochs=training.epochs or size.epochs, batch_size=size.batch, learning_rate=rate, clip=float(size.window),
            weight_decay=0.1, folder=training.folder / name / f"seed-{training.seed}", resume=True,
            seed=training.seed, progress=training.progress,
        )  # fmt: skip
        return Learned(model, run.seconds, run.parameters, run)

    return learn


def mixed(counts: str, network: str) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """The mixture of two models that were learned before, with weights from the dev text."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        begun = time.perf_counter()
        ngram = known[counts].model
        assert isinstance(ngram, NGramModel)
        model = MixtureLM(ngram, [known[network].model])
        model.estimate(judging(task.dev, task.train, size_of(training)))
        model.eval()
        seconds = time.perf_counter() - begun + known[counts].train_seconds + known[network].train_seconds
        shares = model.token_shares(judging(task.dev, task.train, size_of(training)))
        note = f"the n-gram model has {shares[0]:.0%} of the weight, averaged over the dev text"
        return Learned(model, seconds, known[counts].parameters + known[network].parameters, None, note)

    return learn


class Candidate(NamedTuple):
    """A model of the comparison."""

    name: str
    about: str
    learn: Callable[[Task, Training, dict[str, Learned]], Learned]
    needs: tuple[str, ...] = ()


CANDIDATES = {
    "5-gram": Candidate("5-gram", "modified Kneser-Ney", counted(5)),
    "n-gram": Candidate("n-gram", "modified Kneser-Ney of the order that the dev text likes best", counted(None)),
    "lstm": Candidate("LSTM", "two layers", neural("lstm", recurrent, 4e-3)),
    "transformer": Candidate("Transformer", "as many weights as the LSTM", neural("transformer", transformer, 2e-3)),
    "mixture": Candidate(
        "n-gram + Transformer", "mixed exactly, weights from the dev text", mixed("n-gram", "transformer"),
        ("n-gram", "transformer"),
    ),
}  # fmt: skip


def judging(text: Tensor, before: Tensor, size: Size) -> Windows:
    """Windows that predict every token of a text once, each behind as many tokens as a window of training holds; the
    first stands behind the end of the text before."""
    half = max(1, size.window // 2)
    context = size.window - half
    spare = -len(text) % half  # the first window is filled up with what was before
    start = before[len(before) - context - spare :]
    return Windows(torch.cat([start, text]), half, context)


@torch.no_grad()
def token_nats(model: LanguageModel, text: Tensor, before: Tensor, size: Size) -> np.ndarray:
    """Minus the log probability of each token of a text that goes on from another, ``[N]``, in nats."""
    found = [
        model.token_log_probs(batch).double().flatten()
        for batch in judging(text, before, size).batches(batch_size=64, shuffle=False)
    ]
    nats: np.ndarray = -torch.cat(found)[-len(text) :].numpy()
    return nats
