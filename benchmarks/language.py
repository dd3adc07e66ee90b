"""How well does a Transformer predict a small text after a given time, beside nanoGPT, and what do counts add to it?

    python benchmarks/language.py [--text shakespeare reference] [--core-seconds 3600] [--json FILE]

The Transformer of ``probllm compare language --full``, and nanoGPT of the same width, depth, window and batch with its
own optimiser, each trained for the same seconds of the processor, in bfloat16 where that is faster; then the counts and
the exact mixtures of the comparison, whose weights come from the first twentieth of the text. What follows it trains,
the last tenth is judged, each character once and behind at least half a window. Nats a character with a bootstrap
interval over blocks of 200 characters. Corpora: ``../shared/data`` or ``$PROBLLM_DATA``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from nanogpt import NanoGPT, optimiser
from torch import Tensor

from probllm.app.comparison import Settings, Training
from probllm.app.language import BLOCK, read_task
from probllm.app.language_models import CANDIDATES, FULL, Learned, Task, judging, token_nats
from probllm.data import Windows
from probllm.evaluation import bootstrap
from probllm.training import fast_bfloat16

PLACE = Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODELS = ("n-gram", "transformer", "mixture", "adaptive", "adaptive-mixture")


def read(name: str, folder: Path) -> Task:
    """A text, cut as the comparison cuts it."""
    file = PLACE / "tinyshakespeare" / "input.txt.gz"
    if name == "shakespeare" and not file.exists():
        raise SystemExit(f"no corpora at {PLACE}: set PROBLLM_DATA")
    return read_task(Settings(small=False, train=file if name == "shakespeare" else None, folder=folder))


def rate(progress: float, steps: int) -> float:
    """nanoGPT's schedule: 100 steps up to 1e-3, then a cosine down to 1e-4."""
    warm = min(1.0, progress * steps / 100)
    return warm * (1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * progress)))


def train_nanogpt(task: Task, core_seconds: float) -> tuple[NanoGPT, int]:
    """nanoGPT, trained for so long, and its steps; the schedule follows the time that is spent."""
    torch.manual_seed(0)
    model = NanoGPT(len(task.vocabulary), FULL.window, FULL.dim, FULL.layers, 4, FULL.dropout).train()
    descent, windows = optimiser(model), Windows(task.train, FULL.window)
    begun, steps, epoch = time.process_time(), 0, 0
    while True:
        for batch in windows.batches(FULL.batch, seed=0, epoch=epoch):
            spent = time.process_time() - begun
            if spent >= core_seconds:
                return model.eval(), steps
            for group in descent.param_groups:
                group["lr"] = rate(spent / core_seconds, max(1, round(steps * core_seconds / max(spent, 1e-9))))
            inputs = torch.cat([batch["prefix"], batch["text"][:, :-1]], 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                loss = model(inputs, batch["text"])
            descent.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descent.step()
            steps += 1
        epoch += 1


@torch.no_grad()
def nats_of_nanogpt(model: NanoGPT, task: Task) -> np.ndarray:
    """Minus the log probability of each token of the test text."""
    found: list[Tensor] = []
    for batch in judging(task.test, task.train, FULL).batches(64, shuffle=False):
        text = batch["text"]
        inputs = torch.cat([batch["prefix"], text[:, :-1]], 1)
        scores = model.lm_head(model.states(inputs))[:, -text.shape[1] :]
        found.append(F.cross_entropy(scores.flatten(0, 1), text.flatten(), reduction="none"))
    nats: np.ndarray = torch.cat(found)[-len(task.test) :].double().numpy()
    return nats


def epochs_within(task: Task, core_seconds: float) -> int:
    """How many passes over the training text our Transformer makes in the time."""
    part = task.train[: 1 + FULL.window * (FULL.batch * 12 + 1)]
    trial = Task("", task.vocabulary, part, task.dev[: 4 * FULL.window], task.test)
    with TemporaryDirectory() as folder:
        begun = time.process_time()
        CANDIDATES["transformer"].learn(trial, Training(False, 1, Path(folder), False, 0), {})
        step = (time.process_time() - begun) / 12
    return max(1, int(core_seconds / (step * len(task.train) / FULL.window / FULL.batch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", choices=["shakespeare", "reference"], default=["shakespeare", "reference"])
    parser.add_argument("--core-seconds", type=float, default=3600, help="of training, each network")
    parser.add_argument("--epochs", type=int, help="of our Transformer, in place of what fits")
    parser.add_argument("--skip-nanogpt", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/language-benchmark"), help="of the checkpoints")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results: list[dict[str, Any]] = []
    for name in given.text:
        task = read(name, given.folder)
        print(task.about, flush=True)
        sizes = np.diff(np.append(np.arange(0, len(task.test), BLOCK), len(task.test)))

        def tell(about: str, nats: np.ndarray, seconds: float, text: str = name, sizes: np.ndarray = sizes) -> None:
            starts = np.cumsum(sizes) - sizes
            found = bootstrap(np.add.reduceat(nats, starts), sizes)
            print(f"  {about:36} {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] {seconds:7.0f} s", flush=True)
            results.append({"text": text, "model": about, "nats": found, "seconds": seconds})
            if given.json is not None:
                given.json.write_text(json.dumps(results))

        epochs = given.epochs or epochs_within(task, given.core_seconds)
        training = Training(False, epochs, given.folder / name, False, 0)
        known: dict[str, Learned] = {}
        for key in MODELS:
            begun = time.process_time()
            known[key] = CANDIDATES[key].learn(task, training, known)
            spent = time.process_time() - begun
            note = f", {epochs} passes" if key == "transformer" else ""
            tell(CANDIDATES[key].name + note, token_nats(known[key], task, FULL), spent)
            if key == "transformer" and not given.skip_nanogpt:
                model, steps = train_nanogpt(task, spent)
                tell(f"nanoGPT, {steps:,} steps", nats_of_nanogpt(model, task), spent)


if __name__ == "__main__":
    main()
