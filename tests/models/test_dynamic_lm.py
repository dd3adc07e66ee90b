"""Networks that train while they read: exact laws, the step written out, and the trained weights left alone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from probllm.data import Dataset
from probllm.decoding import Beam, generate
from probllm.models import CausalLM, DynamicLM
from probllm.nn import RecurrentDecoder, TransformerDecoder

SIZE = 3
EVERY = torch.tensor(list(itertools.product(range(SIZE), repeat=5)))
TEXTS = Dataset([{"text": torch.tensor(text)} for text in ([0, 1, 2, 0, 1], [2, 2, 1, 0], [0, 1, 0])])


def network() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(TransformerDecoder(SIZE + 1, dim=8, layers=1, heads=2, dropout=0.3)).double()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    return model.eval()


def dynamic(rate: float = 0.3, decay: float = 0.2) -> DynamicLM:
    model = DynamicLM(network(), segment=2, context=3, rate=rate, decay=decay)
    model.estimate(TEXTS)
    return model.eval()


def test_texts_of_a_length_sum_to_one() -> None:
    assert float(dynamic().log_prob({"text": EVERY}).exp().sum()) == pytest.approx(1.0)


def test_each_segment_is_scored_by_the_weights_that_the_steps_before_it_left() -> None:
    model, text = dynamic(), torch.tensor([[0, 1, 2, 2, 0, 1, 1]])
    found = model.token_log_probs({"text": text})
    twin, r = network(), model.steepness
    trained = nn.utils.parameters_to_vector(twin.parameters()).detach()
    weights, expected = trained, []
    for i in range(0, 7, 2):
        part = {"text": text[:, i : i + 2], "prefix": text[:, max(0, i - 3) : i]}
        scores = twin.token_log_probs(part)
        expected.append(scores.detach())
        twin.zero_grad()
        (-scores.mean()).backward()
        g = torch.cat([p.grad.flatten() for p in twin.parameters()])
        weights = weights - 0.3 * g / (r + r.mean()) + 0.2 * (trained - weights) * r / r.mean()
        nn.utils.vector_to_parameters(weights, twin.parameters())
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-6, atol=1e-6, check_dtype=False)


def test_steepness_is_the_root_mean_square_of_the_gradients_of_the_trained_weights() -> None:
    model, twin = dynamic(), network()
    squares = []
    for row in TEXTS.examples:
        twin.zero_grad()
        (-twin.token_log_probs({"text": row["text"].unsqueeze(0)}).mean()).backward()
        squares.append(torch.cat([p.grad.flatten() for p in twin.parameters()]) ** 2)
    torch.testing.assert_close(model.steepness, torch.stack(squares).mean(0).sqrt())


def test_without_a_rate_it_is_the_network_and_with_one_it_learns_what_repeats() -> None:
    text = torch.tensor([[0, 2] * 10])
    still, moving = dynamic(rate=0.0), dynamic(rate=0.02)
    windows = torch.cat([text[:, max(0, i - 3) : i + 2] for i in range(4, 20, 2)])
    expected = network().token_log_probs({"text": windows[:, 3:], "prefix": windows[:, :3]})
    found = still.token_log_probs({"text": text})
    torch.testing.assert_close(found[0, 4:], expected.flatten(), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert float(moving.token_log_probs({"text": text})[0, 10:].sum()) > float(found[0, 10:].sum()) + 1


def test_the_network_is_left_as_it_was_even_by_an_error_and_in_its_mode() -> None:
    model = dynamic()
    model.train()
    before = copy.deepcopy(dict(model.model.named_parameters()))
    first = model.token_log_probs({"text": EVERY[:2]})
    assert torch.equal(model.token_log_probs({"text": EVERY[:2]}), first), "dropout is off while it reads"
    with pytest.raises(IndexError), model._holding(torch.zeros_like(model.steepness)):
        next(model.model.parameters())[99]
    assert model.model.training
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_reading_in_pieces_gives_the_score_of_each_token() -> None:
    model, text = dynamic(), torch.tensor([[0, 1, 2, 2, 0, 1], [1, 1, 0, 2, 2, 2]])
    expected = model.token_log_probs({"text": text})
    for cut in range(4):
        log_probs, state = model.start(text[:, :cut])
        for t in range(cut, 6):
            found = log_probs.gather(1, text[:, t : t + 1]).squeeze(1)
            torch.testing.assert_close(found, expected[:, t], rtol=1e-5, atol=1e-5)
            log_probs, state = model.step(text[:, t], state)
    padded, _ = model.start(torch.tensor([[2, 0, 1, 2], [0, 1, 2, 2]]), torch.tensor([[False, True, True, True]] * 2))
    bare, _ = model.start(torch.tensor([[0, 1, 2], [1, 2, 2]]))
    torch.testing.assert_close(padded, bare)
    empty, _ = model.start(TEXTS[0]["text"].expand(2, -1), torch.tensor([[False] * 5, [True] * 5]))
    torch.testing.assert_close(empty[:1], model.start(text[:1, :0])[0])
    with torch.no_grad():
        exact = generate(model, text[:1, :3], 2, Beam(9), n=9)
    pairs = torch.tensor(list(itertools.product(range(SIZE), repeat=2)))
    scores = model.log_prob({"text": pairs, "prefix": text[:1, :3].expand(9, -1)})
    torch.testing.assert_close(exact.scores[0], scores.sort(descending=True).values, rtol=1e-5, atol=1e-5)


def test_recurrent_networks_learn_too_and_it_is_saved_with_what_it_measured(tmp_path: Path) -> None:
    model = DynamicLM(CausalLM(RecurrentDecoder(SIZE + 1, hidden=8)), segment=2, context=3, rate=0.1)
    model.estimate(TEXTS)
    model.save(tmp_path)
    again = DynamicLM.load(tmp_path)
    assert torch.equal(again.token_log_probs({"text": EVERY}), model.token_log_probs({"text": EVERY}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment": 0}, "segment: expected at least 1, got 0"),
        ({"context": -1}, "context: expected at least 0"),
        ({"rate": -1.0}, "rate: expected a number from 0"),
        ({"decay": 1.0}, "decay: expected a number from 0, below 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLM(network(), **arguments)  # type: ignore[arg-type]
