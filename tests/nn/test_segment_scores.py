"""Segment scores are sums over a segment's words, its ends and its length."""

import math

import pytest
import torch

from probllm.distributions import SemiMarkovCRF
from probllm.nn import SegmentScores, from_config, to_config


def test_a_segment_scores_its_ends_what_is_inside_and_its_length():
    torch.manual_seed(0)
    scores, states, added = (
        SegmentScores(5, 3, 4).double(),
        torch.randn(2, 6, 5).double(),
        torch.randn(2, 6, 9).double(),
    )
    with torch.no_grad():
        scores.length.normal_()
    segments, transitions, start, end = scores(states, added)
    assert segments.shape == (2, 6, 4, 3)
    assert (transitions.shape, start.shape, end.shape) == ((3, 3), (3,), (3,))
    begin, inside, finish = (scores.emit(states) + added).split(3, -1)
    for t in range(6):
        for d in range(min(4, 6 - t)):
            expected = begin[:, t] + inside[:, t : t + d + 1].sum(1) + finish[:, t + d] + scores.length[d]
            torch.testing.assert_close(segments[:, t, d], expected)


def test_gradients_reach_every_weight_and_states():
    scores, states = SegmentScores(5, 3, 4), torch.randn(2, 6, 5, requires_grad=True)
    SemiMarkovCRF(*scores(states), lengths=torch.tensor([6, 2])).log_partition.sum().backward()
    for name, tensor in [("states", states), *scores.named_parameters()]:
        assert bool(tensor.grad.isfinite().all()), name
        assert bool(tensor.grad.any()), name
    assert not bool(states.grad[1, 2:].any()), "padding has no gradient"


def test_a_label_may_have_a_greatest_length_of_its_own():
    scores = SegmentScores(5, 3, [1, 4, 2])
    segments = scores(torch.randn(2, 6, 5))[0]
    forbidden = (segments == -math.inf).all((0, 1))
    assert torch.equal(forbidden, torch.arange(1, 5).unsqueeze(-1) > torch.tensor([1, 4, 2]))
    assert torch.equal(forbidden, (segments == -math.inf).any(0).any(0))


@pytest.mark.parametrize(
    "make", [lambda: SegmentScores(5, 3, [1, 4, 2]), lambda: SegmentScores(9, 3, 2, project=False)]
)
def test_config_makes_it_again(make):
    scores = make()
    again = from_config(to_config(scores))
    again.load_state_dict(scores.state_dict())
    states = torch.randn(1, 2, scores.dim)
    for ours, theirs in zip(scores(states), again(states), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentScores(3, 0, 2), "num_labels is 0"),
        (lambda: SegmentScores(3, 2, 0), "max_duration is 0"),
        (lambda: SegmentScores(3, 2, [1, 0]), "max_duration is 0"),
        (lambda: SegmentScores(3, 2, [1]), "max_duration has 1 numbers"),
        (lambda: SegmentScores(3, 2, 2, project=False), "expected dim 6"),
        (lambda: SegmentScores(3, 2, 2)(torch.zeros(2, 3, 4)), "states has shape"),
        (lambda: SegmentScores(3, 2, 2)(torch.zeros(2, 3, 3), torch.zeros(2, 3, 2)), "added has shape"),
    ],
)
def test_bad_arguments_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
