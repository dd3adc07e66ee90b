"""What every model inherits: weights of its own, losses equal to the trace's, save and load."""

import copy
import gc
import json
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from probllm.models.model import CONFIG_FILE, Model
from tests.models.battery import CHECKS, Case, assert_equal_weights, differs, train, weights
from tests.training.tagging import TAGS, TinyTagger, tagged

BATCH = next(iter(tagged(6).batches(batch_size=6)))
CASE = Case("tiny", TinyTagger, BATCH)


class BayesianTagger(TinyTagger):
    """With a prior on its output weights: the loss holds their log prior over the data size."""

    def forward(self, batch):
        prior = dist.Normal(torch.zeros(TAGS), 1.0).to_event(1)
        pyro.sample("output bias", prior, obs=self.output.bias)
        return super().forward(batch)

    def loss(self, batch):
        prior = dist.Normal(0.0, 1.0).log_prob(self.output.bias).sum()
        return super().loss(batch) - prior / (self.data_size or len(batch["mask"]))


class TiedTagger(TinyTagger):
    """Two names for one weight, a frozen one, a buffer of whole numbers and one of float64."""

    def __init__(self, dim=6):
        super().__init__(dim)
        self.first = nn.Linear(dim, dim)
        self.second = nn.Linear(dim, dim)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("exact", torch.tensor([1 / 3], dtype=torch.float64))

    def logits(self, batch):
        states = self.second(self.first(self.embedding(batch["inputs"])))
        return self.output(states) + self.bias


class NestedTagger(TinyTagger):
    """PyroModules within plain lists, where Pyro alone would not name them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([PyroModule[nn.Linear](6, 6) for _ in range(2)])
        self.scale = PyroModule()
        self.scale.value = pyro.nn.PyroParam(torch.ones(6), constraint=dist.constraints.positive)

    def logits(self, batch):
        states = self.embedding(batch["inputs"])
        for layer in self.layers:
            states = layer(states).tanh() * self.scale.value
        return self.output(states)


CASES = [
    CASE,
    Case("bayesian", BayesianTagger, BATCH),
    Case("tied", TiedTagger, BATCH),
    Case("nested", NestedTagger, BATCH),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case, check):
    if case.name == "bayesian" and "log_prob_is" in check.__name__:
        pytest.skip("its loss holds a prior")
    check(case)


# Names and the param store.


def test_a_pyro_module_without_a_name_shares_its_twins_parameters_and_a_model_does_not():
    class Bare(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = pyro.nn.PyroParam(torch.rand(3) + 1)

        def forward(self):
            return self.scale

    class Ours(Model):
        def __init__(self):
            super().__init__()
            self.scale = pyro.nn.PyroParam(torch.rand(3) + 1)

        def forward(self, batch=None):
            return self.scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(Bare()(), Bare()()), "Pyro has changed: the names may no longer be needed"
    assert not torch.equal(Ours()(), Ours()())


def test_two_models_in_one_trace_have_parameters_of_their_own_names():
    one, other = TinyTagger(), TinyTagger()
    with poutine.trace(param_only=True) as both:
        one(BATCH), other(BATCH)
    held = {id(site["value"].unconstrained()) for site in both.trace.nodes.values()}
    assert held == {id(parameter) for model in (one, other) for parameter in model.parameters()}


def test_models_that_hold_the_same_module_share_it_under_svi():
    one, other = TinyTagger(), TinyTagger()
    other.embedding = one.embedding
    before = one.embedding.weight.clone()
    train(CASE, one)
    middle = one.embedding.weight.clone()
    train(CASE, other)
    assert other.embedding.weight is one.embedding.weight
    assert not torch.equal(before, middle)
    assert not torch.equal(middle, one.embedding.weight)


def test_a_module_put_in_place_of_another_is_the_one_that_trains():
    model = TinyTagger()
    train(CASE, model)
    old = model.output
    model.output = nn.Linear(6, TAGS)
    kept, before = old.weight.clone(), model.output.weight.clone()
    train(CASE, model)
    assert torch.equal(old.weight, kept)
    assert not torch.equal(model.output.weight, before)


def test_a_model_that_dies_leaves_nothing_in_the_param_store():
    model, other = TinyTagger(), TinyTagger()
    train(CASE, model)
    train(CASE, other)
    held = len(pyro.get_param_store())
    del model
    gc.collect()
    assert len(pyro.get_param_store()) == held / 2
    before = weights(other)
    train(CASE, other)
    assert differs(weights(other), before)


def test_clearing_the_param_store_changes_no_weight():
    model = TinyTagger()
    train(CASE, model)
    before = weights(model)
    pyro.clear_param_store()
    poutine.trace(model).get_trace(BATCH)
    assert_equal_weights(weights(model), before)
    train(CASE, model)
    assert differs(weights(model), before)


def test_a_shallow_copy_shares_the_weights():
    model = TinyTagger()
    twin = copy.copy(model)
    train(CASE, model)
    assert twin.output is model.output
    before = weights(model)
    train(CASE, twin)
    assert differs(weights(model), before)


def test_a_model_within_a_model_is_trained_by_either():
    class Pair(Model):
        def __init__(self, tagger):
            super().__init__()
            self.tagger = tagger

        def forward(self, batch):
            return self.tagger(batch)

    inner = TinyTagger()
    pair = Pair(inner)
    for model in (pair, inner, copy.deepcopy(pair)):
        before = weights(model)
        train(CASE, model)
        assert differs(weights(model), before)
    twin = copy.deepcopy(pair)
    assert twin.tagger._pyro_name == f"{twin._pyro_name}.tagger"
    before = weights(pair)
    train(CASE, twin)
    assert_equal_weights(weights(pair), before)


def test_the_guides_parameters_train_under_svi():
    class Coin(Model):
        def __init__(self):
            super().__init__()
            self.a = pyro.nn.PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
            self.net = nn.Linear(1, 1)

        def forward(self, batch):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            with self.plate(batch):
                return pyro.sample("tags", dist.Bernoulli(p), obs=batch.get("tags"))

        def guide(self, batch):
            return pyro.sample("p", dist.Beta(self.a, self.net(torch.ones(1)).exp()[0]))

    one, other = Coin(), Coin()
    kept = weights(other)
    poutine.trace(other.guide).get_trace({"tags": torch.ones(4)})
    svi = SVI(one, one.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = weights(one)
    svi.step({"tags": torch.ones(4)})
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(one).items())
    assert_equal_weights(weights(other), kept)


def test_models_unpickled_in_a_process_with_models_of_that_class_take_names_of_their_own():
    model = TinyTagger()
    content = pickle.dumps(model)
    names = {model._pyro_name, *(pickle.loads(content)._pyro_name for _ in range(3))}
    assert len(names) == 4


# Saving.


def test_saving_twice_leaves_one_model_and_the_last(tmp_path):
    one, other = TinyTagger(), TinyTagger()
    one.save(tmp_path)
    other.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal_weights(weights(TinyTagger.load(tmp_path, allow=[TinyTagger])), weights(other))


def test_a_save_that_is_cut_off_leaves_the_old_model(tmp_path, monkeypatch):
    old = TinyTagger()
    old.save(tmp_path)
    monkeypatch.setattr("probllm.models.model.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TinyTagger().save(tmp_path)
    monkeypatch.undo()
    assert_equal_weights(weights(TinyTagger.load(tmp_path)), weights(old))


def test_dtypes_and_ties_survive_saving(tmp_path):
    model = TiedTagger().double()
    model.save(tmp_path)
    loaded = TiedTagger.load(tmp_path)
    assert loaded.second.weight is loaded.first.weight
    assert_equal_weights(weights(loaded), weights(model))
    assert {name: t.dtype for name, t in weights(loaded).items()} == {n: t.dtype for n, t in weights(model).items()}


def test_loading_what_is_no_such_model_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no saved model: config.json is missing"):
        Model.load(tmp_path)
    TinyTagger().save(tmp_path)
    with pytest.raises(ValueError, match=r"TinyTagger.* is unknown"):
        Model.load(tmp_path)
    with pytest.raises(ValueError, match="holds a TinyTagger, expected a TiedTagger"):
        TiedTagger.load(tmp_path, allow=[TinyTagger])
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    file = tmp_path / config["weights"]
    for change, message in (
        ({"weights": "../" + config["weights"]}, "expected the name of a file beside it"),
        ({"weights": "other.safetensors"}, "no weights at"),
        ({"model": {"class": "os.system", "arguments": {}}}, "os.system"),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **change}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TinyTagger.load(tmp_path)
    config["model"]["arguments"]["dim"] = 5
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shape \[12, 6\], expected \[12, 5\]"):
        TinyTagger.load(tmp_path)
    config["model"]["arguments"]["dim"] = 6
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a safetensors file"):
        TinyTagger.load(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not the config of a saved model"):
        TinyTagger.load(tmp_path)


def test_a_verb_that_a_model_lacks_names_the_model():
    class Nothing(Model):
        pass

    model = Nothing()
    for verb in (model.forward, model.log_prob, model.predict, model.estimate, model.loss):
        with pytest.raises(NotImplementedError, match="Nothing"):
            verb({})
    with pytest.raises(NotImplementedError, match="Nothing"):
        model.sample(1)
