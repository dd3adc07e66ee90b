import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.training.averaging import MovingAverage


@given(decay=st.floats(0.1, 0.99), values=st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_the_average_is_the_recursion_and_counters_are_copied(decay, values):
    tensors = {"w": torch.zeros(2, dtype=torch.float64), "n": torch.tensor(0)}
    average, expected = MovingAverage(tensors, decay), 0.0
    for step, value in enumerate(values):
        tensors["w"].fill_(value)
        tensors["n"].fill_(step)
        average.update(tensors, step)
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * value
    torch.testing.assert_close(average.average["w"], torch.full((2,), expected, dtype=torch.float64))
    assert average.average["n"] == len(values) - 1


@given(decay=st.floats(0.1, 0.99), value=st.floats(-5, 5))
def test_the_average_of_constant_weights_is_these(decay, value):
    tensors = {"w": torch.full((3,), value)}
    average = MovingAverage(tensors, decay)
    for step in range(4):
        average.update(tensors, step)
    torch.testing.assert_close(average.average["w"], tensors["w"])


def test_the_weights_come_back_after_the_average_was_in_place():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"w": weight}, 0.5)
    weight.data.fill_(3.0)
    average.update({"w": weight}, 100)
    try:
        with average.in_place({"w": weight}):
            assert weight.item() == 2.0
            raise RuntimeError
    except RuntimeError:
        pass
    assert weight.item() == 3.0
    assert average.average["w"].item() == 2.0
