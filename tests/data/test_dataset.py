"""Batches hold every example once, in an order that (seed, epoch) decides; padding never leaks into what is real."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Dataset


def tagging_example(length, number, features=3):
    ids = torch.full((length,), number + 1)
    return {
        "inputs": {"words": ids, "features": ids[:, None].expand(-1, features).clone()},
        "tags": ids + 1,
    }


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=80)


@given(
    lengths_strategy, st.integers(1, 9) | st.none(), st.integers(30, 90) | st.none(), st.booleans(), st.integers(0, 5)
)
def test_every_example_is_in_exactly_one_batch_within_the_bounds(lengths, size, tokens, shuffle, seed):
    data = Dataset([tagging_example(length, i) for i, length in enumerate(lengths)])
    batches = data.batches(size, tokens, shuffle, seed=seed)
    assert sorted(i for group in batches.indices for i in group) == list(range(len(lengths)))
    assert len(batches) == len(batches.indices)
    for batch, group in zip(batches, batches.indices, strict=True):
        rows, longest = batch["mask"].shape
        assert rows == len(group)
        assert longest == max(lengths[i] for i in group)
        assert rows <= (size or (32 if tokens is None else rows))
        assert tokens is None or rows * longest <= tokens


def test_the_bound_on_tokens_counts_the_longest_example_wherever_it_stands():
    data = Dataset([tagging_example(length, i) for i, length in enumerate([10, 1, 1, 1, 1, 10, 1])])
    assert data.batches(max_tokens=20, shuffle=False).indices == [[0, 1], [2, 3, 4], [5, 6]]


@given(lengths_strategy, st.integers(0, 3), st.integers(0, 3))
def test_order_is_a_function_of_seed_and_epoch_and_a_slice_resumes_it(lengths, seed, epoch):
    data = Dataset([tagging_example(length, i) for i, length in enumerate(lengths)])
    first = data.batches(4, seed=seed, epoch=epoch)
    torch.rand(3)  # the global generators play no part
    again = data.batches(4, seed=seed, epoch=epoch)
    assert first.indices == again.indices
    step = len(first) // 2
    assert again[step:].indices == first.indices[step:]
    if step < len(first):
        torch.testing.assert_close(again[step:][0], first[step])


def test_epochs_and_seeds_give_different_orders():
    data = Dataset([tagging_example(1 + i % 7, i) for i in range(300)])
    orders = [data.batches(8, seed=seed, epoch=epoch).indices for seed in range(3) for epoch in range(3)]
    assert len({str(order) for order in orders}) == 9


def test_bucketing_pads_little_and_keeps_batches_of_all_lengths_mixed():
    data = Dataset([tagging_example(1 + (i * 37) % 60, i) for i in range(2000)])
    batches = data.batches(32)
    padded = sum(len(group) * max(data.lengths[i] for i in group) for group in batches.indices)
    assert padded < 1.05 * sum(data.lengths)
    longest = torch.tensor([float(max(data.lengths[i] for i in group)) for group in batches.indices])
    halves = longest[: len(longest) // 2].mean() - longest[len(longest) // 2 :].mean()
    assert abs(halves) < 15  # an order by length would differ by 30


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6))
def test_collate_keeps_what_is_real_and_pads_with_zero(shapes):
    examples = [tagging_example(length, i, features) for i, (length, features) in enumerate(shapes)]
    batch = Dataset.collate(examples)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(-1).tolist() == [length for length, _ in shapes]
    for row, (example, (length, features)) in enumerate(zip(examples, shapes, strict=True)):
        assert torch.equal(batch["tags"][row, :length], example["tags"])
        assert torch.equal(batch["inputs"]["features"][row, :length, :features], example["inputs"]["features"])
        assert batch["tags"][row, length:].eq(0).all()
        assert batch["inputs"]["features"][row, length:].eq(0).all()
        assert batch["inputs"]["features"][row, :, features:].eq(0).all()
    assert torch.equal(batch["mask"], batch["tags"] != 0)


def test_pictures_and_labels_are_stacked_without_a_mask():
    data = Dataset.from_tensors({"inputs": torch.rand(5, 1, 8, 8), "label": torch.arange(5)})
    batch = data.batches(3, shuffle=False)[1]
    assert "mask" not in batch
    assert batch["inputs"].shape == (2, 1, 8, 8)
    assert batch["label"].tolist() == [3, 4]


def test_from_tensors_with_nested_inputs_gives_rows():
    words, tags = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.long)
    batch = Dataset.from_tensors({"inputs": {"words": words}, "tags": tags}).batches(3, shuffle=False)[0]
    assert torch.equal(batch["inputs"]["words"], words)
    assert batch["mask"].all()


def test_a_mask_of_the_examples_own_is_kept():
    mask = torch.tensor([True, False, True])
    batch = Dataset.collate([{"inputs": torch.arange(3), "mask": mask}, {"inputs": torch.arange(2), "mask": mask[:2]}])
    assert batch["mask"].tolist() == [[True, False, True], [True, False, False]]


def test_slices_and_lists_of_indices_are_datasets():
    data = Dataset([tagging_example(i + 1, i) for i in range(5)])
    assert data[1:3].lengths == [2, 3]
    assert data[[4, 0]].lengths == [5, 1]
    assert data[-1]["tags"].shape == (5,)
    assert len(Dataset([]).batches(4)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dataset([{"inputs": torch.ones(1)}, {"tags": torch.ones(1)}]), "example 1 has the keys"),
        (lambda: Dataset([tagging_example(2, 0), tagging_example(0, 1)]), "example 1 has no tokens"),
        (
            lambda: Dataset([tagging_example(3, 0), {**tagging_example(3, 1), "tags": torch.ones(2)}]),
            r"example 1: inputs.* has shape \[3.*\] for 2 tags",
        ),
        (lambda: Dataset([{"inputs": torch.ones(3), "tags": torch.ones(4)}]), r"example 0: inputs has shape \[3\]"),
        (lambda: Dataset.collate([]), "examples is empty"),
        (
            lambda: Dataset.collate([{"inputs": torch.ones(2)}, {"inputs": torch.ones(2, 2)}]),
            "inputs must have the same",
        ),
        (
            lambda: Dataset.collate([{"a": torch.ones(1, 2, 3)}, {"a": torch.ones(1, 2, 4)}]),
            "a may differ in its first",
        ),
        (lambda: Dataset([tagging_example(9, 0)]).batches(max_tokens=8), "example 0 alone has 9 tokens"),
        (lambda: Dataset([tagging_example(9, 0)]).batches(0), "batch_size must be at least 1, got 0"),
        (
            lambda: Dataset.collate([{"inputs": {"words": torch.ones(size)}} for size in ((2,), (2, 2))]),
            "inputs.words must have the same rank",
        ),
        (lambda: Dataset.from_tensors({"a": torch.ones(2), "b": torch.ones(3)}), "one leading dimension"),
        (lambda: Dataset.from_tensors({"a": torch.tensor(1.0)}), "one leading dimension"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_example_that_is_no_dict_is_named():
    with pytest.raises(TypeError, match="example 1 is a Tensor, expected a dict"):
        Dataset([tagging_example(2, 0), torch.ones(2)])
