"""A run that is killed again and again, at moments that nobody chose, ends in the weights of one that never was."""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from probllm.training import Run, fit
from probllm.training.checkpoint import load_checkpoint
from tests.models.battery import assert_equal_weights, weights
from tests.training.killed import DATA, HELD_OUT, SETTINGS, built
from tests.training.test_fit import numbers
from tests.training.test_journal import lines


def test_a_run_killed_at_random_moments_ends_in_the_same_weights_bit_for_bit(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    seed = random.SystemRandom().randrange(2**32)
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path / "killed"), str(seed), "12"]
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, f"seed {seed}: {told.stdout}{told.stderr}"
    reached = [int(line.split()[2]) for line in told.stdout.splitlines()]
    assert len({count for count in reached if 0 < count < 24}) >= 2, f"seed {seed}: {reached}"

    torch.set_num_threads(1)
    model = built()
    run = fit(model, DATA, HELD_OUT, folder=tmp_path / "whole", **SETTINGS)
    found = load_checkpoint(tmp_path / "killed")
    assert found is not None
    saved = {name.removeprefix("weights//"): t for name, t in found[0].items() if name.startswith("weights/")}
    assert_equal_weights(saved, weights(model))
    other = Run.load(tmp_path / "killed" / "run.json")
    assert numbers(other) == numbers(run)
    assert (other.best_epoch, other.best_value, other.tokens) == (run.best_epoch, run.best_value, run.tokens)
    for name in ("steps.jsonl", "metrics.jsonl"):
        assert lines(tmp_path / "killed" / name) == lines(tmp_path / "whole" / name)
