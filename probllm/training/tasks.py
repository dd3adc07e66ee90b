"""What a fit trains: one model on its data, or several models, each on its own, that may share modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from probllm.data.dataset import Dataset
from probllm.models.model import Batch, batch_size


@runtime_checkable
class Source(Protocol):
    """Data that can be trained on, as ``probllm.data.Dataset``: batches in an order that (seed, epoch) decide."""

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ) -> Sequence[Any]: ...


@dataclass
class Task:
    """A model, what it is trained and judged on, and the weight of its loss."""

    name: str
    model: nn.Module
    data: Source
    validation: Source | None
    weight: float = 1.0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The model's named losses, each a scalar."""
        model: Any = self.model
        losses = model.losses(batch) if hasattr(model, "losses") else {"loss": model.loss(batch)}
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"{type(model).__name__}: {name} is a {found}, expected a scalar tensor")
        return dict(losses)

    def groups(self) -> dict[str, list[Any]]:
        """The model's parameters by the loss that trains them."""
        model: Any = self.model
        if hasattr(model, "parameter_groups"):
            return dict(model.parameter_groups())
        return {"loss": list(model.parameters())}


def as_tasks(model: Any, data: Any, validation: Any, weights: Mapping[str, float] | None) -> list[Task]:
    """The arguments of ``fit`` as tasks: one without a name, or several by their names."""
    if not isinstance(model, Mapping):
        if weights is not None:
            raise ValueError("weights is given, but there is one model only")
        return [_task("", model, data, validation, 1.0)]
    if not model:
        raise ValueError("model is an empty dict: expected models by name")
    for name, argument in (("data", data), ("validation", validation), ("weights", weights)):
        if argument is None and name != "data":
            continue
        if not isinstance(argument, Mapping):
            raise TypeError(f"{name} is a {type(argument).__name__}, expected a dict with the keys {sorted(model)}")
        if argument.keys() != model.keys():
            raise ValueError(f"{name} has the keys {sorted(argument)}, expected those of model, {sorted(model)}")
    for name in model:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"model has the key {name!r}, expected a name without '/'")
    return [
        _task(name, model[name], data[name], validation and validation[name], weights[name] if weights else 1.0)
        for name in model
    ]


def _task(name: str, model: Any, data: Any, validation: Any, weight: float) -> Task:
    suffix = f"[{name!r}]" if name else ""
    if not isinstance(model, nn.Module) or not (hasattr(model, "loss") or hasattr(model, "losses")):
        raise TypeError(f"model{suffix} is a {type(model).__name__}, expected a module with a method loss(batch)")
    if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"weights{suffix} is {weight!r}, expected a number >= 0")
    train = _source(f"data{suffix}", data)
    return Task(
        name, model, train, None if validation is None else _source(f"validation{suffix}", validation), float(weight)
    )


def _source(argument: str, data: Any) -> Source:
    if isinstance(data, Mapping):
        data = Dataset.from_tensors(data)
    if not isinstance(data, Source):
        raise TypeError(f"{argument} is a {type(data).__name__}, expected a Dataset or a dict of tensors")
    if len(data) == 0:
        raise ValueError(f"{argument} is empty")
    return data


def count_tokens(batch: Batch) -> int:
    """The number of real tokens in a batch, or of its sequences where it has no mask."""
    mask = batch.get("mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else batch_size(batch)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return {key: to_device(part, device) for key, part in value.items()} if isinstance(value, Mapping) else value
