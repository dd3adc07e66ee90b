"""The training loop: epochs, validation, checkpoints. ``fit`` is its face, ``Descent`` makes its steps.

All that a step depends on is its place (epoch, position), the weights, the optimisers, the average and the random
number generators; a checkpoint between two steps holds just these, so that the rest of a killed run is the rest of the
run that was not killed. Where several processes train together, each makes all steps, and the first one writes.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from probllm.models.model import batch_size
from probllm.training.averaging import MovingAverage
from probllm.training.checkpoint import load_checkpoint, random_states, save_checkpoint
from probllm.training.descent import Descent, groups_of, precision
from probllm.training.journal import Journal
from probllm.training.optimisers import Optimisers
from probllm.training.parts import Epoch
from probllm.training.processes import Processes
from probllm.training.progress import ProgressBar, delayed_interrupt
from probllm.training.replicas import Alternating, Copies, Replicas, Shards
from probllm.training.run import Run
from probllm.training.settings import Settings
from probllm.training.state import put_back, tensors_of
from probllm.training.tasks import Task, count_tokens, to_device

RUN_FILE = "run.json"
CHECKPOINT_SECONDS = 10.0  # between two checkpoints, or longer, so that writing them takes no more than ...
CHECKPOINT_SHARE = 0.05  # ... this part of the time


class Loop:
    """A run in progress."""

    def __init__(
        self, tasks: list[Task], settings: Settings, processes: Processes, folder: Path | None, journal: Journal
    ) -> None:
        self.tasks, self.settings, self.processes = tasks, settings, processes
        self.folder, self.journal = folder, journal
        self.modules: dict[str, nn.Module] = {task.name: task.model for task in tasks}
        self.replicas = Replicas(tasks)
        self.optimisers: dict[str, Optimisers] = {}
        self.average: MovingAverage | None = None
        self.best: dict[str, Tensor] = {}
        self.epoch = self.position = self.since_best = 0
        self.sums: dict[str, list[float]] = {}
        self.finished = False
        self.run = Run(device=str(processes.device))
        if tasks[0].validation is not None:
            metric = settings.metric
            self.run.monitored = f"validation_{getattr(metric, '__name__', 'metric')}" if metric else "validation_loss"
        self._clock = self._last_checkpoint = time.perf_counter()
        self._pause = CHECKPOINT_SECONDS

    def prepare(self, sharded: bool) -> None:
        """Make what training needs, and what a model that estimates itself does not."""
        settings, processes = self.settings, self.processes
        alternating = len(groups_of(self.tasks)) > 1
        if sharded and alternating:
            raise ValueError("sharding is 'full', but the model has alternating losses: expected None")
        if processes.size > 1:
            kind = Shards if sharded else Alternating if alternating else Copies
            self.replicas = kind(self.tasks, processes)
            # What a process draws, as for dropout, is for its own rows.
            pyro.set_rng_seed((settings.seed + processes.rank) % 2**32)
        self.descent = Descent(self.replicas, settings, processes)
        self.optimisers = self.descent.optimisers
        if settings.ema is not None:
            self.average = MovingAverage(self.replicas.weights(), settings.ema)
        self.run.parameters = self.descent.size
        # The first optimiser of a process makes torch load its compiler, seconds that are not this run's.
        self._clock = self._last_checkpoint = time.perf_counter()

    # Training.

    def train(self, shown: bool) -> Run:
        """Make the steps that are left; the model then holds the best weights, in evaluation mode."""
        settings, processes = self.settings, self.processes
        with ProgressBar(shown and processes.first, settings.epochs) as bar, delayed_interrupt(bar) as interrupt:
            while not self.finished:
                steps = Epoch(self.tasks, self.epoch, settings, processes)
                bar.epoch(self.epoch, len(steps), self.position)
                for module in self.replicas.modules.values():
                    module.train()
                while self.position < len(steps):
                    loss, tokens = self._step(steps)
                    bar.step(loss, tokens)
                    stop, due = processes.any(interrupt.requested, processes.first and self._is_due())
                    if stop or (due and self.position < len(steps)):
                        self.checkpoint()
                    if stop:
                        raise KeyboardInterrupt
                self._end_epoch(bar)
                stop, due = processes.any(interrupt.requested, processes.first and self._is_due())
                if not self.finished and (stop or due):
                    self.checkpoint()
                if not self.finished and stop:
                    raise KeyboardInterrupt
            self._finish()
            if stop:
                raise KeyboardInterrupt
        return self.run

    def _step(self, steps: Epoch) -> tuple[float, int]:
        run, count = self.run, len(steps)
        began = time.perf_counter()
        parts = steps[self.position]
        progress = (self.epoch + (self.position + 0.5) / count) / self.settings.epochs
        loss = self.descent.step(parts, progress, f"epoch {self.epoch + 1}, batch {self.position + 1} of {count}")
        if self.average is not None:
            self.average.update(self.replicas.weights(), run.steps)
        (total,) = self.processes.sum([sum(count_tokens(part.batch) for some in parts for part in some if part.rows)])
        self.position, run.steps, run.tokens = self.position + 1, run.steps + 1, run.tokens + int(total)
        seconds = time.perf_counter() - began
        run.training_seconds += seconds
        measured = {"loss": (loss, 1), **self.descent.measured}
        for name, (value, weight) in self.descent.measured.items():
            self._add(name, value * weight, weight)
        self._add("tokens_per_second", total, seconds)
        row = {"step": run.steps, "epoch": self.epoch + 1, **{name: value for name, (value, _) in measured.items()}}
        self.journal.step({**row, "tokens_per_second": total / seconds})
        return loss, int(total)

    def _add(self, name: str, total: float, weight: float) -> None:
        sums = self.sums.setdefault(name, [0.0, 0])
        sums[0] += total
        sums[1] += weight

    # Epochs.

    def _end_epoch(self, bar: ProgressBar) -> None:
        row: dict[str, float] = {"epoch": self.epoch + 1, "step": self.run.steps}
        row |= {name: total / count for name, (total, count) in self.sums.items()}
        if len(self.tasks) > 1:
            row["loss"] = sum(task.weight * row[f"loss_{task.name}"] for task in self.tasks)
        self.epoch, self.position, self.sums = self.epoch + 1, 0, {}
        if self.run.monitored is not None:
            with self.judged():
                row |= self.validate()
            self._compare(row[self.run.monitored])
        row["seconds"] = self._count_seconds()
        self.run.history.append(row)
        self.journal.epoch(row)
        shown = {key: value for key, value in row.items() if key.startswith(("loss", "validation"))}
        bar.say(f"epoch {self.epoch}  " + "  ".join(f"{key} {value:.4f}" for key, value in shown.items()))
        patience = self.settings.patience
        if self.epoch == self.settings.epochs:
            self.finished = True
        elif patience is not None and self.since_best >= patience:
            self.finished, self.run.stopped = True, "patience"

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The models as they are validated: in evaluation mode, averaged weights in place, random numbers apart."""
        for module in (*self.modules.values(), *self.replicas.modules.values()):
            module.eval()
        devices = [self.processes.device] if self.processes.device.type == "cuda" else []
        # The same random numbers at every epoch, and training goes on as if there had been no validation.
        with torch.no_grad(), torch.random.fork_rng(devices=devices), self.replicas.judged(self.average):
            torch.manual_seed(self.settings.seed)
            yield

    def validate(self) -> dict[str, float]:
        """The validation loss, weighted over the tasks, and the metric."""
        settings, processes, whole = self.settings, self.processes, 0.0
        row: dict[str, float] = {}
        for task in self.tasks:
            assert task.validation is not None
            total = count = 0.0
            batches = task.validation.batches(settings.batch_size, settings.max_tokens, False)
            for index in range(processes.rank, len(batches), processes.size):
                batch = batches[index]
                with precision(settings, processes):
                    losses = task.losses(to_device(batch, processes.device))
                total += sum(float(loss) for loss in losses.values()) * batch_size(batch)
                count += batch_size(batch)
            total, count = processes.sum([total, count])
            if task.name:
                row[f"validation_loss_{task.name}"] = total / count
            whole += task.weight * total / count
        row["validation_loss"] = whole
        if settings.metric is not None:
            assert self.run.monitored is not None
            if self.tasks[0].name:
                model: Any = dict(self.modules)
                validation: Any = {task.name: task.validation for task in self.tasks}
            else:
                model, validation = self.tasks[0].model, self.tasks[0].validation
            row[self.run.monitored] = processes.of_first(float(settings.metric(model, validation)))
        for name, value in row.items():
            if math.isnan(value):
                raise FloatingPointError(f"epoch {self.epoch}: {name} is nan")
        return row

    def _compare(self, value: float) -> None:
        best, run = self.run.best_value, self.run
        larger = self.settings.metric is not None and self.settings.mode == "max"
        if best is None or (value > best if larger else value < best):
            run.best_value, run.best_epoch, self.since_best = value, self.epoch, 0
            judged = self.average.average if self.average is not None else self.replicas.weights()
            self.best = {name: tensor.clone() for name, tensor in judged.items()}
        else:
            self.since_best += 1

    @torch.no_grad()
    def _finish(self) -> None:
        final = self.best or (self.average.average if self.average is not None else {})
        for name, tensor in self.replicas.weights().items():
            if name in final:
                tensor.copy_(final[name])
        self.replicas.give_back()
        for module in self.modules.values():
            module.eval()
        self.record()

    # Checkpoints.

    def record(self) -> None:
        """Leave a finished run in the folder, if there is one."""
        self._count_seconds()
        self.checkpoint()
        if self.folder is not None and self.processes.first:
            self.run.save(self.folder / RUN_FILE)
        self.journal.close()
        self.processes.wait()

    def checkpoint(self) -> None:
        """Write all that the run needs to go on from here; nothing where there is no folder."""
        if self.folder is None:
            return
        if not self.finished:
            self._count_seconds()
        began = time.perf_counter()
        tensors, values = tensors_of(self)
        generators = self.processes.gather(random_states())
        self.journal.keep()
        if self.processes.first:
            save_checkpoint(self.folder, tensors, values, generators)
        self.processes.wait()  # for any of them may read it next
        self._last_checkpoint = time.perf_counter()
        self._pause = max(CHECKPOINT_SECONDS, (self._last_checkpoint - began) / CHECKPOINT_SHARE)

    def find_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint in the folder, if there is one.

        Raises:
            ValueError: if it is none, or some processes see it and others do not.
        """
        found = load_checkpoint(self.folder) if self.folder is not None else None
        (seeing,) = self.processes.sum([float(found is not None)])
        if 0 < seeing < self.processes.size:
            raise ValueError(f"folder {str(self.folder)!r} is not the same for all processes: expected a shared one")
        return found

    def resume(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go to where a checkpoint was made.

        Raises:
            ValueError: if it belongs to a run with other arguments, data or weights.
        """
        put_back(self, tensors, values)
        if self.finished:
            for module in self.modules.values():
                module.to(self.processes.device).eval()

    def _count_seconds(self) -> float:
        now = time.perf_counter()
        self.run.seconds, self._clock = self.run.seconds + now - self._clock, now
        return self.run.seconds

    def _is_due(self) -> bool:
        return self.folder is not None and time.perf_counter() - self._last_checkpoint >= self._pause
