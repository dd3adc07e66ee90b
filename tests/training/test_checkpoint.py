# ruff: noqa: NPY002 (numpy's global generator is what is tested)
import pickle
import random

import numpy as np
import pytest
import safetensors.torch
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
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:20], b"nonsense", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a checkpoint"):
            load_checkpoint(tmp_path)


def test_a_safetensors_file_of_something_else_is_no_checkpoint(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a checkpoint"):
        load_checkpoint(tmp_path)


def test_one_flipped_bit_is_found_and_its_tensor_named(tmp_path):
    tensors = {"weights/a": torch.randn(30), "weights/b": torch.randn(4).bfloat16(), "weights/c": torch.tensor(3)}
    save_checkpoint(tmp_path, {**tensors, "empty": torch.zeros(0, 3)}, {}, [])
    path = tmp_path / CHECKPOINT_FILE
    whole = path.read_bytes()
    load_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        content = bytearray(whole)
        content[whole.rindex(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint.safetensors is damaged: {name} is not what was written"):
            load_checkpoint(tmp_path)


class Exploit:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_never_loaded(tmp_path, write, capsys):
    write({"weights": Exploit()}, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match=r"it is a pickle, as torch\.save writes, and is never loaded"):
        load_checkpoint(tmp_path)
    assert "unpickled" not in capsys.readouterr().out
