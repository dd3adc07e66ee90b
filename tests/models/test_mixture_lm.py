"""Mixtures of language models: normalised, learned by the gradient as they read, and better than their parts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.data import Dataset
from probllm.decoding import Beam, generate
from probllm.models import AdaptiveNGram, CausalLM, DynamicLM, LanguageModel, MixtureLM, NGramModel
from probllm.models.mixture_lm import RATE, RATE_OF_AVERAGE, SLOWING
from probllm.nn import RecurrentDecoder, TransformerDecoder

SIZE = 3
TEXTS = [[0, 1, 2, 0, 1], [0, 1, 0], [2, 2, 1, 0], [1], [0, 1, 2, 0, 1, 2], [0, 1, 2]]
EVERY = torch.tensor(list(itertools.product(range(SIZE), repeat=4)))
TEXT = torch.tensor([[0, 1, 2, 2, 0, 1, 1], [1, 1, 0, 2, 2, 2, 0]])


def texts() -> Dataset:
    return Dataset([{"text": torch.tensor(text)} for text in TEXTS])


def parts(adaptive: bool) -> list[LanguageModel]:
    torch.manual_seed(0)
    counts = AdaptiveNGram(SIZE, 3) if adaptive else NGramModel(SIZE, 3)
    counts.estimate(texts()[:4])
    transformer = CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, dropout=0.0))
    lstm = CausalLM(RecurrentDecoder(SIZE + 1, hidden=8))
    for model in (transformer, lstm):
        for parameter in model.double().parameters():
            parameter.data.mul_(3.0)
    return [counts, DynamicLM(transformer, 2, 3, rate=0.05) if adaptive else transformer, lstm]


def mixed(adaptive: bool = True) -> MixtureLM:
    return MixtureLM(parts(adaptive), learns=adaptive).eval()


def by_hand(
    model: MixtureLM, text: list[int], rate: float, weights: Tensor, seen: Tensor, read_only: int = 0
) -> tuple[list[Tensor], list[tuple[int, Tensor]]]:
    """The laws before each token and after the last, the gradient being that of autograd, and the rows that moved, as
    they were then; weights and seen move on, but not at the first tokens, ``read_only`` of them."""
    laws, moved = [], []
    read = [part.start(torch.zeros(1, 0, dtype=torch.long)) for part in model.models]
    for t in range(len(text) + 1):
        x = torch.stack([law[0].detach().double() for law, _ in read])
        sure = 1 - float(x.max().exp())
        level = sum(sure <= 0.5**k for k in range(1, 8))
        rows = [0, 1 + (text[t - 1] if t else SIZE), 2 + SIZE + level]
        w = weights[rows].sum(0).requires_grad_()
        law = (w @ x).log_softmax(-1)
        laws.append(law.detach())
        if t == len(text):
            break
        if rate and t >= read_only:
            (g,) = torch.autograd.grad(law[text[t]], w)
            paces = [rate / math.sqrt(1 + float(seen[row]) / SLOWING) for row in rows]
            for row, pace in zip(rows, paces, strict=True):
                weights[row] += pace * g / (1 + sum(paces) * float(g @ g))
                seen[row] += 1
                moved.append((row, weights[row].clone()))
        read = [part.step(torch.tensor([text[t]]), each) for part, (_, each) in zip(model.models, read, strict=True)]
    return laws, moved


@pytest.mark.parametrize("adaptive", [False, True])
@given(text=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=10), seed=st.integers(0, 5))
def test_each_law_is_the_normalised_product_and_the_weights_follow_the_gradient(
    adaptive: bool, text: list[int], seed: int
) -> None:
    model = mixed(adaptive)
    torch.manual_seed(seed)
    model.weights.copy_(torch.randn_like(model.weights))
    model.seen.copy_(100 * torch.rand_like(model.seen))
    laws, _ = by_hand(model, text, RATE if adaptive else 0.0, model.weights.clone(), model.seen.clone())
    first, state = model.start(torch.zeros(1, 0, dtype=torch.long))
    after, _ = model.advance(torch.tensor([text]), state)
    torch.testing.assert_close(torch.cat([first, after[0]]), torch.stack(laws), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_texts_of_a_length_sum_to_one_before_and_after_the_weights_are_set(adaptive: bool) -> None:
    model = mixed(adaptive)
    for _ in range(2):
        assert float(model.log_prob({"text": EVERY}).exp().sum()) == pytest.approx(1.0)
        model.estimate(texts())


def test_weights_are_learned_from_one_text_after_another_and_lower_the_loss() -> None:
    model, data = mixed(), texts()
    weights, seen = model.weights.clone(), model.seen.clone()
    scores = []
    for row in data.examples:
        text = row["text"].tolist()
        laws, _ = by_hand(model, text, RATE, weights, seen)
        scores += [float(law[token]) for law, token in zip(laws, text, strict=False)]
    history = model.estimate(data)
    assert history == [{"loss": pytest.approx(-sum(scores) / len(scores))}]
    torch.testing.assert_close(model.weights, weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.seen, seen)
    losses = [row["loss"] for row in model.estimate(data, passes=8)]
    assert losses[-1] < losses[1] < losses[0] == history[0]["loss"], "an estimate begins anew"
    batch = Dataset.collate(data.examples)
    tokens = int(batch["mask"].sum())  # type: ignore[union-attr]
    alone = [-float(part.token_log_probs(batch).sum()) / tokens for part in model.models]
    assert -float(model.token_log_probs(batch).sum()) / tokens < min(alone)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
                min_size=1, max_size=3), st.integers(1, 3))  # fmt: skip
def test_weights_that_stay_are_averaged_over_the_last_pass_and_do_not_learn_from_prefixes(
    rows: list[tuple[list[int], list[int]]], passes: int
) -> None:
    model = mixed(adaptive=False)
    weights, seen = model.weights.clone(), model.seen.clone()
    for _ in range(passes):
        moved: dict[int, list[Tensor]] = {}
        for prefix, text in rows:
            for row, value in by_hand(model, prefix + text, RATE_OF_AVERAGE, weights, seen, len(prefix))[1]:
                moved.setdefault(row, []).append(value)
    for row, values in moved.items():
        weights[row] = torch.stack(values).mean(0)
    model.estimate(
        Dataset([{"prefix": torch.tensor(a, dtype=torch.long), "text": torch.tensor(b)} for a, b in rows]), passes
    )
    torch.testing.assert_close(model.weights, weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.seen, seen)


def test_weights_that_stay_suit_all_of_the_text_and_not_its_end() -> None:
    """Two models, each of which knows one half of the text; the second half comes last."""
    first, second = NGramModel(SIZE, 1), NGramModel(SIZE, 1)
    first.estimate(Dataset([{"text": torch.tensor([0] * 50 + [1] * 3 + [2])}]))
    second.estimate(Dataset([{"text": torch.tensor([1] * 50 + [0] * 3 + [2])}]))
    text = Dataset([{"text": torch.tensor([0] * 20_000 + [1] * 20_000)}])
    losses = []
    for learns in (False, True):
        model = MixtureLM([first, second], learns)
        model.estimate(text)
        fixed = MixtureLM([first, second], learns=False)
        fixed.weights.copy_(model.weights)
        losses.append(-float(fixed.log_prob({"text": torch.tensor([[0, 1] * 50])})))
    assert losses[0] < losses[1] - 5


def test_reading_leaves_the_weights_of_the_estimate_alone() -> None:
    model = mixed()
    model.estimate(texts())
    weights, seen = model.weights.clone(), model.seen.clone()
    found = model.token_log_probs({"text": TEXT})
    assert torch.equal(model.weights, weights)
    assert torch.equal(model.seen, seen)
    assert torch.equal(model.token_log_probs({"text": TEXT[1:]})[0], found[1])


@pytest.mark.parametrize("adaptive", [False, True])
def test_reading_step_by_step_gives_the_score_of_each_token(adaptive: bool) -> None:
    model = mixed(adaptive)
    model.estimate(texts())
    expected = model.token_log_probs({"text": TEXT})
    log_probs, state = model.start(TEXT[:, :1])
    for t in range(1, 7):
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        found = log_probs.gather(1, TEXT[:, t : t + 1]).squeeze(1)
        torch.testing.assert_close(found, expected[:, t], rtol=1e-5, atol=1e-5)
        log_probs, state = model.step(TEXT[:, t], state)
    exact = generate(model, TEXT[:, :2], 2, Beam(9), n=9)
    pairs = torch.tensor(list(itertools.product(range(SIZE), repeat=2)))
    scores = model.log_prob({"text": pairs, "prefix": TEXT[:1, :2].expand(9, -1)})
    torch.testing.assert_close(exact.scores[0], scores.sort(descending=True).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_padding_is_not_read(adaptive: bool) -> None:
    model = mixed(adaptive)
    model.estimate(texts())
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = model.token_log_probs({"text": TEXT.where(mask, 99), "mask": mask})
    torch.testing.assert_close(found[:1], model.token_log_probs({"text": TEXT[:1]}), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:, :4], model.token_log_probs({"text": TEXT[1:, :4]}), rtol=1e-5, atol=1e-5)
    assert not found[1, 4:].any()
    bare, _ = model.start(torch.tensor([[0, 1]]))
    masks = torch.tensor([[False, True, True], [True, True, False], [True, False, True]])
    padded, state = model.start(torch.tensor([[2, 0, 1], [0, 1, 2], [0, 2, 1]]), masks)
    torch.testing.assert_close(padded, bare.expand(3, -1), rtol=1e-5, atol=1e-5)
    empty, _ = model.start(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[False, False], [True, True]]))
    torch.testing.assert_close(empty[:1], model.start(torch.zeros(1, 0, dtype=torch.long))[0])
    after, _ = model.step(torch.tensor([2, 2, 2]), state)
    torch.testing.assert_close(after, model.start(torch.tensor([[0, 1, 2]]))[0].expand(3, -1), rtol=1e-5, atol=1e-5)


class Certain(LanguageModel):
    """Never says token 2."""

    size = SIZE

    def start(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.tensor([0.5, 0.5, 0.0]).log().expand(len(prompt), -1), None

    def advance(self, tokens: Tensor, state: None, mask: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.tensor([0.5, 0.5, 0.0]).log().expand(*tokens.shape, -1), None


def test_what_a_model_thinks_impossible_stays_a_number() -> None:
    model = MixtureLM([NGramModel(SIZE), Certain()])
    assert float(model.log_prob({"text": EVERY}).exp().sum()) == pytest.approx(1.0)
    model.weights[0] = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(model.start(TEXT[:, :0])[0], torch.full((2, 3), 1 / 3).double().log())


def test_a_long_text_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    expected = model.token_log_probs({"text": TEXT})
    monkeypatch.setattr("probllm.models.language_model.ROOM", 2 * 3 * SIZE * 2)
    monkeypatch.setattr("probllm.models.language_model.PIECE", 3)
    torch.testing.assert_close(model.token_log_probs({"text": TEXT}), expected, rtol=1e-5, atol=1e-5)


def test_it_is_saved_with_its_models(tmp_path: Path) -> None:
    model = mixed()
    model.estimate(texts())
    model.save(tmp_path)
    again = MixtureLM.load(tmp_path)
    assert torch.equal(again.token_log_probs({"text": EVERY}), model.token_log_probs({"text": EVERY}))


def test_models_of_other_tokens_are_refused() -> None:
    other = CausalLM(RecurrentDecoder(SIZE + 2, hidden=4))
    with pytest.raises(ValueError, match=r"models\[1\] has 4 tokens; expected 3"):
        MixtureLM([NGramModel(SIZE), other])
    with pytest.raises(ValueError, match="models: expected at least one"):
        MixtureLM([])
    with pytest.raises(ValueError, match="data is empty"):
        mixed().estimate(Dataset([]))
    with pytest.raises(ValueError, match="passes: expected at least 1, got 0"):
        mixed().estimate(texts(), passes=0)
    with pytest.raises(ValueError, match="text: expected tokens from 0 to 2, got 3 to 3"):
        mixed().estimate(Dataset([{"text": torch.tensor([3, 3])}]))
