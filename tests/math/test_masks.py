"""Masks and lengths say the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.math.masks import lengths_from_mask, mask_from_lengths


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2))
def test_lengths_of_the_mask_of_lengths_are_the_lengths(lengths: list[int], extra: int) -> None:
    given_lengths = torch.tensor(lengths)
    mask = mask_from_lengths(given_lengths, max(lengths) + extra)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(lengths), max(lengths) + extra)
    assert mask.sum(-1).tolist() == lengths
    assert torch.equal(lengths_from_mask(mask), given_lengths)
    assert torch.equal(lengths_from_mask(mask.unsqueeze(0)), given_lengths.unsqueeze(0))


def test_scalars_and_empty_batches() -> None:
    assert mask_from_lengths(torch.tensor(2), 3).tolist() == [True, True, False]
    assert lengths_from_mask(torch.tensor([True, False])).item() == 1
    assert lengths_from_mask(torch.ones(0, 3, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "mask: expected dtype torch.bool"),
        (torch.tensor(True), ValueError, "mask: expected shape"),
        (torch.tensor([[True, False, True]]), ValueError, "mask: expected padding on the right"),
        (torch.tensor([[False, True]]), ValueError, "mask: expected padding on the right"),
        (torch.tensor([[True], [False]]), ValueError, "mask: expected at least one real position"),
    ],
)
def test_bad_masks_are_named(mask: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lengths_from_mask(mask)
