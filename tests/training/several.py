"""Trainings that a test makes with one process, and this script (under torchrun) with several: ``several.py FOLDER``.

What the processes find is left in the folder: ``<case>.json`` with the history, ``<case>-<rank>.safetensors`` with the
weights that each of them has at the end.
"""

import json
import math
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from probllm.models import CRFTagger, SoftmaxTagger
from probllm.nn import RecurrentEncoder, TransformerEncoder
from probllm.training import fit
from probllm.training.processes import is_sharded, start
from probllm.training.replicas import Shards
from probllm.training.tasks import as_tasks
from tests.training.tagging import TAGS, WORDS, TinyTagger, accuracy, tagged

DATA, HELD_OUT = tagged(41), tagged(21, seed=1)  # the last batch of 8 has one row: not every process has one
OPTIONS = {
    "epochs": 2,
    "batch_size": 4,
    "accumulate": 2,
    "learning_rate": 0.02,
    "clip": 1.0,
    "ema": 0.7,
    "metric": accuracy,
    "seed": 3,
    "progress": False,
}


class Scaled(SoftmaxTagger):
    """With a number for a parameter, and a matrix that no loss touches."""

    def __init__(self, encoder=None, dropout=0.0, at=0, where=1):
        super().__init__(encoder or TransformerEncoder(WORDS, dim=8, layers=2, heads=2, dropout=dropout), TAGS)
        self.scale, self.idle = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(3, 3))
        self.at, self.where, self.calls = at, where, 0

    def loss(self, batch):
        if self.training and self.at and (not dist.is_initialized() or dist.get_rank() == self.where):
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.scale.exp() * super().loss(batch)


def scaled(**options):
    torch.manual_seed(7)
    return Scaled(**options).double()


def pair():
    """Two taggers on one encoder."""
    torch.manual_seed(7)
    one = Scaled()
    return {"one": one.double(), "other": Scaled(one.encoder).double()}


class Rivals(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in "xy")

    def losses(self, batch):
        product = (batch["z"] @ self.x) * self.y.sum()
        return {"lower": product.mean(), "raise": -product.square().mean()}

    loss = losses

    def parameter_groups(self):
        return {"lower": [self.x], "raise": [self.y]}


Z = {"z": torch.randn(23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


def sparse(sparse=True):
    torch.manual_seed(7)
    return TinyTagger(sparse=sparse).double()


def crf():
    """Its compiled recursions read the transitions in place."""
    torch.manual_seed(7)
    return CRFTagger(RecurrentEncoder(WORDS, hidden=4), TAGS)


def joint(**options):
    data, held_out = {"one": DATA, "other": HELD_OUT}, {"one": HELD_OUT, "other": DATA}
    models = pair()
    run = fit(models, data, held_out, weights={"one": 1.0, "other": 0.4}, **{**OPTIONS, **options, "metric": None})
    return run, nn.ModuleDict(models)


def alone(model, data=DATA, validation=HELD_OUT, **options):
    return fit(model, data, validation, **{**OPTIONS, **options}), model


CASES = {
    "copies": lambda: alone(scaled()),
    "shards": lambda: alone(scaled(), sharding="full"),
    "last-shards": lambda: alone(scaled(), DATA, None, metric=None, ema=None, sharding="full", epochs=1),
    "joint-copies": joint,
    "joint-shards": lambda: joint(sharding="full"),
    "muon-copies": lambda: alone(scaled(), optimiser="muon", epochs=1),
    "muon-shards": lambda: alone(scaled(), optimiser="muon", sharding="full", epochs=1),
    "crf-shards": lambda: alone(crf(), sharding="full", epochs=1),
    "constrained-shards": lambda: alone(sparse(sparse=False), optimiser="sgd", sharding="full", epochs=1),
    "sparse-copies": lambda: alone(sparse(), optimiser="adagrad"),
    "rivals-copies": lambda: alone(Rivals(), Z, None, metric=None),
}


def leave(folder, name, run, model):
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(run.history))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / f"{name}-{dist.get_rank()}.safetensors")


def interrupted(folder, **options):
    """Ctrl-C reaches one process alone; all of them stop after the same step."""
    try:
        alone(
            scaled(at=11, **{k: options.pop(k) for k in ("dropout", "where") if k in options}), folder=folder, **options
        )
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


def refused(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def held():
    """Which part of the layers' weights one of the processes holds, and how many blocks are cut by themselves."""
    objective = Shards(as_tasks(scaled(), DATA, None, None), start(None)).objective
    layers = {name: p for name, p in objective.named_parameters() if ".layers." in name}
    assert all(is_sharded(p) for p in layers.values())
    own = sum(p.to_local().numel() for p in layers.values()) / sum(p.numel() for p in layers.values())
    return own, sum(type(module).__name__ == "FSDPTransformerLayer" for module in objective.modules())


class Draws(Scaled):
    """Tells what it draws."""

    def loss(self, batch):
        if self.training:
            self.drawn = [*getattr(self, "drawn", []), torch.rand(()).item()]
        return super().loss(batch)


class Breaks(Scaled):
    def loss(self, batch):
        broken = dist.get_rank() == 1 and self.training
        return super().loss(batch) * (math.nan if broken else 1.0)


def main(folder):
    torch.set_num_threads(1)
    for name, case in CASES.items():
        leave(folder, name, *case())
    leave(folder, "from-one", *alone(scaled(), folder=folder / "by-one", resume=True, sharding="full"))
    interrupted(folder / "by-copies")
    interrupted(folder / "by-shards", sharding="full", where=0)
    for sharding in (None, "full"):
        noisy = {"dropout": 0.3, "sharding": sharding}
        place = folder / f"noisy-{sharding}"
        leave(folder, f"noisy-whole-{sharding}", *alone(scaled(dropout=0.3), sharding=sharding))
        interrupted(place, **noisy)
        leave(
            folder, f"noisy-cut-{sharding}", *alone(scaled(dropout=0.3), sharding=sharding, folder=place, resume=True)
        )
    said = {
        "nan": refused(FloatingPointError, lambda: alone(Breaks().double())),
        "nan-shards": refused(FloatingPointError, lambda: alone(Breaks().double(), sharding="full")),
        "sparse": refused(ValueError, lambda: alone(sparse(), sharding="full")),
        "rivals": refused(ValueError, lambda: alone(Rivals(), Z, None, metric=None, sharding="full")),
    }
    said["held"] = held()
    said["drawn"] = alone(Draws().double(), epochs=1)[1].drawn
    (folder / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
