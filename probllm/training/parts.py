"""The steps of an epoch, and the parts in which a step's batch is computed: one by one, and on several processes.

A step goes down the mean over the rows of its batch. With n_i of the n rows in part i,

    loss = sum_i (n_i / n) * loss_i

however the rows are dealt out, where a model's loss is a mean over rows as ``Model.loss`` is. The batches do not depend
on the number of parts and processes, so that these change no number beyond rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from probllm.data.dataset import Batches
from probllm.models.model import Batch, batch_size
from probllm.training.processes import Processes
from probllm.training.settings import Settings
from probllm.training.tasks import Task


class Part(NamedTuple):
    """Some rows of the batch of a step, which are computed at once."""

    batch: Batch
    rows: int  # 0: of no weight, computed because processes must compute equally many parts
    total: int  # those of the step's batch, over all parts and processes

    @property
    def share(self) -> float:
        """The weight of the part's loss."""
        return self.rows / self.total


class Epoch(Sequence[list[list[Part]]]):
    """The steps of an epoch: for each task the parts of its batch that are this process's.

    The longest task is passed over once, the others again until it ends.
    """

    def __init__(self, tasks: Sequence[Task], epoch: int, settings: Settings, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        bounds = settings.bounds(settings.accumulate)

        def passes(task: Task, number: int) -> Sequence[Any]:
            # Pass 0 of every epoch is that of a run on this task alone; later passes have orders of their own.
            return task.data.batches(*bounds, True, settings.seed, epoch + number * settings.epochs)

        firsts = [passes(task, 0) for task in tasks]
        self.length = max(map(len, firsts))
        self.plans: list[list[tuple[Sequence[Any], int]]] = []
        for task, batches in zip(tasks, firsts, strict=True):
            plan = [(batches, index) for index in range(len(batches))]
            number = 0
            while len(plan) < self.length:
                number += 1
                batches = passes(task, number)
                plan.extend((batches, index) for index in range(len(batches)))
            self.plans.append(plan[: self.length])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: Any) -> Any:
        return [self._parts(*plan[step]) for plan in self.plans]

    def _parts(self, batches: Sequence[Any], index: int) -> list[Part]:
        settings, processes = self.settings, self.processes
        if settings.accumulate == processes.size == 1:
            batch = batches[index]
            count = batch_size(batch)
            return [Part(batch, count, count)]
        size, max_tokens = settings.bounds(1)
        collate: Callable[[Sequence[int]], Batch]
        if type(batches) is Batches:  # another may make of its rows what it likes
            rows, data = batches.indices[index], batches.data
            # Every other row: those of a batch stand by length, and so each process gets as many tokens.
            groups = [data.cut(rows[rank :: processes.size], size, max_tokens) for rank in range(processes.size)]
            collate = lambda some: data.collate([data.examples[i] for i in some])  # noqa: E731
        else:
            batch = batches[index]
            rows = list(range(batch_size(batch)))
            least = len(rows) if max_tokens is None else max(1, len(rows) // settings.accumulate)
            width = min(least, len(rows) if size is None else size)
            groups = [
                [own[i : i + width] for i in range(0, len(own), width)]
                for own in (rows[rank :: processes.size] for rank in range(processes.size))
            ]
            collate = lambda some: _take(batch, some)  # noqa: E731
        own = [Part(collate(some), len(some), len(rows)) for some in groups[processes.rank]]
        spare = max(map(len, groups)) - len(own)
        return own + [Part(collate(rows[:1]), 0, len(rows)) for _ in range(spare)]


def _take(value: Any, rows: Sequence[int]) -> Any:
    """These rows of a batch; what is no tensor with rows stays as it is."""
    if isinstance(value, Mapping):
        return {key: _take(part, rows) for key, part in value.items()}
    return value[list(rows)] if isinstance(value, Tensor) and value.ndim else value
