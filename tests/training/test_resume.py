"""A run that was cut off goes on to the same numbers, bit for bit on one thread."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from probllm.training import Run, fit, loop
from probllm.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, random_states, save_checkpoint
from tests.models.battery import assert_equal_weights, weights
from tests.training.tagging import TinyTagger, accuracy, tagged
from tests.training.test_fit import numbers

DATA, HELD_OUT = tagged(48), tagged(20, seed=1)
SETTINGS = {
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.05,
    "metric": accuracy,
    "ema": 0.8,
    "seed": 5,
    "progress": False,
}


class Cut(TinyTagger):
    """Sends itself a signal in the midst of a step: of epoch 3 if ``at`` is 15 and an epoch has 6 steps."""

    at = 0
    sent = signal.SIGINT

    def __init__(self, dropout: float = 0.3, sparse: bool = False) -> None:
        super().__init__(dropout=dropout, sparse=sparse)
        self.calls = 0

    def loss(self, batch):
        if self.training:
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(self.sent)
        return super().loss(batch)


def built(sparse: bool = False, at: int = 0) -> Cut:
    torch.manual_seed(11)
    model = Cut(sparse=sparse)
    model.at = at
    return model


def whole_run(**changes) -> tuple[Run, dict]:
    torch.set_num_threads(1)
    model = built(changes.pop("sparse", False))
    return fit(model, DATA, HELD_OUT, **{**SETTINGS, **changes}), weights(model)


@pytest.mark.parametrize("at", [1, 6, 15, 24])
@pytest.mark.parametrize("changes", [{}, {"sparse": True}, {"optimiser": "adagrad", "ema": None, "max_tokens": 30}])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_numbers(tmp_path, at, changes):
    reference, expected = whole_run(**changes)
    options = {**SETTINGS, **changes}
    sparse = options.pop("sparse", False)
    with pytest.raises(KeyboardInterrupt):
        fit(built(sparse, at), DATA, HELD_OUT, folder=tmp_path, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model = built(sparse)
    torch.manual_seed(99)  # the checkpoint's generators count, not these
    run = fit(model, DATA, HELD_OUT, folder=tmp_path, resume=True, **options)
    assert numbers(run) == numbers(reference)
    assert (run.best_epoch, run.best_value, run.tokens, run.steps) == (
        reference.best_epoch,
        reference.best_value,
        reference.tokens,
        reference.steps,
    )
    assert_equal_weights(weights(model), expected)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(run.history)


def test_joint_training_goes_on_to_the_same_numbers(tmp_path):
    def pair(at=0):
        one = built(at=at)
        other = TinyTagger(dim=6, dropout=0.2)
        other.embedding = one.embedding
        return {"one": one, "other": other}

    data = {"one": DATA, "other": tagged(20, seed=4)}  # 6 steps and 3: the second is passed over twice
    options = {**SETTINGS, "metric": None, "weights": {"one": 1.0, "other": 0.3}}
    torch.set_num_threads(1)
    reference = fit(whole := pair(), data, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(pair(at=10), data, folder=tmp_path, **options)
    run = fit(models := pair(), data, folder=tmp_path, resume=True, **options)
    assert numbers(run) == numbers(reference)
    for name, model in models.items():
        assert_equal_weights(weights(model), weights(whole[name]))


def test_metrics_of_epochs_after_the_checkpoint_are_not_told_twice(tmp_path):
    def until(at, **options):
        with pytest.raises(KeyboardInterrupt):
            fit(built(at=at), DATA, HELD_OUT, folder=tmp_path, **options, **SETTINGS)
        return [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert until(8) == [1]
    checkpoint = (tmp_path / CHECKPOINT_FILE).read_bytes()
    assert until(13, resume=True) == [1, 2, 3]
    (tmp_path / CHECKPOINT_FILE).write_bytes(checkpoint)  # as if the run had been killed before the next one
    assert until(5, resume=True) == [1, 2]


def test_a_finished_run_is_read_back_and_not_repeated(tmp_path):
    first = built()
    reference = fit(first, DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    model = built(at=1)
    run = fit(model, DATA, HELD_OUT, folder=tmp_path, resume=True, **SETTINGS)
    assert run == reference
    assert_equal_weights(weights(model), weights(first))
    assert not model.training


def test_resume_without_a_checkpoint_starts_and_without_resume_starts_anew(tmp_path):
    reference, expected = whole_run()
    for options in ({"resume": True}, {"resume": False}):
        model = built()
        run = fit(model, DATA, HELD_OUT, folder=tmp_path, **options, **SETTINGS)
        assert numbers(run) == numbers(reference)
        assert_equal_weights(weights(model), expected)
        with pytest.raises(KeyboardInterrupt):
            fit(built(at=10), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "holds a run with learning_rate=0.05, not 0.1"),
        ({"metric": None}, "metric='accuracy', not None"),
        ({"seed": 6}, "seed=5, not 6"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    with pytest.raises(KeyboardInterrupt):
        fit(built(at=9), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=message):
        fit(built(), DATA, HELD_OUT, folder=tmp_path, resume=True, **{**SETTINGS, **changes})
    with pytest.raises(ValueError, match=r"len\(data\)=48, not 47"):
        fit(built(), DATA[:47], HELD_OUT, folder=tmp_path, resume=True, **SETTINGS)


def test_a_checkpoint_of_another_shape_is_refused_by_the_first_tensor_that_differs(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(built(at=9), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    narrow, double, wide = TinyTagger(dim=4), built().double(), built()
    wide.more = nn.Linear(2, 2)
    for other, message in [
        (narrow, r"other weights: embedding\.weight has shape \[12, 6\], expected \[12, 4\]"),
        (double, r"other weights: bias_unconstrained has dtype torch\.float32, expected torch\.float64"),
        (wide, r"other weights: more\.weight is missing"),
    ]:
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            fit(other, DATA, HELD_OUT, folder=tmp_path, resume=True, **SETTINGS)
        assert_equal_weights(weights(other), before)


def rewritten(folder, change):
    """The checkpoint in the folder with its tensors and values changed, and its checksums as they should be."""
    tensors, values = load_checkpoint(folder)
    del values["generators"]
    change(tensors, values)
    states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random/")}
    numbers = random_states()[1]
    save_checkpoint(folder, tensors, values, [({n.removeprefix("random/0/"): t for n, t in states.items()}, numbers)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("average//output.weight"), r"other averages: output\.weight is missing"),
        (lambda t, v: t.update({"best//more": torch.ones(1)}), r"other best weights: more is not expected"),
        (
            lambda t, v: t.update({"optimiser//output.bias/exp_avg": torch.ones(5)}),
            r"the optimiser's output\.bias/exp_avg has shape \[5\], expected \[3\]",
        ),
        (lambda t, v: v.pop("sums"), r"holds a checkpoint without 'sums'"),
        (lambda t, v: v["run"].pop("steps"), r"not the record of a run: missing \['steps'\]"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(tmp_path, change, message):
    with pytest.raises(KeyboardInterrupt):
        fit(built(at=9), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fit(built(), DATA, HELD_OUT, folder=tmp_path, resume=True, **SETTINGS)


def test_every_checkpoint_in_a_run_leads_to_the_same_end(tmp_path, monkeypatch):
    """Resumes from one checkpoint in each epoch and between two, not only from where a signal fell."""
    reference, expected = whole_run()
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    kept: list[bytes] = []
    replace = os.replace

    def keeping(source, target):
        replace(source, target)
        if Path(target).name == CHECKPOINT_FILE:
            kept.append(Path(target).read_bytes())

    monkeypatch.setattr("probllm.models.weights.os.replace", keeping)
    fit(built(), DATA, HELD_OUT, folder=tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert len(kept) == 24
    for content in kept[::4]:
        (tmp_path / CHECKPOINT_FILE).write_bytes(content)
        model = built()
        run = fit(model, DATA, HELD_OUT, folder=tmp_path, resume=True, **SETTINGS)
        assert numbers(run) == numbers(reference)
        assert_equal_weights(weights(model), expected)
