"""One loop for all models: ``fit(model, data, validation)`` trains in place and says what it cost.

The objective is the mean of the model's loss over mini-batches, minimised by AdamW (Loshchilov and Hutter, 2019) with
warm-up and a cosine schedule; a model that can set its weights in closed form or by EM does that instead.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyro
import torch

from probllm.training.checkpoint import CHECKPOINT_FILE
from probllm.training.journal import METRICS_FILE, STEPS_FILE, Journal
from probllm.training.loop import RUN_FILE, Loop
from probllm.training.optimisers import OptimiserFactory, OptimiserName
from probllm.training.processes import start
from probllm.training.run import Run
from probllm.training.schedule import Schedule
from probllm.training.settings import Settings
from probllm.training.tasks import as_tasks


def fit(
    model: Any,
    data: Any,
    validation: Any = None,
    *,
    epochs: int = 10,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    optimiser: OptimiserName | OptimiserFactory = "adamw",
    schedule: Schedule = "cosine",
    warmup: float = 0.05,
    decay: float = 0.2,
    clip: float | None = 5.0,
    patience: int | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    mode: Literal["max", "min"] = "max",
    ema: float | None = None,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device | None = None,
    mixed_precision: bool | None = None,
    sharding: Literal["full"] | None = None,
    folder: str | Path | None = None,
    tensorboard: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Train a model, or several together, in place.

    With ``validation`` the model ends with the weights of its best epoch, else with the last ones (averaged ones, with
    ``ema``), and always in evaluation mode on ``device``. A model whose ``estimate(data)`` exists is estimated, once,
    and the arguments that concern gradients have no effect. ``model.data_size`` becomes ``len(data)`` where it is None.

    Several models: ``fit({"tags": a, "captions": b}, {"tags": ..., "captions": ...})``. A step takes a batch of each;
    an epoch is one pass over the longest data; modules that the models share get one update a step. A model with
    several ``parameter_groups()`` (a GAN) is stepped for each named loss in turn.

    Ctrl-C ends the run after the step in progress: a checkpoint is left in ``folder``, ``KeyboardInterrupt`` is raised,
    and the same call with ``resume=True`` goes on. A second Ctrl-C does not wait. A killed run goes on from its last
    checkpoint (one every ten seconds), to the same numbers: bit for bit on one CPU thread.

    Under ``torchrun``, or in an initialised process group, the processes deal out the rows of each step's batch and
    make one run of it, the same as one process makes alone but for rounding and random draws. The first one writes.

    Args:
        model: a module with ``loss(batch)``, best a ``probllm.models`` model; or a dict of them by name.
        data: a ``Dataset``, or a dict of tensors with a common leading dimension; a dict of these for several models.
        validation: the same, to choose the best epoch by; None: no choice is made.
        epochs: passes over the data.
        batch_size: sequences that are computed at once, 32 if neither this nor ``max_tokens`` is given.
        max_tokens: tokens that are computed at once at most, padding counted.
        accumulate: a step is made on a batch so many times as large, computed in parts: the numbers are those of the
            large batch, where the loss is a mean over sequences, the memory that of the small one.
        learning_rate: its highest value.
        weight_decay: on weights, but not on biases, norms and torch's own embeddings.
        optimiser: ``"adamw"``; ``"muon"`` for the hidden matrices, AdamW for the rest; ``"adagrad"``; ``"sgd"``; or a
            function from torch's parameter groups to an optimiser.
        schedule: ``"cosine"``, ``"constant"`` or ``"wsd"`` (constant, then a decay) after the warm-up.
        warmup: the part of the run over which the learning rate rises from 0, in [0, 1).
        decay: the part of the run, at its end, over which ``"wsd"`` lowers the learning rate to 0, in (0, 1].
        clip: the largest norm of the gradient; None: no clipping.
        patience: stop after so many epochs without a better validation; None: make them all.
        metric: ``metric(model, validation) -> float`` to choose the best epoch by, in place of the validation loss.
        mode: whether the larger metric is better, or the smaller (``"max"``, ``"min"``).
        ema: decay of an exponential moving average of the weights, validated and kept in place of the weights.
        weights: of the losses of several models; 1 each by default.
        device: where to train; a GPU where there is one by default.
        mixed_precision: bfloat16 where torch's autocast says so; by default on a GPU alone.
        sharding: where several processes train. None: each holds all weights; ``"full"``: each holds a part of every
            weight, gradient and optimiser's state, and a GPU all weights only to validate and at the end.
        folder: for ``steps.jsonl`` and ``metrics.jsonl`` (a line a step and an epoch), ``checkpoint.safetensors`` and
            ``run.json``. Several processes must see the same one.
        tensorboard: a folder for TensorBoard's curves.
        resume: go on from the checkpoint in ``folder``; from the start where there is none. False starts anew.
        seed: of the order of the data and of all random number generators, which are set to it.
        progress: a progress bar, in a terminal.
    Returns:
        the history, the best epoch and what it cost.
    Raises:
        TypeError, ValueError: for bad arguments, or a checkpoint that is damaged or of another run.
        ImportError: if ``tensorboard`` is given and the package is missing.
        FloatingPointError: if the loss or a gradient is not finite; the message names epoch, batch and parameter.
        KeyboardInterrupt: after Ctrl-C.
    """
    if sharding not in (None, "full"):
        raise ValueError(f"sharding is {sharding!r}, expected None or 'full'")
    processes = start(device)
    where = processes.device
    mixed = where.type == "cuda" if mixed_precision is None else mixed_precision
    settings = Settings(
        epochs, batch_size, max_tokens, accumulate, learning_rate, weight_decay, optimiser, schedule, warmup, decay,
        clip, patience, metric, mode, ema, mixed, seed,
    )  # fmt: skip
    if validation is None and (patience is not None or metric is not None):
        raise ValueError(f"{'patience' if metric is None else 'metric'} is given, but validation is None")
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run to go on with")
    tasks = as_tasks(model, data, validation, weights)
    place = Path(folder) if folder is not None else None
    boards = Path(tensorboard) if tensorboard is not None else None
    journal = Journal(place, boards) if processes.first else Journal(None, None)

    pyro.set_rng_seed(seed)
    sharded = sharding is not None and processes.size > 1
    for task in tasks:
        if not sharded:  # else only its shard is to be there
            task.model.to(where)
        if getattr(task.model, "data_size", 0) is None:
            task.model.data_size = len(task.data)  # type: ignore[assignment]
    if place is not None and processes.first:
        place.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in (CHECKPOINT_FILE, METRICS_FILE, STEPS_FILE, RUN_FILE):
                (place / name).unlink(missing_ok=True)
    loop = Loop(tasks, settings, processes, place, journal)
    saved = loop.find_checkpoint() if resume else None
    if saved is None and len(tasks) == 1 and _estimate(loop):
        return loop.run
    if saved is None or not saved[1].get("finished"):
        loop.prepare(sharded)
    if saved is not None:
        loop.resume(*saved)
    if loop.finished:
        return loop.run
    journal.open(loop.run.steps, loop.run.history)
    try:
        return loop.train(progress)
    finally:
        journal.close()


def _estimate(loop: Loop) -> bool:
    """Let a model estimate itself, and record it; False where it does not."""
    (task,) = loop.tasks
    model: Any = task.model
    if not hasattr(model, "estimate"):
        return False
    began = time.perf_counter()
    try:
        rows = model.estimate(task.data)
    except NotImplementedError:
        return False
    model.to(loop.processes.device)
    run = loop.run
    run.training_seconds = time.perf_counter() - began
    run.stopped = "estimate"
    run.history = [{"epoch": number, **row} for number, row in enumerate(rows or [{}], 1)]
    run.parameters = sum(parameter.numel() for parameter in model.parameters())
    run.tokens = sum(getattr(task.data, "lengths", [])) * len(run.history)
    if task.validation is not None:
        with loop.judged():
            run.history[-1] |= loop.validate()
        assert run.monitored is not None
        run.best_epoch, run.best_value = len(run.history), run.history[-1][run.monitored]
    model.eval()
    loop.finished = True
    loop.journal.open(0, [])
    for row in run.history:
        loop.journal.epoch(row)
    loop.record()
    return True
