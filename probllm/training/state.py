"""A run as a checkpoint has it: taken apart into named tensors and JSON values, and put together again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probllm.training.checkpoint import restore_random_states
from probllm.training.processes import sharded_as, whole
from probllm.training.run import Run

if TYPE_CHECKING:
    from probllm.training.loop import Loop

_PLACE = ("epoch", "position", "since_best", "finished")


def tensors_of(loop: "Loop") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a run, put together where processes hold shards, on the CPU of the first; and its values.

    Whole tensors, and not a file for each shard: a run then goes on with any number of processes, and one process
    reads what many have written.
    """
    held: dict[str, Tensor] = {f"weights/{name}": tensor for name, tensor in loop.replicas.weights().items()}
    scalars: dict[str, Any] = {}
    if not loop.finished:
        held |= {f"best/{name}": tensor for name, tensor in loop.best.items()}
        if loop.average is not None:
            held |= {f"average/{name}": tensor for name, tensor in loop.average.average.items()}
        for group, optimisers in loop.optimisers.items():
            some, scalars[group] = optimisers.state()
            held |= {f"optimiser/{group}/{name}": tensor for name, tensor in some.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in held.items():
        together = whole(tensor).detach()
        if loop.processes.first:
            tensors[name] = together.cpu()
    values = {
        "settings": identity_of(loop),
        "run": loop.run.to_json(),
        "optimiser": scalars,
        "sums": loop.sums,
        **{name: getattr(loop, name) for name in _PLACE},
    }
    return tensors, values


@torch.no_grad()
def put_back(loop: "Loop", tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Bring a run to where a checkpoint was made.

    Raises:
        ValueError: if it belongs to a run with other arguments, data or weights; the message names the first.
    """
    folder = f"folder {str(loop.folder)!r}"
    missing = [name for name in ("settings", "run", "optimiser", "sums", "generators", *_PLACE) if name not in values]
    if missing:
        raise ValueError(f"{folder} holds a checkpoint without {missing[0]!r}")
    for name, value in identity_of(loop).items():
        if values["settings"].get(name) != value:
            saved = values["settings"].get(name)
            raise ValueError(f"{folder} holds a run with {name}={saved!r}, not {value!r}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest] = tensor
    run, own = Run.from_json(values["run"]), loop.replicas.weights()
    _check_alike(parts.get("weights", {}), own, f"{folder} holds a run with other weights")
    going_on = not values["finished"]
    if going_on and run.best_epoch is not None:
        _check_alike(parts.get("best", {}), own, f"{folder} holds a run with other best weights")
    if going_on and loop.average is not None:
        _check_alike(parts.get("average", {}), own, f"{folder} holds a run with other averages")

    for name, tensor in own.items():
        tensor.copy_(sharded_as(parts["weights"][name], tensor))
    if going_on:
        device = loop.processes.device
        loop.best = {name: sharded_as(some.to(device), own[name]) for name, some in parts.get("best", {}).items()}
        if loop.average is not None:
            loop.average.average = {
                name: sharded_as(some.to(device), own[name]) for name, some in parts["average"].items()
            }
        for group, optimisers in loop.optimisers.items():
            prefix, held = f"{group}/", parts.get("optimiser", {})
            some = {name.removeprefix(prefix): t for name, t in held.items() if name.startswith(prefix)}
            optimisers.load_state(some, values["optimiser"][group])
    loop.run, loop.sums = run, values["sums"]
    for name in _PLACE:
        setattr(loop, name, values[name])
    restore_random_states(tensors, values, loop.processes.rank)


def identity_of(loop: "Loop") -> dict[str, Any]:
    """What must be equal in a run and in the one that goes on with it."""
    sizes = {f"data{f'[{task.name!r}]' if task.name else ''}": len(task.data) for task in loop.tasks}
    weights = {f"weights[{task.name!r}]": task.weight for task in loop.tasks if task.name}
    return {**loop.settings.to_json(), **{f"len({name})": size for name, size in sizes.items()}, **weights}


def _check_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise, and name the first tensor, where two sets of tensors differ in names, shapes or dtypes."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        shown = name.removeprefix("/")
        if name not in found:
            raise ValueError(f"{what}: {shown} is missing")
        if name not in expected:
            raise ValueError(f"{what}: {shown} is not expected")
        if found[name].shape != expected[name].shape:
            shapes = f"{list(found[name].shape)}, expected {list(expected[name].shape)}"
            raise ValueError(f"{what}: {shown} has shape {shapes}")
        if found[name].dtype != expected[name].dtype:
            raise ValueError(f"{what}: {shown} has dtype {found[name].dtype}, expected {expected[name].dtype}")
