"""One step of a run: the losses of its batches, their gradients, and the optimisers' move."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probllm.models.model import Batch
from probllm.training.optimisers import Optimisers, name_of
from probllm.training.parts import Part
from probllm.training.processes import Processes, is_sharded, whole
from probllm.training.replicas import Replicas
from probllm.training.roles import hidden_matrices
from probllm.training.schedule import rate_factor
from probllm.training.settings import Settings
from probllm.training.tasks import Task, to_device


class Descent:
    """The optimisers of a run, and how they go down its losses.

    Attributes:
        measured: what the last step measured: a value and its weight in an epoch's mean, by name.
    """

    def __init__(self, replicas: Replicas, settings: Settings, processes: Processes) -> None:
        self.replicas, self.settings, self.processes = replicas, settings, processes
        self.tasks, self.modules = replicas.tasks, replicas.modules
        self.measured: dict[str, tuple[float, int]] = {}
        if settings.optimiser == "muon" and not hidden_matrices(self.modules.values()):
            raise ValueError("optimiser is 'muon', but the model has no hidden matrix for it: expected 'adamw'")
        self.optimisers = {
            name: Optimisers(entries, self.modules, settings.optimiser, settings.learning_rate, settings.weight_decay)
            for name, entries in groups_of(self.tasks).items()
        }
        self._parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum({id(p): p.numel() for each in self.optimisers.values() for p in each.parameters}.values())

    def step(self, parts: Sequence[Sequence[Part]], progress: float, place: str) -> float:
        """Make a step, and return its loss.

        Args:
            parts: those of each task's batch that are this process's.
            progress: the part of the run that is done, which decides the learning rate.
            place: of the step in the run, for messages.
        """
        settings = self.settings
        factor = rate_factor(settings.schedule, progress, settings.warmup, settings.decay)
        for optimisers in self.optimisers.values():
            optimisers.set_rate(factor)
        self.measured = {"learning_rate": (settings.learning_rate * factor, 1)}
        return self._alternate(parts[0], place) if len(self.optimisers) > 1 else self._descend(parts, place)

    def _descend(self, parts: Sequence[Sequence[Part]], place: str) -> float:
        """Down the weighted sum of all losses of all tasks."""
        (optimisers,) = self.optimisers.values()
        sums: list[dict[str, float]] = [{} for _ in parts]
        last = max((number for number, task in enumerate(self.tasks) if task.weight), default=-1)
        for number, (task, some) in enumerate(zip(self.tasks, parts, strict=True)):
            for index, part in enumerate(some):
                with self.replicas.computing(number == last and index == len(some) - 1):
                    losses = self._losses(number, part, place)
                    with precision(self.settings, self.processes):
                        total = torch.stack([loss.reshape(()) for loss in losses.values()]).sum()
                    self._add(sums[number], {"": total, **(losses if len(losses) > 1 else {})}, part)
                    if self.processes.size == 1:  # else all of them learn of it first, and then stop together
                        self._check(sums[number][""], place, task.name)
                    if task.weight:
                        self._backward(total, task.weight * part.share, task, place)
        values = [
            self._record(task, some, parts[number][0].total, place)
            for number, (task, some) in enumerate(zip(self.tasks, sums, strict=True))
        ]
        self._move(optimisers, place)
        return sum(task.weight * value for task, value in zip(self.tasks, values, strict=True))

    def _alternate(self, parts: Sequence[Part], place: str) -> float:
        """Down each named loss in turn, with its own parameters, as in a GAN."""
        task = self.tasks[0]
        parts = [part._replace(batch=to_device(part.batch, self.processes.device)) for part in parts]
        norms: list[float] = []
        sums: dict[str, float] = {"": 0.0}
        for name, optimisers in self.optimisers.items():
            for part in parts:
                losses = self._losses(0, part, place)
                if name not in losses:
                    raise ValueError(f"parameter_groups() has {name!r}, but losses() has {sorted(losses)} only")
                self._add(sums, {"": losses[name], name: losses[name]}, part)
                self._backward(losses[name], part.share, task, f"{place}, loss {name!r}", optimisers.parameters)
            (value,) = self.processes.sum([sums[name]])
            self._check(value, f"{place}, loss {name!r}", "")
            norms.append(self._move(optimisers, place))
        self.measured["gradient_norm"] = (sum(norms) / len(norms), len(norms))
        return self._record(task, sums, parts[0].total, place)

    def _losses(self, number: int, part: Part, place: str) -> dict[str, Tensor]:
        """The losses of a part; an error, as of a law that refuses NaN scores, is told with its place."""
        batch: Batch = to_device(part.batch, self.processes.device)
        try:
            with precision(self.settings, self.processes):
                return self.replicas.losses(number, batch)
        except ValueError as error:
            # Of shards nothing is known here, as the other processes need not be in trouble.
            sharded = any(is_sharded(parameter) for parameter in self._parameters)
            error.add_note(place if sharded else f"{place}; {self._cause()}")
            raise

    def _backward(self, loss: Tensor, weight: float, task: Task, place: str, inputs: Any = None) -> None:
        if not loss.requires_grad:
            name = task.name and f" of {task.name!r}"
            raise ValueError(f"{place}: the loss{name} depends on no parameter that is trained")
        weight *= self.processes.size  # for the processes' gradients are averaged, and their shares sum to 1
        (loss if weight == 1 else weight * loss).backward(inputs=inputs)

    def _add(self, sums: dict[str, float], losses: Mapping[str, Tensor], part: Part) -> None:
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + (part.share * float(loss.detach()) if part.rows else 0.0)

    def _record(self, task: Task, sums: Mapping[str, float], rows: int, place: str) -> float:
        """The loss of a task, checked; it and the task's named losses become known as measured."""
        name = f"loss_{task.name}" if task.name else "loss"
        totals = dict(zip(sums, self.processes.sum(list(sums.values())), strict=True))
        self._check(totals[""], place, task.name)
        for part, value in totals.items():
            self.measured[f"{name}_{part}" if part else name] = (value, rows)
        return totals[""]

    def _check(self, value: float, place: str, task: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(f"{place}: the loss{task and f' of {task!r}'} is {value}; {self._cause()}")

    def _move(self, optimisers: Optimisers, place: str) -> float:
        self.replicas.complete()
        norm = optimisers.clip(self.settings.clip)
        if not math.isfinite(norm):
            bad = next(p for p in optimisers.parameters if p.grad is not None and not _is_finite(p.grad))
            raise FloatingPointError(f"{place}: the gradient of {name_of(bad, self.modules)} is not finite")
        self.measured["gradient_norm"] = (norm, 1)
        optimisers.step()
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def _cause(self) -> str:
        """Which parameter is not finite, if one is."""
        names = (
            f"the parameter {f'{prefix}.' if prefix else ''}{name} is not finite"
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if not _is_finite(parameter)
        )
        return next(names, "all parameters are finite, so that the batch or the model is at fault")


def groups_of(tasks: Sequence[Task]) -> dict[str, list[Any]]:
    """The parameters by the loss that trains them; all together, under no name, unless there are several.

    Raises:
        ValueError: for several models of which one has several groups.
    """
    groups = [task.groups() for task in tasks]
    if len(groups) == 1 and len(groups[0]) > 1:
        return groups[0]
    if any(len(group) > 1 for group in groups):
        raise ValueError("a model with several parameter groups (alternating losses) cannot be trained jointly")
    return {"": [entry for group in groups for entries in group.values() for entry in entries]}


def precision(settings: Settings, processes: Processes) -> Any:
    """Where losses are computed: bfloat16 as torch's autocast has it, or as they are."""
    return torch.autocast(processes.device.type, torch.bfloat16, enabled=settings.mixed_precision)


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(whole(torch.isfinite(values).all()))
