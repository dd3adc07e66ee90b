"""The training loop: steps, epochs, validation, checkpoints. ``fit`` is its face.

All that a step depends on is its place (epoch, position), the weights, the optimisers, the average and the random
number generators; a checkpoint between two steps holds just these, so that the rest of a killed run is the rest of the
run that was not killed.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probllm.models.model import Batch, batch_size
from probllm.models.weights import memory_of, write_atomically
from probllm.training.averaging import MovingAverage
from probllm.training.checkpoint import load_checkpoint, restore_random_states, save_checkpoint
from probllm.training.optimisers import Optimisers, name_of
from probllm.training.progress import ProgressBar, delayed_interrupt
from probllm.training.roles import hidden_matrices
from probllm.training.run import Run
from probllm.training.schedule import rate_factor
from probllm.training.settings import Settings
from probllm.training.tasks import Epoch, Task, count_tokens, to_device

METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"
CHECKPOINT_SECONDS = 10.0  # between two checkpoints, or longer, so that writing them takes no more than ...
CHECKPOINT_SHARE = 0.05  # ... this part of the time


class Loop:
    """A run in progress."""

    def __init__(self, tasks: list[Task], settings: Settings, device: torch.device, folder: Path | None) -> None:
        self.tasks, self.settings, self.device, self.folder = tasks, settings, device, folder
        self.modules: dict[str, nn.Module] = {task.name: task.model for task in tasks}
        self.optimisers: dict[str, Optimisers] = {}
        self.average = MovingAverage(self._weights(), settings.ema) if settings.ema is not None else None
        self.best: dict[str, Tensor] = {}
        self.epoch = self.position = self.since_best = 0
        self.sums: dict[str, list[float]] = {}
        self.finished = False
        self.run = Run(device=str(device))
        if tasks[0].validation is not None:
            metric = settings.metric
            self.run.monitored = f"validation_{getattr(metric, '__name__', 'metric')}" if metric else "validation_loss"
        self._clock = self._last_checkpoint = time.perf_counter()
        self._pause = CHECKPOINT_SECONDS

    def prepare(self) -> None:
        """Make the optimisers; a model that estimates itself needs none."""
        settings, groups = self.settings, [task.groups() for task in self.tasks]
        if len(groups) == 1 and len(groups[0]) > 1:
            entries = groups[0]
        elif any(len(group) > 1 for group in groups):
            raise ValueError("a model with several parameter groups (alternating losses) cannot be trained jointly")
        else:
            entries = {"": [entry for group in groups for entries in group.values() for entry in entries]}
        self.optimisers = {
            name: Optimisers(some, self.modules, settings.optimiser, settings.learning_rate, settings.weight_decay)
            for name, some in entries.items()
        }
        if settings.optimiser == "muon" and not hidden_matrices(self.modules.values()):
            raise ValueError("optimiser is 'muon', but the model has no hidden matrix for it: expected 'adamw'")
        trained = {id(p): p.numel() for each in self.optimisers.values() for p in each.parameters}
        self.run.parameters = sum(trained.values())
        self._parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        # The first optimiser of a process makes torch load its compiler, seconds that are not this run's.
        self._clock = self._last_checkpoint = time.perf_counter()

    # Training.

    def train(self, shown: bool) -> Run:
        """Make the steps that are left; the model then holds the best weights, in evaluation mode."""
        settings = self.settings
        with ProgressBar(shown, settings.epochs) as bar, delayed_interrupt(bar) as interrupt:
            while not self.finished:
                steps = Epoch(
                    self.tasks, self.epoch, settings.epochs, settings.batch_size, settings.max_tokens, settings.seed
                )
                bar.epoch(self.epoch, len(steps), self.position)
                for module in self.modules.values():
                    module.train()
                while self.position < len(steps):
                    began = time.perf_counter()
                    progress = (self.epoch + (self.position + 0.5) / len(steps)) / settings.epochs
                    batches = [to_device(batch, self.device) for batch in steps[self.position]]
                    loss = self._step(
                        batches, progress, f"epoch {self.epoch + 1}, batch {self.position + 1} of {len(steps)}"
                    )
                    self.position += 1
                    tokens = sum(map(count_tokens, batches))
                    self.run.tokens += tokens
                    self.run.training_seconds += time.perf_counter() - began
                    bar.step(loss, tokens)
                    if interrupt.requested or (self.position < len(steps) and self._is_due()):
                        self.checkpoint()
                    if interrupt.requested:
                        raise KeyboardInterrupt
                self._end_epoch(bar)
                if not self.finished and (interrupt.requested or self._is_due()):
                    self.checkpoint()
                if interrupt.requested and not self.finished:
                    raise KeyboardInterrupt
            self._finish()
            if interrupt.requested:
                raise KeyboardInterrupt
        return self.run

    def _step(self, batches: list[Batch], progress: float, place: str) -> float:
        factor = rate_factor(self.settings.schedule, progress, self.settings.warmup, self.settings.decay)
        for optimisers in self.optimisers.values():
            optimisers.set_rate(factor)
        self._add("learning_rate", self.settings.learning_rate * factor, 1)
        value = self._alternate(batches[0], place) if len(self.optimisers) > 1 else self._descend(batches, place)
        if self.average is not None:
            self.average.update(self._weights(), self.run.steps)
        self.run.steps += 1
        return value

    def _descend(self, batches: list[Batch], place: str) -> float:
        """One step down the weighted sum of all losses of all tasks."""
        (optimisers,) = self.optimisers.values()
        whole = 0.0
        for task, batch in zip(self.tasks, batches, strict=True):
            losses = self._losses(task, batch, place)
            with self._precision():
                total = torch.stack([loss.reshape(()) for loss in losses.values()]).sum()
            value = self._checked(total, place, task.name)
            self._record(task, losses, value, batch_size(batch))
            if task.weight:
                (total if task.weight == 1 else task.weight * total).backward()
                whole += task.weight * value
        self._move(optimisers, place)
        return whole

    def _alternate(self, batch: Batch, place: str) -> float:
        """One step for each named loss in turn, with its own parameters, as in a GAN."""
        task, total = self.tasks[0], 0.0
        seen: dict[str, Tensor] = {}
        for name, optimisers in self.optimisers.items():
            losses = self._losses(task, batch, place)
            if name not in losses:
                raise ValueError(f"parameter_groups() has {name!r}, but losses() has {sorted(losses)} only")
            total += self._checked(losses[name], f"{place}, loss {name!r}", "")
            losses[name].backward(inputs=optimisers.parameters)
            seen[name] = losses[name]
            self._move(optimisers, place)
        self._record(task, seen, total, batch_size(batch))
        return total

    def _losses(self, task: Task, batch: Batch, place: str) -> dict[str, Tensor]:
        """The losses of a batch; an error, as of a law that refuses NaN scores, is told with its place."""
        try:
            with self._precision():
                return task.losses(batch)
        except ValueError as error:
            error.add_note(f"{place}; {self._cause()}")
            raise

    def _move(self, optimisers: Optimisers, place: str) -> None:
        norm = optimisers.clip(self.settings.clip)
        if not math.isfinite(norm):
            bad = next(p for p in optimisers.parameters if p.grad is not None and not _is_finite(p.grad))
            raise FloatingPointError(f"{place}: the gradient of {name_of(bad, self.modules)} is not finite")
        self._add("gradient_norm", norm, 1)
        optimisers.step()
        for parameter in self._parameters:
            parameter.grad = None

    def _checked(self, loss: Tensor, place: str, task: str) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"{place}: the loss{task and f' of {task!r}'} is {value}; {self._cause()}")
        if not loss.requires_grad:
            raise ValueError(f"{place}: the loss{task and f' of {task!r}'} depends on no parameter that is trained")
        return value

    def _cause(self) -> str:
        """Which parameter is not finite, if one is."""
        names = (
            f"the parameter {f'{prefix}.' if prefix else ''}{name} is not finite"
            for prefix, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if not _is_finite(parameter)
        )
        return next(names, "all parameters are finite, so that the batch or the model is at fault")

    def _record(self, task: Task, losses: Mapping[str, Tensor], value: float, count: int) -> None:
        name = f"loss_{task.name}" if task.name else "loss"
        self._add(name, value, count)
        if len(losses) > 1:
            for part, loss in losses.items():
                self._add(f"{name}_{part}", float(loss.detach()), count)

    def _add(self, name: str, value: float, count: int) -> None:
        total = self.sums.setdefault(name, [0.0, 0])
        total[0] += value * count
        total[1] += count

    # Epochs.

    def _end_epoch(self, bar: ProgressBar) -> None:
        row: dict[str, float] = {"epoch": self.epoch + 1}
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
        if self.folder is not None:
            with open(self.folder / METRICS_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
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
        for module in self.modules.values():
            module.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        average = self.average.in_place(self._weights()) if self.average is not None else nullcontext()
        # The same random numbers at every epoch, and training goes on as if there had been no validation.
        with torch.no_grad(), torch.random.fork_rng(devices=devices), average:
            torch.manual_seed(self.settings.seed)
            yield

    def validate(self) -> dict[str, float]:
        """The validation loss, weighted over the tasks, and the metric."""
        settings, whole = self.settings, 0.0
        row: dict[str, float] = {}
        for task in self.tasks:
            assert task.validation is not None
            total = count = 0.0
            for batch in task.validation.batches(settings.batch_size, settings.max_tokens, False):
                with self._precision():
                    losses = task.losses(to_device(batch, self.device))
                total += sum(float(loss) for loss in losses.values()) * batch_size(batch)
                count += batch_size(batch)
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
            row[self.run.monitored] = float(settings.metric(model, validation))
        for name, value in row.items():
            if math.isnan(value):
                raise FloatingPointError(f"epoch {self.epoch}: {name} is nan")
        return row

    def _compare(self, value: float) -> None:
        best, run = self.run.best_value, self.run
        larger = self.settings.metric is not None and self.settings.mode == "max"
        if best is None or (value > best if larger else value < best):
            run.best_value, run.best_epoch, self.since_best = value, self.epoch, 0
            self.best = {name: tensor.clone() for name, tensor in self._weights().items()}
        else:
            self.since_best += 1

    def _finish(self) -> None:
        final = self.best or (self.average.average if self.average is not None else {})
        with torch.no_grad():
            for name, tensor in self._weights().items():
                if name in final:
                    tensor.copy_(final[name])
        for module in self.modules.values():
            module.eval()
        self.record()

    # Checkpoints.

    def record(self) -> None:
        """Leave a finished run in the folder, if there is one."""
        self._count_seconds()
        if self.folder is not None:
            self._write_metrics()
            self.run.save(self.folder / RUN_FILE)
            self.checkpoint()

    def _write_metrics(self) -> None:
        assert self.folder is not None
        lines = "".join(json.dumps(row) + "\n" for row in self.run.history)
        write_atomically(self.folder / METRICS_FILE, lines.encode())

    def checkpoint(self) -> None:
        """Write all that the run needs to go on from here; nothing where there is no folder."""
        if self.folder is None:
            return
        if not self.finished:
            self._count_seconds()
        began = time.perf_counter()
        tensors = {f"weights/{name}": tensor for name, tensor in self._weights().items()}
        scalars: dict[str, Any] = {}
        if not self.finished:
            tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
            if self.average is not None:
                tensors |= {f"average/{name}": tensor for name, tensor in self.average.average.items()}
            for group, optimisers in self.optimisers.items():
                some, scalars[group] = optimisers.state()
                tensors |= {f"optimiser/{group}/{name}": tensor for name, tensor in some.items()}
        values = {
            "settings": self._identity(),
            "run": self.run.to_json(),
            "optimiser": scalars,
            "sums": self.sums,
            **{name: getattr(self, name) for name in ("epoch", "position", "since_best", "finished")},
        }
        save_checkpoint(self.folder, tensors, values)
        self._last_checkpoint = time.perf_counter()
        self._pause = max(CHECKPOINT_SECONDS, (self._last_checkpoint - began) / CHECKPOINT_SHARE)

    def find_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint in the folder, if there is one."""
        return load_checkpoint(self.folder) if self.folder is not None else None

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go to where a checkpoint was made.

        Raises:
            ValueError: if it belongs to a run with other arguments, data or weights.
        """
        assert self.folder is not None
        mine = self._identity()
        for name, value in mine.items():
            if values["settings"].get(name) != value:
                saved = values["settings"].get(name)
                raise ValueError(f"folder {str(self.folder)!r} holds a run with {name}={saved!r}, not {value!r}")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            parts.setdefault(kind, {})[rest] = tensor.to(self.device) if kind in ("best", "average") else tensor
        own, saved = self._weights(), parts["weights"]
        differing = sorted(
            name
            for name in own.keys() | saved.keys()
            if name not in own or name not in saved or own[name].shape != saved[name].shape
        )
        if differing:
            raise ValueError(f"folder {str(self.folder)!r} holds a run with other weights: {differing[:5]} differ")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        self.best = parts.get("best", {})
        if self.average is not None and not values["finished"]:
            self.average.average = parts["average"]
        for group, optimisers in self.optimisers.items() if not values["finished"] else ():
            prefix = f"{group}/"
            some = {name.removeprefix(prefix): t for name, t in parts["optimiser"].items() if name.startswith(prefix)}
            optimisers.load_state(some, values["optimiser"][group])
        self.run = Run.from_json(values["run"])
        self.epoch, self.position, self.since_best = values["epoch"], values["position"], values["since_best"]
        self.sums, self.finished = values["sums"], values["finished"]
        self._write_metrics()
        restore_random_states(tensors, values)
        if self.finished:
            for module in self.modules.values():
                module.eval()

    def _identity(self) -> dict[str, Any]:
        sizes = {f"data{f'[{task.name!r}]' if task.name else ''}": len(task.data) for task in self.tasks}
        weights = {f"weights[{task.name!r}]": task.weight for task in self.tasks if task.name}
        return {**self.settings.to_json(), **{f"len({name})": size for name, size in sizes.items()}, **weights}

    def _weights(self) -> dict[str, Tensor]:
        """The weights and buffers of all models, each memory once, by task and name."""
        seen: set[object] = set()
        weights: dict[str, Tensor] = {}
        for task, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                if isinstance(tensor, Tensor) and memory_of(tensor) not in seen:
                    seen.add(memory_of(tensor))
                    weights[f"{task}/{name}"] = tensor
        return weights

    def _count_seconds(self) -> float:
        now = time.perf_counter()
        self.run.seconds, self._clock = self.run.seconds + now - self._clock, now
        return self.run.seconds

    def _is_due(self) -> bool:
        return self.folder is not None and time.perf_counter() - self._last_checkpoint >= self._pause

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision)


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(torch.isfinite(values).all())
