"""How good and how fast are the taggers beside python-crfsuite, on part-of-speech tags and on entities?

    python benchmarks/tagging.py --tasks ewt wnut17 --models crfsuite feature-crf bilstm-crf --seeds 0 1 2 --threads 1

UPOS accuracy on the English Web Treebank, entity F1 on WNUT 2017. The epoch is chosen on the development set; the test
set is looked at once. python-crfsuite and the feature CRF get the same features, hashed to 30 and to 18 bits.
Training seconds are those of training alone for crfsuite (L-BFGS in C), of all of ``fit`` with its validations for
ours; tagging speeds are from ids or feature strings to tags. Corpora: ``../shared/data`` or ``$PROBLLM_DATA``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probllm.data import (
    Dataset,
    FeatureHasher,
    TaggedSentence,
    TaggingVocabulary,
    bio_rules,
    labels_of_tags,
    read_tagged,
    segmentation_from_tags,
    spans_from_tags,
    tags_from_segmentation,
)
from probllm.evaluation import bootstrap, correct_tokens, paired_bootstrap, span_counts
from probllm.models.crf_tagger import CRFTagger
from probllm.models.model import Model
from probllm.models.semi_markov_tagger import SemiMarkovTagger
from probllm.models.softmax_tagger import SoftmaxTagger
from probllm.nn import (
    CharacterCNN,
    Encoder,
    FeatureEmbedding,
    RecurrentEncoder,
    TransformerEncoder,
    WordEmbedding,
    WordRepresentation,
)
from probllm.training import fit

BITS = 18
# words that a segment of a semi-Markov CRF may have; of the entities of WNUT's training sentences 98 % have no more
LONGEST = 6


@dataclass
class Task:
    """A corpus, and what its tags are scored by."""

    name: str
    splits: dict[str, list[TaggedSentence]]
    spans: bool
    vocabulary: TaggingVocabulary = field(init=False)

    def __post_init__(self) -> None:
        tags = {tag for sentence in self.splits["dev"] for tag in sentence.tags}
        self.vocabulary = TaggingVocabulary.build(self.splits["train"], tags=tags, bits=BITS, min_count=1)

    @property
    def rules(self) -> dict[str, torch.Tensor] | None:
        return bio_rules(self.vocabulary.tags) if self.spans else None

    @property
    def labels(self) -> list[str]:
        return labels_of_tags(self.vocabulary.tags)

    def names(self, law: str, structure: torch.Tensor) -> list[str]:
        """The tags that a prediction stands for."""
        if law == "semimarkov":
            return tags_from_segmentation(structure, self.labels)
        return self.vocabulary.decode(structure)

    def counts(self, split: str, predicted: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and denominators ``[sentences]`` of the score of predicted tag names."""
        gold = [sentence.tags for sentence in self.splits[split]]
        if not self.spans:
            ids = {tag: number for number, tag in enumerate(self.vocabulary.tags)}
            return correct_tokens([[ids[t] for t in p] for p in predicted], [[ids.get(t, -1) for t in g] for g in gold])
        right, ours, theirs = span_counts(*([spans_from_tags(tags) for tags in each] for each in (predicted, gold)))
        return 2 * right, ours + theirs


@dataclass
class Result:
    """One model on one task: a score, and what it cost, by seed."""

    task: str
    model: str
    seeds: list[int] = field(default_factory=list)
    dev: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    train_cpu_seconds: list[float] = field(default_factory=list)  # which a busy machine stretches less
    tokens_per_second: list[float] = field(default_factory=list)
    parameters: int = 0
    counts: list[tuple[list[int], list[int]]] = field(default_factory=list)  # of the test sentences


# Ours.


def words(vocabulary: TaggingVocabulary) -> Encoder:
    """A vector for the word and one made of its characters."""
    parts = [WordEmbedding(len(vocabulary.words), 100, word_dropout=0.15), CharacterCNN(len(vocabulary.characters))]
    return WordRepresentation(parts, dropout=0.1)


def recurrent(vocabulary: TaggingVocabulary) -> Encoder:
    return RecurrentEncoder(words(vocabulary), hidden=128, dropout=0.4)


def transformer(vocabulary: TaggingVocabulary) -> Encoder:
    return TransformerEncoder(words(vocabulary), dim=128, layers=2, heads=4, dropout=0.2)


def features(vocabulary: TaggingVocabulary) -> Encoder:
    """A score of each tag for each feature."""
    return FeatureEmbedding(vocabulary.features.size, vocabulary.num_tags)


Build = Callable[[Task], Model]
ENCODERS: dict[str, Callable[[TaggingVocabulary], Encoder] | None] = {
    "feature": None,
    "bilstm": recurrent,
    "transformer": transformer,
}
# The few thousand noisy sentences of WNUT are learnt by heart where each rare feature takes Adam's full steps; plain
# gradients, which leave rare features small, go on to carry over to new words.
PLAIN = {"optimiser": "sgd", "learning_rate": 0.3, "weight_decay": 1e-4, "batch_size": 16}
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("ewt", "feature"): {"epochs": 4, "batch_size": 64, "learning_rate": 0.015},
    ("ewt", "bilstm"): {"epochs": 6, "batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.05},
    ("ewt", "transformer"): {"epochs": 5, "batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.05, "warmup": 0.1},
    ("wnut17", "feature"): {"epochs": 4, **PLAIN},
    ("wnut17", "bilstm"): {"epochs": 5, **PLAIN},
    ("wnut17", "transformer"): {"epochs": 4, **PLAIN, "learning_rate": 0.1},
}
LAWS = ("softmax", "crf", "semimarkov")  # the last over entities, so where there are some
MODELS = ["crfsuite", *(f"{encoder}-{law}" for encoder in ENCODERS for law in LAWS)]


def build(name: str, task: Task) -> Model:
    """A fresh tagger: an encoder of words and characters, if any, and feature scores, under a law."""
    kind, law = name.split("-")
    make, vocabulary = ENCODERS[kind], task.vocabulary
    encoder = None if make is None else make(vocabulary)
    if law == "softmax":
        return SoftmaxTagger(encoder, vocabulary.num_tags, features(vocabulary))
    if law == "semimarkov":
        durations = [1 if label == "O" else LONGEST for label in task.labels]
        scores = FeatureEmbedding(vocabulary.features.size, 3 * len(durations))
        return SemiMarkovTagger(encoder, len(durations), durations, scores)
    return CRFTagger(encoder, vocabulary.num_tags, features(vocabulary), rules=task.rules)


def run_ours(name: str, task: Task, seed: int, result: Result, options: dict[str, Any]) -> None:
    vocabulary = task.vocabulary
    fields = ["features"] if name.startswith("feature") else ["features", "words", "characters"]
    law = name.split("-")[1]
    data = {split: vocabulary.dataset(sentences, fields) for split, sentences in task.splits.items() if split != "test"}
    if law == "semimarkov":
        for split, tagged in data.items():
            segmentations = (segmentation_from_tags(x.tags, task.labels, LONGEST) for x in task.splits[split])
            examples = zip(tagged.examples, segmentations, strict=True)
            data[split] = Dataset([{"inputs": x["inputs"], "segmentation": cut} for x, cut in examples])
    test = vocabulary.dataset([(s.words, None) for s in task.splits["test"]], fields)
    torch.manual_seed(seed)
    model = build(name, task)
    # Kernels are compiled before the clock starts, as crfsuite's were when it was built.
    fit(model, data["train"][:64], data["dev"][:64], epochs=1, seed=seed, progress=False)
    torch.manual_seed(seed)
    model = build(name, task)

    def score(model: Any, development: Any) -> float:
        predicted, _ = tag(model, task, law, development)
        right, total = task.counts("dev", predicted)
        return float(right.sum() / total.sum())

    began = time.perf_counter(), time.process_time()
    record = fit(
        model,
        data["train"],
        data["dev"],
        metric=score,
        seed=seed,
        **{**OPTIONS[task.name, name.split("-")[0]], **options},
    )
    result.train_seconds.append(time.perf_counter() - began[0])
    result.train_cpu_seconds.append(time.process_time() - began[1])
    predicted, seconds = tag(model, task, law, test)
    result.dev.append(float(record.best_value or 0.0))
    result.parameters = record.parameters
    add(task, result, seed, predicted, seconds)


@torch.no_grad()
def tag(model: Any, task: Task, law: str, data: Any) -> tuple[list[list[str]], float]:
    """Tag names of each sentence, and the seconds that ``predict`` took."""
    order = sorted(range(len(data)), key=data.lengths.__getitem__)
    named: list[list[str]] = [[] for _ in order]
    spent = 0.0
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        batch = data.collate([data[row] for row in rows])
        began = time.perf_counter()
        tags = model.predict(batch)
        spent += time.perf_counter() - began
        for row, ids in zip(rows, tags, strict=True):
            named[row] = task.names(law, ids[: data.lengths[row]])
    return named, spent


# The peer.


def run_crfsuite(task: Task, seed: int, result: Result, iterations: int = 60) -> None:
    import pycrfsuite

    hasher = FeatureHasher(30)
    strings = {
        split: [
            [[str(number) for number in row if number] for row in rows]
            for rows in hasher.encode([sentence.words for sentence in sentences])
        ]
        for split, sentences in task.splits.items()
    }
    trainer = pycrfsuite.Trainer(verbose=False)
    for rows, sentence in zip(strings["train"], task.splits["train"], strict=True):
        trainer.append(rows, sentence.tags)
    # The best on the development set of c1, c2 in {0, 0.1, 0.2, 1}: much better than either penalty alone.
    trainer.set_params({"c1": 0.1, "c2": 0.1, "max_iterations": iterations, "feature.possible_transitions": True})
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.crfsuite")
        began = time.perf_counter(), time.process_time()
        trainer.train(path)
        result.train_seconds.append(time.perf_counter() - began[0])
        result.train_cpu_seconds.append(time.process_time() - began[1])
        tagger = pycrfsuite.Tagger()
        tagger.open(path)
        right, total = task.counts("dev", [tagger.tag(rows) for rows in strings["dev"]])
        result.dev.append(float(right.sum() / total.sum()))
        start = time.perf_counter()
        predicted = [tagger.tag(rows) for rows in strings["test"]]
        seconds = time.perf_counter() - start
        info = tagger.info()
        result.parameters = len(info.state_features) + len(info.transitions)
        tagger.close()
    add(task, result, seed, predicted, seconds)


def add(task: Task, result: Result, seed: int, predicted: Sequence[Sequence[str]], seconds: float) -> None:
    right, total = task.counts("test", predicted)
    result.seeds.append(seed)
    result.test.append(float(right.sum() / total.sum()))
    result.counts.append((right.tolist(), total.tolist()))
    result.tokens_per_second.append(sum(len(sentence.words) for sentence in task.splits["test"]) / seconds)


# The whole.


def corpora() -> Path:
    return Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def read_task(name: str, folder: Path) -> Task:
    directory, suffix = {"ewt": ("ud_english_ewt", "conllu"), "wnut17": ("wnut17", "conll")}[name]
    files = {split: folder / directory / f"{split}.{suffix}.gz" for split in ("train", "dev", "test")}
    return Task(name, {split: read_tagged(path) for split, path in files.items()}, spans=name == "wnut17")


def run(
    models: Sequence[str] = MODELS,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = ("ewt", "wnut17"),
    threads: int = 1,
    report: Callable[[str], None] = print,
    **options: Any,
) -> list[Result]:
    """Train and judge models on tasks, once a seed; crfsuite, which draws nothing, once.

    Args:
        models: some of ``MODELS``.
        seeds: one run each.
        tasks: ``"ewt"``, ``"wnut17"``.
        threads: of torch; crfsuite has one.
        report: is told each line.
        options: of ``fit``, in place of each model's own (``epochs=2``).
    """
    torch.set_num_threads(threads)
    results = []
    for task in (read_task(name, corpora()) for name in tasks):
        counts = {split: (len(s), sum(len(each.words) for each in s)) for split, s in task.splits.items()}
        report(f"{task.name}: sentences, tokens {counts}; {task.vocabulary.num_tags} tags; threads {threads}")
        for name in models:
            if name.endswith("-semimarkov") and not task.spans:
                continue
            result = Result(task.name, name)
            for seed in seeds if name != "crfsuite" else seeds[:1]:
                if name == "crfsuite":
                    run_crfsuite(task, seed, result)
                else:
                    run_ours(name, task, seed, result, options)
                score = f"dev {100 * result.dev[-1]:.2f}  test {100 * result.test[-1]:.2f}"
                cost = f"{result.train_seconds[-1]:.1f} s, {result.train_cpu_seconds[-1]:.1f} of CPU"
                report(f"  {name} seed {seed}: {score}  {cost}  {result.tokens_per_second[-1]:,.0f} tokens/s")
            results.append(result)
    return results


def table(results: Sequence[Result]) -> str:
    """Means over the seeds, with the test score's 95 % bootstrap interval and ratios to crfsuite."""
    heads = (
        "task",
        "model",
        "seeds",
        "dev",
        "test",
        "95 %",
        "train s",
        "ratio",
        "CPU s",
        "tokens/s",
        "ratio",
        "params",
    )
    widths = (7, -20, 5, 6, 6, 13, 8, 6, 8, 9, 6, 10)
    rows: list[tuple[object, ...]] = [heads]
    peers = {result.task: result for result in results if result.model == "crfsuite"}
    for r in results:
        interval = bootstrap(*(np.array(part) for part in zip(*r.counts, strict=True)))
        train, speed, peer = np.mean(r.train_seconds), np.mean(r.tokens_per_second), peers.get(r.task)
        rows.append(
            (
                r.task,
                r.model,
                len(r.seeds),
                f"{100 * np.mean(r.dev):.2f}",
                f"{100 * np.mean(r.test):.2f}",
                f"{100 * interval.low:.2f}-{100 * interval.high:.2f}",
                f"{train:.1f}",
                f"{train / peer.train_seconds[0]:.2f}" if peer else "",
                f"{np.mean(r.train_cpu_seconds):.1f}",
                f"{speed:,.0f}",
                f"{speed / peer.tokens_per_second[0]:.2f}" if peer else "",
                f"{r.parameters:,}",
            )
        )
    lines = []
    for row in rows:
        cells = (f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
        lines.append(" ".join(cells))
    return "\n".join(lines)


def contrasts(results: Sequence[Result]) -> str:
    """CRF less softmax and semi-Markov less CRF on each encoder, by paired bootstrap over sentences, seeds paired."""
    by_name = {(result.task, result.model): result for result in results}
    lines = []
    for (task, model), better in by_name.items():
        encoder, _, law = model.partition("-")
        simpler = by_name.get((task, f"{encoder}-{LAWS[LAWS.index(law) - 1]}")) if law in LAWS[1:] else None
        if simpler is None:
            continue
        (a, a_total), (b, b_total) = (zip(*each.counts, strict=True) for each in (better, simpler))
        gap = paired_bootstrap(np.array(a), np.array(b), np.array(a_total), np.array(b_total))
        interval = f"[{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]{' (holds zero)' if gap.holds_zero else ''}"
        lines.append(f"{task} {model} less {simpler.model}: {100 * gap.value:+.2f} in {interval}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ewt", "wnut17"], choices=["ewt", "wnut17"])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="in place of each model's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    if not corpora().is_dir():
        raise SystemExit(f"no corpora at {corpora()}: set PROBLLM_DATA")
    print({name: version(name) for name in ("torch", "numba", "python-crfsuite")})
    options = {} if given.epochs is None else {"epochs": given.epochs}
    results = run(
        given.models, given.seeds, given.tasks, given.threads, lambda line: print(line, flush=True), **options
    )
    print(table(results), contrasts(results), sep="\n")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
