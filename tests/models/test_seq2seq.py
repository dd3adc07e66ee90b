"""Encoder-decoders: the battery of a model, a law over targets, smoothing, and writing step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from probllm.decoding import Beam, Greedy, Sample, generate, stream
from probllm.models import Seq2Seq
from probllm.nn import RecurrentDecoder, RecurrentEncoder, TransformerDecoder, TransformerEncoder, WordEmbedding
from tests.models.battery import CHECKS, Case

SIZE, END = 5, 4  # 0 is padding; 1 to 3 and the end are tokens
INPUTS = torch.tensor([[1, 3, 1, 2], [2, 2, 0, 0], [1, 3, 2, 0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
TARGET = torch.tensor([[3, 1, 2, 4], [2, 4, 0, 0], [1, 1, 4, 0]])
BATCH = {"inputs": INPUTS, "mask": MASK, "target": TARGET}


def transformer(**options: Any) -> Seq2Seq:
    encoder = TransformerEncoder(SIZE, dim=8, layers=1, heads=2, dropout=0.0)
    decoder = TransformerDecoder(SIZE + 1, dim=8, layers=2, heads=2, dropout=0.0, memory_dim=8)
    return Seq2Seq(encoder, decoder, END, max_length=4, **options)


def shared() -> Seq2Seq:
    embedding = WordEmbedding(SIZE + 1, 8)
    encoder = TransformerEncoder(embedding, dim=8, layers=1, heads=2, dropout=0.0)
    decoder = TransformerDecoder(embedding, dim=8, layers=1, heads=2, dropout=0.0, memory_dim=8)
    return Seq2Seq(encoder, decoder, END, max_length=4)


def recurrent(attention: Any) -> Seq2Seq:
    encoder = RecurrentEncoder(SIZE, 4)
    decoder = RecurrentDecoder(SIZE + 1, hidden=8, memory_dim=encoder.dim, attention=attention)
    return Seq2Seq(encoder, decoder, END, tied=False, max_length=4)


def with_begin() -> Seq2Seq:
    encoder = RecurrentEncoder(SIZE, 4)
    return Seq2Seq(encoder, RecurrentDecoder(SIZE, hidden=8, memory_dim=encoder.dim), END, begin=1, max_length=4)


MAKERS: dict[str, Callable[[], Seq2Seq]] = {
    "transformer": transformer,
    "one embedding for both": shared,
    "luong": lambda: recurrent("luong"),
    "bahdanau": lambda: recurrent("bahdanau"),
    "begin among the tokens": with_begin,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
CASES = [Case(name, make, BATCH, target="target") for name, make in MAKERS.items()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: Case, check: Callable[[Case], None]) -> None:
    if check.__name__.startswith("check_predict_has_the_shape"):
        pytest.skip("a target may be longer than its source")
    check(case)


def made(make: Callable[[], Seq2Seq]) -> Seq2Seq:
    torch.manual_seed(3)
    model = make().double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # far from uniform
    return model


def every_target(steps: int) -> Tensor:
    """All targets that end within so many steps, and those of so many tokens."""
    found = []
    for n in range(steps):
        for tokens in itertools.product((1, 2, 3), repeat=n):
            found.append([*tokens, END] + [0] * (steps - n - 1))
    return torch.tensor(found + [list(tokens) for tokens in itertools.product((1, 2, 3), repeat=steps)])


@makers
def test_targets_that_end_and_those_cut_off_sum_to_one(make: Callable[[], Seq2Seq]) -> None:
    model, every = made(make), every_target(3)
    one = {"inputs": INPUTS[1:2], "mask": MASK[1:2]}
    both = {"inputs": one["inputs"].expand(len(every), -1), "mask": one["mask"].expand(len(every), -1)}
    log_prob = model.log_prob({**both, "target": every})
    assert float(log_prob.exp().sum()) == pytest.approx(1.0)
    law = model.law({**one, "target": every[:1]}).expand((len(every),))
    torch.testing.assert_close(law.log_prob(every), log_prob)


@makers
def test_reading_step_by_step_gives_the_score_of_each_token(make: Callable[[], Seq2Seq]) -> None:
    model = made(make)
    expected, reader = model.token_log_probs(BATCH), model.given(BATCH)
    for read in range(3):
        log_probs, state = reader.start(TARGET[:, :read].clamp_min(1))
        for t in range(read, 4):
            real = (TARGET != 0).cumprod(-1).bool()[:, t]
            found = log_probs.gather(1, TARGET[:, t : t + 1]).squeeze(1)
            torch.testing.assert_close(found[real], expected[real, t])
            torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3).to(log_probs))
            log_probs, state = reader.step(TARGET[:, t].clamp_min(1), state)


@makers
def test_the_beam_that_is_wide_enough_finds_the_best_targets(make: Callable[[], Seq2Seq]) -> None:
    model, every = made(make), every_target(3)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in BATCH.items() if key != "target"}
        whole = {key: value.expand(len(every), -1) for key, value in one.items()}
        best = model.log_prob({**whole, "target": every}).sort(descending=True)
        found = generate(model.given(one), torch.zeros(1, 0, dtype=torch.long), 3, Beam(30), n=5, end=END)
        torch.testing.assert_close(found.scores[0], best.values[:5])
        assert torch.equal(found.tokens[0], every[best.indices[:5]])
    # all rows at once, so that the hypotheses of different sources move within the batch
    together = generate(model.given(BATCH), torch.zeros(3, 0, dtype=torch.long), 3, Beam(6), n=2, end=END)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in BATCH.items()}
        alone = generate(model.given(one), torch.zeros(1, 0, dtype=torch.long), 3, Beam(6), n=2, end=END)
        torch.testing.assert_close(together.scores[row], alone.scores[0])
    greedy = model.predict(BATCH)
    assert greedy.shape == (3, 4)
    assert torch.equal(model.predict(BATCH, Beam(1)), greedy)


@makers
def test_draws_have_the_frequencies_of_the_law(make: Callable[[], Seq2Seq]) -> None:
    pyro.set_rng_seed(0)
    model = made(make)
    one = {"inputs": INPUTS[:1], "mask": MASK[:1]}
    drawn = model.sample(4000, one)[:, 0]
    every = every_target(4)
    whole = {key: value.expand(len(every), -1) for key, value in one.items()}
    p = model.log_prob({**whole, "target": every}).exp()
    counts = (drawn.unsqueeze(1) == every).all(-1).sum(0)
    assert int(counts.sum()) == 4000
    common = p > 0.005
    assert common.sum() > 3
    sigma = (p * (1 - p) / 4000).sqrt()
    assert ((counts / 4000 - p).abs()[common] < 4.5 * sigma[common]).all()
    several = generate(model.given(BATCH), torch.zeros(3, 0, dtype=torch.long), 4, Sample(), n=2, end=END)
    for row in range(3):
        repeated = {key: value[row : row + 1].expand(2, -1) for key, value in BATCH.items()}
        scores = model.log_prob({**repeated, "target": several.tokens[row]})
        torch.testing.assert_close(several.scores[row], scores)


def test_what_stands_behind_the_end_or_on_padding_changes_nothing() -> None:
    model = made(transformer)
    found = model.token_log_probs(BATCH)
    other = {
        "inputs": INPUTS.where(MASK, 4),
        "mask": MASK,
        "target": torch.tensor([[3, 1, 2, 4], [2, 4, 3, 4], [1, 1, 4, 2]]),
    }
    torch.testing.assert_close(model.token_log_probs(other), found)
    assert not found[TARGET == 0].any()


def test_smoothing_is_of_training_alone_and_stands_in_the_trace() -> None:
    e = 0.2
    torch.manual_seed(0)
    model = transformer(label_smoothing=e)
    nats = -model.eval().log_prob(BATCH).mean()
    torch.testing.assert_close(model.loss(BATCH), nats)
    smoothed = model.train().loss(BATCH)
    reader, uniform = model.given(BATCH), torch.zeros(3)
    log_probs, state = reader.start(TARGET[:, :0])
    for t in range(4):
        real = TARGET[:, t] != 0
        uniform += torch.where(real, -log_probs[:, 1:].mean(-1), 0.0)
        log_probs, state = reader.step(TARGET[:, t].clamp_min(1), state)
    torch.testing.assert_close(smoothed, (1 - e) * nats + e * uniform.mean())
    joint = poutine.trace(model).get_trace(BATCH).log_prob_sum()
    torch.testing.assert_close(-joint / 3, smoothed)


def test_targets_stream_as_they_are_chosen() -> None:
    model = made(transformer)
    whole = generate(model.given(BATCH), TARGET[:, :0], 4, Greedy(), end=END).tokens[:, 0]
    pieces = torch.stack([t.tokens for t in stream(model.given(BATCH), TARGET[:, :0], 4, Greedy(), end=END)], -1)
    assert torch.equal(pieces, whole)


def test_the_length_of_a_target_goes_by_the_source_unless_it_is_given() -> None:
    encoder = TransformerEncoder(SIZE, dim=8, layers=1, heads=2)
    decoder = TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, memory_dim=8)
    model = Seq2Seq(encoder, decoder, END).eval()
    assert model.predict(BATCH).shape == (3, 18)
    assert model.predict({"inputs": INPUTS[1:], "mask": MASK[1:]}).shape == (2, 16)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"target": torch.tensor([[1], [5], [1]])}, "target: expected tokens from 0 to 4, got 1 to 5"),
        ({"target": torch.zeros(3, 2)}, "target: expected long tokens"),
        ({"target": TARGET[:2]}, "target: expected 3 rows, as of inputs, got 2"),
        ({"target": torch.tensor([[4], [0], [4]])}, "target: row 1 has padding before any end, which is 4"),
    ],
)
def test_bad_batches_are_named(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer().log_prob({**BATCH, **batch})


def test_bad_parts_are_named() -> None:
    encoder = TransformerEncoder(SIZE, dim=8, layers=1, heads=2)
    for memory_dim in (None, 6):
        decoder = TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, memory_dim=memory_dim)
        with pytest.raises(ValueError, match="expected the encoder's dim, 8"):
            Seq2Seq(encoder, decoder, END)
    decoder = TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, memory_dim=8)
    for options, message in (
        ({"end": 0}, "end: expected a token from 1 to 4"),
        ({"end": 5}, "end: expected a token from 1 to 4"),
        ({"end": 1, "begin": 6}, "begin: expected a token from 0 to 5"),
        ({"end": 1, "label_smoothing": 1.0}, "label_smoothing"),
        ({"end": 1, "max_length": 0}, "max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            Seq2Seq(encoder, decoder, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt: expected 3 rows, as of inputs, or a multiple, got 4"):
        transformer().given(BATCH).start(torch.ones(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="batch is None"):
        transformer().sample(1)


@makers
def test_rows_take_their_sources_along_when_they_change_places(make: Callable[[], Seq2Seq]) -> None:
    model = made(make)
    _, state = model.given(BATCH).start(TARGET[:, :0])
    _, state = model.given(BATCH).step(torch.tensor([1, 2, 3]), state.select(torch.tensor([1, 0, 2])))
    found, _ = model.given(BATCH).step(torch.tensor([2, 1, 3]), state.select(torch.tensor([2, 2, 0])))
    moved = {key: value[torch.tensor([2, 2, 1])] for key, value in BATCH.items()}
    expected, _ = model.given(moved).start(torch.tensor([[3, 2], [3, 1], [1, 3]]))
    torch.testing.assert_close(found, expected)


def test_targets_are_as_long_as_the_positions_allow() -> None:
    encoder = TransformerEncoder(SIZE, dim=8, layers=1, heads=2, dropout=0.0)
    decoder = TransformerDecoder(
        SIZE + 1, dim=8, layers=1, heads=2, dropout=0.0, memory_dim=8, positions="learned", max_length=7
    )
    model = Seq2Seq(encoder, decoder, END).eval()
    assert model.predict(BATCH).shape == (3, 7)
    assert model.sample(2, BATCH).shape == (2, 3, 7)
    prompt = torch.ones(3, 3, dtype=torch.long)
    assert model.given(BATCH).longest == 7
    with pytest.raises(ValueError, match="prompt: 3 tokens and max_tokens = 5 more are beyond the 7"):
        generate(model.given(BATCH), prompt, 5)
    assert generate(model.given(BATCH), prompt, 4).tokens.shape == (3, 1, 4)
