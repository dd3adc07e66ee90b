"""Adaptive n-gram models: exact laws over texts that learn as they read, step by step or at once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from probllm.data import Dataset
from probllm.decoding import Beam, Sample, generate
from probllm.models import AdaptiveNGram, NGramModel
from probllm.training import fit

SIZE = 3
TEXTS = [[0, 1, 2, 0, 1], [0, 1, 0], [2, 2, 1, 0], [1], [0, 1, 2, 0, 1, 2]]


def data() -> Dataset:
    return Dataset([{"text": torch.tensor(text)} for text in TEXTS])


def estimated(order: int = 3, cache: bool = False) -> AdaptiveNGram:
    model = AdaptiveNGram(SIZE, order, cache)
    model.estimate(data())
    return model


def every_text(length: int) -> dict[str, Tensor]:
    return {"text": torch.tensor(list(itertools.product(range(SIZE), repeat=length)))}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_texts_of_a_length_sum_to_one(order: int, cache: bool) -> None:
    assert float(estimated(order, cache).log_prob(every_text(5)).exp().sum()) == pytest.approx(1.0)


def test_the_first_token_is_predicted_as_by_the_static_model_and_a_cache_knows_nothing_of_it() -> None:
    static = NGramModel(SIZE, 3)
    static.estimate(data())
    torch.testing.assert_close(estimated().log_prob(every_text(1)), static.log_prob(every_text(1)))
    torch.testing.assert_close(estimated(cache=True).log_prob(every_text(1)).exp(), torch.full((3,), 1 / 3).double())
    assert torch.equal(estimated(cache=True).tree_discounts, estimated().tree_discounts)


@pytest.mark.parametrize("cache", [False, True])
def test_what_was_read_becomes_likely_and_each_text_starts_anew(cache: bool) -> None:
    model = estimated(cache=cache)
    text = torch.tensor([[0, 2] * 20])
    found = model.token_log_probs({"text": text.expand(2, -1)})
    assert float(found[0, -8:].mean()) > float(found[0, :8].mean()) + 0.5
    assert torch.equal(found[0], found[1])
    assert torch.equal(model.token_log_probs({"text": text}), found[:1])


def test_reading_in_pieces_gives_the_score_of_each_token() -> None:
    model = estimated()
    text, mask = torch.tensor([[0, 1, 2, 2, 0], [1, 1, 0, 9, 9]]), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = model.token_log_probs({"text": text, "mask": mask})
    assert not expected[1, 3:].any()
    log_probs, state = model.start(text[:, :1])
    for t in range(1, 5):
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(log_probs.gather(1, text[:, t : t + 1] % 9)[mask[:, t], 0], expected[mask[:, t], t])
        laws, state = model.advance(text[:, t : t + 1], state, mask[:, t : t + 1])
        log_probs = laws[:, 0].where(mask[:, t : t + 1], log_probs)
    # after the padding the second text is where it was
    after, _ = model.step(torch.tensor([2, 2]), state)
    whole, _ = model.start(torch.tensor([[1, 1, 0, 2]]))
    torch.testing.assert_close(after[1:], whole)


def test_a_prefix_is_read_and_learned_from() -> None:
    model, whole = estimated(), torch.tensor([[0, 2, 0, 2, 0, 2, 2, 1]])
    found = model.token_log_probs({"text": whole[:, 5:], "prefix": whole[:, :5]})
    torch.testing.assert_close(found, model.token_log_probs({"text": whole})[:, 5:])


def test_padding_on_either_side_of_a_prompt_changes_nothing() -> None:
    model = estimated()
    bare, _ = model.start(torch.tensor([[0, 1]]))
    masks = torch.tensor([[False, True, True], [True, True, False], [True, False, True]])
    padded, _ = model.start(torch.tensor([[2, 0, 1], [0, 1, 2], [0, 2, 1]]), masks)
    torch.testing.assert_close(padded, bare.expand(3, -1))


def test_it_is_continued_in_every_way() -> None:
    model, prompt = estimated(), torch.tensor([[0, 1], [2, 2]])
    exact = generate(model, prompt, 3, Beam(27), n=27)  # rows of the state part, and go on alone
    for row in range(2):
        whole = torch.cat([prompt[row].expand(27, -1), every_text(3)["text"]], 1)
        scores = model.token_log_probs({"text": whole})[:, 2:].sum(-1)
        torch.testing.assert_close(exact.scores[row], scores.sort(descending=True).values)
    assert generate(model, torch.zeros(2, 0, dtype=torch.long), 4, Sample(top_p=0.9), n=3).tokens.shape == (2, 3, 4)


@pytest.mark.parametrize("cache", [False, True])
def test_fit_estimates_it_and_it_is_saved_and_read(tmp_path: Path, cache: bool) -> None:
    model = AdaptiveNGram(SIZE, 4, cache)
    fit(model, data(), progress=False)
    model.save(tmp_path)
    again = AdaptiveNGram.load(tmp_path)
    assert torch.equal(again.log_prob(every_text(5)), model.log_prob(every_text(5)))
    assert (again.order, again.size, again.cache) == (4, SIZE, cache)


def test_bad_input_is_named() -> None:
    model = estimated()
    with pytest.raises(ValueError, match="text: expected tokens from 0 to 2, got 0 to 3"):
        model.log_prob({"text": torch.tensor([[0, 3]])})
    with pytest.raises(ValueError, match="prefix: expected 1 rows"):
        model.log_prob({"text": torch.tensor([[0]]), "prefix": torch.tensor([[0], [1]])})
    with pytest.raises(ValueError, match="size: expected at least 1"):
        AdaptiveNGram(0)
    with pytest.raises(ValueError, match="order: expected at least 1"):
        AdaptiveNGram(3, 0)
    with pytest.raises(ValueError, match="data is empty"):
        model.estimate(Dataset([]))
    with pytest.raises(ValueError, match="tokens: expected tokens from 0 to 2"):
        model.step(torch.tensor([5]), model.start(torch.zeros(1, 0, dtype=torch.long))[1])
