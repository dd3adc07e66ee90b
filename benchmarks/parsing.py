"""How well do the parsers do on the English Web Treebank, how fast, and what does a law over trees add?

    python benchmarks/parsing.py --models bilstm-projective bilstm-spanning --seeds 0 --threads 2

Attachment on all words of the test set, labels up to their subtypes (CoNLL 2018), without pre-trained vectors and from
gold words alone (no tags). The epoch is chosen by LAS on the development set; the test set is looked at once. The
models are those of ``probllm compare parsing --full``. Corpora: ``../shared/data`` or ``$PROBLLM_DATA``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from probllm.app.comparison import Settings
from probllm.app.parsers import CANDIDATES, Candidate
from probllm.app.parsing import Task, Trained, read_task, train
from probllm.data import read_conllu, write_conllu
from probllm.evaluation import bootstrap, paired_bootstrap


@dataclass
class Result:
    """One model, seeds together."""

    model: str
    dev: list[float]
    uas: tuple[float, float, float]
    las: tuple[float, float, float]
    uas_without_punctuation: float
    las_without_punctuation: float
    exact: float
    trees: float
    train_seconds: list[float]
    cpu_seconds: float  # of all seeds, judging included, which a busy machine stretches less
    words_per_second: float
    parameters: int
    history: list[list[float]]  # LAS on the development set, by seed and epoch


def measure(candidate: Candidate, task: Task, settings: Settings, seeds: int) -> tuple[Result, Trained]:
    """Train and test one model."""
    began = time.process_time()
    trained = train(candidate, task, settings, seeds, settings.folder, lambda line: print(line, flush=True))
    words, bare = trained.counts("words"), trained.counts("words", True)
    result = Result(
        candidate.key,
        [float(record.best_value or 0.0) for record in trained.runs],
        bootstrap(trained.counts("heads"), words),
        bootstrap(trained.counts("labelled"), words),
        float(trained.counts("heads", True).sum() / bare.sum()),
        float(trained.counts("labelled", True).sum() / bare.sum()),
        float(trained.counts("trees").mean()),
        float(np.mean([verdict.is_tree.mean() for verdict in trained.verdicts])),
        [record.seconds for record in trained.runs],
        time.process_time() - began,
        float(np.mean([verdict.words_per_second for verdict in trained.verdicts])),
        trained.runs[0].parameters,
        [[entry.get(record.monitored or "", 0.0) for entry in record.history] for record in trained.runs],
    )
    return result, trained


def table(results: list[Result]) -> str:
    """A row a model, in percent, with the 95 % bootstrap intervals of the test scores."""
    lines = [
        f"{'model':24} {'dev LAS':>7} {'UAS':>6} {'95 %':>13} {'LAS':>6} {'95 %':>13} {'no punct.':>12} {'exact':>6} "
        f"{'trees':>6} {'train s':>8} {'CPU s':>7} {'words/s':>8} {'params':>11}"
    ]
    for r in results:
        uas, las = ([f"{100 * x:.2f}" for x in each] for each in (r.uas, r.las))
        bare = f"{100 * r.uas_without_punctuation:.2f}/{100 * r.las_without_punctuation:.2f}"
        lines.append(
            f"{r.model:24} {100 * np.mean(r.dev):7.2f} {uas[0]:>6} {uas[1]:>6}-{uas[2]:<6} {las[0]:>6} "
            f"{las[1]:>6}-{las[2]:<6} {bare:>12} {100 * r.exact:6.1f} {100 * r.trees:6.1f} "
            f"{np.mean(r.train_seconds):8.0f} {r.cpu_seconds:7.0f} {r.words_per_second:8,.0f} {r.parameters:11,}"
        )
    return "\n".join(lines)


def contrasts(trained: list[Trained]) -> str:
    """The laws over trees less head selection on the same encoder, by paired bootstrap over the test sentences."""
    by_key = {each.candidate.key: each for each in trained}
    lines = []
    for each in trained:
        baseline = by_key.get(f"{each.candidate.encoder.lower()}-heads")
        if baseline is None or baseline is each:
            continue
        for name, part in (("UAS", "heads"), ("LAS", "labelled")):
            gap = paired_bootstrap(each.counts(part), baseline.counts(part), each.counts("words"))
            low, high = 100 * gap.low, 100 * gap.high
            holds = " (holds zero)" if gap.holds_zero else ""
            interval = f"[{low:+.2f}, {high:+.2f}]{holds}"
            lines.append(f"{each.candidate.key} less head selection, {name}: {100 * gap.value:+.2f} in {interval}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--epochs", type=int, help="in place of each model's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", type=int, default=1, help="train on one sentence in so many")
    parser.add_argument("--folder", type=Path, default=Path("runs/parsing-benchmark"), help="of the checkpoints")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    place = Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "ud_english_ewt"
    if not place.is_dir():
        raise SystemExit(f"no corpora at {place}: set PROBLLM_DATA")
    train_file, dev, test = (place / f"{part}.conllu.gz" for part in ("train", "dev", "test"))
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.part > 1:
        sentences = read_conllu(train_file)[:: given.part]
        train_file = given.folder / f"train-{given.part}.conllu"
        write_conllu(train_file, sentences)
    settings = Settings(small=False, epochs=given.epochs, train=train_file, dev=dev, test=test, folder=given.folder)
    task = read_task(settings)
    print({name: version(name) for name in ("torch", "numba")}, task.about, sep="\n", flush=True)
    measured = [measure(CANDIDATES[key], task, settings, given.seeds) for key in given.models]
    results = [result for result, _ in measured]
    print(table(results), contrasts([trained for _, trained in measured]), sep="\n")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
