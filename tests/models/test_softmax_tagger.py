"""The softmax tagger: its short ways lead where those of the chain without transitions do."""

import torch
from hypothesis import given

from probllm.models.tagger import Tagger
from tests.models.test_tagger import K, made, random_batch, seeds


@given(seeds)
def test_its_verbs_are_those_of_a_chain_without_transitions(seed):
    model, batch = made("softmax with features", seed=seed), random_batch([4, 1, 6], seed)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(batch), Tagger.log_prob(model, batch))
        torch.testing.assert_close(model.marginals(batch), Tagger.marginals(model, batch))
        assert torch.equal(model.predict(batch), Tagger.predict(model, batch))
        assert torch.equal(model.predict(batch, "posterior"), Tagger.predict(model, batch, "posterior"))


@given(seeds)
def test_the_probability_of_a_sequence_is_the_product_of_its_tags(seed):
    model, batch = made("softmax", seed=seed), random_batch([5, 2], seed)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(batch), model.token_log_prob(batch).sum(-1))


def test_where_nothing_is_allowed_there_is_no_sequence():
    model, batch = made("softmax"), random_batch([3, 3])
    batch["allowed"] = torch.ones(2, 3, K, dtype=torch.bool)
    batch["allowed"][0, 1] = False
    with torch.no_grad():
        assert torch.equal(torch.isinf(model.log_prob(batch)), torch.tensor([True, False]))
        assert (model.predict(batch)[0] == -1).all()
        assert (model.predict(batch)[1] >= 0).all()
