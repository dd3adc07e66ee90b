"""``fit`` on a tiny tagger: what it minimises, what it keeps, what it refuses."""

import io
import json
import math
import sys

import pytest
import torch
from torch import nn

from probllm.data.dataset import Dataset
from probllm.models.model import Model
from probllm.training import Run, fit
from probllm.training.schedule import rate_factor
from tests.models.battery import assert_equal_weights, weights
from tests.training.tagging import TinyTagger, accuracy, tagged

DATA, HELD_OUT = tagged(60), tagged(30, seed=1)
QUICK = {"epochs": 4, "learning_rate": 0.05, "batch_size": 16, "progress": False}


def numbers(run: Run) -> list[dict]:
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in run.history]


def validation_loss(model, data) -> float:
    with torch.no_grad():
        return sum(float(-model.log_prob(batch).sum()) for batch in data.batches(shuffle=False)) / len(data)


# What it does.


def test_fit_lowers_the_loss_and_says_what_it_cost():
    model = TinyTagger()
    run = fit(model, DATA, **QUICK)
    assert run.history[-1]["loss"] < run.history[0]["loss"] / 2
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
    assert run.tokens == 4 * sum(DATA.lengths)
    assert run.steps == 4 * 4
    assert run.tokens_per_second > 0
    assert 0 < run.training_seconds <= run.seconds
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (run.stopped, run.best_epoch, run.device) == ("epochs", None, "cpu")
    assert not model.training
    assert model.data_size == len(DATA)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        runs.append(numbers(fit(TinyTagger(dropout=0.2), DATA, seed=seed, **QUICK)))
    assert runs[0] == runs[1] != runs[2]


def test_the_first_epochs_loss_is_the_mean_over_sequences_before_a_vanishing_step():
    model = TinyTagger()
    before = validation_loss(model, DATA)
    run = fit(model, DATA, HELD_OUT, **QUICK | {"learning_rate": 1e-12, "batch_size": 7})
    assert run.history[0]["loss"] == pytest.approx(before, rel=1e-5)
    assert run.history[0]["validation_loss"] == pytest.approx(validation_loss(model, HELD_OUT), rel=1e-5)


def test_the_optimiser_follows_the_schedule():
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    run = fit(TinyTagger(), DATA, optimiser=lambda groups: Spy(groups), warmup=0.25, **QUICK)
    assert rates == pytest.approx([0.05 * rate_factor("cosine", (step + 0.5) / 16, 0.25, 0.2) for step in range(16)])
    assert run.history[0]["learning_rate"] == pytest.approx(sum(rates[:4]) / 4)


def test_a_dict_of_tensors_is_data_too():
    batch = DATA.collate([DATA[i] for i in range(len(DATA))])
    run = fit(TinyTagger(), batch, batch, **QUICK)
    assert run.tokens == 4 * sum(DATA.lengths)
    assert run.history[-1]["validation_loss"] < run.history[0]["loss"]


def test_max_tokens_bounds_the_batches():
    seen = []

    class Spy(TinyTagger):
        def loss(self, batch):
            seen.append(batch["mask"].numel())
            return super().loss(batch)

    fit(Spy(), DATA, max_tokens=21, epochs=1, progress=False)
    assert max(seen) <= 21
    assert len(seen) > 10


def test_a_plain_module_with_a_loss_is_trained():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Linear(1, 1)

        def loss(self, batch):
            return (self.slope(batch["x"]) - batch["y"]).square().mean()

    x = torch.linspace(-1, 1, 64)[:, None]
    model = Line()
    fit(model, {"x": x, "y": 3 * x + 1}, epochs=60, learning_rate=0.1, weight_decay=0.0, progress=False)
    assert model.slope.weight.item() == pytest.approx(3, abs=0.05)


def test_mixed_precision_trains_nearly_alike_and_keeps_float32_weights():
    losses = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model = TinyTagger(dim=16)
        losses.append([row["loss"] for row in fit(model, DATA, HELD_OUT, mixed_precision=mixed, **QUICK).history])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


# Validation.


def test_the_model_ends_with_the_weights_of_its_best_epoch():
    model = TinyTagger()
    run = fit(model, DATA, HELD_OUT, **QUICK | {"learning_rate": 1.0, "epochs": 6, "schedule": "constant"})
    losses = [row["validation_loss"] for row in run.history]
    assert run.best_value == min(losses)
    assert run.best_epoch == losses.index(min(losses)) + 1
    assert validation_loss(model, HELD_OUT) == pytest.approx(run.best_value, rel=1e-5)


@pytest.mark.parametrize(("mode", "better"), [("max", max), ("min", min)])
def test_a_metric_chooses_the_epoch_and_patience_stops(mode, better):
    values = iter([0.3, 0.5, 0.5, 0.9, 0.2, 0.1])

    def metric(model, data):
        assert data is HELD_OUT
        assert not model.training
        assert not torch.is_grad_enabled()
        return next(values)

    run = fit(TinyTagger(), DATA, HELD_OUT, metric=metric, mode=mode, patience=2, **QUICK | {"epochs": 6})
    seen = [row["validation_metric"] for row in run.history]
    assert run.monitored == "validation_metric"
    assert run.best_value == better(seen)
    assert run.best_epoch == seen.index(better(seen)) + 1
    assert run.epochs == (6 if mode == "max" else 3)
    assert run.stopped == ("patience" if mode == "min" else "epochs")


def test_validation_does_not_change_the_training():
    runs = []
    for validation in (None, HELD_OUT):
        torch.manual_seed(0)
        runs.append(fit(TinyTagger(dropout=0.3), DATA, validation, **QUICK))
    assert [row["loss"] for row in runs[0].history] == [row["loss"] for row in runs[1].history]


def test_every_validation_draws_the_same_random_numbers():
    class Noisy(TinyTagger):
        def loss(self, batch):
            return super().loss(batch) if self.training else torch.rand(())

    run = fit(Noisy(dropout=0.3), DATA, HELD_OUT, **QUICK)
    assert len({row["validation_loss"] for row in run.history}) == 1


def test_the_average_is_what_is_validated_and_kept():
    path: list[dict] = []

    class Spy(TinyTagger):
        def loss(self, batch):
            if self.training:
                path.append(weights(self))
            return super().loss(batch)

    model = Spy()
    run = fit(model, DATA, HELD_OUT, ema=0.5, **QUICK | {"epochs": 1})
    assert validation_loss(model, HELD_OUT) == pytest.approx(run.history[0]["validation_loss"], rel=1e-5)
    path.append(None)  # the weights after the last step are no more: the average must still be the recursion's
    average = path[0]
    for step, own in enumerate(path[1:-1]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * own[name] for name in own}
    final = weights(model)
    last = len(path) - 2
    decay = min(0.5, (1 + last) / (10 + last))
    implied = {name: (final[name] - decay * average[name]) / (1 - decay) for name in final}
    twin = Spy()
    twin.load_state_dict(path[0])
    fit(twin, DATA, **QUICK | {"epochs": 1})
    for name, tensor in weights(twin).items():
        torch.testing.assert_close(implied[name], tensor, rtol=1e-4, atol=1e-4)


# Several models, several losses, none.


def test_models_that_share_nothing_train_jointly_as_they_do_alone():
    torch.manual_seed(0)
    one, other = TinyTagger(), TinyTagger(dim=4)
    alone = TinyTagger()
    alone.load_state_dict(one.state_dict())
    options = {**QUICK, "clip": None}
    run = fit(
        {"one": one, "other": other}, {"one": DATA, "other": HELD_OUT}, weights={"one": 1, "other": 0.5}, **options
    )
    single = fit(alone, DATA, **options)
    assert_equal_weights(weights(one), weights(alone))
    assert [row["loss_one"] for row in run.history] == [row["loss"] for row in single.history]
    last = run.history[-1]
    assert last["loss"] == pytest.approx(last["loss_one"] + 0.5 * last["loss_other"])
    assert last["loss_other"] < run.history[0]["loss_other"]
    assert run.steps == single.steps


def test_a_shared_parameter_is_updated_once_by_the_weighted_sum_of_its_gradients():
    one, other = TinyTagger(), TinyTagger()
    other.embedding = one.embedding
    before = one.embedding.weight.detach().clone()
    first, second = (data.collate(list(data)) for data in (DATA, HELD_OUT))
    gradient = torch.autograd.grad(one.loss(first) + 0.25 * other.loss(second), one.embedding.weight)[0]
    fit(
        {"a": one, "b": other},
        {"a": DATA, "b": HELD_OUT},
        weights={"a": 1.0, "b": 0.25},
        optimiser=lambda groups: torch.optim.SGD(groups, lr=0.0),
        **QUICK | {"epochs": 1, "batch_size": 60, "learning_rate": 0.5, "schedule": "constant", "warmup": 0.0},
        clip=None,
    )
    assert other.embedding is one.embedding
    torch.testing.assert_close(one.embedding.weight.detach(), before - 0.5 * gradient, rtol=1e-4, atol=1e-5)


def test_named_losses_are_summed_and_recorded():
    class Two(TinyTagger):
        def losses(self, batch):
            loss = self.loss(batch)
            return {"tags": loss, "penalty": self.output.weight.square().sum()}

    run = fit(Two(), DATA, HELD_OUT, **QUICK)
    for row in run.history:
        assert row["loss"] == pytest.approx(row["loss_tags"] + row["loss_penalty"], rel=1e-5)


class Rivals(nn.Module):
    """Two players of x * y, each of whom sees the other's last move."""

    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))

    def losses(self, batch):
        product = (self.x * self.y).sum()
        return {"lower": product, "raise": -product}

    loss = losses

    def parameter_groups(self):
        return {"lower": [self.x], "raise": [{"params": [self.y], "lr": 0.2}]}


def test_losses_with_groups_of_their_own_alternate():
    model = Rivals()
    fit(
        model,
        {"z": torch.zeros(1, 1)},
        epochs=1,
        learning_rate=0.1,
        schedule="constant",
        warmup=0.0,
        optimiser=lambda groups: torch.optim.SGD(groups),
        clip=None,
        weight_decay=0.0,
        progress=False,
    )
    x = 1 - 0.1 * 1
    assert model.x.item() == pytest.approx(x)
    assert model.y.item() == pytest.approx(1 + 0.2 * x)


def test_a_model_that_estimates_itself_takes_no_step(tmp_path):
    class Counter(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def estimate(self, data):
            batches = data.batches(shuffle=False)
            self.mean = torch.cat([batch["x"] for batch in batches]).mean()
            return [{"loss": 2.0}, {"loss": 1.0}]

        def loss(self, batch):
            return (batch["x"] - self.mean).square().mean()

    model = Counter()
    x = torch.arange(10.0)[:, None]
    run = fit(model, {"x": x}, {"x": x}, folder=tmp_path, ema=0.5, progress=False)
    assert float(model.mean) == 4.5
    assert (run.stopped, run.steps, run.epochs) == ("estimate", 0, 2)
    assert run.history[-1]["validation_loss"] == pytest.approx(float(x.var(unbiased=False)))
    assert Run.load(tmp_path / "run.json") == run
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == run.history
    again = Counter()
    assert fit(again, {"x": x}, {"x": x}, folder=tmp_path, ema=0.5, resume=True, progress=False) == run
    assert float(again.mean) == 4.5


# What it writes.


def test_the_folder_tells_the_story(tmp_path):
    run = fit(TinyTagger(), DATA, HELD_OUT, metric=accuracy, folder=tmp_path / "run", **QUICK)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    assert Run.load(tmp_path / "run" / "run.json") == run
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "run.json",
        "steps.jsonl",
    ]


def test_a_fit_is_silent_where_there_is_no_terminal(capfd):
    fit(TinyTagger(), DATA, **QUICK | {"progress": True})
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_shows_the_loss_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    fit(TinyTagger(), DATA, HELD_OUT, **QUICK | {"progress": True})
    assert "validation_loss" in screen.getvalue()
    assert "epoch 4/4" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


# What it refuses.


def test_a_loss_that_is_nan_names_epoch_batch_and_parameter():
    class Breaks(TinyTagger):
        calls = 0

        def loss(self, batch):
            Breaks.calls += 1
            if Breaks.calls == 6:
                with torch.no_grad():
                    self.output.weight[0, 0] = math.nan
            return super().loss(batch)

    with pytest.raises(FloatingPointError, match=r"epoch 2, batch 2 of 4: the loss is nan; .*output\.weight"):
        fit(Breaks(), DATA, **QUICK)


def test_an_infinite_loss_under_finite_parameters_blames_the_batch():
    class Forbids(TinyTagger):
        def loss(self, batch):
            return super().loss(batch) + math.inf

    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1 of 4: the loss is inf; all parameters are finite"):
        fit(Forbids(), DATA, **QUICK)


def test_what_the_model_refuses_is_told_with_its_place():
    class Refuses(TinyTagger):
        def loss(self, batch):
            raise ValueError("emissions: a score is NaN")

    with pytest.raises(ValueError, match="emissions: a score is NaN") as caught:
        fit(Refuses(), DATA, **QUICK)
    assert caught.value.__notes__ == [
        "epoch 1, batch 1 of 4; all parameters are finite, so that the batch or the model is at fault"
    ]


def test_a_gradient_that_is_nan_names_the_parameter():
    class Breaks(TinyTagger):
        def loss(self, batch):
            return super().loss(batch) + (self.output.bias * 0).sqrt().sum()

    before = weights(model := Breaks())
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1 of 4: the gradient of output\.bias is not finite"):
        fit(model, DATA, **QUICK)
    assert_equal_weights(weights(model), before)


def test_a_validation_loss_that_is_nan_names_the_epoch():
    class Breaks(TinyTagger):
        def loss(self, batch):
            return super().loss(batch) * (1.0 if self.training else math.nan)

    with pytest.raises(FloatingPointError, match="epoch 1: validation_loss is nan"):
        fit(Breaks(), DATA, HELD_OUT, **QUICK)


def frozen() -> TinyTagger:
    model = TinyTagger()
    model.requires_grad_(False)
    return model


class Vector(TinyTagger):
    def loss(self, batch):
        return -self.log_prob(batch)


class Constant(TinyTagger):
    def loss(self, batch):
        return torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"epochs": 2.0}, "epochs is 2.0"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"accumulate": 0}, "accumulate is 0, expected a whole number of at least 1"),
        ({"sharding": "half"}, "sharding is 'half', expected None or 'full'"),
        ({"patience": True}, "patience is True"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"warmup": 1.0}, "warmup is 1.0, expected"),
        ({"decay": 0.0}, r"decay is 0.0, expected a finite number in \(0, 1\]"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "warmup and decay are 0.5 and 0.6"),
        ({"optimiser": "muon"}, "the model has no hidden matrix"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of"),
        ({"optimiser": "adam"}, "optimiser is 'adam', expected"),
        ({"mode": "best"}, "mode is 'best'"),
        ({"validation": None, "patience": 3}, "patience is given, but validation is None"),
        ({"validation": None, "metric": accuracy}, "metric is given, but validation is None"),
        ({"metric": 3}, "metric is a int, expected a function"),
        ({"resume": True}, "resume=True needs the folder"),
        ({"data": Dataset([])}, "data is empty"),
        ({"data": [1, 2]}, "data is a list, expected a Dataset or a dict of tensors"),
        ({"model": nn.Linear(2, 2)}, "model is a Linear, expected a module with a method loss"),
        ({"weights": {"a": 1.0}}, "weights is given, but there is one model only"),
        ({"model": {"a": TinyTagger()}}, "data is a Dataset, expected a dict with the keys"),
        ({"model": {"a": TinyTagger()}, "data": {"b": DATA}, "validation": None}, r"data has the keys \['b'\]"),
        (
            {"model": {"a": TinyTagger()}, "data": {"a": DATA}, "validation": None, "weights": {"a": -1.0}},
            r"weights\['a'\] is -1.0",
        ),
        (
            {"model": {"a": Rivals(), "b": TinyTagger()}, "data": {"a": DATA, "b": DATA}, "validation": None},
            "cannot be trained jointly",
        ),
        ({"model": frozen()}, "no parameter with requires_grad"),
        ({"model": Vector()}, r"loss is a shape \[\d+\], expected a scalar"),
        ({"model": Constant()}, "depends on no parameter"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_bad_argument_is_named(change, message):
    arguments = {"model": TinyTagger(), "data": DATA, "validation": HELD_OUT, **QUICK, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        fit(arguments.pop("model"), arguments.pop("data"), **arguments)
