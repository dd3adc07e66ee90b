"""Several processes that train together make the run that one of them would make alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from probllm.training import Run, fit
from tests.training import several
from tests.training.several import DATA, HELD_OUT, OPTIONS, alone, scaled
from tests.training.test_fit import numbers

pytestmark = pytest.mark.slow
TIMED = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left."""
    place = tmp_path_factory.mktemp("several")
    with pytest.raises(KeyboardInterrupt):
        alone(scaled(at=9), folder=place / "by-one")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.several", str(place)]
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "find_unused_parameters" not in told.stderr
    return place


def weights_of(folder, name, rank=0):
    return safetensors.torch.load_file(folder / f"{name}-{rank}.safetensors")


def history_of(folder, name):
    rows = json.loads((folder / f"{name}.json").read_text())
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", several.CASES)
def test_several_processes_train_as_one_does(folder, case, monkeypatch):
    torch.set_num_threads(1)
    run, model = several.CASES[case]()
    # Muon orthogonalises in bfloat16, which a difference in the last digit of float64 may round otherwise.
    tolerance = {"muon": 1e-2, "crf": 1e-4}.get(case.partition("-")[0], 1e-8)  # the CRF computes in float32
    for row, expected in zip(history_of(folder, case), numbers(run), strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for rank in (0, 1):
        assert_close(weights_of(folder, case, rank), model.state_dict(), tolerance)


@pytest.mark.parametrize("kind", ["by-copies", "by-shards"])
def test_one_process_goes_on_with_the_run_of_several(folder, kind):
    whole, expected = alone(scaled())
    run = fit(model := scaled(), DATA, HELD_OUT, folder=folder / kind, resume=True, **OPTIONS)
    for row, other in zip(numbers(run), numbers(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-8)
    assert (run.best_epoch, run.steps, run.tokens) == (whole.best_epoch, whole.steps, whole.tokens)
    assert_close(model.state_dict(), expected.state_dict(), 1e-8)
    steps = [json.loads(line)["step"] for line in (folder / kind / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.steps + 1))


def test_several_processes_go_on_with_the_run_of_one(folder):
    whole, expected = alone(scaled())
    for row, other in zip(history_of(folder, "from-one"), numbers(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-8)
    assert_close(weights_of(folder, "from-one", 1), expected.state_dict(), 1e-8)
    saved = Run.load(folder / "by-one" / "run.json")
    assert (saved.steps, saved.tokens) == (whole.steps, whole.tokens)
    steps = [json.loads(line)["step"] for line in (folder / "by-one" / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.steps + 1))


@pytest.mark.parametrize("sharding", [None, "full"])
def test_a_run_of_several_that_was_cut_goes_on_bit_for_bit_with_the_draws_of_each(folder, sharding):
    assert history_of(folder, f"noisy-cut-{sharding}") == history_of(folder, f"noisy-whole-{sharding}")
    found, expected = (weights_of(folder, f"noisy-{kind}-{sharding}") for kind in ("cut", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def said_in(folder):
    """What each process told."""
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


def test_processes_draw_each_their_own_random_numbers_and_the_first_those_of_one_alone(folder):
    drawn = [said["drawn"] for said in said_in(folder)]
    assert len({*drawn[0], *drawn[1]}) == 2 * len(drawn[0]) == 2 * 6
    torch.manual_seed(OPTIONS["seed"])
    assert drawn[0] == [torch.rand(()).item() for _ in range(6)]


def test_shards_are_shares_and_the_blocks_of_a_stack_are_cut_by_themselves(folder):
    assert [said["held"] for said in said_in(folder)] == [[0.5, 2]] * 2


def test_what_is_wrong_in_one_process_is_told_by_all(folder):
    one, other = said_in(folder)
    assert {**one, "drawn": other["drawn"]} == other
    assert one["nan"].startswith("epoch 1, batch 1 of 6: the loss is nan; all parameters are finite")
    assert one["nan-shards"] == one["nan"]
    assert "sharding is 'full', but the model has a table with sparse gradients" in one["sparse"]
    assert "sharding is 'full', but the model has alternating losses" in one["rivals"]
