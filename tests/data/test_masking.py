"""Hidden tokens, spans cut out, texts cut in two."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Dataset, Masked, Windows, prefix_pairs, span_denoising

MASK, FIRST, SIZE = 4, 5, 60


def texts(count: int, seed: int = 0) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.integers(FIRST, SIZE, random.integers(1, 40))) for _ in range(count)]


def masked(unit: Any = "token", rate: float = 0.15, count: int = 300) -> Masked:
    examples = []
    for text in texts(count):
        index = torch.arange(len(text)) // 3  # words of three tokens
        index[0] = -1
        examples.append({"inputs": text, "word_index": index})
    return Masked(Dataset(examples), MASK, SIZE, FIRST, rate, unit)


def every_batch(data: Masked, **options: Any) -> list[dict[str, torch.Tensor]]:
    return list(data.batches(16, **options))


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_four_fifths_are_replaced_by_the_mask_a_tenth_by_any_token(unit: Any) -> None:
    data = masked(unit, 0.3)
    picked = masks = others = real = 0
    for batch in every_batch(data):
        hidden, inputs, target = batch["hidden"], batch["inputs"], batch["target"]
        assert not hidden[~batch["mask"]].any()
        assert not target[~hidden].any()
        assert (target[hidden] >= FIRST).all()
        assert ((inputs[hidden] == MASK) | ((inputs[hidden] >= FIRST) & (inputs[hidden] < SIZE))).all()
        picked += int(hidden.sum())
        masks += int((inputs[hidden] == MASK).sum())
        others += int(((inputs != MASK) & (inputs != target))[hidden].sum())
        real += int(batch["mask"].sum())
    # words and spans are picked together, which spreads the share more than single tokens would
    assert abs(picked / real - 0.3) < 0.05
    assert abs(masks / picked - 0.8) < 0.04
    assert abs(others / picked - 0.1) < 0.03


def test_what_is_not_hidden_is_the_text_itself() -> None:
    data = masked(count=20)
    for masked_batch, plain in zip(data.batches(4, seed=3), data.data.batches(4, seed=3), strict=True):
        text, hidden = plain["inputs"], masked_batch["hidden"]
        assert isinstance(text, torch.Tensor)
        assert torch.equal(masked_batch["inputs"][~hidden], text[~hidden])
        assert torch.equal(masked_batch["target"][hidden], text[hidden])


def test_whole_words_are_hidden_or_not() -> None:
    data = masked("word", 0.4)
    seen = 0
    for batch, plain in zip(data.batches(16), data.data.batches(16), strict=True):
        index = plain["word_index"]
        assert isinstance(index, torch.Tensor)
        for hidden, words in zip(batch["hidden"], index, strict=True):
            assert not hidden[words < 0].any()
            for word in range(int(words.max()) + 1):
                share = hidden[words == word].float().mean()
                assert share in (0.0, 1.0)
                seen += int(share)
    assert seen > 50


def test_spans_have_the_share_and_run_on() -> None:
    text = torch.randint(FIRST, SIZE, (400,))
    data = Masked(Windows(text, 100), MASK, SIZE, rate=0.2, unit="span")
    hidden = torch.cat([batch["hidden"] for epoch in range(20) for batch in data.batches(2, epoch=epoch)])
    assert (hidden.sum(1) == 20).all()
    runs = [len(list(run)) for row in hidden.tolist() for value, run in itertools.groupby(row) if value]
    assert 2.5 < np.mean(runs) < 5.5


def test_tokens_below_the_first_are_left_alone() -> None:
    data = Masked(Dataset([{"inputs": torch.tensor([2, 9, 3])}] * 30), MASK, SIZE, FIRST, rate=1.0)
    for batch in data.batches(7):
        assert torch.equal(batch["hidden"], torch.tensor([[False, True, False]]).expand(len(batch["hidden"]), -1))


def test_batches_depend_on_seed_and_epoch_alone_and_a_slice_is_the_rest() -> None:
    data = masked(count=60)
    one, again = every_batch(data, seed=1, epoch=2), every_batch(data, seed=1, epoch=2)
    rest = list(data.batches(16, seed=1, epoch=2)[2:])
    other = every_batch(data, seed=1, epoch=3)
    for first, second in zip(one, again, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    for first, second in zip(one[2:], rest, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(x["hidden"].shape != y["hidden"].shape or not torch.equal(x["hidden"], y["hidden"])
               for x, y in zip(one, other, strict=True))  # fmt: skip
    assert len(data) == 60
    assert set(data[3]) == {"inputs", "mask", "hidden", "target"}
    assert torch.equal(data[3]["inputs"], data[3]["inputs"])


def test_windows_of_a_text_are_hidden_too() -> None:
    text = torch.randint(FIRST, SIZE, (300,))
    batch = Masked(Windows(text, 20), MASK, SIZE, FIRST).batches(8)[0]
    assert batch["inputs"].shape == (8, 20)
    assert batch["mask"].all()


@given(
    st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=40), min_size=1, max_size=8),
    st.floats(0.05, 0.9), st.floats(1.0, 6.0), st.integers(1, 5), st.integers(0, 3),
)  # fmt: skip
def test_the_spans_put_back_give_the_text(
    texts: list[list[int]], rate: float, mean: float, count: int, seed: int
) -> None:
    sentinels = list(range(100, 100 + count))
    kept = [text for text in texts if len(text) > 1]
    data = span_denoising(texts, sentinels, 1, rate, mean, seed)
    assert len(data) == len(kept)
    for text, example in zip(kept, data, strict=True):
        source, target = example["inputs"].tolist(), example["target"].tolist()  # type: ignore[union-attr]
        assert target[-1] == 1
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 100:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        assert list(spans) == sentinels[: len(spans)]
        assert all(spans.values())
        whole = [x for token in source for x in spans.get(token, [token])]
        assert whole == text
        cut = sum(map(len, spans.values()))
        assert cut == min(max(round(len(text) * rate), 1), len(text) - 1)


@given(st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(0, 3))
def test_both_parts_give_the_text(texts: list[list[int]], seed: int) -> None:
    kept = [text for text in texts if len(text) > 1]
    for text, example in zip(kept, prefix_pairs(texts, 1, seed), strict=True):
        source, target = example["inputs"].tolist(), example["target"].tolist()  # type: ignore[union-attr]
        assert source
        assert len(target) > 1
        assert [*source, *target] == [*text, 1]


def test_bad_numbers_are_named() -> None:
    data = Dataset([{"inputs": torch.tensor([7, 8])}])
    for options, message in (
        ({"rate": 0.0}, "rate: expected"), ({"first": 60}, "first: expected"), ({"unit": "words"}, "unit: expected"),
        ({"unit": "word"}, "word_index"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Masked(data, MASK, SIZE, **options)  # type: ignore[arg-type]
    for arguments, message in (
        (([[1, 2]], [9], 1, 1.0), "rate"), (([[1, 2]], [9], 1, 0.5, 0.5), "mean_length"),
        (([[1, 2]], [], 1), "sentinels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            span_denoising(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="subwords"):
        Masked(Dataset([{"inputs": {"words": torch.tensor([7])}}]), MASK, SIZE).batches(1)[0]
