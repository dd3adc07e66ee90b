"""The main comparison: taggers that score whole tag sequences beside one that decides word by word, on the same words.

Without files the task is stress: the phonemes of a word come without their stress, and each vowel gets its degree back.
Files in CoNLL-U or columns give any other tagging; where their tags are BIO, spans are scored too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from probllm.app.comparison import (
    Contrast,
    InputError,
    Measure,
    Outcome,
    Picture,
    Row,
    Settings,
    Value,
    check_models,
    files_of,
)
from probllm.app.taggers import CANDIDATES, Candidate, Setting
from probllm.app.verdict import Verdict, judge, tag
from probllm.data import Dataset, Split, TaggedSentence, TaggingVocabulary, read_tagged, stress_tagging
from probllm.data.bio import bio_rules, spans_from_tags
from probllm.evaluation import (
    bootstrap,
    confusion_matrix,
    correct_tokens,
    paired_bootstrap,
    plot_confusion,
    plot_learning,
    plot_marginals,
    plot_reliability,
    reliability_curve,
    span_counts,
)
from probllm.evaluation.plots import LINES
from probllm.training import Run, fit

SMALL_SIZES = (8000, 1000, 2000)  # pronunciations to train on, to stop by and to test on: a few minutes in all
EXAMPLES = 3  # sentences that are drawn

MEASURES = [
    Measure("accuracy", 1, 2, percent=True, meaning="share of tags that are right"),
    Measure(
        "token NLL", -1, 3, meaning="nats: minus the log of the right tag's posterior probability, mean over tokens"
    ),
    Measure(
        "sequence NLL", -1, 2, meaning="nats: minus the log probability of the right tag sequence, mean over sentences"
    ),
    Measure(
        "ECE", -1, 2, percent=True, meaning="expected calibration error: mean gap of confidence and accuracy, 15 bins"
    ),
    Measure("train s", 0, 1, meaning="seconds of training, validation included, one run"),
    Measure("tokens/s", 0, 0, compact=True, meaning="tokens tagged a second, from ids"),
    Measure("params", 0, 0, compact=True, meaning="numbers that training sets"),
]
SPAN_F1 = Measure("span F1", 1, 2, percent=True, meaning="both ends and the label of a span must be right")


@dataclass
class Task:
    """Tagged sentences, and the ids that they become."""

    about: str
    sentences: Split[TaggedSentence]
    vocabulary: TaggingVocabulary
    data: tuple[Dataset, Dataset, Dataset]  # to train on, to stop by, to test on
    gold: list[Any]  # the right tags of each test sentence

    @property
    def is_bio(self) -> bool:
        """Whether the tags mark spans."""
        parts = [tag.partition("-") for tag in self.vocabulary.tags]
        marks = {mark for mark, _, _ in parts}
        return {"O", "B"} <= marks <= set("OBIES") and all(label for mark, _, label in parts if mark != "O")

    @property
    def rules(self) -> dict[str, Tensor] | None:
        """Which tag may follow which, if the tags mark spans and all sentences keep to the rules."""
        if not self.is_bio:
            return None
        names = self.vocabulary.tags
        rules = bio_rules(names, "bioes" if any(tag[0] in "ES" for tag in names) else "bio")
        for part in self.data:
            for example in part:
                tags: Any = example["tags"]
                follows = rules["transitions"][tags[:-1], tags[1:]]
                if not (rules["start"][tags[0]] and rules["end"][tags[-1]] and bool(follows.all())):
                    return None
        return rules


@dataclass
class Trained:
    """What became of a candidate: a verdict and a run for each seed."""

    candidate: Candidate
    verdicts: list[Verdict]
    runs: list[Run]

    def stack(self, name: str) -> Any:
        """One of the verdicts' arrays, ``[runs, sentences]``."""
        return np.stack([getattr(verdict, name) for verdict in self.verdicts])

    def mean(self, name: str) -> float:
        """The mean of one of the verdicts' numbers."""
        return float(np.mean([getattr(verdict, name) for verdict in self.verdicts]))


def run(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Train the candidates, judge them on the test sentences, and lay out what was found.

    Raises:
        InputError: for a file that cannot be read, or a model that does not exist.
    """
    chosen = choose(settings)
    task = read_task(settings)
    say(task.about)
    folder = settings.folder / f"tagging-{fingerprint(settings, task)}"
    seeds = settings.seeds or (1 if settings.small else 3)
    trained = [train(candidate, task, settings, seeds, folder, say) for candidate in chosen]
    outcome = lay_out(task, trained, seeds)
    shutil.rmtree(folder, ignore_errors=True)  # nothing is left to resume: the same command starts anew
    return outcome


def choose(settings: Settings) -> list[Candidate]:
    """The candidates that the settings name, else those of the small or the full setting."""
    if not settings.models:
        return [candidate for candidate in CANDIDATES.values() if candidate.in_small or not settings.small]
    check_models(settings.models, CANDIDATES)
    return [CANDIDATES[name] for name in dict.fromkeys(settings.models)]


def read_task(settings: Settings) -> Task:
    """The sentences that the settings name, else the embedded ones, and the ids that they become."""
    files = files_of(settings)
    if files is None:
        if settings.column is not None:
            raise InputError("--column says which column of files holds the tags; give --train, --dev and --test too")
        origin, sentences = "Stress of the vowels in pronunciations (CMU Pronouncing Dictionary)", embedded()
        if settings.small:
            sentences = Split(*(part[:size] for part, size in zip(sentences, SMALL_SIZES, strict=True)))
    else:
        origin = f"{settings.train}"
        sentences = Split(*(read_file(path, settings.column) for path in files))
    tags = {tag for part in sentences for sentence in part for tag in sentence.tags}
    vocabulary = TaggingVocabulary.build(sentences.train, tags=tags, min_count=1, bits=15 if settings.small else 18)
    data = (vocabulary.dataset(sentences.train), vocabulary.dataset(sentences.dev), vocabulary.dataset(sentences.test))
    sizes = ", ".join(
        f"{len(part):,} {purpose} ({sum(len(sentence.words) for sentence in part):,} tokens)"
        for purpose, part in zip(("to train on", "to stop by", "to test on"), sentences, strict=True)
    )
    threads = torch.get_num_threads()
    about = f"{origin}: {sizes}; {vocabulary.num_tags} tags; {threads} thread{'s' * (threads > 1)}."
    gold = [example["tags"].numpy() for example in data[2]]  # type: ignore[union-attr]
    return Task(about, sentences, vocabulary, data, gold)


def embedded() -> Split[TaggedSentence]:
    """The sentences that come along."""
    try:
        return stress_tagging()
    except ImportError as error:
        raise InputError(str(error)) from error


def read_file(path: Path, column: str | None) -> list[TaggedSentence]:
    """The sentences of one file; what is wrong with it is said in one line."""
    number = int(column) if column is not None and column.lstrip("-").isdigit() else column
    try:
        return read_tagged(path, number)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def fingerprint(settings: Settings, task: Task) -> str:
    """Tells the checkpoints of one command from those of another: eight characters of what decides a training run."""
    kept = [settings.small, settings.epochs, [(s.words, s.tags) for part in task.sentences for s in part]]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]


def train(
    candidate: Candidate, task: Task, settings: Settings, seeds: int, folder: Path, say: Callable[[str], None]
) -> Trained:
    """Train a candidate once a seed and judge each; a run that was interrupted goes on from its checkpoint."""
    score = score_of(task)
    setting = Setting(task.vocabulary, task.rules, task.is_bio, settings.small)
    learn, stop, test = (narrow(part, candidate.fields) for part in task.data)
    trained = Trained(candidate, [], [])
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        model: Any = candidate.build(setting)
        options = candidate.options(setting) | ({"epochs": settings.epochs} if settings.epochs else {})
        record = fit(
            model,
            learn,
            stop,
            metric=score,
            folder=folder / candidate.key / f"seed-{seed}",
            resume=True,
            seed=seed,
            progress=settings.progress,
            **options,
        )
        model.eval()
        verdict = judge(model, test, task.gold, device=device_of(model))
        trained.runs.append(record)
        trained.verdicts.append(verdict)
        accuracy = verdict.correct.sum() / verdict.tokens.sum()
        which = f" (seed {seed})" if seeds > 1 else ""
        say(f"{candidate.name}{which}: accuracy {accuracy:.2%} after {record.seconds:.1f} s of training")
    return trained


def score_of(task: Task) -> Callable[[Any, Any], float]:
    """What the best epoch is chosen by: span F1 where the tags mark spans, else accuracy."""
    gold = [example["tags"].numpy() for example in task.data[1]]  # type: ignore[union-attr]
    gold_spans = [spans(task, tags) for tags in gold] if task.is_bio else []

    def accuracy(model: Any, data: Dataset) -> float:
        correct, tokens = correct_tokens(tag(model, data, device=device_of(model)), gold)
        return float(correct.sum() / tokens.sum())

    def span_f1(model: Any, data: Dataset) -> float:
        found = [spans(task, tags) for tags in tag(model, data, device=device_of(model))]
        right, predicted, true = span_counts(found, gold_spans)
        return float(2 * right.sum() / max(1, predicted.sum() + true.sum()))

    return span_f1 if task.is_bio else accuracy


def device_of(model: Any) -> torch.device:
    """Where a model's weights are."""
    device: torch.device = next(model.parameters()).device
    return device


def narrow(data: Dataset, fields: Sequence[str]) -> Dataset:
    """The same examples with only the inputs that a model reads."""
    examples: list[Any] = list(data)
    return Dataset({**example, "inputs": {key: example["inputs"][key] for key in fields}} for example in examples)


def lay_out(task: Task, trained: list[Trained], seeds: int) -> Outcome:
    """The table, the paired differences and the pictures."""
    notes = [f"Each model was trained {seeds} times."] if seeds > 1 else []
    can_draw = find_spec("matplotlib") is not None
    if not can_draw:
        notes.append("No pictures without matplotlib: pip install 'probllm[plots]'")
    return Outcome(
        "tagging",
        "Does a law over whole tag sequences tag better than a decision at each word?",
        task.about,
        [MEASURES[0], *([SPAN_F1] if task.is_bio else []), *MEASURES[1:]],
        [Row(each.candidate.name, each.candidate.about, measure(task, each)) for each in trained],
        contrasts(task, trained),
        pictures(task, trained) if can_draw else [],
        notes,
    )


def measure(task: Task, trained: Trained) -> dict[str, Value]:
    """A row of the table."""
    tokens = trained.stack("tokens")
    values: dict[str, Value] = {
        "accuracy": bootstrap(trained.stack("correct"), tokens),
        "token NLL": bootstrap(trained.stack("token_nll"), tokens),
        "sequence NLL": bootstrap(trained.stack("sequence_nll")),
        "ECE": trained.mean("calibration_error"),
        "train s": float(np.mean([record.seconds for record in trained.runs])),
        "tokens/s": trained.mean("tokens_per_second"),
        "params": float(trained.runs[0].parameters),
    }
    if task.is_bio:
        right, predicted, gold = span_arrays(task, trained)
        values["span F1"] = bootstrap(2 * right, predicted + gold)
    return values


def spans(task: Task, tags: Any) -> list[Any]:
    """The spans that tag ids mark."""
    return list(spans_from_tags(task.vocabulary.decode(tags.tolist())))


def span_arrays(task: Task, trained: Trained) -> tuple[Any, Any, Any]:
    """Right, predicted and gold spans, ``[runs, sentences]`` each."""
    gold = [spans(task, tags) for tags in task.gold]
    counts = [span_counts([spans(task, tags) for tags in v.predicted], gold) for v in trained.verdicts]
    return tuple(np.stack(part) for part in zip(*counts, strict=True))  # type: ignore[return-value]


def pairs(trained: list[Trained]) -> list[tuple[Trained, Trained]]:
    """Each CRF with the softmax on the same encoder."""
    return [
        (a, b)
        for a in trained
        for b in trained
        if a.candidate.encoder == b.candidate.encoder and (a.candidate.law, b.candidate.law) == ("CRF", "softmax")
    ]


def contrasts(task: Task, trained: list[Trained]) -> list[Contrast]:
    """What the law over sequences adds, on the same encoder and the same sentences."""
    found = []
    for a, b in pairs(trained):
        names = a.candidate.name, b.candidate.name
        difference = paired_bootstrap(a.stack("correct"), b.stack("correct"), a.stack("tokens"))
        found.append(Contrast(*names, "accuracy", difference))
        if task.is_bio:
            (r, p, g), (s, q, h) = span_arrays(task, a), span_arrays(task, b)
            found.append(Contrast(*names, "span F1", paired_bootstrap(2 * r, 2 * s, p + g, q + h)))
        difference = paired_bootstrap(a.stack("sequence_nll"), b.stack("sequence_nll"))
        found.append(Contrast(*names, "sequence NLL", difference))
    return found


def pictures(task: Task, trained: list[Trained]) -> list[Picture]:
    """The best model's confusions, everybody's calibration and learning, and a few sentences."""
    tags = task.vocabulary.tags
    best = max(trained, key=lambda each: each.stack("correct").sum())
    gold = np.concatenate(task.gold)
    curves = {t.candidate.name: reliability_curve(np.concatenate(t.verdicts[0].marginals), gold) for t in trained}
    learning = {t.candidate.name: learning_curve(t.runs[0]) for t in trained}
    colors = dict(zip(curves, LINES, strict=False))
    drawn = [
        Picture(
            f"Confusions of {best.candidate.name}",
            "Test tokens by gold tag (rows) and predicted tag (columns); shaded by the share of the row.",
            plot_confusion(confusion_matrix(best.verdicts[0].predicted, task.gold, len(tags)), tags),
            wide=len(tags) > 12,
        ),
        Picture(
            "Reliability",
            "How often tags are right that are given with a certain posterior probability. Above the diagonal a model "
            "is too modest, below it too sure. A dot's area is its share of the tokens.",
            plot_reliability(curves, colors=colors),
        ),
        Picture(
            "Learning",
            "Minus the log probability of the right tag sequence on the sentences to stop by, epoch by epoch.",
            plot_learning(
                {name: curve for name, curve in learning.items() if len(curve[0]) > 1},
                y="nats a sentence",
                colors=colors,
            ),
        ),
    ]
    return drawn + example_pictures(task, trained)


def learning_curve(record: Run) -> tuple[list[float], list[float]]:
    """Epochs and the loss after each, on the sentences to stop by where it was measured."""
    key = "validation_loss"
    steps = [float(entry.get("epoch", index)) for index, entry in enumerate(record.history, 1) if key in entry]
    return steps, [entry[key] for entry in record.history if key in entry]


def example_pictures(task: Task, trained: list[Trained]) -> list[Picture]:
    """Sentences on which the models disagree, with the posterior marginals of two of them."""
    matched = pairs(trained)
    shown = list(reversed(matched[-1])) if matched else trained[-1:]
    wrong = np.stack([each.verdicts[0].tokens - each.verdicts[0].correct for each in shown])  # [models, sentences]
    lengths = np.array([len(tags) for tags in task.gold])
    fits = (lengths >= 4) & (lengths <= 16)
    # Most telling: one of the models errs where another does not; then, any error; short sentences are drawn in full.
    order = np.argsort(-(fits * (1 + np.ptp(wrong, axis=0) + 0.1 * wrong.max(axis=0))), kind="stable")
    group = f"Sentences {'that the two disagree on' if len(shown) > 1 else 'and their posterior marginals'}"
    drawn = []
    for index in order[:EXAMPLES].tolist():
        words = task.sentences.test[index].words
        for each in shown:
            verdict = each.verdicts[0]
            figure = plot_marginals(
                verdict.marginals[index],
                words,
                task.vocabulary.tags,
                predicted=verdict.predicted[index].tolist(),
                gold=task.gold[index].tolist(),
            )
            caption = "Frames: the right tags. Dots: the chosen ones, red where wrong. Shade: posterior probability."
            title = f"{each.candidate.name} on “{' '.join(words)}”"
            drawn.append(Picture(title, caption, figure, group=group))
    return drawn
