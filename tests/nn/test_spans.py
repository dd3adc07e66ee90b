"""Span scores: their shape, what a span depends on, and that they make a law."""

import pytest
import torch

from probllm.distributions import SpanTree
from probllm.nn import SpanScores, from_config, to_config


def test_scores_are_those_of_differences_of_fenceposts():
    scores, states = SpanScores(6, 3, hidden=5), torch.randn(2, 4, 6)
    found = scores(states)
    assert found.shape == (2, 4, 4, 3)
    edged = torch.nn.functional.pad(states, (0, 0, 1, 1))
    for i in range(4):
        for j in range(i, 4):
            span = torch.cat([edged[:, j + 1, :3] - edged[:, i, :3], edged[:, i + 1, 3:] - edged[:, j + 2, 3:]], -1)
            expected = scores.score(torch.relu(scores.norm(scores.project(span))))
            torch.testing.assert_close(found[:, i, j], expected)


def test_padding_with_zero_states_does_not_change_a_sentence():
    scores, states = SpanScores(6, 3), torch.randn(1, 4, 6)
    longer = torch.nn.functional.pad(states, (0, 0, 0, 2))
    torch.testing.assert_close(scores(longer)[:, :4, :4], scores(states))


def test_scores_make_a_law_that_learns_a_tree():
    torch.manual_seed(0)
    scores, states, lengths = SpanScores(8, 2, hidden=16), torch.randn(3, 5, 8), torch.tensor([5, 3, 4])
    trees = SpanTree(torch.randn(3, 5, 5, 2), lengths).sample()
    optimiser = torch.optim.Adam(scores.parameters(), 0.02)
    for _ in range(60):
        loss = -SpanTree(scores(states), lengths).log_prob(trees).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.equal(SpanTree(scores(states), lengths).mode, trees)


def test_rebuilt_from_its_configuration():
    scores, states = SpanScores(6, 3, hidden=5), torch.randn(2, 4, 6)
    again = from_config(to_config(scores))
    again.load_state_dict(scores.state_dict())
    assert torch.equal(again(states), scores(states))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanScores(0, 2), "dim is 0"),
        (lambda: SpanScores(1, 2), "dim is 1"),
        (lambda: SpanScores(4, 0), "num_labels is 0"),
        (lambda: SpanScores(4, 2, hidden=0), "hidden is 0"),
        (lambda: SpanScores(4, 2)(torch.zeros(2, 3, 5)), "states has shape"),
    ],
)
def test_bad_arguments_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
