"""Mixtures of language models: normalised, read step by step, and better than their parts on what they were set by."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from probllm.data import Dataset
from probllm.decoding import Beam, generate
from probllm.models import CausalLM, MixtureLM, NGramModel
from probllm.nn import RecurrentDecoder, TransformerDecoder

SIZE = 3
TEXTS = [[0, 1, 2, 0, 1], [0, 1, 0], [2, 2, 1, 0], [1], [0, 1, 2, 0, 1, 2], [0, 1, 2]]
EVERY = torch.tensor(list(itertools.product(range(SIZE), repeat=4)))


def texts() -> Dataset:
    return Dataset([{"text": torch.tensor(text)} for text in TEXTS])


def mixed() -> MixtureLM:
    torch.manual_seed(0)
    ngram = NGramModel(SIZE, 3)
    ngram.estimate(texts()[:4])
    transformer = CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, dropout=0.0))
    lstm = CausalLM(RecurrentDecoder(SIZE + 1, hidden=8))
    for model in (transformer, lstm):
        for parameter in model.double().parameters():
            parameter.data.mul_(3.0)
    return MixtureLM(ngram, [transformer, lstm]).eval()


def test_texts_of_a_length_sum_to_one_before_and_after_the_weights_are_set() -> None:
    model = mixed()
    for _ in range(2):
        assert float(model.log_prob({"text": EVERY}).detach().exp().sum()) == pytest.approx(1.0)
        model.estimate(texts())


def test_weights_by_em_lower_the_loss_below_that_of_each_model_alone() -> None:
    model, data = mixed(), texts()
    batch = Dataset.collate(data.examples)
    history = [row["loss"] for row in model.estimate(data)]
    tokens = int(batch["mask"].sum())  # type: ignore[union-attr]
    alone = [-float(part.token_log_probs(batch).sum()) / tokens for part in (model.ngram, *model.others)]
    found = -float(model.token_log_probs(batch).sum()) / tokens
    assert found <= history[0] + 1e-9
    assert found < min(alone)
    torch.testing.assert_close(model.weights.sum(-1), torch.ones(len(model.weights), dtype=torch.float64))
    assert float(model.weights.std(0).max()) > 0.001, "the weights of all classes are the same"


def test_it_mixes_probabilities_with_the_weights_of_the_history() -> None:
    model = mixed()
    model.weights.copy_(torch.rand(model.weights.shape, generator=torch.Generator().manual_seed(1)).softmax(-1))
    batch = {"text": torch.tensor([[0, 1, 2, 0]])}
    parts = [part.token_log_probs(batch)[0].double().exp() for part in (model.ngram, *model.others)]
    nodes = model.ngram.histories(batch)[0]
    tree = model.ngram.ngrams
    depths = [0 if int(node) == 0 else int(tree.depths()[node]) for node in nodes]
    assert depths[0] == 1, "the beginning is a history of one token"
    for t in range(4):
        left = float(torch.from_numpy(tree.backoffs)[nodes[t]].exp())
        weights = model.weights[3 * depths[t] + (left >= 0.1) + (left >= 0.4)]
        expected = sum(float(w * part[t]) for w, part in zip(weights, parts, strict=True))
        assert float(model.token_log_probs(batch)[0, t].exp()) == pytest.approx(expected)


def test_reading_step_by_step_gives_the_score_of_each_token() -> None:
    model = mixed()
    model.estimate(texts())
    text = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
    expected = model.token_log_probs({"text": text})
    log_probs, state = model.start(text[:, :1])
    for t in range(1, 4):
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(log_probs.gather(1, text[:, t : t + 1]).squeeze(1), expected[:, t])
        log_probs, state = model.step(text[:, t], state)
    exact = generate(model, text[:, :2], 2, Beam(9), n=9)
    pairs = torch.tensor(list(itertools.product(range(SIZE), repeat=2)))
    scores = model.log_prob({"text": pairs, "prefix": text[:1, :2].expand(9, -1)})
    torch.testing.assert_close(exact.scores[0], scores.sort(descending=True).values)


def test_it_is_saved_with_its_models(tmp_path: Path) -> None:
    model = mixed()
    model.estimate(texts())
    model.save(tmp_path)
    again = MixtureLM.load(tmp_path)
    assert torch.equal(again.token_log_probs({"text": EVERY}), model.token_log_probs({"text": EVERY}))


def test_models_of_other_tokens_are_refused() -> None:
    other = CausalLM(RecurrentDecoder(SIZE + 2, hidden=4))
    with pytest.raises(ValueError, match=r"others\[0\] has 4 tokens; expected 3"):
        MixtureLM(NGramModel(SIZE), [other])
    with pytest.raises(ValueError, match="others: expected at least one"):
        MixtureLM(NGramModel(SIZE), [])
