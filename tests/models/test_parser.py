"""All parsers: a law over heads and labels that enumeration confirms, and decodings as they are defined."""

import itertools
import math

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Dataset, find_cycle, is_projective
from probllm.distributions.projective_dependency_tree import ProjectiveDependencyTree
from probllm.distributions.spanning_tree import SpanningTree
from probllm.models.dependency_parser import DependencyParser
from probllm.models.head_selection_parser import HeadSelectionParser
from probllm.models.parser import Parser
from probllm.nn import RecurrentEncoder, TransformerEncoder, WordEmbedding
from probllm.training import fit
from tests.models.battery import CHECKS, Case

R, WORDS = 3, 11
SIZES = {"arc_dim": 4, "label_dim": 3, "dropout": 0.0}


def random_batch(lengths, seed=0):
    """Words, heads that form a chain from the last word to the root, and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    words = torch.randint(2, WORDS, shape, generator=generator) * mask
    heads = torch.arange(shape[1]).expand(shape) * mask
    labels = torch.randint(R, shape, generator=generator) * mask
    return {"inputs": {"words": words}, "mask": mask, "heads": heads, "labels": labels}


BATCH = random_batch([5, 1, 3, 5])


def recurrent():
    return RecurrentEncoder(WordEmbedding(WORDS, 4), hidden=3)


def transformer():
    return TransformerEncoder(WORDS, dim=8, layers=1, heads=2, dropout=0.0)


MODELS = {
    "heads": lambda: HeadSelectionParser(recurrent(), R, **SIZES),
    "projective": lambda: DependencyParser(recurrent(), R, "projective", **SIZES),
    "spanning": lambda: DependencyParser(recurrent(), R, "spanning", **SIZES),
    "projective, many roots": lambda: DependencyParser(transformer(), R, "projective", False, **SIZES),
    "spanning, many roots": lambda: DependencyParser(transformer(), R, "spanning", False, **SIZES),
}
CASES = [Case(name, make, BATCH, "heads") for name, make in MODELS.items()]


def made(name, spread=1.0, seed=0) -> Parser:
    """A model whose scores differ by some nats."""
    pyro.set_rng_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape))
    return model.double()


def is_allowed(name, heads):
    if name == "heads":
        return all(head != word for word, head in enumerate(heads, start=1))
    if find_cycle(heads) or ("many" not in name and heads.count(0) != 1):
        return False
    return "projective" not in name or is_projective(heads)


def repeated(batch, times):
    return {
        key: repeated(value, times) if isinstance(value, dict) else value.expand(times, *value.shape[1:])
        for key, value in batch.items()
    }


def law_by_enumeration(name, model, batch):
    """All heads ``[S, T]``, and their log probabilities by hand from the scores."""
    length = batch["mask"].shape[1]
    heads = torch.tensor(list(itertools.product(range(length + 1), repeat=length)))
    scores = model._scores(batch)
    table = torch.cat([scores.root[0].unsqueeze(0), scores.arcs[0]])  # [1 + T, T]
    total = table[heads, torch.arange(length)].sum(-1)
    allowed = torch.tensor([is_allowed(name, row) for row in heads.tolist()])
    return heads, total.masked_fill(~allowed, -math.inf).log_softmax(0)


names = st.sampled_from(sorted(MODELS))
lengths = st.integers(1, 4)
seeds = st.integers(0, 1000)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case, check):
    check(case)


# The law, against enumeration.


@given(names, lengths, seeds)
def test_log_prob_is_that_of_the_heads_and_of_their_labels(name, length, seed):
    model, batch = made(name, seed=seed), random_batch([length], seed)
    heads, log_probs = law_by_enumeration(name, model, batch)
    many = repeated(batch, len(heads))
    with torch.no_grad():
        alone = model.log_prob({**{k: v for k, v in many.items() if k != "labels"}, "heads": heads})
        joint = model.log_prob({**many, "heads": heads})
        states = model.encoder(many["inputs"], many["mask"])
        labels = model.biaffine.score_labels(states, heads).log_softmax(-1)
    torch.testing.assert_close(alone, log_probs, rtol=1e-6, atol=1e-8)
    own = labels.gather(-1, many["labels"].unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(joint, log_probs + own, rtol=1e-6, atol=1e-8)


@given(names, lengths, seeds)
def test_marginals_and_decodings_are_those_of_the_enumerated_law(name, length, seed):
    model, batch = made(name, seed=seed), random_batch([length], seed)
    heads, log_probs = law_by_enumeration(name, model, batch)
    expected = torch.zeros(length, length, dtype=torch.float64)
    for row, log_prob in zip(heads.tolist(), log_probs.tolist(), strict=True):
        for dependent, head in enumerate(row):
            expected[dependent if head == 0 else head - 1, dependent] += math.exp(log_prob)
    with torch.no_grad():
        torch.testing.assert_close(model.marginals(batch)[0], expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(model.predict(batch)[0], heads[log_probs.argmax()])
        gain = torch.cat([expected.diagonal()[None], expected - torch.diag(expected.diagonal())])
        possible = log_probs > -math.inf
        risk = gain[heads, torch.arange(length)].sum(-1).masked_fill(~possible, -math.inf)
        found = model.predict(batch, "min_risk")[0]
        assert gain[found, torch.arange(length)].sum() == pytest.approx(risk.max().item(), abs=1e-9)


@given(names, seeds)
def test_samples_are_allowed_and_padding_is_zero(name, seed):
    model, batch = made(name, seed=seed), random_batch([4, 2], seed)
    drawn = model.sample(30, batch)
    assert drawn.shape == (30, 2, 4)
    assert not drawn[:, 1, 2:].any()
    for row, size in ((0, 4), (1, 2)):
        assert all(is_allowed(name, heads[:size]) for heads in drawn[:, row].tolist())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_program_draws_labels_of_the_heads_it_drew(name):
    model, batch = made(name), {key: BATCH[key] for key in ("inputs", "mask")}
    heads, labels = model(batch)
    assert heads.shape == labels.shape == batch["mask"].shape
    assert not labels[~batch["mask"]].any()
    assert torch.isfinite(model.log_prob({**batch, "heads": heads, "labels": labels})).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_parse_gives_the_heads_of_predict_and_their_best_labels(name):
    model = made(name)
    heads, labels = model.parse(BATCH)
    assert torch.equal(heads, model.predict(BATCH))
    with torch.no_grad():
        scores = model.biaffine.score_labels(model.encoder(BATCH["inputs"], BATCH["mask"]), heads)
    assert torch.equal(labels, scores.argmax(-1) * BATCH["mask"])


# What the laws rule out.


def test_a_projective_parser_gives_crossing_arcs_probability_0_and_refuses_to_learn_them():
    crossing = {**random_batch([4]), "heads": torch.tensor([[3, 4, 0, 3]])}
    with torch.no_grad():
        assert made("projective").log_prob(crossing).item() == -math.inf
        assert torch.isfinite(made("spanning").log_prob(crossing)).all()
    with pytest.raises(ValueError, match=r"rows \[0\]: their arcs cross.*projectivise"):
        made("projective").loss(crossing)


def test_several_roots_are_refused_where_one_is_wanted():
    roots = {**random_batch([3]), "heads": torch.tensor([[0, 0, 2]])}
    with pytest.raises(ValueError, match="no trees with a single root"):
        made("spanning").loss(roots)
    assert torch.isfinite(made("spanning, many roots").loss(roots))


def test_a_word_that_is_its_own_head_is_refused_by_head_selection():
    with pytest.raises(ValueError, match="its own head"):
        made("heads").loss({**random_batch([3]), "heads": torch.tensor([[0, 2, 1]])})


# Learning.


@pytest.mark.parametrize("name", ["heads", "projective", "spanning"])
def test_it_learns_trees_that_the_words_decide(name):
    words = [torch.randint(2, WORDS, (size,)) for size in (3, 5, 2, 4) * 4]
    data = [{"inputs": {"words": w}, "heads": torch.arange(len(w)), "labels": (w % R)} for w in words]
    torch.manual_seed(0)
    sizes = {"arc_dim": 8, "label_dim": 8, "dropout": 0.0}
    encoder = RecurrentEncoder(WordEmbedding(WORDS, 8), hidden=8)
    model = HeadSelectionParser(encoder, R, **sizes) if name == "heads" else DependencyParser(encoder, R, name, **sizes)
    fit(model, Dataset(data), epochs=40, batch_size=8, learning_rate=0.02, progress=False)
    batch = Dataset.collate(data)
    heads, labels = model.parse(batch)
    assert torch.equal(heads, batch["heads"])
    assert torch.equal(labels, batch["labels"])


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": None}, ValueError, "batch has no inputs"),
        ({"heads": None}, ValueError, "batch has no heads"),
        ({"heads": BATCH["heads"].float()}, TypeError, "heads has dtype torch.float32"),
        ({"heads": BATCH["heads"][:, :3]}, ValueError, r"heads has shape \[4, 3\]; expected \[4, 5\]"),
        ({"heads": BATCH["heads"] + 2}, ValueError, "heads lie from 0 to 6; expected 0 to 5"),
        ({"labels": BATCH["labels"] - 1}, ValueError, "labels lie from -1"),
        ({"labels": BATCH["labels"] + 1}, ValueError, "expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("name", ["heads", "projective"])
def test_a_batch_that_cannot_be_scored_is_refused_by_name(name, change, error, message):
    batch = {key: value for key, value in {**BATCH, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        made(name).log_prob(batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DependencyParser(recurrent(), R, "crossing"), "tree is 'crossing'"),
        (lambda: DependencyParser(recurrent(), 0), "num_labels is 0"),
        (lambda: made("heads").predict(BATCH, "viterbi"), "decoding is 'viterbi'"),
        (lambda: made("heads").sample(2), "a parser needs words"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("name", "law"), [("projective", ProjectiveDependencyTree), ("spanning", SpanningTree)])
def test_the_law_is_that_of_the_biaffine_scores_of_the_encoders_states(name, law):
    model, lengths = made(name), BATCH["mask"].sum(1)
    with torch.no_grad():
        alone = law(*model.biaffine(model.encoder(BATCH["inputs"], BATCH["mask"])), lengths=lengths)
        torch.testing.assert_close(model.law(BATCH).log_prob(BATCH["heads"]), alone.log_prob(BATCH["heads"]))
        torch.testing.assert_close(model.marginals(BATCH), alone.marginals)
        torch.testing.assert_close(model.law(BATCH).entropy(), alone.entropy())
