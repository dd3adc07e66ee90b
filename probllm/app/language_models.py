"""The language models that the comparison sets side by side: counts, an LSTM, a Transformer, and mixtures of them, as
they were trained or going on learning while they read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from probllm.app.comparison import Training
from probllm.data import Dataset, Windows
from probllm.models import AdaptiveNGram, CausalLM, DynamicLM, LanguageModel, MixtureLM, NGramModel
from probllm.models.model import Batch
from probllm.nn import RecurrentDecoder, TransformerDecoder
from probllm.nn.decoder import Decoder
from probllm.training import Run, fast_bfloat16, fit
from probllm.training.optimisers import OptimiserName

ORDERS = (3, 4, 5, 6, 7, 8, 10)  # among which the dev text chooses
ADAPTIVE = ((3, False), (6, False), (16, False), (5, True))  # orders, and whether this text alone is counted


@dataclass
class Task:
    """A text to learn from, one to choose by and one to be judged on, as tokens."""

    about: str
    vocabulary: list[str]
    train: Tensor
    dev: Tensor
    test: Tensor


@dataclass
class Learned:
    """A model, and what it took."""

    model: LanguageModel
    train_seconds: float
    parameters: int
    run: Run | None = None
    note: str = ""
    learns: bool = False  # while it reads: it is judged in one go, and reads the text to choose by before


class Size(NamedTuple):
    """Of the neural models and their training."""

    window: int
    batch: int
    epochs: int
    dim: int
    layers: int
    hidden: int  # units of the LSTM, so that both have about as many weights
    dropout: float


SMALL, FULL = Size(64, 8, 3, 96, 3, 144, 0.0), Size(256, 16, 10, 256, 4, 440, 0.1)


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
        len(task.vocabulary) + 1, size.dim, size.layers, 4, dropout=size.dropout, window=size.window, qk_norm=True
    )


def neural(
    name: str, decoder: Callable[[Task, Size], Decoder], rate: float, optimiser: OptimiserName
) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """A neural model, trained on windows of the text."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        size = size_of(training)
        pyro.set_rng_seed(training.seed)
        model = CausalLM(decoder(task, size))
        run = fit(
            model, Windows(task.train, size.window), Windows(task.dev, size.window),
            epochs=training.epochs or size.epochs, batch_size=size.batch, learning_rate=rate, clip=float(size.window),
            weight_decay=0.1, folder=training.folder / name / f"seed-{training.seed}", resume=True, optimiser=optimiser,
            seed=training.seed, progress=training.progress, mixed_precision=not training.small and fast_bfloat16(),
        )  # fmt: skip
        return Learned(model, run.seconds, run.parameters, run)

    return learn


def mixed(counts: str, network: str) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """The mixture of two models that were learned before, with weights from the dev text."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        begun = time.perf_counter()
        parts = [known[counts], known[network]]
        model = MixtureLM([part.model for part in parts], learns=False)
        model.estimate(judging(task.dev, task.train, size_of(training)), passes=2)
        model.eval()
        seconds = time.perf_counter() - begun + sum(part.train_seconds for part in parts)
        return Learned(model, seconds, sum(part.parameters for part in parts))

    return learn


def adaptive(network: str | None) -> Callable[[Task, Training, dict[str, Learned]], Learned]:
    """Counts of several orders that go on counting, and a network that was learned before and goes on training, in a
    mixture whose weights go on learning too."""

    def learn(task: Task, training: Training, known: dict[str, Learned]) -> Learned:
        begun = time.perf_counter()
        learning = Dataset([{"text": task.train}])
        models: list[LanguageModel] = []
        parameters = 0
        for order, cache in ADAPTIVE:
            counted = AdaptiveNGram(len(task.vocabulary), order, cache)
            counted.estimate(learning)
            models.append(counted)
            parameters += len(counted.tree_counts)
        seconds = 0.0
        if network is not None:
            trained, size = known[network], size_of(training)
            assert isinstance(trained.model, CausalLM)
            half = max(1, size.window // 2)
            dynamic = DynamicLM(trained.model, half, size.window - half)
            dynamic.estimate(Windows(task.train, size.window))
            models.append(dynamic)
            parameters, seconds = parameters + trained.parameters, trained.train_seconds
        model = MixtureLM(models)
        model.estimate(Dataset([{"text": task.dev}]))
        model.eval()
        return Learned(model, seconds + time.perf_counter() - begun, parameters, learns=True)

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
    "lstm": Candidate("LSTM", "two layers", neural("lstm", recurrent, 4e-3, "adamw")),
    "transformer": Candidate(
        "Transformer", "as many weights as the LSTM", neural("transformer", transformer, 1e-2, "muon")
    ),
    "mixture": Candidate(
        "n-gram + Transformer", "mixed exactly, weights from the dev text", mixed("n-gram", "transformer"),
        ("n-gram", "transformer"),
    ),
    "adaptive": Candidate("n-grams that learn", "four kinds of counts that go on counting", adaptive(None)),
    "adaptive-mixture": Candidate(
        "n-grams + Transformer that learn", "all go on learning as they read", adaptive("transformer"),
        ("transformer",),
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
def token_nats(learned: Learned, task: Task, size: Size) -> np.ndarray:
    """Minus the log probability of each token of the test text, which follows the training text, ``[N]``, in nats."""
    if learned.learns:
        batches: Iterable[Batch] = [{"text": task.test.unsqueeze(0), "prefix": task.dev.unsqueeze(0)}]
    else:
        batches = judging(task.test, task.train, size).batches(batch_size=64, shuffle=False)
    found = [learned.model.token_log_probs(batch).double().flatten() for batch in batches]
    nats: np.ndarray = -torch.cat(found)[-len(task.test) :].numpy()
    return nats
