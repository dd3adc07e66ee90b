"""Trains in children that are killed (SIGKILL) at random moments, each going on from what the one before has left.

Run as ``python killed.py FOLDER SEED KILLS``; the seed chooses the moments. A child is a fork, which saves the seconds
that a fresh interpreter would spend on imports: nothing has been computed before, so that it is as good as one.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # which the first optimiser of a process would load, for seconds

from probllm.models import SoftmaxTagger
from probllm.models.model import Batch
from probllm.nn import TransformerEncoder
from probllm.training import fit, loop
from tests.training.tagging import TAGS, WORDS, accuracy, tagged

DATA, HELD_OUT = tagged(48), tagged(20, seed=1)
SETTINGS = {
    "epochs": 4,
    "batch_size": 4,
    "accumulate": 2,
    "learning_rate": 0.02,
    "optimiser": "muon",
    "schedule": "wsd",
    "metric": accuracy,
    "ema": 0.8,
    "seed": 5,
    "progress": False,
}


def built() -> SoftmaxTagger:
    torch.manual_seed(11)
    return SoftmaxTagger(TransformerEncoder(WORDS, dim=8, layers=2, heads=2, dropout=0.2), TAGS)


def train(folder: Path) -> None:
    def slowly(self: SoftmaxTagger, batch: Batch, loss=SoftmaxTagger.loss):
        time.sleep(0.002)
        return loss(self, batch)

    SoftmaxTagger.loss = slowly
    loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_SHARE = 0.0, 1e9  # a checkpoint each step
    fit(built(), DATA, HELD_OUT, folder=folder, resume=True, **SETTINGS)


def steps(folder: Path) -> int:
    path = folder / "steps.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def main(folder: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(seed)
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(folder)
                code = 0
            finally:
                os._exit(code)
        told, end = steps(folder), time.monotonic() + 60
        if killed < kills and moments.random() < 0.3:
            end = time.monotonic() + moments.uniform(0.0, 0.1)  # perhaps before its first step
        found = 0
        while not found and time.monotonic() < end:
            time.sleep(0.001)
            found, status = os.waitpid(child, os.WNOHANG)
            if told is not None and killed < kills and steps(folder) > told:
                told, end = None, min(end, time.monotonic() + moments.uniform(0.0, 0.06))
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        print(f"killed after {steps(folder)} steps", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
