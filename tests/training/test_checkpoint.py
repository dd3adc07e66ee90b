# ruff: noqa: NPY002 (numpy's global generator is what is tested)
import random

import numpy as np
import pytest
import torch

from probllm.training.checkpoint import (
    CHECKPOINT_FILE,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)


def draws():
    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second number for the next call
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(()).item()


def test_every_generator_goes_on_where_the_checkpoint_was_made(tmp_path):
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)
    save_checkpoint(tmp_path, {}, {}, [random_states()])
    expected = draws()
    draws()
    tensors, values = load_checkpoint(tmp_path)
    restore_random_states(tensors, values)
    assert draws() == expected


def test_tensors_and_numbers_come_back_exactly(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(1 / 3, dtype=torch.float64), "c": torch.arange(3)[::2]}
    values = {"loss": 0.1 + 0.2, "inf": float("inf"), "none": None, "rows": [{"epoch": 1}]}
    save_checkpoint(tmp_path, tensors, values, [])
    found, other = load_checkpoint(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert {key: other[key] for key in values} == values
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_a_checkpoint_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {}, {"number": 1}, [])
    monkeypatch.setattr("probllm.models.weights.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, {}, {"number": 2}, [])
    assert load_checkpoint(tmp_path)[1]["number"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_no_checkpoint_is_none_and_a_cut_file_is_named(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"a": torch.ones(100)}, {}, [])
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a checkpoint"):
        load_checkpoint(tmp_path)
