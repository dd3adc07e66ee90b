"""A checkpoint: a folder with ``config.json`` and tensors in ``model.safetensors``, or in several files with an index.

A family is a table of ``Weight``s, which says of each of our parameters what tensors of the file it is made of: one
table reads and writes. Nothing is unpickled: a pickle may run anything, and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.transformer_layer import Activation, activate

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


class Weight(NamedTuple):
    """One of our parameters and the tensors of the file that it is made of, one below another.

    ``sizes`` are their numbers of rows (None where there is one tensor), ``transposed`` says that the file keeps them
    ``[in, out]``, one beside another in a single tensor where ours is one, and ``leading`` counts the axes of size 1
    that they have in front.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    transposed: bool = False
    leading: int = 0


class OutputTransform(Configurable, nn.Module):
    """What BERT puts before its output layer: ``norm(gelu(W h + b))`` (Devlin et al., 2019, their code).

    Args:
        dim: size of the states.
        activation: as in ``TransformerEncoder``.
        norm_eps: added to the variance by the norm.
    """

    def __init__(self, dim: int, activation: Activation = "gelu", norm_eps: float = 1e-12) -> None:
        super().__init__()
        self.activation = activation
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """``[..., dim]`` from ``[..., dim]``."""
        result: Tensor = self.norm(activate(self.dense(states), self.activation))
        return result


@dataclass
class Head:
    """What a checkpoint holds beside the stack of layers: the output layer, and all that must be written back.

    Attributes:
        weight: the output layer's own weights ``[vocabulary_size, dim]``, or ``[labels, dim]`` of a classifier; None
            where they are the embeddings.
        bias: its biases ``[vocabulary_size]``, or None.
        transform: what comes between the states and the output layer, or None.
        config: the file's ``config.json``.
        extra: tensors that no part of ours holds, by their names in the file (BERT's pooler, other heads).
        prefix: what stands before the stack's names in the file.
        present: whether the file holds an output layer, its own or tied.
        pooler: ViT's layer on the state of the class token, or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: OutputTransform | None = None
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    prefix: str | None = None
    present: bool = True
    pooler: nn.Linear | None = None

    def logits(self, states: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """Scores ``[..., vocabulary_size]`` of states ``[..., dim]``, given the embeddings for a tied output layer.

        Raises:
            ValueError: if the output layer has no weights of its own, and none are given.
        """
        weight = token_weight if self.weight is None else self.weight
        if weight is None:
            raise ValueError("token_weight is None, and the checkpoint holds no output layer of its own")
        return F.linear(states if self.transform is None else self.transform(states), weight, self.bias)

    def pooled(self, states: Tensor) -> Tensor:
        """``tanh(W h + b)`` ``[B, size]`` of the class token's state, from states ``[B, length, dim]``.

        Raises:
            ValueError: if the checkpoint holds no pooler.
        """
        if self.pooler is None:
            raise ValueError("the checkpoint holds no pooler")
        return torch.tanh(self.pooler(states[:, 0]))


def read_config(folder: str | Path, model_types: Sequence[str]) -> dict[str, Any]:
    """``config.json`` of the folder, of one of these families.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or names another family.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a folder with config.json and model.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in model_types:
        raise ValueError(f"{path}: model_type is {model_type!r}; expected {' or '.join(map(repr, model_types))}")
    return config  # type: ignore[no-any-return]


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is a pickle only, or a file is corrupt; the message names it.
    """
    folder = Path(folder)
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.is_file():
        files = [path]
    elif index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    else:
        for name in _PICKLES:
            if (folder / name).exists():
                raise ValueError(
                    f"{folder / name} is a pickle, which may run anything when it is read; expected safetensors "
                    "(convert it with transformers: model.save_pretrained(folder, safe_serialization=True))"
                )
        raise FileNotFoundError(f"{path} is missing; expected a folder with config.json and model.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.parent != folder:
            raise ValueError(f"{index} names the file {file}; expected one of its own folder")
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file, or corrupt: {error}") from error
    return tensors


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each to a name of its own first, so that none is ever half written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / "model.safetensors", folder / "model.safetensors.new"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new, {"format": "pt"})
    os.replace(new, path)
    path, new = folder / "config.json", folder / "config.json.new"
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)


def load(module: nn.Module, table: Iterable[Weight], tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Take each parameter of the module (made on the device "meta") out of the file's tensors.

    Raises:
        ValueError: if a tensor is missing or of another shape than the config says; the message names the first.
    """
    state, shapes = {}, {name: parameter.shape for name, parameter in module.state_dict().items()}
    for weight in table:
        parts = []
        expected = shapes[weight.ours]
        for name, rows in zip(weight.theirs, weight.sizes or expected[:1], strict=True):
            full = prefix + name
            if full not in tensors:
                raise ValueError(f"the checkpoint lacks the tensor {full!r}")
            part, shape = tensors.pop(full), torch.Size([rows, *expected[1:]])
            if weight.transposed:
                part = part.t() if part.dim() == 2 else part
            front = (1,) * weight.leading
            if part.shape != front + shape:
                # Named as they stand in the file.
                found, wanted = ([*s][::-1] if weight.transposed else [*s] for s in (part.shape, front + shape))
                raise ValueError(f"the tensor {full!r} has shape {found}; config.json says {wanted}")
            parts.append(part.reshape(shape))
        state[weight.ours] = (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
    module.load_state_dict(state, assign=True)


def unload(module: nn.Module, table: Iterable[Weight], prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors out of the module's parameters, by their full names."""
    state, tensors = module.state_dict(), {}
    for weight in table:
        whole = state[weight.ours]
        for name, part in zip(weight.theirs, whole.split(weight.sizes or len(whole)), strict=True):
            part = part.t() if weight.transposed else part
            tensors[prefix + name] = part.reshape((1,) * weight.leading + part.shape)
    return tensors


def check_options(module: Configurable, family: str, **expected: Any) -> None:
    """Raise unless the module was made with the options that a family's checkpoints have."""
    for name, wanted in expected.items():
        given = module.config_arguments.get(name)
        if given != wanted:
            raise ValueError(f"{name} is {given!r}; a {family} checkpoint has {wanted!r}")


def check_config(config: Mapping[str, Any], family: str, **expected: Any) -> None:
    """Raise unless the entries that are there have the values that our layers compute."""
    for name, wanted in expected.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"config.json: {name} is {config[name]!r}; of the {family} family, {wanted!r} can be read")


def translate(name: str, value: Any, table: Mapping[str, str]) -> str:
    """Their name of an option in ours."""
    if value not in table:
        raise ValueError(f"config.json: {name} is {value!r}; expected one of {sorted(table)}")
    return table[value]


def translate_back(name: str, value: Any, table: Mapping[str, str], family: str, written: Any = None) -> str:
    """Our name of an option in theirs: the one that was read, if it means the same, else the table's first."""
    if table.get(str(written)) == value:
        return str(written)
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    raise ValueError(f"{name} is {value!r}; a {family} checkpoint has one of {sorted(set(table.values()))}")
