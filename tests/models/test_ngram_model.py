"""N-gram models: a law over texts, read step by step, saved, and exchanged with other toolkits as ARPA files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import Predictive
from torch import Tensor

from probllm.data import Dataset
from probllm.decoding import Beam, Contrastive, Greedy, Sample, generate
from probllm.math.ngrams import Smoothing
from probllm.models import NGramModel
from probllm.training import fit

SIZE = 3
TEXTS = [[0, 1, 2, 0, 1], [0, 1, 0], [2, 2, 1, 0], [1], [0, 1, 2, 0, 1, 2]]
SMOOTHINGS: list[Smoothing] = ["kneser-ney", "witten-bell", "additive"]
VOCABULARY = ["a", "<unk>", "</s>"]


def data() -> Dataset:
    return Dataset([{"text": torch.tensor(text)} for text in TEXTS])


def estimated(order: int = 3, smoothing: Smoothing = "kneser-ney") -> NGramModel:
    model = NGramModel(SIZE, order, smoothing, k=0.3)
    model.estimate(data())
    return model


def every_text(length: int) -> dict[str, Tensor]:
    text = torch.tensor(list(itertools.product(range(SIZE), repeat=length)))
    return {"text": text, "mask": torch.ones_like(text, dtype=torch.bool)}


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_texts_of_a_length_sum_to_one(smoothing: Smoothing, order: int) -> None:
    log_prob = estimated(order, smoothing).log_prob(every_text(4))
    assert float(log_prob.exp().sum()) == pytest.approx(1.0)


def test_before_it_is_estimated_all_tokens_are_equally_probable() -> None:
    found = NGramModel(SIZE, 3).log_prob(every_text(3))
    torch.testing.assert_close(found, torch.full_like(found, -3 * math.log(SIZE)))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=7))
def test_reading_step_by_step_gives_the_score_of_each_token(smoothing: Smoothing, text: list[int]) -> None:
    model = estimated(3, smoothing)
    expected = model.token_log_probs({"text": torch.tensor([text])})[0]
    for start in range(len(text)):
        log_probs, state = model.start(torch.tensor([text[:start]], dtype=torch.long))
        for t in range(start, len(text)):
            assert float(log_probs.exp().sum()) == pytest.approx(1.0)
            assert float(log_probs[0, text[t]]) == pytest.approx(float(expected[t]))
            log_probs, state = model.step(torch.tensor([text[t]]), state)


def test_padding_on_either_side_of_a_prompt_changes_nothing() -> None:
    model = estimated()
    bare, _ = model.start(torch.tensor([[0, 1]]))
    prompts = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 2, 1]])
    masks = torch.tensor([[False, True, True], [True, True, False], [True, False, True]])
    padded, state = model.start(prompts, masks)
    torch.testing.assert_close(padded, bare.expand(3, -1))
    torch.testing.assert_close(state.select(torch.tensor([1, 1, 0])).nodes, state.nodes)


def test_it_is_a_pyro_program() -> None:
    model = estimated()
    batch = data().collate(data().examples)
    trace = pyro.poutine.trace(model).get_trace(batch)
    torch.testing.assert_close(trace.log_prob_sum(), model.log_prob(batch).sum())
    torch.testing.assert_close(-trace.log_prob_sum() / len(TEXTS), model.loss(batch))
    drawn = Predictive(model, num_samples=4)({"mask": batch["mask"]})["text"]
    assert drawn.shape == (4, *batch["mask"].shape)
    assert not drawn[:, ~batch["mask"]].any()
    broken = {**batch, "text": torch.where(batch["mask"], batch["text"], 99)}
    torch.testing.assert_close(model.log_prob(broken), model.log_prob(batch))


def test_samples_come_as_often_as_they_are_probable() -> None:
    model, every = estimated(), every_text(3)
    drawn = model.sample(4000, {"mask": torch.ones(1, 3, dtype=torch.bool)})[:, 0]
    counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27).double()
    expected = 4000 * model.log_prob(every).exp()
    # chi-square with 26 degrees of freedom: 70 is exceeded once in 150,000, and the seed is fixed
    assert float(((counts - expected) ** 2 / expected).sum()) < 70


def test_fit_estimates_it_and_it_is_saved_and_read(tmp_path: Path) -> None:
    model = NGramModel(SIZE, 4)
    run = fit(model, data(), progress=False)
    assert run.stopped == "estimate"
    model.save(tmp_path)
    again = NGramModel.load(tmp_path)
    batch = every_text(5)
    assert torch.equal(again.log_prob(batch), model.log_prob(batch))
    assert (again.order, again.size, again.smoothing) == (4, SIZE, "kneser-ney")


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_arpa_round_trip(tmp_path: Path, smoothing: Smoothing, order: int) -> None:
    model = estimated(order, smoothing)
    model.write_arpa(tmp_path / "m.arpa", VOCABULARY)
    again, vocabulary = NGramModel.from_arpa(tmp_path / "m.arpa")
    assert vocabulary == VOCABULARY
    for length in (1, 5):
        torch.testing.assert_close(again.log_prob(every_text(length)), model.log_prob(every_text(length)))


def test_kenlm_reads_what_is_written_and_says_the_same(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    model = NGramModel(SIZE, 3)
    ended = [[*(0 if x != 1 else 1 for x in text), 2] for text in TEXTS]
    model.estimate(Dataset([{"text": torch.tensor(text)} for text in ended]))
    model.write_arpa(tmp_path / "m.arpa", VOCABULARY)
    theirs = kenlm.Model(str(tmp_path / "m.arpa"))
    for text in ([0, 0, 1, 0], [1], [0], [1, 1, 1, 0, 0]):
        words = " ".join(VOCABULARY[x] for x in text)
        found = float(model.log_prob({"text": torch.tensor([[*text, 2]])}))
        assert found == pytest.approx(theirs.score(words, bos=True, eos=True) * math.log(10), rel=1e-5)


def test_an_arpa_file_of_another_toolkit_with_missing_suffixes_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "pruned.arpa"
    path.write_text(
        "made by hand\n\n\\data\\\nngram 1=4\nngram 2=2\nngram 3=1\n\n\\1-grams:\n-1\t<unk>\n-99\t<s>\t-0.5\n"
        "-0.4\ta\t-0.25\n-0.7\t</s>\n\n\\2-grams:\n-0.3\t<s> a\t-0.125\n-0.2\ta a\t-0.0625\n\n"
        "\\3-grams:\n-0.1\t<s> a </s>\n\n\\end\\\n"
    )
    model, vocabulary = NGramModel.from_arpa(path)
    assert vocabulary == ["<unk>", "a", "</s>"]
    unk, a, end = range(3)
    ten = math.log(10)
    for text, expected in (
        ([a, end], -0.3 - 0.1),
        ([a, a, end], -0.3 + (-0.125 - 0.2) + (-0.0625 - 0.25 - 0.7)),  # "a a" has no children but a weight
        ([unk, a], (-0.5 - 1) - 0.4),
        ([a, unk], -0.3 + (-0.125 - 0.25 - 1)),
    ):
        assert float(model.log_prob({"text": torch.tensor([text])})) == pytest.approx(ten * expected), text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nothing"], "no ARPA file"),
        (["\\data\\", "ngram 1=x"], ":2: expected 'ngram N=count'"),
        (["\\data\\", "ngram 2=1"], ":2: expected the count of the 1-grams"),
        (["\\data\\", "ngram 1=1", "", "-1 a"], r":4: expected '\\1-grams:'"),
        (["\\data\\", "ngram 1=2", "", "\\1-grams:", "-1 a", "\\end\\"], ":6: expected a log probability, 1 word"),
        (["\\data\\", "ngram 1=1", "", "\\1-grams:", "x a", "\\end\\"], ":5: expected a log probability"),
        (["\\data\\", "ngram 1=1", "", "\\1-grams:", "0.5 a", "\\end\\"], ":5: expected a log probability"),
        (["\\data\\", "ngram 1=2", "", "\\1-grams:", "-1 a", "-1 a", "\\end\\"], ":6: an n-gram stands here a second"),
        (["\\data\\", "ngram 1=1", "", "\\1-grams:", "-1 a"], "the file is cut off"),
        (
            ["\\data\\", "ngram 1=1", "ngram 2=1", "", "\\1-grams:", "-1 a", "", "\\2-grams:", "-1 b a", "\\end\\"],
            ":9: expected the 1-gram 'b' before it",
        ),
        (
            ["\\data\\", "ngram 1=1", "ngram 2=1", "", "\\1-grams:", "-1 a", "", "\\2-grams:", "-1 a b", "\\end\\"],
            ":9: 'b' is not among the 1-grams",
        ),
    ],
)
def test_a_malformed_arpa_file_is_named_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "m.arpa"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        NGramModel.from_arpa(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "vocabulary", [["a", "b"], ["a", "a", "b"], ["a", "b c", "d"], ["a", "<s>", "b"], ["", "b", "c"]]
)
def test_names_that_an_arpa_file_cannot_hold(tmp_path: Path, vocabulary: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary: expected"):
        estimated().write_arpa(tmp_path / "m.arpa", vocabulary)


def test_bad_input_is_named() -> None:
    model = estimated()
    with pytest.raises(ValueError, match="text: expected tokens from 0 to 2, got 0 to 3"):
        model.log_prob({"text": torch.tensor([[0, 3]])})
    with pytest.raises(ValueError, match="text: expected long tokens"):
        model.log_prob({"text": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="size: expected at least 1"):
        NGramModel(0)
    with pytest.raises(ValueError, match="order: expected at least 1"):
        NGramModel(3, 0)
    with pytest.raises(ValueError, match="data is empty"):
        model.estimate(Dataset([]))
    with pytest.raises(ValueError, match="batch: expected text or mask"):
        model.law({})
    with pytest.raises(ValueError, match="tokens: expected tokens from 0 to 2"):
        model.step(torch.tensor([5]), model.start(torch.zeros(1, 0, dtype=torch.long))[1])


def test_it_is_continued_in_every_way_that_needs_no_hidden_states() -> None:
    model, prompt = estimated(), torch.tensor([[0, 1], [2, 2]])
    every = every_text(3)["text"]
    exact = generate(model, prompt, 3, Beam(27), n=27)
    for row in range(2):
        whole = torch.cat([prompt[row].expand(27, -1), every], 1)
        scores = model.token_log_probs({"text": whole})[:, 2:].sum(-1)
        torch.testing.assert_close(exact.scores[row], scores.sort(descending=True).values)
    assert torch.equal(generate(model, prompt, 4, Beam(1)).tokens, generate(model, prompt, 4, Greedy()).tokens)
    assert generate(model, torch.zeros(2, 0, dtype=torch.long), 4, Sample(top_p=0.9), n=3).tokens.shape == (2, 3, 4)
    with pytest.raises(TypeError, match="contrastive search compares hidden states, and NGramModel has none"):
        generate(model, prompt, 2, Contrastive())
