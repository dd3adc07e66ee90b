from hypothesis import given
from hypothesis import strategies as st

from probllm.training.tasks import Epoch, as_tasks
from tests.training.tagging import TinyTagger, tagged


def rows(batches):
    return [tuple(row[row >= 0].tolist()) for batch in batches for row in batch["inputs"]]


@given(long=st.integers(5, 20), short=st.integers(1, 5), size=st.integers(1, 6), epoch=st.integers(0, 3))
def test_an_epoch_is_one_pass_over_the_longest_data_and_whole_passes_over_the_others(long, short, size, epoch):
    data = {"long": tagged(long), "short": tagged(short, seed=1)}
    tasks = as_tasks({name: TinyTagger() for name in data}, data, None, None)
    steps = Epoch(tasks, epoch, 4, size, None, 0)
    assert len(steps) == -(-long // size)
    first, second = zip(*(steps[i] for i in range(len(steps))), strict=True)
    assert sum(len(batch["tags"]) for batch in first) == long
    pass_length = -(-short // size)
    for start in range(0, len(second) - pass_length + 1, pass_length):
        assert sum(len(batch["tags"]) for batch in second[start : start + pass_length]) == short


def test_the_passes_of_one_epoch_and_of_all_epochs_differ_in_order():
    data = {"long": tagged(90), "short": tagged(30, seed=1)}
    tasks = as_tasks({name: TinyTagger() for name in data}, data, None, None)
    orders = []
    for epoch in range(3):
        steps = Epoch(tasks, epoch, 3, 1, None, 0)
        batches = [steps[i][1] for i in range(len(steps))]
        orders += [str(rows(batches[start : start + 30])) for start in (0, 30, 60)]
    assert len(set(orders)) == 9


def test_the_first_pass_is_that_of_the_task_alone():
    data = tagged(20)
    steps = Epoch(as_tasks(TinyTagger(), data, None, None), 2, 5, 4, None, 7)
    alone = data.batches(4, seed=7, epoch=2)
    assert rows(steps[i][0] for i in range(len(steps))) == rows(alone)
