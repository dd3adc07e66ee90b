"""The models as this process trains them: themselves, a replica that others have too, or its shard of them.

Every process computes the gradient of its parts, and torch averages the gradients while they are computed:
``DistributedDataParallel`` where each process holds all weights (Li et al., 2020), ``fully_shard`` where each holds a
part of every weight, of its gradient and of its optimiser's state (Zhao et al., 2023).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probllm.models.model import Batch
from probllm.models.weights import memory_of
from probllm.training.averaging import MovingAverage
from probllm.training.processes import Processes, whole
from probllm.training.roles import sparse_tables
from probllm.training.tasks import Task


class Replicas:
    """The models of one process alone, and the face of the other kinds.

    Args:
        tasks: with the models that the caller gave.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.given = self.tasks = list(tasks)
        self.names = _names_of_weights(self.given)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models that are trained, by task."""
        return {task.name: task.model for task in self.tasks}

    def weights(self) -> dict[str, Tensor]:
        """The weights and buffers that are trained, each memory once, by task and name."""
        states = {task.name: task.model.state_dict() for task in self.tasks}
        return {f"{task}/{name}": states[task][name] for task, name in self.names}

    def losses(self, number: int, batch: Batch) -> dict[str, Tensor]:
        """The named losses of the task with this number."""
        return self.tasks[number].losses(batch)

    def computing(self, last: bool) -> AbstractContextManager[None]:
        """Where losses and their gradients are computed; ``last`` in a step, after which gradients are averaged."""
        return nullcontext()

    def complete(self) -> None:
        """Average the gradients that have not been averaged while they were computed."""

    def judged(self, average: MovingAverage | None) -> AbstractContextManager[None]:
        """Where the models that the caller gave have the weights they are judged by: the average, if there is one."""
        return average.in_place(self.weights()) if average is not None else nullcontext()

    def give_back(self) -> None:
        """The weights that are trained, in the models that the caller gave."""


class Copies(Replicas):
    """Every process holds all weights."""

    def __init__(self, tasks: Sequence[Task], processes: Processes) -> None:
        super().__init__(tasks)
        device = processes.device
        objective = _Objective(self.tasks)
        # A step need not touch all weights: a model may skip some, and so does one of several models. Where it does
        # touch all, torch would advise against looking for the others; there is always this one.
        objective.idle = nn.Parameter(torch.zeros(1, device=device))
        self.parallel = nn.parallel.DistributedDataParallel(
            objective, [device] if device.type == "cuda" else None, find_unused_parameters=True
        )

    def losses(self, number: int, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.parallel(number, batch)
        return found

    def computing(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.parallel.no_sync()


class Alternating(Replicas):
    """Every process holds all weights, and the losses have parameters of their own.

    Such a loss gives gradients to some parameters alone, for which torch's wrapper would wait.
    """

    def __init__(self, tasks: Sequence[Task], processes: Processes) -> None:
        super().__init__(tasks)
        processes.copy_from_first(self.weights().values())
        self.processes = processes

    def complete(self) -> None:
        self.processes.average_gradients(self.tasks[0].model.parameters())


class Shards(Replicas):
    """Every process holds a shard of each weight, of copies of the models that the caller gave.

    The copies are cut at the blocks of a stack (the modules in an ``nn.ModuleList``), whose weights are put together
    for the time that a block computes; what stands outside of them is put together for a whole step. The models that
    were given stay whole, where they were, for ``loss`` and a metric call what they like in them.

    Raises:
        ValueError: for parameters with sparse gradients.
    """

    def __init__(self, tasks: Sequence[Task], processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(tasks)
        self.processes = processes
        if sparse_tables(self.modules.values()):
            raise ValueError("sharding is 'full', but the model has a table with sparse gradients, which cannot be cut")
        processes.copy_from_first(self.weights().values())
        models = copy.deepcopy([task.model for task in self.given])
        self.tasks = [replace(task, model=model) for task, model in zip(self.given, models, strict=True)]
        self.objective = _Objective(self.tasks).to(processes.device)
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        self.uncut = _uncut(self.objective, processes.device)
        for block in _blocks(self.objective):
            fully_shard(block, mesh=mesh, ignored_params=set(self.uncut))
        fully_shard(self.objective, mesh=mesh, ignored_params=set(self.uncut))

    def losses(self, number: int, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.objective(number, batch)
        return found

    def complete(self) -> None:
        self.processes.average_gradients(self.uncut)

    @contextmanager
    def judged(self, average: MovingAverage | None) -> Iterator[None]:
        homes = [next((p.device for p in task.model.parameters()), self.processes.device) for task in self.given]
        self._fill(average.average if average is not None else self.weights())
        try:
            yield
        finally:
            for task, home in zip(self.given, homes, strict=True):
                task.model.to(home)

    def give_back(self) -> None:
        self._fill(self.weights())

    def _fill(self, weights: dict[str, Tensor]) -> None:
        for task in self.given:
            task.model.to(self.processes.device)
        states = {task.name: task.model.state_dict() for task in self.given}
        for key, name in self.names:
            states[key][name].copy_(whole(weights[f"{key}/{name}"]).detach())
        self.processes.copy_from_first(buffer for task in self.given for buffer in task.model.buffers())


class _Objective(nn.Module):
    """What torch's wrappers call: ``forward`` is the losses of one of the models."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.models = nn.ModuleList(task.model for task in tasks)
        self.tasks = list(tasks)

    def forward(self, number: int, batch: Batch) -> Any:
        return self.tasks[number].losses(batch)


def _uncut(module: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """The parameters that every process holds whole: single numbers, and on the CPU what is no layer's of torch's.

    The compiled recursions read such weights where they lie, and torch cannot free memory that another looks at.
    """
    bare = {
        id(parameter)
        for layer in module.modules()
        for parameter in layer.parameters(False)
        if device.type == "cpu" and not _is_torchs(layer)
    }
    return [parameter for parameter in module.parameters() if not parameter.ndim or id(parameter) in bare]


def _is_torchs(layer: nn.Module) -> bool:
    """Whether it is one of torch's layers, or a kind of one, as our ``Linear`` and ``RMSNorm`` are."""
    return any(kind is not nn.Module and kind.__module__.startswith("torch.nn.") for kind in type(layer).__mro__)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The modules in a stack, themselves of several modules, that share no parameter with the rest."""
    uses: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name)
    found: list[nn.Module] = []
    seen: set[int] = set()
    for path, stack in module.named_modules():
        if not isinstance(stack, nn.ModuleList) or not path.partition(".")[2]:
            continue
        for key, block in stack.named_children():
            own = list(block.parameters())
            inside = all(name.startswith(f"{path}.{key}.") for parameter in own for name in uses[id(parameter)])
            if own and inside and any(True for _ in block.children()) and not any(id(each) in seen for each in own):
                seen |= {id(each) for each in own}
                found.append(block)
    return found


def _names_of_weights(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    seen: set[object] = set()
    names: list[tuple[str, str]] = []
    for task in tasks:
        for name, tensor in task.model.state_dict().items():
            if isinstance(tensor, Tensor) and memory_of(tensor) not in seen:
                seen.add(memory_of(tensor))
                names.append((task.name, name))
    return names
