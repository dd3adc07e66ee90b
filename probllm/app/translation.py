"""The comparison of encoder-decoders: a sequence is read whole and another written, by recurrence or attention.

Without files letters become phonemes, from the CMU Pronouncing Dictionary. Files are sentences, one a line, and the
translations lie beside them: ``train.en`` and ``train.de``, or ``train.en.gz`` and ``train.de.gz``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from probllm.app.alignment import ERRORS, SMALL_SIZES, embedded, rates
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
    files_of,
)
from probllm.app.tagging import learning_curve
from probllm.app.transducers import Example, pairs_of
from probllm.app.translators import CANDIDATES, Answers, Codec, Pieces, Symbols, Task, answer, learn
from probllm.data import Subwords, TransductionVocabulary, read_parallel_lines
from probllm.evaluation import (
    Estimate,
    bleu,
    bleu_counts,
    bootstrap,
    edit_errors,
    paired_bleu,
    paired_bootstrap,
    plot_learning,
)
from probllm.evaluation.plots import LINES

QUESTION = "Do attention alone and a beam write better than recurrence and the best symbol at each step?"
SUBWORDS = {True: 2000, False: 8000}  # by setting: small or not
SHOWN = 8  # test sources whose answers are shown

SENTENCES = [Measure("BLEU", 1, 2, meaning="sacreBLEU of the whole test set, 13a tokens, case counts")]
COMMON = [
    Measure("nats/token", -1, 3, meaning="minus the log probability of a token of the first right target"),
    Measure("train s", 0, 1, meaning="seconds of training"),
    Measure("sources/s", 0, 0, compact=True, meaning="sources answered a second, from ids"),
    Measure("params", 0, 0, compact=True, meaning="numbers that training sets"),
]


def run(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Train the candidates, judge what they write for the test sources, and lay out what was found.

    Raises:
        InputError: for a file that cannot be read, or a model that does not exist.
    """
    check_models(settings.models, CANDIDATES)
    chosen = list(dict.fromkeys(settings.models or CANDIDATES))
    task = read_task(settings)
    if task.codec.shared and find_spec("sacrebleu") is None:
        raise InputError("BLEU is counted by sacrebleu: pip install 'probllm[translation]'")
    say(task.about)
    folder = settings.folder / f"translation-{fingerprint(settings, task)}"
    training = Training(settings.small, settings.epochs, folder, settings.progress, 0)
    trained: dict[str, Any] = {}
    answers: dict[str, Answers] = {}
    for key in chosen:
        candidate = CANDIDATES[key]
        if candidate.trained_as not in trained:
            trained[candidate.trained_as] = learn(task, training, candidate)
        model, record = trained[candidate.trained_as]
        answers[key] = answer(task, model, record, candidate.method)
        say(f"{candidate.name}: {sentence_of(task, answers[key])}, trained in {record.seconds:.1f} s")
    outcome = lay_out(task, answers)
    shutil.rmtree(folder, ignore_errors=True)  # nothing is left to resume: the same command starts anew
    return outcome


def sentence_of(task: Task, found: Answers) -> str:
    """What a line says of a model that is done."""
    if task.codec.shared:
        return f"BLEU {bleu(bleu_counts(found.written, references(task))).value:.2f}"
    return rates(edit_errors(found.written, [targets for _, targets in task.test]))


def references(task: Task) -> list[str]:
    """The translation of each test sentence."""
    return [str(targets[0]) for _, targets in task.test]


def read_task(settings: Settings) -> Task:
    """The sentences that the settings name, else letters and phonemes."""
    if settings.column is not None:
        raise InputError("--column is for taggers: translations lie in files beside their sources")
    files = files_of(settings)
    learn: list[Example]
    stop: list[Example]
    test: list[Example]
    codec: Codec
    if files is None:
        if settings.target is not None:
            raise InputError("--target is for files of sentences; missing: --train, --dev and --test")
        learn, stop, test = embedded()
        if settings.small:
            learn, stop, test = (part[:size] for part, size in zip((learn, stop, test), SMALL_SIZES, strict=True))
        origin, unit = "CMU Pronouncing Dictionary, without stress", "words"
        codec = Symbols(TransductionVocabulary.build(pairs_of(learn)))
        rest = "The nearest of several right targets counts."
    else:
        if settings.target is None:
            raise InputError("--target is needed, such as de: what the names of the translations end with, beside .en")
        learn, stop, test = (
            [Example(source, [target]) for source, target in read_parallel(path, settings.target)] for path in files
        )
        origin, unit = f"{settings.train} into {settings.target}", "sentences"
        texts = [str(text) for pair in pairs_of(learn) for text in pair]
        codec = Pieces(Subwords.train(texts, "bpe", SUBWORDS[settings.small]))
        rest = f"{codec.sources:,} subwords."
    pairs, dev = pairs_of(learn), pairs_of(stop)
    threads = torch.get_num_threads()
    about = (
        f"{origin}: {len(pairs):,} pairs to train on, {len(stop):,} {unit} to stop by, {len(test):,} to test on; "
        f"{threads} thread{'s' * (threads > 1)}. {rest}"
    )
    return Task(about, list(pairs), list(dev), test, codec)


def read_parallel(path: Path, target: str) -> list[tuple[str, str]]:
    """The lines of a file and of the one that is named alike but for its last suffix, which is the target's."""
    packed = path.suffix == ".gz"
    other = (path.with_suffix("") if packed else path).with_suffix(f".{target}")
    other = other.with_name(other.name + ".gz") if packed else other
    if other == path:
        raise InputError(f"{path} would be translated into itself: --target is what the other file's name ends with")
    try:
        return read_parallel_lines(path, other)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def fingerprint(settings: Settings, task: Task) -> str:
    """Tells the checkpoints of one command from those of another: eight characters of what decides a training run."""
    decided = [settings.small, settings.epochs, task.train, task.dev]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:8]


def lay_out(task: Task, answers: dict[str, Answers]) -> Outcome:
    """The table, the paired differences, learning curves, and what was written."""
    names = {key: CANDIDATES[key].name for key in answers}
    counts: dict[str, Any] = {}
    scores: dict[str, dict[str, Estimate]] = {}
    for key, each in answers.items():
        if task.codec.shared:
            counts[key] = bleu_counts(each.written, references(task))
            scores[key] = {"BLEU": bleu(counts[key])}
        else:
            counts[key] = edit_errors(each.written, [targets for _, targets in task.test])
            wrong, edits, length = counts[key]
            scores[key] = {"WER": bootstrap(wrong), "PER": bootstrap(edits, length)}
    rows = [
        Row(names[key], CANDIDATES[key].about, {
            **scores[key], "nats/token": each.nats, "train s": each.run.seconds, "sources/s": each.per_second,
            "params": float(each.run.parameters),
        })
        for key, each in answers.items()
    ]  # fmt: skip
    contrasts = []
    for first, second in combinations(answers, 2):
        if task.codec.shared:
            contrast = Contrast(names[second], names[first], "BLEU", paired_bleu(counts[second], counts[first]))
        else:
            difference = paired_bootstrap(counts[second].wrong, counts[first].wrong)
            contrast = Contrast(names[second], names[first], "WER", difference)
        contrasts.append(contrast)
    can_draw = find_spec("matplotlib") is not None
    notes = [] if can_draw else ["No pictures without matplotlib: pip install 'probllm[plots]'"]
    measures = [*(SENTENCES if task.codec.shared else ERRORS), *COMMON]
    outcome = Outcome("translation", QUESTION, task.about, measures, rows, contrasts, [], notes)
    outcome.pictures = pictures(answers) if can_draw else []
    outcome.texts = written(task, answers)
    return outcome


def pictures(answers: dict[str, Answers]) -> list[Picture]:
    """Learning curves of the models."""
    curves = {}
    for key, each in answers.items():
        if CANDIDATES[key].trained_as == key:
            curves[CANDIDATES[key].name] = learning_curve(each.run)
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if not curves:
        return []
    caption = "Minus the log probability of the targets to stop by, epoch by epoch."
    colors = dict(zip(curves, LINES, strict=False))
    return [Picture("Learning", caption, plot_learning(curves, y="nats a target", colors=colors))]


def written(task: Task, answers: dict[str, Answers]) -> list[Text]:
    """The first test sources with what is right, and what each model wrote for them."""

    def shown(target: Any) -> str:
        return target if isinstance(target, str) else " ".join(target)

    count = min(SHOWN, len(task.test))
    sources = [source if isinstance(source, str) else "".join(source) for source, _ in task.test[:count]]
    right = [f"{source}\n  {shown(targets[0])}" for source, (_, targets) in zip(sources, task.test, strict=False)]
    found = [Text("Source and target", "of the test set", "\n".join(right))]
    for key, each in answers.items():
        lines = [f"{source}\n  {shown(target)}" for source, target in zip(sources, each.written, strict=False)]
        found.append(Text(CANDIDATES[key].name, CANDIDATES[key].about, "\n".join(lines)))
    return found
