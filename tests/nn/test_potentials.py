"""Potentials: the scores' shapes, and what each kind of transition depends on."""

import pytest
import torch

from probllm.nn import ChainPotentials, from_config, to_config


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChainPotentials(3, 0), "num_tags is 0"),
        (lambda: ChainPotentials(3, 4, "sparse"), "transitions is 'sparse'"),
        (lambda: ChainPotentials(3, 4, project=False), "project is False"),
        (lambda: ChainPotentials(3, 4)(torch.zeros(2, 3, 4)), "states has shape"),
    ],
)
def test_bad_arguments_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
