"""Memory used again: never while anything still refers to it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.math import room

LARGE = (room.LEAST // 8, 2)


@pytest.fixture(autouse=True)
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_blocks", room._Blocks())


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    first = room.empty(LARGE)
    place = address(first)
    second = room.empty(LARGE)
    assert address(second) != place
    del first
    third = room.empty(LARGE)
    assert address(third) == place


@pytest.mark.parametrize("view", [lambda x: x[1:, :1], lambda x: torch.from_numpy(x).t()[0], lambda x: x.reshape(-1).T])
def test_a_view_or_tensor_keeps_its_memory(view: object) -> None:
    array = room.zeros(LARGE)
    kept = view(array)  # type: ignore[operator]
    del array
    for _ in range(3):
        room.empty(LARGE).fill(1)
    assert not np.asarray(kept).any()


def test_a_gradient_is_not_overwritten_by_the_next_call() -> None:
    from probllm.math.chain import log_partition

    torch.manual_seed(0)
    emissions, transitions = torch.randn(2, 64, 40, 48), torch.randn(48, 48)
    assert emissions[0].numel() * 4 < room.LEAST <= 2 * emissions[0].numel() * 4  # q and alpha in one block
    gradients = [torch.func.grad(lambda e: log_partition(e, transitions).sum())(e) for e in emissions]
    again = torch.func.grad(lambda e: log_partition(e, transitions).sum())(emissions[0])
    assert torch.equal(gradients[0], again)


@given(st.lists(st.integers(1, 3 * room.MOST // 4 // 8), min_size=1, max_size=6), st.booleans())
def test_no_more_is_kept_than_allowed(sizes: list[int], hold: bool) -> None:
    room.forget()
    held = []
    for size in sizes:
        array = room.empty((size,))
        assert (array.shape, array.dtype) == ((size,), np.float64)
        assert size * 8 < room.LEAST or address(array) % room.ALIGNMENT == 0
        if hold:
            assert not any(np.shares_memory(array, other) for other in held)
            held.append(array)
        assert sum(block.size for block, _ in room._blocks.known) <= room.MOST
    assert all(np.dtype(kind).itemsize * 3 == room.zeros((3,), kind).nbytes for kind in (np.float32, np.int64))


def test_threads_have_blocks_of_their_own() -> None:
    held = room.empty(LARGE)
    place = address(held)
    del held
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(address(room.empty(LARGE))))
    thread.start()
    thread.join()
    assert found[0] != place
    assert address(room.empty(LARGE)) == place
