"""CRF taggers: rules, transitions by input, and agreement with the law that a user would build."""

import itertools

import pytest
import torch

from probllm.data import bio_rules
from probllm.distributions import LinearChainCRF
from probllm.models.crf_tagger import CRFTagger
from probllm.models.model import Model
from tests.models.test_tagger import BATCH, RULES, K, every_sequence, law_by_enumeration, made, one_sentence, recurrent

NAMES = ["O", "B-place", "I-place"]


def is_legal(tags):
    return RULES["start"][tags[0]] and all(RULES["transitions"][a][b] for a, b in itertools.pairwise(tags))


def test_rules_give_probability_0_to_what_they_forbid_and_share_out_the_rest():
    ruled, batch = made("crf with rules"), one_sentence(4)
    free = CRFTagger(recurrent(), K).double().eval()
    free.load_state_dict(ruled.state_dict())
    sequences, probabilities = law_by_enumeration(ruled, batch)
    legal = torch.tensor([is_legal(tags) for tags in sequences.tolist()])
    assert legal.any()
    assert not legal.all()
    expected = law_by_enumeration(free, batch)[1] * legal
    torch.testing.assert_close(probabilities, expected / expected.sum())


def test_bio_rules_let_no_entity_begin_inside():
    model = CRFTagger(recurrent(), K, rules=bio_rules(NAMES)).eval()
    with torch.no_grad():
        model.potentials.emit.bias[2] = 20.0  # it would like to say I-place everywhere
        predicted = model.predict(BATCH)
    assert (predicted[:, 0] == 1).all()
    assert (predicted[0, 1:] == 2).all()
    assert (model.sample(50, BATCH)[:, :, 0] != 2).all()


def test_rules_are_saved_with_the_model(tmp_path):
    model = CRFTagger(recurrent(), K, rules=bio_rules(NAMES)).eval()
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert torch.equal(loaded.transitions_rule, bio_rules(NAMES)["transitions"])
    with torch.no_grad():
        assert torch.equal(loaded.marginals(BATCH), model.marginals(BATCH))


def test_the_law_is_that_of_the_potentials_on_the_encoders_states():
    model = made("crf")
    states = model.encoder(BATCH["inputs"], BATCH["mask"])
    law = LinearChainCRF(*model.potentials(states), lengths=BATCH["mask"].sum(1))
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(BATCH), law.log_prob(BATCH["tags"]))
        torch.testing.assert_close(model.law(BATCH).entropy(), law.entropy())


def test_feature_scores_are_added_to_the_emissions():
    model, batch = made("crf with features"), one_sentence(3)
    emissions = model.law(batch).emissions
    with torch.no_grad():
        model.scores.weight += 0.5
        moved = model.law(batch).emissions
    counts = (batch["inputs"]["features"] != 0).sum(-1, keepdim=True)
    torch.testing.assert_close(moved - emissions, 0.5 * counts.expand(-1, -1, K).double())


def test_transitions_by_input_differ_from_sentence_to_sentence():
    model = made("crf by input")
    transitions = model.law(BATCH).transitions
    assert transitions.shape == (4, 4, K, K)
    assert not torch.allclose(transitions[0, 0], transitions[3, 0])


def test_a_sequence_that_breaks_the_rules_has_log_probability_minus_infinity():
    model, batch = made("crf with rules"), one_sentence(3)
    sequences = every_sequence(3)
    _, probabilities = law_by_enumeration(model, batch)
    assert (probabilities[[not is_legal(tags) for tags in sequences.tolist()]] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"end": [True]}}, r"rules\['end'\] has shape \[1\], expected \[3\]"),
        ({"rules": {"middle": [True] * K}}, "rules has the key 'middle'"),
        ({"transitions": "none"}, "transitions is 'none'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CRFTagger(recurrent(), K, **arguments)


def test_rules_that_are_scores_are_refused_not_turned_round():
    with pytest.raises(TypeError, match=r"rules\['start'\] has dtype torch.float32, expected torch.bool"):
        CRFTagger(recurrent(), K, rules={"start": torch.tensor([0.0, -1e4, 0.0])})
