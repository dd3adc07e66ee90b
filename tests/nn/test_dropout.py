"""Dropout: the share, the scale, gradients, and random numbers that a seed decides."""

import pytest
import torch
from torch import nn

from probllm.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_unit_is_dropped_with_the_probability_and_the_rest_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ones = torch.ones(4, 100_001, dtype=dtype, requires_grad=True)
    found = Dropout(p)(ones)
    dropped = found == 0
    sigma = (p * (1 - p) / ones.numel()) ** 0.5
    assert abs(float(dropped.double().mean()) - p) < 5 * sigma + 1 / 65536
    for offset in range(4):  # each of the four that share a draw
        assert abs(float(dropped.flatten()[offset::4].double().mean()) - p) < 10 * sigma + 1 / 65536
    kept = found[~dropped].double()
    assert ((kept - 1 / (1 - p)).abs() < (0.02 if dtype == torch.bfloat16 else 1e-3) / (1 - p)).all()
    (gradient,) = torch.autograd.grad(found.sum(), ones)
    assert torch.equal(gradient, found.detach())
    both = dropped[:, :-1] & dropped[:, 1:]
    assert abs(float(both.double().mean()) - p * p) < 0.01  # neighbours are independent


def test_a_seed_decides_and_evaluation_changes_nothing() -> None:
    layer, states = Dropout(0.5), torch.randn(7, 5)
    torch.manual_seed(3)
    one = layer(states)
    other = layer(states)
    torch.manual_seed(3)
    assert torch.equal(layer(states), one)
    assert not torch.equal(one, other)
    assert layer.eval()(states) is states
    assert Dropout(0.0)(states) is states
    assert not Dropout(1.0)(states).any()


def test_it_is_torchs_own_under_transforms() -> None:
    layer, states = Dropout(0.5), torch.ones(64, 50)
    found = torch.func.vmap(layer, randomness="different")(states)
    assert 0.4 < float((found == 0).float().mean()) < 0.6
    assert isinstance(layer, nn.Dropout)
    assert Dropout(0.5)(torch.ones(3, 0)).shape == (3, 0)
    torch.autograd.gradgradcheck(_seeded(layer), torch.randn(2, 3, dtype=torch.float64, requires_grad=True))


def _seeded(layer: Dropout):  # type: ignore[no-untyped-def]
    def run(states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layer(states).sin()

    return run
