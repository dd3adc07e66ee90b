"""The comparison of dependency parsers: laws over whole trees beside one that chooses each word's head by itself.

Without files the trees are those of the Turkish Web Treebank; CoNLL-U files give any other treebank.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

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
from probllm.app.parse_verdict import Verdict, judge, parse
from probllm.app.parsers import CANDIDATES, WORDS, Candidate, Setting
from probllm.app.tagging import device_of, learning_curve
from probllm.data import (
    Dataset,
    ParsingVocabulary,
    Split,
    TreebankSentence,
    is_projective,
    read_conllu,
    turkish_treebank,
)
from probllm.evaluation import (
    attachment_counts,
    bootstrap,
    paired_bootstrap,
    plot_learning,
    plot_marginals,
    plot_reliability,
    reliability_curve,
)
from probllm.evaluation.plots import LINES
from probllm.training import Run, fit

SMALL_SIZES = (1200, 200, 244)  # sentences to train on, to stop by and to test on: two minutes in all
EXAMPLES = 3  # sentences that are drawn
QUESTION = "Does a law over whole trees parse better than a head chosen for each word?"

MEASURES = [
    Measure("UAS", 1, 2, percent=True, meaning="share of words with the right head, punctuation counted"),
    Measure("LAS", 1, 2, percent=True, meaning="with the right head and relation, up to its subtype (CoNLL 2018)"),
    Measure("UAS, words", 1, 2, percent=True, meaning="UAS without punctuation"),
    Measure("LAS, words", 1, 2, percent=True, meaning="LAS without punctuation"),
    Measure("exact", 1, 1, percent=True, meaning="share of sentences with all heads right"),
    Measure("trees", 1, 1, percent=True, meaning="share of sentences whose heads form a tree"),
    Measure(
        "tree NLL",
        -1,
        2,
        meaning="nats: minus the log probability of the right heads and relations, mean over the sentences whose arcs "
        "do not cross, to which all laws give some",
    ),
    Measure("ECE", -1, 2, percent=True, meaning="expected calibration error of the chosen heads, 15 bins"),
    Measure("train s", 0, 1, meaning="seconds of training, validation included, one run"),
    Measure("words/s", 0, 0, compact=True, meaning="words parsed a second, from ids"),
    Measure("params", 0, 0, compact=True, meaning="numbers that training sets"),
]


@dataclass
class Task:
    """Parsed sentences, and the ids that they become."""

    about: str
    sentences: Split[TreebankSentence]
    vocabulary: ParsingVocabulary
    single_root: bool

    def data(self, part: str, lifted: bool = False) -> Dataset:
        """``"train"``, ``"dev"`` or ``"test"`` as examples, perhaps with crossing arcs lifted."""
        return self.vocabulary.dataset(getattr(self.sentences, part), WORDS, part, projective=lifted)


@dataclass
class Trained:
    """What became of a candidate: a verdict and a run for each seed."""

    candidate: Candidate
    verdicts: list[Verdict]
    runs: list[Run]

    def counts(self, name: str, without_punctuation: bool = False) -> Any:
        """One of ``AttachmentCounts``' arrays, ``[runs, sentences]``."""
        of = "counts_of_words" if without_punctuation else "counts"
        return np.stack([getattr(getattr(verdict, of), name) for verdict in self.verdicts])


def run(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Train the candidates, judge them on the test sentences, and lay out what was found.

    Raises:
        InputError: for a file that cannot be read, or a model that does not exist.
    """
    chosen = choose(settings)
    task = read_task(settings)
    say(task.about)
    folder = settings.folder / f"parsing-{fingerprint(settings, task)}"
    seeds = settings.seeds or (1 if settings.small else 3)
    trained = [train(candidate, task, settings, seeds, folder, say) for candidate in chosen]
    outcome = lay_out(task, trained, seeds)
    shutil.rmtree(folder, ignore_errors=True)  # nothing is left to resume: the same command starts anew
    return outcome


def choose(settings: Settings) -> list[Candidate]:
    """The candidates that the settings name, else all."""
    check_models(settings.models, CANDIDATES)
    return [CANDIDATES[name] for name in dict.fromkeys(settings.models or CANDIDATES)]


def read_task(settings: Settings) -> Task:
    """The sentences that the settings name, else the embedded ones."""
    if settings.column is not None:
        raise InputError("--column is for taggers: parsers read heads and relations, each in its own column")
    files = files_of(settings)
    if files is None:
        origin, sentences = "Turkish Web Treebank", embedded()
        if settings.small:
            sentences = Split(*(part[:size] for part, size in zip(sentences, SMALL_SIZES, strict=True)))
    else:
        origin = f"{settings.train}"
        sentences = Split(*(read_file(path) for path in files))
    relations = {relation for part in sentences for sentence in part for relation in sentence.relations}
    vocabulary = ParsingVocabulary.build(sentences.train, relations=relations)
    sizes = ", ".join(
        f"{len(part):,} {purpose} ({sum(map(len, part)):,} words)"
        for purpose, part in zip(("to train on", "to stop by", "to test on"), sentences, strict=True)
    )
    crossing = sum(not is_projective(sentence.heads) for sentence in sentences.train)
    threads = torch.get_num_threads()
    about = (
        f"{origin}: {sizes}; {vocabulary.num_labels} relations; {threads} thread{'s' * (threads > 1)}. Arcs cross in "
        f"{crossing:,} of the training sentences; projective parsers learn from these with the crossing arcs lifted "
        "(Nivre and Nilsson, 2005), and all are tested on the trees as they are."
    )
    single_root = all(sentence.heads.count(0) == 1 for sentence in sentences.train)
    return Task(about, sentences, vocabulary, single_root)


def embedded() -> Split[TreebankSentence]:
    """The sentences that come along."""
    try:
        return turkish_treebank()
    except ImportError as error:
        raise InputError(f"{error}, or give --train, --dev and --test") from error


def read_file(path: Path) -> list[TreebankSentence]:
    """The sentences of one file; what is wrong with it is said in one line."""
    try:
        return read_conllu(path, trees=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def fingerprint(settings: Settings, task: Task) -> str:
    """Tells the checkpoints of one command from those of another: eight characters of what decides a training run."""
    words = [(s.words, s.heads, s.relations) for part in task.sentences for s in part]
    return hashlib.sha256(json.dumps([settings.small, settings.epochs, words]).encode()).hexdigest()[:8]


def train(
    candidate: Candidate, task: Task, settings: Settings, seeds: int, folder: Path, say: Callable[[str], None]
) -> Trained:
    """Train a candidate once a seed and judge each; a run that was interrupted goes on from its checkpoint."""
    setting = Setting(task.vocabulary, task.single_root, settings.small)
    lifted = candidate.law == "projective"
    learn, stop, test = task.data("train", lifted), task.data("dev", lifted), task.data("test")
    gold = [(sentence.heads, sentence.relations) for sentence in task.sentences.dev]

    def labelled_attachment(model: Any, data: Dataset) -> float:
        counts = attachment_counts(parse(model, data, task.vocabulary, device_of(model)), gold)
        return float(counts.labelled.sum() / counts.words.sum())

    trained = Trained(candidate, [], [])
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        model: Any = candidate.build(setting)
        options = candidate.options(setting) | ({"epochs": settings.epochs} if settings.epochs else {})
        options["max_tokens"] = max(options["max_tokens"], *learn.lengths)
        record = fit(
            model,
            learn,
            stop,
            metric=labelled_attachment,
            folder=folder / candidate.key / f"seed-{seed}",
            resume=True,
            seed=seed,
            progress=settings.progress,
            **options,
        )
        model.eval()
        verdict = judge(model, test, task.sentences.test, task.vocabulary, device_of(model))
        trained.runs.append(record)
        trained.verdicts.append(verdict)
        counts = verdict.counts
        uas, las = (100 * part.sum() / counts.words.sum() for part in (counts.heads, counts.labelled))
        which = f" (seed {seed})" if seeds > 1 else ""
        say(f"{candidate.name}{which}: UAS {uas:.2f} %, LAS {las:.2f} %, trained in {record.seconds:.1f} s")
    return trained


def lay_out(task: Task, trained: list[Trained], seeds: int) -> Outcome:
    """The table, the paired differences and the pictures."""
    notes = [f"Each model was trained {seeds} times."] if seeds > 1 else []
    crossing = sum(not is_projective(sentence.heads) for sentence in task.sentences.test)
    notes.append(f"Arcs cross in {crossing:,} of the {len(task.sentences.test):,} test sentences.")
    can_draw = find_spec("matplotlib") is not None
    if not can_draw:
        notes.append("No pictures without matplotlib: pip install 'probllm[plots]'")
    return Outcome(
        "parsing",
        QUESTION,
        task.about,
        MEASURES,
        [Row(each.candidate.name, each.candidate.about, measure(task, each)) for each in trained],
        contrasts(trained),
        pictures(task, trained) if can_draw else [],
        notes,
    )


def measure(task: Task, trained: Trained) -> dict[str, Value]:
    """A row of the table."""
    words, bare = trained.counts("words"), trained.counts("words", True)
    straight = np.array([is_projective(sentence.heads) for sentence in task.sentences.test])
    nll = np.stack([verdict.nll for verdict in trained.verdicts])[:, straight]
    return {
        "UAS": bootstrap(trained.counts("heads"), words),
        "LAS": bootstrap(trained.counts("labelled"), words),
        "UAS, words": bootstrap(trained.counts("heads", True), bare),
        "LAS, words": bootstrap(trained.counts("labelled", True), bare),
        "exact": bootstrap(trained.counts("trees")),
        "trees": float(np.mean([verdict.is_tree.mean() for verdict in trained.verdicts])),
        "tree NLL": bootstrap(nll) if nll.size else None,
        "ECE": float(np.mean([verdict.calibration_error for verdict in trained.verdicts])),
        "train s": float(np.mean([record.seconds for record in trained.runs])),
        "words/s": float(np.mean([verdict.words_per_second for verdict in trained.verdicts])),
        "params": float(trained.runs[0].parameters),
    }


def contrasts(trained: list[Trained]) -> list[Contrast]:
    """What a law over trees adds, and what crossing arcs do, on the same encoder and the same sentences."""
    found = []
    for first, second in (("projective", "heads"), ("spanning", "heads"), ("projective", "spanning")):
        for a in trained:
            for b in trained:
                if a.candidate.encoder != b.candidate.encoder or (a.candidate.law, b.candidate.law) != (first, second):
                    continue
                for name, part in (("UAS", "heads"), ("LAS", "labelled")):
                    difference = paired_bootstrap(a.counts(part), b.counts(part), a.counts("words"))
                    found.append(Contrast(a.candidate.name, b.candidate.name, name, difference))
                difference = paired_bootstrap(a.counts("trees"), b.counts("trees"))
                found.append(Contrast(a.candidate.name, b.candidate.name, "exact", difference))
    return found


def pictures(task: Task, trained: list[Trained]) -> list[Picture]:
    """Everybody's calibration and learning, and the arcs of a few sentences."""
    names = [each.candidate.name for each in trained]
    colors = dict(zip(names, LINES, strict=False))
    curves = {
        each.candidate.name: reliability_curve(each.verdicts[0].confidence, each.verdicts[0].right) for each in trained
    }
    learning = {each.candidate.name: learning_curve(each.runs[0]) for each in trained}
    return [
        Picture(
            "Reliability",
            "How often heads are right that are given with a certain posterior probability. Above the diagonal a model "
            "is too modest, below it too sure. A dot's area is its share of the words.",
            plot_reliability(curves, colors=colors),
        ),
        Picture(
            "Learning",
            "Minus the log probability of the heads and relations on the sentences to stop by, epoch by epoch.",
            plot_learning(
                {name: curve for name, curve in learning.items() if len(curve[0]) > 1},
                y="nats a sentence",
                colors=colors,
            ),
        ),
        *example_pictures(task, trained),
    ]


def example_pictures(task: Task, trained: list[Trained]) -> list[Picture]:
    """Sentences in which a head is wrong, with the posterior probability of each arc under the best model."""
    best = max(trained, key=lambda each: each.counts("labelled").sum())
    verdict = best.verdicts[0]
    wrong = verdict.counts.words - verdict.counts.heads
    short = (verdict.counts.words >= 4) & (verdict.counts.words <= 12)
    order = np.argsort(-(short * (1 + wrong)), kind="stable")
    drawn = []
    for index in order[:EXAMPLES].tolist():
        sentence = task.sentences.test[index]
        figure = plot_marginals(
            verdict.marginals[index].T,
            sentence.words,
            ["root", *(f"{number} {word}" for number, word in enumerate(sentence.words, start=1))],
            predicted=verdict.trees[index][0].tolist(),
            gold=sentence.heads,
        )
        caption = "Each word and its possible heads. Frames: the right ones. Dots: the chosen ones, red where wrong."
        title = f"{best.candidate.name} on “{' '.join(sentence.words)}”"
        drawn.append(Picture(title, caption, figure, group="Sentences and the probabilities of their arcs"))
    return drawn
