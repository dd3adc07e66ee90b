import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data.windows import Windows
from probllm.training.parts import Epoch
from probllm.training.processes import Processes
from probllm.training.settings import Settings
from probllm.training.tasks import as_tasks
from tests.training.tagging import TinyTagger, tagged


def settings(**changes):
    usual = dict.fromkeys(("batch_size", "max_tokens", "clip", "patience", "metric", "ema"))
    usual |= {"accumulate": 1, "learning_rate": 0.1, "weight_decay": 0.0, "optimiser": "sgd", "schedule": "constant"}
    return Settings(**{**usual, "warmup": 0.0, "decay": 0.1, "mode": "max", "mixed_precision": False, **changes})


def steps_of(data, epoch=0, rank=0, size=1, **changes):
    processes = Processes(torch.device("cpu"))
    processes.rank, processes.size = rank, size
    model = {name: TinyTagger() for name in data} if isinstance(data, dict) else TinyTagger()
    return Epoch(as_tasks(model, data, None, None), epoch, settings(**changes), processes)


def rows(batches):
    """Each row by its words; padding, which is 0 as a word may be, is cut off by the mask."""
    return [
        tuple(row[real].tolist()) for batch in batches for row, real in zip(batch["inputs"], batch["mask"], strict=True)
    ]


@given(long=st.integers(5, 20), short=st.integers(1, 5), size=st.integers(1, 6), epoch=st.integers(0, 3))
def test_an_epoch_is_one_pass_over_the_longest_data_and_whole_passes_over_the_others(long, short, size, epoch):
    data = {"long": tagged(long), "short": tagged(short, seed=1)}
    steps = steps_of(data, epoch, batch_size=size, epochs=4, seed=0)
    assert len(steps) == -(-long // size)
    first, second = ([steps[i][task][0] for i in range(len(steps))] for task in (0, 1))
    assert sum(part.rows for part in first) == long
    assert all(part.rows == part.total == len(part.batch["tags"]) for part in [*first, *second])
    pass_length = -(-short // size)
    for start in range(0, len(second) - pass_length + 1, pass_length):
        assert sum(part.rows for part in second[start : start + pass_length]) == short


def test_the_passes_of_one_epoch_and_of_all_epochs_differ_in_order():
    orders = []
    for epoch in range(3):
        steps = steps_of({"long": tagged(90), "short": tagged(30, seed=1)}, epoch, batch_size=1, epochs=3, seed=0)
        batches = [steps[i][1][0].batch for i in range(len(steps))]
        orders += [str(rows(batches[start : start + 30])) for start in (0, 30, 60)]
    assert len(set(orders)) == 9


def test_the_first_pass_is_that_of_the_task_alone():
    data = tagged(20)
    steps = steps_of(data, 2, batch_size=4, epochs=5, seed=7)
    alone = data.batches(4, seed=7, epoch=2)
    assert rows(steps[i][0][0].batch for i in range(len(steps))) == rows(alone)


windows = Windows(torch.arange(60), length=3, prefix=2)


@pytest.mark.parametrize("bounds", [{"batch_size": 3}, {"max_tokens": 16}, {"batch_size": 2, "max_tokens": 20}, {}])
@pytest.mark.parametrize("data", [tagged(23), windows], ids=["tagged", "windows"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_all_processes_are_the_rows_of_the_large_batch(accumulate, size, bounds, data):
    options = {**bounds, "accumulate": accumulate, "epochs": 1, "seed": 3}
    sought = [None if bound is None else accumulate * bound for bound in map(bounds.get, ("batch_size", "max_tokens"))]
    large = data.batches(*(sought if bounds else [32 * accumulate]), seed=3, epoch=0)
    each = [steps_of(data, rank=rank, size=size, **options) for rank in range(size)]
    key = "inputs" if "inputs" in data[0] else "text"
    for step in range(len(large)):
        parts = [steps[step][0] for steps in each]
        whole = large[step]
        assert len({len(some) for some in parts}) == 1  # processes that compute together compute equally often
        assert sum(part.share for some in parts for part in some) == pytest.approx(1)
        found = []
        for part in (part for some in parts for part in some):
            assert part.total == len(whole[key])
            assert len(part.batch[key]) == max(part.rows, 1)
            if part.rows:
                found += [row[row > 0].tolist() for row in part.batch[key]]
            assert len(part.batch[key]) <= bounds.get("batch_size", 32)
            assert part.batch[key].numel() <= bounds.get("max_tokens", 1000)
        assert sorted(found) == sorted(row[row > 0].tolist() for row in whole[key])
    assert all(len(steps) == len(large) for steps in each)


def test_a_processs_parts_are_no_more_than_its_rows_need():
    steps = steps_of(tagged(40), rank=1, size=2, batch_size=4, accumulate=2, epochs=1, seed=0)
    assert [[part.rows for part in steps[i][0]] for i in range(len(steps))] == [[4]] * 5
    steps = steps_of(tagged(3), rank=3, size=4, batch_size=4, epochs=1, seed=0)
    assert [[(part.rows, part.total) for part in steps[i][0]] for i in range(len(steps))] == [[(0, 3)]]
