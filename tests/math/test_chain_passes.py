"""The compiled passes: whatever the rows weigh, and however they lie in the room, the gradients are the twin's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probllm.math import chain_torch
from probllm.math.chain import as_chain, log_partition
from probllm.math.chain_passes import apart, expectations, forward

ROWS, STEPS, K = 7, 6, 3


def scores_of(kind: tuple[int, ...], scale: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((ROWS, STEPS, K), (*kind, K, K), (K,), (K,))
    return [(scale * torch.randn(*shape, generator=generator)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [(), (STEPS - 1,), (ROWS, 1)])
@pytest.mark.parametrize("scale", [0.5, 12.0, 400.0])  # float32, float64, log space
@pytest.mark.parametrize("weights", ["ones", "equal", "zero", "negative", "different"])
def test_gradients_of_weighted_rows(dtype: torch.dtype, kind: tuple[int, ...], scale: float, weights: str) -> None:
    scores, lengths = scores_of(kind, scale, dtype), torch.tensor([6, 1, 5, 6, 2, 3, 6])
    by = {"ones": 1.0, "equal": 0.3, "zero": 0.0, "negative": -2.0}.get(weights)
    w = torch.linspace(-1, 2, ROWS, dtype=dtype) if by is None else torch.full((ROWS,), by, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in scores]
    found = torch.autograd.grad((log_partition(*leaves, lengths) * w).sum(), leaves)
    wide = [x.double().requires_grad_() for x in scores]
    log_z = chain_torch.log_partition(*as_chain(*wide, lengths=lengths)[:5])
    expected = torch.autograd.grad((log_z * w.double()).sum(), wide)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_a_mean_and_the_gradient_of_one_row() -> None:
    scores = [x.requires_grad_() for x in scores_of((), 0.5, torch.float64)]
    of_mean = torch.autograd.grad(log_partition(*scores).mean(), scores[0])[0]
    for row in range(ROWS):
        alone = torch.autograd.grad(log_partition(*scores)[row], scores[0])[0]
        torch.testing.assert_close(alone[row] / ROWS, of_mean[row])
        assert not alone[:row].any()
        assert not alone[row + 1 :].any()


@pytest.mark.parametrize("scale", [0.5, 12.0, 400.0])
def test_both_ways_give_the_log_z_of_one_way(scale: float) -> None:
    chain = as_chain(*scores_of((), scale, torch.float32))
    log_z, tags, _ = expectations(*chain[:5])
    torch.testing.assert_close(
        torch.from_numpy(log_z), torch.from_numpy(forward(*chain[:5], keep=False).log_z), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(tags.sum(-1), torch.ones(ROWS, STEPS))


@pytest.mark.parametrize("size", [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("steps", [1, 16, 127, 128, 512])
def test_rows_in_the_room_do_not_begin_in_the_same_places_of_the_cache(size: int, steps: int) -> None:
    span = apart(steps, size)
    assert steps <= span <= steps + 16
    if size <= 2048:
        assert 256 <= span * size % 4096 <= 3840
