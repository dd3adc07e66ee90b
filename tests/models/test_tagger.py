"""What both taggers given the words promise: a law over tags that enumeration confirms, whole or partial labels."""

import itertools
import json
from unittest import mock

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.nn.functional import pad

from probllm.models.crf_tagger import CRFTagger
from probllm.models.softmax_tagger import SoftmaxTagger
from probllm.models.tagger import Tagger
from probllm.nn import (
    FeatureEmbedding,
    FeedForwardEncoder,
    RecurrentEncoder,
    TransformerEncoder,
    WordEmbedding,
    from_config,
    to_config,
)
from probllm.training import fit
from tests.models.battery import CHECKS, Case

K, WORDS, FEATURES = 3, 11, 16


def random_batch(lengths, seed=0):
    """Words, four features each, and tags."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def draw(low, high, *more):
        return torch.randint(low, high, (*shape, *more), generator=generator) * mask.view(*shape, *[1 for _ in more])

    inputs = {"words": draw(2, WORDS), "features": draw(0, FEATURES, 4)}
    return {"inputs": inputs, "mask": mask, "tags": draw(0, K)}


def scores():
    return FeatureEmbedding(FEATURES, K)


def recurrent():
    return RecurrentEncoder(WordEmbedding(WORDS, 4), hidden=3)


RULES = {"transitions": [[True, True, True], [True, True, True], [False, True, True]], "start": [True, True, False]}
BATCH = random_batch([5, 1, 3, 5])
LEGAL = {**BATCH, "tags": torch.tensor([[0, 1, 1, 2, 2], [1, 0, 0, 0, 0], [0, 2, 1, 0, 0], [1, 2, 2, 1, 0]])}

MODELS = {
    "crf": lambda: CRFTagger(recurrent(), K),
    "crf on features": lambda: CRFTagger(None, K, scores()),
    "crf with features": lambda: CRFTagger(FeedForwardEncoder(WORDS), K, scores()),
    "crf by input": lambda: CRFTagger(
        TransformerEncoder(WORDS, dim=8, layers=1, heads=2, dropout=0.0), K, transitions="input"
    ),
    "crf with rules": lambda: CRFTagger(recurrent(), K, rules=RULES),
    "softmax": lambda: SoftmaxTagger(recurrent(), K),
    "softmax on features": lambda: SoftmaxTagger(None, K, scores()),
    "softmax with features": lambda: SoftmaxTagger(FeedForwardEncoder(WORDS), K, scores()),
}
CASES = [Case(name, make, LEGAL) for name, make in MODELS.items()]


def made(name, spread=1.0, seed=0) -> Tagger:
    """A model whose scores differ by about ``spread`` nats."""
    pyro.set_rng_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape))
    return model.double()


def every_sequence(length):
    return torch.tensor(list(itertools.product(range(K), repeat=length)))


def one_sentence(length, seed=0):
    return {key: value for key, value in random_batch([length], seed).items() if key != "tags"}


def repeated(batch, times):
    return {
        key: repeated(value, times) if isinstance(value, dict) else value.expand(times, *value.shape[1:])
        for key, value in batch.items()
    }


def law_by_enumeration(model, batch):
    """All sequences ``[S, T]`` and their probabilities."""
    sequences = every_sequence(batch["mask"].shape[1])
    with torch.no_grad():
        return sequences, model.log_prob({**repeated(batch, len(sequences)), "tags": sequences}).exp()


names = st.sampled_from(sorted(MODELS))
lengths = st.integers(1, 4)
seeds = st.integers(0, 1000)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case, check):
    check(case)


# The law, against enumeration.


@given(names, lengths, seeds)
def test_probabilities_of_all_sequences_sum_to_1(name, length, seed):
    _, probabilities = law_by_enumeration(made(name, seed=seed), one_sentence(length, seed))
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0).double())


@given(names, lengths, seeds)
def test_marginals_and_decodings_are_those_of_the_enumerated_law(name, length, seed):
    model, batch = made(name, seed=seed), one_sentence(length, seed)
    sequences, probabilities = law_by_enumeration(model, batch)
    marginals = torch.einsum("s,stk->tk", probabilities, torch.nn.functional.one_hot(sequences, K).double())
    with torch.no_grad():
        torch.testing.assert_close(model.marginals(batch)[0], marginals)
        assert torch.equal(model.predict(batch)[0], sequences[probabilities.argmax()])
        assert torch.equal(model.predict(batch, "posterior")[0], marginals.argmax(-1))
        own = model.token_log_prob({**repeated(batch, len(sequences)), "tags": sequences})
    expected = marginals.expand(len(sequences), -1, -1).gather(-1, sequences.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own.exp(), expected)


@given(names, lengths, seeds)
def test_a_partial_label_has_the_probability_of_all_sequences_that_agree(name, length, seed):
    model, batch = made(name, seed=seed), one_sentence(length, seed)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(1, length, K, generator=generator) < 0.6
    allowed[..., 1] = True  # which no rule forbids
    sequences, probabilities = law_by_enumeration(model, batch)
    agree = allowed[0].expand(len(sequences), -1, -1).gather(-1, sequences.unsqueeze(-1)).all(1)[:, 0]
    total = (probabilities * agree).sum()
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob({**batch, "allowed": allowed})[0], total.log())
        given_that = {**batch, "allowed": allowed}
        weights = probabilities * agree / total
        one_hot = torch.nn.functional.one_hot(sequences, K).double()
        torch.testing.assert_close(model.marginals(given_that)[0], torch.einsum("s,stk->tk", weights, one_hot))
        assert torch.equal(model.predict(given_that)[0], sequences[weights.argmax()])


@given(names, seeds)
def test_a_tag_that_is_not_known_is_summed_out(name, seed):
    model, batch = made(name, seed=seed), random_batch([4, 2], seed)
    tags = torch.tensor([[1, -1, 1, -1], [-1, 1, 0, 0]])
    with torch.no_grad():
        alone = model.log_prob({**batch, "tags": tags})
        summed = torch.stack(
            [
                torch.stack([model.log_prob({**batch, "tags": filled}) for filled in fillings]).logsumexp(0)
                for fillings in [
                    [torch.tensor([[1, a, 1, b], [c, 1, 0, 0]]) for a in range(K) for b in range(K) for c in range(K)]
                ]
            ]
        )[0]
    # Each row's sum runs over the other row's fillings too: K of them for the first, K * K for the second.
    torch.testing.assert_close(alone, summed - torch.tensor([K, K * K]).double().log())


# The program.


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_partial_labels_is_minus_the_log_joint_of_the_trace_and_svi_lowers_it(name):
    model = made(name).float()
    batch = {**LEGAL, "tags": LEGAL["tags"].masked_fill(torch.rand(4, 5) < 0.5, -1)}
    batch["allowed"] = torch.ones(4, 5, K, dtype=torch.bool)
    model.data_size = 12
    with torch.no_grad():
        loss = model.loss(batch)
        torch.testing.assert_close(
            loss, -poutine.trace(model).get_trace(batch).log_prob_sum() / 12, rtol=1e-4, atol=1e-4
        )
        elbo = torch.tensor(Trace_ELBO().loss(model, model.guide, batch)) / 12
    torch.testing.assert_close(loss, elbo, rtol=1e-4, atol=1e-4)
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(batch)
    assert model.loss(batch) < loss


@pytest.mark.parametrize("name", MODELS)
def test_tags_drawn_under_partial_labels_agree_with_them(name):
    model = made(name)
    tags = torch.tensor([[-1, 1, -1, -1, 1], [-1, 0, 0, 0, 0], [0, -1, 1, 0, 0], [-1, -1, -1, -1, -1]])
    drawn = model({**BATCH, "tags": tags})
    known = (tags >= 0) & BATCH["mask"]
    assert torch.equal(drawn[known], tags[known])


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_laws_frequencies_and_0_at_padding(name):
    model = made(name)
    drawn = model.sample(4000, BATCH)
    assert drawn.shape == (4000, 4, 5)
    assert not drawn[:, ~BATCH["mask"]].any()
    frequencies = torch.nn.functional.one_hot(drawn, K).double().mean(0)[BATCH["mask"]]
    with torch.no_grad():
        # Five standard errors: about one false alarm in twenty thousand runs of this test.
        assert (frequencies - model.marginals(BATCH)[BATCH["mask"]]).abs().max() < 5 * 0.5 / 4000**0.5


# Padding, saving, training.


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask_every_position_is_real(name):
    model = made(name)
    batch = random_batch([4, 4])
    bare = {key: value for key, value in batch.items() if key != "mask"}
    bare["tags"] = batch["tags"] = torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(bare), model.log_prob(batch))
        torch.testing.assert_close(model.token_log_prob(bare), model.token_log_prob(batch))
        torch.testing.assert_close(model.marginals(bare), model.marginals(batch))
        assert torch.equal(model.predict(bare), model.predict(batch))


@pytest.mark.parametrize("name", MODELS)
def test_marginals_sum_to_1_at_real_positions_and_are_0_at_padding(name):
    model, wider = made(name), {**BATCH, "mask": pad(BATCH["mask"], (0, 2))}
    wider["inputs"] = {
        "words": pad(BATCH["inputs"]["words"], (0, 2)),
        "features": pad(BATCH["inputs"]["features"], (0, 0, 0, 2)),
    }
    with torch.no_grad():
        marginals = model.marginals(wider)
    torch.testing.assert_close(marginals.sum(-1), wider["mask"].double())


@pytest.mark.parametrize("name", MODELS)
def test_a_config_goes_through_json(name):
    model = MODELS[name]()
    twin = from_config(json.loads(json.dumps(to_config(model))))
    assert type(twin) is type(model)
    assert to_config(twin) == to_config(model)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval().log_prob(LEGAL), model.eval().log_prob(LEGAL))


@pytest.mark.parametrize("name", ["crf with features", "softmax with features", "crf on features"])
def test_fit_learns_tags_that_the_words_decide(name):
    batch = random_batch([6] * 40)
    batch["tags"] = batch["inputs"]["words"] % K
    batch["inputs"]["features"] = batch["inputs"]["words"].unsqueeze(-1)
    pyro.set_rng_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        before = model.loss(batch)
    fit(model, batch, epochs=20, batch_size=8, learning_rate=0.1, progress=False)
    with torch.no_grad():
        assert model.loss(batch) < 0.3 * before
    assert (model.predict(batch) == batch["tags"]).double().mean() > 0.95


# Bad input.


@pytest.mark.parametrize("name", ["crf", "softmax"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": torch.full((4, 5), K)}, "tags lie from 0 to 3; expected 0 to 2"),
        ({"tags": torch.full((4, 5), -2)}, "tags lie from -2"),
        ({"tags": None}, "no tags to score"),
        ({"mask": torch.zeros(4, 5, dtype=torch.bool)}, "mask"),
        ({"tags": torch.zeros(1, 5, dtype=torch.long)}, r"tags has shape \[1, 5\]; expected \[4, 5\]"),
        ({"tags": torch.zeros(4, 4, dtype=torch.long)}, r"tags has shape \[4, 4\]; expected \[4, 5\]"),
        ({"allowed": torch.ones(4, 3, K, dtype=torch.bool)}, r"allowed is .* expected torch.bool \[4, 5, 3\]"),
        ({"allowed": torch.ones(4, 5, K)}, "allowed is torch.float32"),
    ],
)
def test_bad_batches_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        made(name).log_prob({**BATCH, **change})


@pytest.mark.parametrize("name", ["crf", "softmax"])
def test_tags_that_are_no_integers_are_named(name):
    for verb in (made(name).log_prob, made(name).token_log_prob):
        with pytest.raises(TypeError, match=r"tags has dtype torch.float32; expected torch.long"):
            verb({**BATCH, "tags": torch.zeros(4, 5)})


class OwnNetwork(torch.nn.Module):
    """A network of the user's own, which neither looks at the mask nor checks a shape."""

    def __init__(self):
        super().__init__()
        self.dim, self.embed = 6, torch.nn.Embedding(WORDS, 6)

    def forward(self, inputs, mask=None):
        return self.embed(inputs["words"])


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_a_mask_of_another_shape_is_named_where_the_network_does_not_look(kind):
    model = kind(OwnNetwork(), K)
    for mask in (torch.ones(4, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)):
        for verb in (model.predict, model.marginals):
            with pytest.raises(ValueError, match=r"mask has shape .* expected \[batch, length\] = \[4, 5\]"):
                verb({"inputs": BATCH["inputs"], "mask": mask})
    with pytest.raises(ValueError, match="batch has no inputs"):
        model.predict({"mask": BATCH["mask"]})


class OwnRecurrence(OwnNetwork):
    """A network that gives more than its states, as torch's own recurrent ones do."""

    def forward(self, inputs, mask=None):
        states = super().forward(inputs)
        return states, states[:, -1]


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_states_that_are_no_tensor_are_named(kind):
    with pytest.raises(TypeError, match="states is a tuple; expected a tensor"):
        kind(OwnRecurrence(), K).predict(BATCH)


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_what_is_no_encoder_is_named(kind):
    for encoder in (torch.nn.Linear(3, 3), lambda inputs, mask: inputs):
        with pytest.raises(TypeError, match=r"encoder is a .* whose dim is None"):
            kind(encoder, K)


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_gradients_of_each_example_by_vmap_are_those_of_a_loop(kind):
    model, batch = kind(OwnNetwork(), K).double().eval(), random_batch([5, 2, 1, 4])
    batch["tags"][0, 1:3] = -1  # summed out, though a transform hides that it is not known
    batch["tags"][3, 0] = -1
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def log_prob(weights, words, mask, tags):
        with mock.patch.object(model, "forward", model.log_prob):
            one = {"inputs": {"words": words[None]}, "mask": mask[None], "tags": tags[None]}
            return torch.func.functional_call(model, weights, (one,)).squeeze(0)

    arguments = batch["inputs"]["words"], batch["mask"], batch["tags"]
    found = torch.func.vmap(torch.func.grad(log_prob), (None, 0, 0, 0))(weights, *arguments)
    loop = [torch.func.grad(log_prob)(weights, *row) for row in zip(*arguments, strict=True)]
    for name in weights:
        torch.testing.assert_close(found[name], torch.stack([row[name] for row in loop]))


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_a_batch_of_no_sentences_has_no_log_probabilities(kind):
    nothing = {"inputs": {"words": BATCH["inputs"]["words"][:0]}, "mask": BATCH["mask"][:0], "tags": BATCH["tags"][:0]}
    assert kind(OwnNetwork(), K).log_prob(nothing).shape == (0,)


@pytest.mark.parametrize("kind", [CRFTagger, SoftmaxTagger])
def test_bad_arguments_are_named(kind):
    with pytest.raises(ValueError, match="encoder and scores are both None"):
        kind(None, K)
    with pytest.raises(ValueError, match=r"scores.dim is 3, expected num_tags = 4"):
        kind(recurrent(), 4, scores())
    model = kind(recurrent(), K).eval()
    with pytest.raises(ValueError, match="decoding is 'beam'"):
        model.predict(BATCH, "beam")
    with pytest.raises(ValueError, match="batch is None"):
        model.sample(2)
    with pytest.raises(ValueError, match="known tags"):
        model.token_log_prob({**BATCH, "tags": torch.full((4, 5), -1)})
