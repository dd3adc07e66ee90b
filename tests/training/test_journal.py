"""What a run writes of its steps and epochs, and that going on from a checkpoint writes nothing twice."""

import importlib.util
import json
import sys

import pytest
import torch

from probllm.training import fit
from probllm.training.checkpoint import CHECKPOINT_FILE
from probllm.training.journal import METRICS_FILE, STEPS_FILE, cut_after
from probllm.training.schedule import rate_factor
from tests.training.tagging import TinyTagger, accuracy
from tests.training.test_resume import DATA, HELD_OUT, SETTINGS, built

TIMED = ("seconds", "tokens_per_second")
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def test_every_step_has_a_line_and_every_epoch_its_means(tmp_path):
    run = fit(TinyTagger(), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    steps, epochs = lines(tmp_path / STEPS_FILE), lines(tmp_path / METRICS_FILE)
    assert [(row["step"], row["epoch"]) for row in steps] == [(i + 1, i // 6 + 1) for i in range(24)]
    for i, row in enumerate(steps):
        assert row["learning_rate"] == pytest.approx(0.05 * rate_factor("cosine", (i + 0.5) / 24, 0.05, 0.2))
        assert row["gradient_norm"] > 0
    for epoch, row in enumerate(epochs):
        own = steps[6 * epoch : 6 * epoch + 6]
        assert row["step"] == own[-1]["step"]
        for name in ("loss", "gradient_norm", "learning_rate"):  # 48 sequences are 6 full batches
            assert row[name] == pytest.approx(sum(each[name] for each in own) / 6)
        assert {"validation_loss", "validation_accuracy"} <= row.keys()
    rates = [json.loads(line)["tokens_per_second"] for line in (tmp_path / STEPS_FILE).read_text().splitlines()]
    assert min(rates) > 0
    rates = [row["tokens_per_second"] for row in run.history]
    assert sum(sum(DATA.lengths) / rate for rate in rates) == pytest.approx(run.training_seconds)


def cut_and_resumed(folder, **options):
    """A run that is killed some steps after its last checkpoint, in the midst of writing a line, and goes on."""
    options = {**SETTINGS, "folder": folder, **options}
    with pytest.raises(KeyboardInterrupt):
        fit(built(at=8), DATA, HELD_OUT, **options)
    checkpoint = (folder / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fit(built(at=9), DATA, HELD_OUT, resume=True, **options)
    assert len(lines(folder / STEPS_FILE)) == 17
    (folder / CHECKPOINT_FILE).write_bytes(checkpoint)
    with open(folder / STEPS_FILE, "a") as file:
        file.write('{"step": 18, "epo')
    fit(built(), DATA, HELD_OUT, resume=True, **options)


def test_a_run_that_goes_on_tells_each_step_and_epoch_once_as_if_it_had_never_stopped(tmp_path):
    fit(built(), DATA, HELD_OUT, folder=tmp_path / "whole", **SETTINGS)
    (tmp_path / "cut").mkdir()
    cut_and_resumed(tmp_path / "cut")
    for name in (STEPS_FILE, METRICS_FILE):
        assert lines(tmp_path / "cut" / name) == lines(tmp_path / "whole" / name)


def test_what_is_kept_of_the_steps_is_never_rewritten(tmp_path):
    path = tmp_path / STEPS_FILE
    kept = b'{"step": 1}\n{"step": 2}\n'
    for rest in (
        b"",
        b'{"step": 3}\n',
        b'{"step": 2',
        b'{"step": 2}',
        b"nonsense\n",
        b"[]\n",
        b'{"step": 3}\n{"step": 1}\n',
    ):
        path.write_bytes(kept + rest)
        place = path.stat().st_ino
        cut_after(path, 2)
        assert path.read_bytes() == kept
        assert path.stat().st_ino == place
    cut_after(path, 0)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "none", 3)


@needs_tensorboard
def test_tensorboard_shows_every_step_once_though_the_run_was_cut(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    folder.mkdir()
    cut_and_resumed(folder, tensorboard=tmp_path / "board")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = board.Scalars("train/loss")
    expected = lines(folder / STEPS_FILE)
    assert [event.step for event in found] == [row["step"] for row in expected]
    assert [event.value for event in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    epochs = board.Scalars("epoch/validation_accuracy")
    assert [event.step for event in epochs] == [6, 12, 18, 24]
    assert epochs[-1].value == pytest.approx(lines(folder / METRICS_FILE)[-1]["validation_accuracy"])


def test_a_missing_tensorboard_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'probllm\[tensorboard\]'"):
        fit(TinyTagger(), DATA, tensorboard=tmp_path, **{**SETTINGS, "metric": None})
    assert not list(tmp_path.iterdir())


def test_the_metric_of_a_run_is_in_its_lines_with_several_models_too(tmp_path):
    def both(models, data):
        return sum(accuracy(models[name], data[name]) for name in models) / 2

    torch.manual_seed(0)
    data, held_out = {"a": DATA, "b": DATA}, {"a": HELD_OUT, "b": HELD_OUT}
    options = {**SETTINGS, "metric": both, "epochs": 1}
    run = fit({"a": TinyTagger(), "b": TinyTagger()}, data, held_out, folder=tmp_path, **options)
    assert run.history[0]["validation_both"] == run.best_value
    assert {"loss", "loss_a", "loss_b"} <= lines(tmp_path / STEPS_FILE)[0].keys()
