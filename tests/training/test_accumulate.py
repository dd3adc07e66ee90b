"""A step that is computed in parts is the step of the whole batch, to the rounding of float64."""

import pytest
import torch
from torch import nn

from probllm.data.windows import Windows
from probllm.training import fit
from tests.models.battery import weights
from tests.training.tagging import TinyTagger, tagged
from tests.training.test_fit import numbers

DATA, HELD_OUT = tagged(58), tagged(20, seed=1)
OPTIONS = {"epochs": 3, "learning_rate": 0.05, "ema": 0.7, "clip": 0.5, "seed": 2, "progress": False}


def twins(make=lambda: TinyTagger().double(), count=3):
    models = []
    for _ in range(count):
        torch.manual_seed(4)
        models.append(make())
    return models


def assert_same_training(runs, models):
    for run, model in zip(runs[1:], models[1:], strict=True):
        for row, expected in zip(numbers(run), numbers(runs[0]), strict=True):
            assert row == pytest.approx(expected, rel=1e-9)
        for name, tensor in weights(model).items():
            torch.testing.assert_close(tensor, weights(models[0])[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_accumulation_over_k_is_one_batch_k_times_as_large(optimiser):
    models = twins()
    runs = [
        fit(model, DATA, HELD_OUT, batch_size=12 // k, accumulate=k, optimiser=optimiser, **OPTIONS)
        for model, k in zip(models, (1, 3, 12), strict=True)
    ]
    assert [run.steps for run in runs] == [15] * 3  # 58 sequences by 12
    assert [run.tokens for run in runs] == [3 * sum(DATA.lengths)] * 3
    assert_same_training(runs, models)


def test_accumulation_over_k_is_one_batch_of_k_times_as_many_tokens():
    models = twins(count=2)
    runs = [fit(m, DATA, max_tokens=40 // k, accumulate=k, **OPTIONS) for m, k in zip(models, (1, 4), strict=True)]
    assert_same_training(runs, models)


def test_a_part_is_no_larger_than_the_bounds_of_what_is_computed_at_once():
    seen = []

    class Spy(TinyTagger):
        def loss(self, batch):
            seen.append(batch["mask"].shape)
            return super().loss(batch)

    fit(Spy(), DATA, batch_size=5, accumulate=3, epochs=1, progress=False)
    assert max(shape[0] for shape in seen) == 5
    assert len(seen) == 12  # steps of 15, 15, 15 and 13


def test_other_sources_of_data_are_cut_by_rows():
    class Bigrams(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

        def loss(self, batch):
            text = torch.cat([batch["prefix"][:, -1:], batch["text"]], 1)
            return -self.table.log_softmax(-1)[text[:, :-1], text[:, 1:]].sum(-1).mean()

    windows = Windows(torch.randint(0, 5, (70,), generator=torch.Generator().manual_seed(0)), length=3)
    models = twins(Bigrams, 2)
    runs = [fit(m, windows, batch_size=8 // k, accumulate=k, **OPTIONS) for m, k in zip(models, (1, 4), strict=True)]
    assert_same_training(runs, models)


def test_joint_training_and_named_losses_accumulate():
    class Two(TinyTagger):
        def losses(self, batch):
            return {"tags": self.loss(batch), "penalty": self.output.weight.square().sum()}

    def pair():
        one, other = Two().double(), TinyTagger().double()
        other.embedding = one.embedding
        return nn.ModuleDict({"one": one, "other": other})

    pairs = twins(pair, 2)
    options = {**OPTIONS, "weights": {"one": 1.0, "other": 0.3}}
    data = {"one": DATA, "other": HELD_OUT}
    runs = [
        fit(dict(models), data, batch_size=8 // k, accumulate=k, **options)
        for models, k in zip(pairs, (1, 4), strict=True)
    ]
    assert "loss_one_penalty" in runs[0].history[0]
    assert_same_training(runs, pairs)


def test_alternating_losses_accumulate():
    class Rivals(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.y = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def losses(self, batch):
            product = (batch["z"] @ self.x) * self.y.sum()
            return {"lower": product.mean(), "raise": -product.square().mean()}

        loss = losses

        def parameter_groups(self):
            return {"lower": [self.x], "raise": [self.y]}

    z = torch.randn(22, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    models = twins(Rivals, 2)
    runs = [fit(m, {"z": z}, batch_size=6 // k, accumulate=k, **OPTIONS) for m, k in zip(models, (1, 3), strict=True)]
    assert_same_training(runs, models)
