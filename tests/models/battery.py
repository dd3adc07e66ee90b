"""The checks that every model passes, whatever it is. In a model's own test file:

CASES = [Case("bilstm", lambda: CRFTagger(...), batch), ...]

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case, check):
    check(case)
"""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import pad

from probllm.models.model import Batch, Model, batch_size


@dataclass
class Case:
    """A model to check.

    Attributes:
        name: of the case.
        make: builds it; the weights are drawn from the global generator.
        batch: observed and padded: at least two rows, the targets present, not all of one length.
        target: the key of the targets.
        exact: whether there is no latent variable, so that the trace gives the loss without noise.
        allow: classes outside the package that the saved model holds.
        rate: Adam's, for the few steps of SVI that must lower the loss.
        tolerance: of the comparisons between two ways to one number, relative and absolute.
    """

    name: str
    make: Callable[[], Model]
    batch: Batch
    target: str = "tags"
    exact: bool = True
    allow: list[type] = field(default_factory=list)
    rate: float = 0.02
    tolerance: float = 2e-5

    def made(self, seed: int = 0) -> Model:
        pyro.set_rng_seed(seed)
        return self.make().eval()

    def unobserved(self) -> Batch:
        return {key: value for key, value in self.batch.items() if key != self.target}

    def close(self, one: Any, other: Any) -> None:
        torch.testing.assert_close(
            torch.as_tensor(one), torch.as_tensor(other), rtol=self.tolerance, atol=self.tolerance
        )


def trains(model: Model) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def with_more_padding(batch: Batch, extra: int) -> Batch:
    """The same sentences with ``extra`` more columns of padding in every tensor that has one column a word."""
    length = batch["mask"].shape[1]

    def widen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: widen(part) for key, part in value.items()}
        if value.ndim < 2 or value.shape[1] != length:
            return value
        return pad(value, (0, 0) * (value.ndim - 2) + (0, extra))

    return {key: widen(value) for key, value in batch.items()}


def one_row(batch: Batch, row: int) -> Batch:
    return {
        key: one_row(value, row) if isinstance(value, dict) else value[row : row + 1] for key, value in batch.items()
    }


def train(case: Case, model: Model, steps: int = 5) -> None:
    """A few steps of Pyro's own SVI."""
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": case.rate}), Trace_ELBO())
    for _ in range(steps):
        svi.step(case.batch)


# The program.


def check_the_trace_observes_targets_that_are_present_and_samples_missing_ones(case: Case) -> None:
    model = case.made()
    observed = poutine.trace(model).get_trace(case.batch)
    assert observed.nodes[case.target]["is_observed"]
    assert torch.isfinite(observed.log_prob_sum())
    sampled = poutine.trace(model).get_trace(case.unobserved())
    assert not sampled.nodes[case.target]["is_observed"]
    assert torch.isfinite(sampled.log_prob_sum())


def check_the_loss_is_minus_the_log_joint_of_the_trace_over_the_data_size(case: Case) -> None:
    model = case.made()
    if not case.exact:
        pytest.skip("a bound: both sides are estimates")
    rows = batch_size(case.batch)
    for size in (None, 3 * rows):
        model.data_size = size
        with torch.no_grad():
            joint = poutine.trace(model).get_trace(case.batch).log_prob_sum()
            case.close(model.loss(case.batch), -joint / (size or rows))
            elbo = Trace_ELBO().loss(model, model.guide, case.batch)
            case.close(model.loss(case.batch), elbo / (size or rows))


def check_predictive_gives_targets_of_the_right_shape(case: Case) -> None:
    model, target = case.made(), case.batch[case.target]
    drawn = Predictive(model, num_samples=3, return_sites=[case.target])(case.unobserved())[case.target]
    assert drawn.shape == (3, *target.shape)
    assert drawn.dtype == target.dtype


def check_svi_lowers_the_loss(case: Case) -> None:
    model = case.made()
    if not trains(model):
        pytest.skip("no parameter has a gradient")
    with torch.no_grad():
        before = model.loss(case.batch)
    train(case, model, 20)
    with torch.no_grad():
        assert model.loss(case.batch) < before


# The verbs.


def check_log_prob_is_one_number_a_row_whatever_the_other_rows(case: Case) -> None:
    model = case.made()
    try:
        with torch.no_grad():
            log_prob = model.log_prob(case.batch)
    except NotImplementedError:
        pytest.skip("no exact log_prob")
    assert log_prob.shape == (batch_size(case.batch),)
    assert (log_prob <= case.tolerance).all(), "a sequence of tags has a probability of at most 1"
    case.close(model.loss(case.batch).detach(), -log_prob.mean())
    with torch.no_grad():
        alone = torch.cat([model.log_prob(one_row(case.batch, row)) for row in range(len(log_prob))])
    case.close(alone, log_prob)


def check_padding_changes_nothing(case: Case) -> None:
    model, wider = case.made(), with_more_padding(case.batch, 3)
    with torch.no_grad():
        case.close(model.loss(wider), model.loss(case.batch))
        narrow, wide = model.predict(case.batch), model.predict(wider)
    length = case.batch["mask"].shape[1]
    assert torch.equal(wide[:, :length], narrow)
    assert not wide[:, length:].any()


def check_predict_has_the_shape_of_the_targets_and_0_at_padding(case: Case) -> None:
    model, target = case.made(), case.batch[case.target]
    with torch.no_grad():
        predicted = model.predict(case.unobserved())
    assert predicted.shape == target.shape
    assert predicted.dtype == target.dtype
    assert not predicted[~case.batch["mask"]].any()


# Weights.


def check_save_and_load_give_an_equal_model(case: Case) -> None:
    model = case.made()
    model.data_size = 17
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        state = torch.get_rng_state()
        loaded = Model.load(folder, allow=[*case.allow, type(model)])
        assert torch.equal(torch.get_rng_state(), state), "load draws random numbers"
        assert type(loaded) is type(model)
        assert type(type(model).load(folder, allow=case.allow)) is type(model)
    assert loaded.data_size == 17
    assert_equal_weights(weights(model), weights(loaded))
    with torch.no_grad():
        assert torch.equal(model.loss(case.batch), loaded.loss(case.batch))
        assert torch.equal(model.predict(case.batch), loaded.predict(case.batch))


def check_two_models_keep_their_own_weights_under_svi(case: Case) -> None:
    one, other = case.made(1), case.made(2)
    if not trains(one):
        pytest.skip("no parameter has a gradient")
    poutine.trace(one).get_trace(case.batch), poutine.trace(other).get_trace(case.batch)
    first, second = weights(one), weights(other)
    train(case, one)
    assert differs(weights(one), first), "the first does not train"
    assert_equal_weights(weights(other), second)
    after = weights(one)
    train(case, other)
    assert differs(weights(other), second), "the second does not train"
    assert_equal_weights(weights(one), after)


def check_copies_keep_their_own_weights_under_svi(case: Case) -> None:
    model = case.made(1)
    if not trains(model):
        pytest.skip("no parameter has a gradient")
    train(case, model)
    kept = weights(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        loaded = Model.load(folder, allow=[*case.allow, type(model)])
    copies = {"loaded": loaded, "deep copy": copy.deepcopy(model)}
    if "<locals>" not in type(model).__qualname__:
        copies["unpickled"] = pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies["torch.load"] = torch.load(buffer, weights_only=False)
    for kind, twin in copies.items():
        assert_equal_weights(weights(twin), kept)
        train(case, twin.eval())
        assert differs(weights(twin), kept), f"the {kind} model does not train"
        assert_equal_weights(weights(model), kept)


def check_functional_call_never_reaches_the_param_store(case: Case) -> None:
    model = case.made()
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not (own and case.exact):
        pytest.skip("no parameter has a gradient, or the loss is an estimate")
    moved = {name: parameter.detach() + 0.01 for name, parameter in own.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        trace = poutine.trace(lambda batch: functional_call(model, parameters, (batch,))).get_trace(case.batch)
        return -trace.log_prob_sum() / batch_size(case.batch)

    gradient = grad(loss)(moved)
    stored = {id(value) for value in pyro.get_param_store()._params.values()}
    assert not stored - {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(moved[name])
    model.loss(case.batch).backward()
    for name, parameter in own.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        torch.testing.assert_close(
            gradient[name], expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert isinstance(next(iter(model.parameters())), nn.Parameter)


CHECKS: list[Callable[[Case], None]] = [
    check_the_trace_observes_targets_that_are_present_and_samples_missing_ones,
    check_the_loss_is_minus_the_log_joint_of_the_trace_over_the_data_size,
    check_predictive_gives_targets_of_the_right_shape,
    check_svi_lowers_the_loss,
    check_log_prob_is_one_number_a_row_whatever_the_other_rows,
    check_padding_changes_nothing,
    check_predict_has_the_shape_of_the_targets_and_0_at_padding,
    check_save_and_load_give_an_equal_model,
    check_two_models_keep_their_own_weights_under_svi,
    check_copies_keep_their_own_weights_under_svi,
    check_functional_call_never_reaches_the_param_store,
]
