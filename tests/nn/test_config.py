"""A config is JSON, rebuilds an equal module, and can build nothing but what is ours or allowed."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from probllm.nn.config import Configurable, from_config, to_config


class Leaf(Configurable, nn.Module):
    def __init__(self, dim: int, widths: tuple[int, ...] = (1, 2), **options: float):
        super().__init__()
        self.linear = nn.Linear(dim, sum(widths))
        self.options = options


class Bigger(Leaf):
    def __init__(self, dim: int, extra: str = "x"):
        super().__init__(2 * dim, widths=(3,))
        self.extra = extra


class Inherits(Bigger):
    pass


class Program(Configurable, PyroModule):
    def __init__(self, encoder: nn.Module, parts: list[nn.Module] | None = None, table: dict[str, Any] | None = None):
        super().__init__()
        self.encoder = encoder
        self.parts = nn.ModuleList(parts or [])
        self.table = table


ALL = [Leaf, Bigger, Inherits, Program]


def through_json(module: Configurable) -> Any:
    return from_config(json.loads(json.dumps(to_config(module))), allow=ALL)


def test_defaults_and_keyword_options_are_recorded():
    assert Leaf(3, momentum=0.5).config_arguments == {"dim": 3, "widths": (1, 2), "momentum": 0.5}
    assert through_json(Leaf(3, momentum=0.5)).options == {"momentum": 0.5}


@pytest.mark.parametrize("cls", [Bigger, Inherits])
def test_the_outermost_constructor_is_the_one_recorded(cls):
    again = through_json(cls(4, extra="y"))
    assert type(again) is cls
    assert again.config_arguments == {"dim": 4, "extra": "y"}
    assert again.linear.weight.shape == (3, 8)


def test_a_pyro_module_with_nested_modules_comes_back_equal():
    module = Program(Leaf(2), [Leaf(3), Bigger(1)], {"a": [1, {"b": None}]})
    again = through_json(module)
    assert to_config(again) == to_config(module)
    again.load_state_dict(module.state_dict())
    x = torch.randn(5, 2)
    assert torch.equal(again.encoder.linear(x), module.encoder.linear(x))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in module.named_parameters()]


def test_a_module_given_twice_comes_back_as_one_held_twice():
    leaf = Leaf(2)
    again = through_json(Program(Leaf(1), [leaf, Program(leaf)]))
    assert again.parts[0] is again.parts[1].encoder
    assert again.parts[0] is not again.encoder


def test_copies_and_pickles_keep_the_record():
    module = Program(Leaf(2))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert to_config(other) == to_config(module)
        assert other.config_arguments["encoder"] is other.encoder


def test_ours_are_found_by_their_room_alone():
    import probllm.nn as room

    embedding = room.WordEmbedding(10, 4)
    config = to_config(embedding)
    assert config["class"] == "probllm.nn.WordEmbedding"
    assert isinstance(from_config(config), room.WordEmbedding)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class": "os.system", "arguments": {"command": "true"}}, r"os\.system"),
        ({"class": "probllm.nn.Nothing", "arguments": {}}, r"probllm\.nn\.Nothing"),
        ({"class": "probllm.nowhere.Nothing", "arguments": {}}, "Nothing"),
        ({"class": "torch.nn.Linear", "arguments": {}}, r"torch\.nn\.Linear"),
        ({"class": f"{Leaf.__module__}.Leaf", "arguments": {}}, "dim"),
        ({"class": f"{Bigger.__module__}.Bigger", "arguments": {"dim": 1, "widht": 2}}, "widht"),
        ({"class": 3, "arguments": {}}, "class"),
        ({"arguments": {}}, "class"),
        ({"class": f"{Program.__module__}.Program", "arguments": {"encoder": {"same_as": "parts"}}}, "precede"),
    ],
)
def test_a_bad_config_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, allow=[Leaf, Bigger, Program])


def test_a_users_class_must_be_allowed():
    with pytest.raises(ValueError, match="Leaf"):
        from_config(to_config(Leaf(2)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Program(nn.Linear(1, 1)), "encoder is a Linear"),
        (Program(Leaf(1), table={"x": torch.zeros(1)}), r"table\.x is a Tensor"),
        (Program(Leaf(1), table={3: 1}), "table"),
        (Program(Leaf(1), table={"class": "os.system"}), "reserved"),
    ],
)
def test_what_json_cannot_hold_is_named(module, message):
    with pytest.raises(TypeError, match=message):
        to_config(module)
