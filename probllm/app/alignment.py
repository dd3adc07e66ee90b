"""The comparison of transducers: aligning two sequences first, against summing over all their alignments.

Without files letters become phonemes, from the CMU Pronouncing Dictionary; files have a source and a target a line,
parted by a tab.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    Training,
    check_models,
    files_of,
)
from probllm.app.tagging import learning_curve
from probllm.app.transducers import ALL, BOTH, FRAMES, LSTM, NGRAM, Answers, Example, Task, pairs_of, together
from probllm.data import Dataset, Pair, TransductionVocabulary, letters_to_phonemes
from probllm.data.lines import malformed, numbered_lines
from probllm.evaluation import EditErrors, bootstrap, edit_errors, paired_bootstrap, plot_learning, plot_marginals
from probllm.evaluation.plots import LINES

QUESTION = "Do letters find their phonemes better if they are aligned first, or if all alignments are summed?"
SMALL_SIZES = (8000, 400, 1500)  # words to train on, to stop by and to test on: two minutes in all
EXAMPLES = 3  # words that are drawn

ERRORS = [
    Measure("WER", -1, 2, percent=True, meaning="share of words whose target is none of the right ones"),
    Measure("PER", -1, 2, percent=True, meaning="edits to the nearest right target, over its length"),
]
MEASURES = [
    *ERRORS,
    Measure("train s", 0, 1, meaning="seconds of training"),
    Measure("words/s", 0, 0, compact=True, meaning="words written a second, from ids"),
    Measure("params", 0, 0, compact=True, meaning="numbers that training sets"),
]


def run(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Train the candidates, judge them on the test words, and lay out what was found.

    Raises:
        InputError: for a file that cannot be read, or a model that does not exist.
    """
    check_models(settings.models, ALL)
    chosen = list(dict.fromkeys(settings.models or ALL))
    task = read_task(settings)
    say(task.about)
    folder = settings.folder / f"alignment-{fingerprint(settings, task)}"
    training = Training(settings.small, settings.epochs, folder, settings.progress, 0)
    needed = dict.fromkeys([key for key in chosen if key != BOTH] + ([NGRAM, LSTM] if BOTH in chosen else []))
    answers: dict[str, Answers] = {}
    for key in needed:
        train = ALL[key].train
        assert train is not None
        answers[key] = train(task, training)
        tell(task, key, answers[key], say)
    if BOTH in chosen:
        answers[BOTH] = together(task, answers[NGRAM], answers[LSTM])
        tell(task, BOTH, answers[BOTH], say)
    outcome = lay_out(task, {key: answers[key] for key in chosen})
    shutil.rmtree(folder, ignore_errors=True)  # nothing is left to resume: the same command starts anew
    return outcome


def tell(task: Task, key: str, answers: Answers, say: Callable[[str], None]) -> None:
    """One line about a model that is done."""
    say(f"{ALL[key].name}: {rates(errors(task, answers))}, trained in {answers.train_seconds:.1f} s")


def rates(found: EditErrors) -> str:
    """Both error rates, in words."""
    wer, per = 100 * found.wrong.mean(), 100 * found.edits.sum() / max(1, found.length.sum())
    return f"WER {wer:.2f} %, PER {per:.2f} %"


def errors(task: Task, answers: Answers) -> EditErrors:
    """Of the test words."""
    return edit_errors(answers.written, [example.targets for example in task.test])


def read_task(settings: Settings) -> Task:
    """The words that the settings name, else the embedded ones."""
    if settings.column is not None:
        raise InputError("--column is for taggers: transducers read a source and a target, parted by a tab")
    files = files_of(settings)
    if files is None:
        origin, parts = "CMU Pronouncing Dictionary, without stress", embedded()
        if settings.small:
            parts = [part[:size] for part, size in zip(parts, SMALL_SIZES, strict=True)]
    else:
        origin, parts = f"{settings.train}", [read_file(path) for path in files]
    sizes = ", ".join(
        f"{len(part):,} {purpose}"
        for purpose, part in zip(("words to train on", "to stop by", "to test on"), parts, strict=True)
    )
    threads = torch.get_num_threads()
    about = f"{origin}: {sizes}; {threads} thread{'s' * (threads > 1)}. The nearest of several right targets counts."
    learn, stop, test = parts
    return Task(about, learn, stop, test, TransductionVocabulary.build(pairs_of(learn)))


def embedded() -> list[list[Example]]:
    """Letters and phonemes."""
    try:
        split = letters_to_phonemes()
    except ImportError as error:
        raise InputError(f"{error}, or give --train, --dev and --test") from error
    return [[Example(word.word, word.phonemes) for word in part] for part in split]


def read_file(path: Path) -> list[Example]:
    """Lines of a source, a tab and a target; symbols are characters, or parted by spaces where there are any.

    Lines of the same source are ways to write it.
    """
    ways: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    try:
        for number, line in numbered_lines(path):
            fields = line.split("\t")
            if len(fields) != 2 or not fields[0].strip():
                raise malformed(path, number, f"expected 'SOURCE<tab>TARGET', got {line!r}")
            source, target = (tuple(x.split()) if " " in x.strip() else tuple(x.strip()) for x in fields)
            ways.setdefault(source, {})[target] = None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    return [Example(source, list(targets)) for source, targets in ways.items()]


def fingerprint(settings: Settings, task: Task) -> str:
    """Tells the checkpoints of one command from those of another: eight characters of what decides a training run."""
    words = [(x.source, list(x.targets)) for part in (task.train, task.dev) for x in part]
    return hashlib.sha256(json.dumps([settings.small, settings.epochs, words]).encode()).hexdigest()[:8]


def lay_out(task: Task, answers: dict[str, Answers]) -> Outcome:
    """The table, the paired differences and the pictures."""
    found = {key: errors(task, each) for key, each in answers.items()}
    rows = [
        Row(ALL[key].name, ALL[key].about, {
            "WER": bootstrap(found[key].wrong), "PER": bootstrap(found[key].edits, found[key].length),
            "train s": each.train_seconds, "words/s": each.per_second, "params": float(each.parameters),
        })
        for key, each in answers.items()
    ]  # fmt: skip
    contrasts = []
    keys = list(answers)
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            a, b = found[second], found[first]
            difference = paired_bootstrap(a.wrong, b.wrong)
            contrasts.append(Contrast(ALL[second].name, ALL[first].name, "WER", difference))
    notes = []
    if BOTH in answers:
        weight = answers[BOTH].extra["weight"]
        notes.append(
            f"In the sum the n-gram model's log probabilities are weighed by {weight}, chosen on the dev words."
        )
    can_draw = find_spec("matplotlib") is not None
    if not can_draw:
        notes.append("No pictures without matplotlib: pip install 'probllm[plots]'")
    drawn = pictures(task, answers) if can_draw else []
    return Outcome("alignment", QUESTION, task.about, MEASURES, rows, contrasts, drawn, notes)


def pictures(task: Task, answers: dict[str, Answers]) -> list[Picture]:
    """Learning curves, and the alignments of a few words."""
    neural = {key: each for key, each in answers.items() if each.run is not None}
    if not neural:
        return []
    colors = dict(zip((ALL[key].name for key in neural), LINES, strict=False))
    curves = {ALL[key].name: learning_curve(each.run) for key, each in neural.items() if each.run is not None}
    found = [
        Picture(
            "Learning",
            "Minus the log probability of the targets of the words to stop by, epoch by epoch.",
            plot_learning(
                {name: curve for name, curve in curves.items() if len(curve[0]) > 1}, y="nats a word", colors=colors
            ),
        )
    ]
    key, best = min(neural.items(), key=lambda item: errors(task, item[1]).wrong.sum())
    for example in [x for x in task.test if 5 <= len(x.source) <= 10][:EXAMPLES]:
        target = example.targets[0]
        caption = "Each letter's column shows how likely it is that it writes a phoneme, over all alignments."
        figure = plot_marginals(
            letters_of(best.extra["model"], task.vocabulary, Pair(example.source, target)),
            list(example.source),
            [f"{number} {symbol}" for number, symbol in enumerate(target, start=1)],
        )
        title = f"{ALL[key].name}: “{''.join(example.source)}” is {' '.join(target)}"
        found.append(Picture(title, caption, figure, group="Alignments"))
    return found


@torch.no_grad()
def letters_of(model: Any, vocabulary: TransductionVocabulary, pair: Pair) -> np.ndarray:
    """Probability that a symbol of the source writes each of the target, ``[source, target]``."""
    batch: Any = Dataset.collate(vocabulary.dataset([pair]).examples)
    law = model.law(batch).posterior(batch["target"])
    states = law.marginals[0, : FRAMES * len(pair.source), 1::2]  # [frames, labels]
    found: np.ndarray = states.unflatten(0, (-1, FRAMES)).amax(1).numpy()
    return found
