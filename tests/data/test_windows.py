"""Windows over a text: each token once an epoch, behind the tokens before it, in an order that two numbers decide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Windows

TEXT = torch.arange(100)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.integers(0, 50), st.booleans())
def test_tokens_come_once_an_epoch_behind_those_before_them(
    length: int, prefix: int, size: int, epoch: int, shuffle: bool
) -> None:
    windows = Windows(TEXT, length, prefix)
    batches = windows.batches(size, shuffle=shuffle, epoch=epoch)
    seen = []
    for batch in batches:
        assert 1 <= len(batch["text"]) <= size
        assert batch["text"].shape[1] == length
        whole = torch.cat([batch["prefix"], batch["text"]], 1)
        assert bool((whole.diff(dim=1) == 1).all())
        seen += batch["text"].flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert len(seen) >= len(TEXT) - prefix - 2 * length + (0 if shuffle else length)
    if not shuffle:
        assert seen == list(range(prefix, prefix + length * len(windows)))
        assert torch.equal(windows[len(windows) - 1]["text"], batches[-1]["text"][-1])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    windows = Windows(TEXT, 10)

    def order(**numbers: int) -> list[list[int]]:
        return [batch["text"][:, 0].tolist() for batch in windows.batches(3, **numbers)]

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3)
    assert order(seed=1, epoch=2) != order(seed=2, epoch=2)
    assert [x["text"][:, 0].tolist() for x in windows.batches(3, seed=1)[1:]] == order(seed=1, epoch=0)[1:]
    assert [len(batch["text"]) for batch in windows.batches(max_tokens=35, shuffle=False)] == [3, 3, 3]


def test_bad_numbers_are_named() -> None:
    for arguments, message in (
        ((TEXT, 0), "length: expected at least 1"),
        ((TEXT, 5, 0), "prefix: expected at least 1"),
        ((TEXT, 100), r"text: expected at least length \+ prefix = 101 tokens, got 100"),
        ((TEXT.float(), 5), "text: expected long tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Windows(*arguments)
    with pytest.raises(ValueError, match="max_tokens=4, but a window alone has 5"):
        Windows(TEXT, 5).batches(max_tokens=4)
    with pytest.raises(IndexError, match="there are 9 windows, got 9"):
        Windows(TEXT, 11)[9]
