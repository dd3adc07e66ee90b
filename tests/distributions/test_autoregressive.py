"""The law of sequences drawn token by token, against a table of all of them."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from torch import Tensor

from probllm.distributions import Autoregressive

SIZE, STEPS = 3, 3
LENGTHS = torch.tensor([3, 2])
GENERATOR = torch.Generator().manual_seed(0)
# a Markov chain of its own for each row: [rows, from (the last row begins), to]
MOVES = torch.randn(2, SIZE + 1, SIZE, generator=GENERATOR, dtype=torch.float64).log_softmax(-1)


def score(text: Tensor, rows: Tensor) -> Tensor:
    before = torch.cat([torch.full((len(text), 1), SIZE), text[:, :-1]], 1)
    return MOVES[rows[:, None], before, text]


def draw(rows: Tensor) -> Tensor:
    text, last = torch.zeros(len(rows), STEPS, dtype=torch.long), torch.full((len(rows),), SIZE)
    for t in range(STEPS):
        last = text[:, t] = torch.distributions.Categorical(logits=MOVES[rows, last]).sample()
    return text


def law() -> Autoregressive:
    return Autoregressive(score, draw, LENGTHS, STEPS, SIZE)


def test_sequences_of_a_length_sum_to_one_and_padding_does_not_matter() -> None:
    whole = torch.tensor(list(itertools.product(range(SIZE), repeat=STEPS)))
    found = law().log_prob(whole[:, None])
    assert found.shape == (27, 2)
    assert float(found[:, 0].exp().sum()) == pytest.approx(1.0)
    assert float(found[:, 1].exp().sum()) == pytest.approx(3.0)  # each text of two tokens stands there three times
    torch.testing.assert_close(found[0::3, 1], found[2::3, 1])
    assert torch.equal(law().log_prob(torch.tensor([[0, 1, 2], [0, 1, 99]])), law().log_prob(torch.tensor([0, 1, 2])))


def test_samples_come_as_often_as_they_are_probable() -> None:
    drawn = law().sample((6000,))
    assert not drawn[:, 1, 2].any()
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=STEPS)))
    expected = 6000 * law().log_prob(every[:, None])[:, 0].exp()
    counts = torch.bincount(drawn[:, 0] @ torch.tensor([9, 3, 1]), minlength=27)
    assert float(((counts - expected) ** 2 / expected).sum()) < 70  # 26 degrees of freedom: once in 150,000


def test_expand_and_plates() -> None:
    wide = law().expand((4, 2))
    assert wide.batch_shape == (4, 2)
    value = wide.sample((5,))
    assert value.shape == (5, 4, 2, STEPS)
    torch.testing.assert_close(wide.log_prob(value), law().log_prob(value))

    def model(obs: Tensor | None = None) -> Tensor:
        with pyro.plate("copies", 4, dim=-2), pyro.plate("rows", 2):
            drawn: Tensor = pyro.sample("x", law(), obs=obs)
            return drawn

    assert model().shape == (4, 2, STEPS)
    trace = pyro.poutine.trace(model).get_trace(value[0])
    torch.testing.assert_close(trace.log_prob_sum(), law().log_prob(value[0]).sum())


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"value: expected shape \[..., 3\]"):
        law().log_prob(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="value: expected tokens from 0 to 2, got 0 to 7"):
        law().log_prob(torch.tensor([[0, 7, 0], [0, 0, 0]]))
