"""The comparison of language models: counts against networks, and both together, on a text, character by character.

Without files the text is the reference of the Python language; the first nine tenths are learned from, the rest is
judged, each character once.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from probllm.app.comparison import (
    Contrast,
    InputError,
    Measure,
    Outcome,
    Picture,
    Row,
    Settings,
    Text,
    Training,
    check_models,
)
from probllm.app.language_models import (
    CANDIDATES,
    FULL,
    SMALL,
    Learned,
    Task,
    size_of,
    token_nats,
)
from probllm.app.tagging import learning_curve
from probllm.data import python_reference, read_text
from probllm.decoding import Sample, generate
from probllm.evaluation import Estimate, bootstrap, paired_bootstrap, plot_learning
from probllm.evaluation.plots import LINES

QUESTION = "Does a network or a table of counts predict a small text better, and what do they do together?"
UNKNOWN = "�"  # stands for characters that the training text does not have
BLOCK = 200  # characters that the bootstrap draws together
SMALL_TEXT = 180_000  # characters of the embedded text in the small setting
SAMPLE, PROMPT = 300, 50  # characters

MEASURES = [
    Measure("nats/char", -1, 3, meaning="minus the log probability of a character of the test text"),
    Measure("bits/char", -1, 3, meaning="the same in bits"),
    Measure("word perplexity", -1, 1, meaning="exp of the nats of a word with the space behind it"),
    Measure("train s", 0, 1, meaning="seconds of training"),
    Measure("chars/s", 0, 0, compact=True, meaning="characters scored a second"),
    Measure("params", 0, 0, compact=True, meaning="numbers that training sets"),
]


def run(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Train the candidates, judge them on the test text, and lay out what was found.

    Raises:
        InputError: for a file that cannot be read, or a model that does not exist.
    """
    check_models(settings.models, CANDIDATES)
    chosen = list(dict.fromkeys(settings.models or CANDIDATES))
    task = read_task(settings)
    say(task.about)
    folder = settings.folder / f"language-{fingerprint(settings, task)}"
    training = Training(settings.small, settings.epochs, folder, settings.progress, 0)
    order = [key for key in CANDIDATES if key in chosen or any(key in CANDIDATES[each].needs for each in chosen)]
    known: dict[str, Learned] = {}
    nats: dict[str, np.ndarray] = {}
    speed: dict[str, float] = {}
    for key in order:
        known[key] = CANDIDATES[key].learn(task, training, known)
        begun = time.perf_counter()
        nats[key] = token_nats(known[key], task, size_of(training))
        speed[key] = len(task.test) / (time.perf_counter() - begun)
        say(f"{CANDIDATES[key].name}: {nats[key].mean():.3f} nats/char, trained in {known[key].train_seconds:.1f} s")
    shutil.rmtree(folder, ignore_errors=True)  # nothing is left to resume: the same command starts anew
    return lay_out(task, {key: known[key] for key in chosen}, nats, speed)


def read_task(settings: Settings) -> Task:
    """The text that the settings name, else the embedded one; its first twentieth is to choose by, for what stands
    before the text to be judged on tells most about that."""
    if settings.column is not None:
        raise InputError("--column is for taggers: language models read plain text")
    if settings.train is None:
        if settings.dev is not None or settings.test is not None:
            raise InputError("a text to train on is needed beside the others; missing: --train")
        reference = python_reference()
        text = reference.text[:SMALL_TEXT] if settings.small else reference.text
        origin = f"The reference of the Python language (SHA-256 {reference.sha256[:8]})"
        learn, test = split(text)
        dev = ""
    else:
        learn, dev, test = (read(path) if path else "" for path in (settings.train, settings.dev, settings.test))
        origin = str(settings.train)
        if not test:
            learn, test = split(learn)
    if not dev:
        cut = len(learn) // 20
        dev, learn = learn[:cut], learn[cut:]
    window = SMALL.window if settings.small else FULL.window
    for name, part in (("train", learn), ("dev", dev), ("test", test)):
        if len(part) < 4 * window:
            raise InputError(f"the text to {name} has {len(part)} characters; at least {4 * window} are needed")
    vocabulary = [UNKNOWN, *sorted(set(learn) - {UNKNOWN})]
    number = {character: i for i, character in enumerate(vocabulary)}
    parts = [torch.tensor([number.get(character, 0) for character in part]) for part in (learn, dev, test)]
    threads = torch.get_num_threads()
    about = (
        f"{origin}: {len(learn):,} characters to learn from, {len(dev):,} to choose by, {len(test):,} to be judged on, "
        f"each once; {len(vocabulary) - 1} different ones; {threads} thread{'s' * (threads > 1)}."
    )
    return Task(about, vocabulary, *parts)


def split(text: str) -> tuple[str, str]:
    """The first nine tenths and the rest."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def read(path: Path) -> str:
    """A text file."""
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def fingerprint(settings: Settings, task: Task) -> str:
    """Tells the checkpoints of one command from those of another: eight characters of what decides a training run."""
    decided = f"{settings.small} {settings.epochs} {task.vocabulary}".encode()
    return hashlib.sha256(decided + task.train.numpy().tobytes() + task.dev.numpy().tobytes()).hexdigest()[:8]


def lay_out(task: Task, learned: dict[str, Learned], nats: dict[str, np.ndarray], speed: dict[str, float]) -> Outcome:
    """The table, the paired differences, pictures and samples."""
    names = {key: CANDIDATES[key].name for key in learned}
    starts = np.arange(0, len(task.test), BLOCK)
    sizes = np.diff(np.append(starts, len(task.test)))
    blocks = {key: np.add.reduceat(nats[key], starts) for key in learned}
    rows, contrasts, notes = [], [], []
    words = word_count(task)
    for key, each in learned.items():
        found = bootstrap(blocks[key], sizes)
        bits = Estimate(*(x / math.log(2) for x in found))
        rows.append(Row(names[key], CANDIDATES[key].about, {
            "nats/char": found, "bits/char": bits, "word perplexity": math.exp(nats[key].sum() / words),
            "train s": each.train_seconds, "chars/s": speed[key], "params": float(each.parameters),
        }))  # fmt: skip
        if each.note:
            notes.append(f"{names[key]}: {each.note}.")
    best = min(learned, key=lambda key: nats[key].sum())
    for key in learned:
        if key != best:
            difference = paired_bootstrap(blocks[best], blocks[key], sizes)
            contrasts.append(Contrast(names[best], names[key], "nats/char", difference))
    can_draw = find_spec("matplotlib") is not None
    if not can_draw:
        notes.append("No pictures without matplotlib: pip install 'probllm[plots]'")
    drawn = pictures(learned) if can_draw else []
    outcome = Outcome("language", QUESTION, task.about, MEASURES, rows, contrasts, drawn, notes)
    outcome.texts = samples(task, learned)
    return outcome


def word_count(task: Task) -> int:
    """How many words the test text has."""
    return max(1, len("".join(task.vocabulary[i] for i in task.test.tolist()).split()))


def pictures(learned: dict[str, Learned]) -> list[Picture]:
    """Learning curves of the networks."""
    colors = dict(zip((CANDIDATES[key].name for key in learned), LINES, strict=False))
    curves = {CANDIDATES[key].name: learning_curve(each.run) for key, each in learned.items() if each.run is not None}
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if not curves:
        return []
    caption = "Minus the log probability of a window of the text to choose by, epoch by epoch."
    return [Picture("Learning", caption, plot_learning(curves, y="nats a window", colors=colors))]


def samples(task: Task, learned: dict[str, Learned]) -> list[Text]:
    """How each model goes on from the beginning of the test text."""
    prompt = task.test[:PROMPT].unsqueeze(0)
    shown = "".join(task.vocabulary[i] for i in prompt[0].tolist())
    found = []
    for key, each in learned.items():
        generator = torch.Generator().manual_seed(0)
        drawn = generate(each.model, prompt, SAMPLE, Sample(temperature=0.8), generator=generator).tokens[0, 0]
        text = "".join(task.vocabulary[i] for i in drawn.tolist())
        found.append(Text(CANDIDATES[key].name, f"after “{shown.strip()}”, at temperature 0.8", text))
    return found
