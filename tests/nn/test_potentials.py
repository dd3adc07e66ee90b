"""Potentials: the scores' shapes, and what each kind of transition depends on."""

import pyro.distributions as dist
import pytest
import torch

from probllm.distributions import HiddenMarkovModel
from probllm.nn import ChainPotentials, TransitionScores, from_config, to_config


@pytest.mark.parametrize("transitions", ["shared", "input", "none"])
@pytest.mark.parametrize("start_end", [True, False])
def test_shapes_and_gradients(transitions, start_end):
    potentials = ChainPotentials(5, 3, transitions, start_end)
    emissions, table, start, end = potentials(torch.randn(2, 4, 5))
    assert emissions.shape == (2, 4, 3)
    assert table.shape == ((2, 3, 3, 3) if transitions == "input" else (3, 3))
    assert table.requires_grad == (transitions != "none")
    assert (start is not None, end is not None) == (start_end, start_end)
    if start is not None:
        assert start.shape == end.shape == (3,)
    again = from_config(to_config(potentials))
    again.load_state_dict(potentials.state_dict())
    states = torch.randn(1, 2, 5)
    for ours, theirs in zip(potentials(states), again(states), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_step_s_transitions_depend_on_the_state_it_leads_to():
    potentials, states = ChainPotentials(5, 3, "input"), torch.randn(1, 4, 5)
    changed = states.clone()
    changed[0, 2] += 1
    difference = (potentials(states)[1] - potentials(changed)[1]).abs().sum((0, 2, 3))
    assert (difference > 0).tolist() == [False, True, False]


def test_one_position_has_no_transitions_of_its_own():
    assert ChainPotentials(5, 3, "input")(torch.randn(2, 1, 5))[1].shape == (2, 0, 3, 3)


def test_states_can_be_the_emissions():
    states = torch.randn(2, 4, 3)
    potentials = ChainPotentials(3, 3, project=False)
    assert potentials(states)[0] is states
    assert {name for name, _ in potentials.named_parameters()} == {"transitions", "start", "end"}


def test_input_output_hidden_markov_model_learns_what_the_inputs_do_to_its_states():
    """An input of 1 turns the state, one of 0 keeps it; the model finds this from the observations alone."""
    torch.manual_seed(0)
    inputs = (torch.rand(30, 12, 1) < 0.5).float()
    states = inputs[..., 0].cumsum(-1).long() % 2
    value = dist.Normal(2.0 * states, 0.5).sample()
    scores = TransitionScores(1, 2)
    observation = dist.Normal(torch.tensor([0.0, 2.0]), 0.5)

    def law() -> HiddenMarkovModel:
        return HiddenMarkovModel(torch.zeros(2), scores(inputs), observation)

    assert scores(inputs).shape == (30, 11, 2, 2)
    optimiser = torch.optim.Adam(scores.parameters(), 0.2)
    before = law().log_prob(value).mean().item()
    for _ in range(60):
        optimiser.zero_grad()
        (-law().log_prob(value).mean()).backward()
        optimiser.step()
    assert law().log_prob(value).mean().item() > before + 3
    for u, expected in ((0.0, torch.eye(2)), (1.0, 1 - torch.eye(2))):
        found = scores(torch.full((1, 2, 1), u))[0, 0].softmax(-1)
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    again = from_config(to_config(scores))
    again.load_state_dict(scores.state_dict())
    assert torch.equal(again(inputs), scores(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChainPotentials(3, 0), "num_tags is 0"),
        (lambda: ChainPotentials(3, 4, "sparse"), "transitions is 'sparse'"),
        (lambda: ChainPotentials(3, 4, project=False), "project is False"),
        (lambda: ChainPotentials(3, 4)(torch.zeros(2, 3, 4)), "states has shape"),
        (lambda: TransitionScores(0, 4), "dim is 0"),
        (lambda: TransitionScores(3, 4)(torch.zeros(2, 3, 4)), "inputs has shape"),
    ],
)
def test_bad_arguments_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
