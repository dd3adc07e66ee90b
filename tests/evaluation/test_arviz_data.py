"""Draws reach ArviZ in both of its lines: the one installed for real, the other by its surface."""

import sys
import types

import numpy as np
import pytest
import torch

from probllm.evaluation import to_arviz

POSTERIOR = {"weight": np.arange(24.0).reshape(2, 4, 3), "scale": np.ones((2, 4))}
OBSERVED = {"y": np.arange(5.0)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_draws_come_back_from_the_arviz_that_is_installed():
    draws = to_arviz(
        {**POSTERIOR, "bias": torch.zeros(2, 4, requires_grad=True)},
        log_likelihood={"y": np.zeros((2, 4, 5))},
        observed_data=OBSERVED,
    )
    assert np.array_equal(draws["posterior"]["weight"].values, POSTERIOR["weight"])
    assert draws["posterior"]["weight"].dims[:2] == ("chain", "draw")
    assert draws["posterior"]["bias"].shape == (2, 4)
    assert draws["log_likelihood"]["y"].shape == (2, 4, 5)
    assert np.array_equal(draws["observed_data"]["y"].values, OBSERVED["y"])


@pytest.mark.parametrize(
    ("version", "keywords"), [("0.18.0", True), ("0.23.4", True), ("1.0.0", False), ("1.2.1", False)]
)
def test_each_line_of_arviz_is_called_as_it_wants(monkeypatch, version, keywords):
    calls = []
    fake = types.ModuleType("arviz")
    fake.__version__ = version
    fake.from_dict = lambda *args, **kwargs: calls.append((args, kwargs))
    monkeypatch.setitem(sys.modules, "arviz", fake)
    to_arviz(POSTERIOR, observed_data=OBSERVED)
    ((args, kwargs),) = calls
    groups = kwargs if keywords else args[0]
    assert (not args) if keywords else (not kwargs)
    assert set(groups) == {"posterior", "observed_data"}
    assert np.array_equal(groups["posterior"]["weight"], POSTERIOR["weight"])


@pytest.mark.parametrize(
    ("posterior", "says"),
    [
        ({}, "at least one variable"),
        ({"w": np.zeros(3)}, r"\[chain, draw"),
        ({"w": np.zeros((2, 3)), "v": np.zeros((2, 4))}, "same chains and draws"),
    ],
)
def test_bad_input_is_named(posterior, says):
    with pytest.raises(ValueError, match=says):
        to_arviz(posterior)
