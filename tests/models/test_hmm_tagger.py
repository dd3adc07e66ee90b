"""HMM taggers against enumeration of every tag sequence, in float64, for both orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from probllm.data import Dataset, TaggingVocabulary, read_tagged
from probllm.distributions import HiddenMarkovModel
from probllm.models import hmm_estimation, hmm_tagger
from probllm.models.hmm_laws import Rows
from probllm.models.hmm_smoothing import count, smooth, smooth_emissions, witten_bell
from probllm.models.hmm_tagger import HMMTagger
from tests.models.battery import CHECKS, Case

BATCH = {
    "inputs": {"symbols": torch.tensor([[3, 1, 4, 1, 0], [2, 0, 0, 0, 0], [4, 4, 3, 0, 0]])},
    "tags": torch.tensor([[0, 1, 2, 1, 0], [2, 0, 0, 0, 0], [1, 1, 0, 0, 0]]),
    "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool(),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("order", [1, 2])
def test_battery(order: int, check: Callable[[Case], None]) -> None:
    check(Case(f"order {order}", lambda: HMMTagger(3, 5, order=order), BATCH))


NOISY = (  # they compare two losses, each one draw's estimate if Bayesian
    "check_log_prob_is_one_number_a_row_whatever_the_other_rows",
    "check_padding_changes_nothing",
    "check_save_and_load_give_an_equal_model",
    "check_svi_lowers_the_loss",
)


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check.__name__ not in NOISY], ids=lambda check: check.__name__
)
def test_battery_bayesian(check: Callable[[Case], None]) -> None:
    check(Case("bayesian", lambda: HMMTagger(3, 5, bayesian=True, emission_concentration=1.0), BATCH, exact=False))


# Cases: a model with random probabilities, and a batch with some tags known.


@st.composite
def cases(draw: st.DrawFn) -> tuple[HMMTagger, dict[str, Any]]:
    order, tags, symbols = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = HMMTagger(tags, symbols, order=order).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    known = torch.randint(0, tags, (batch, length))
    missing = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return model, {
        "inputs": {"symbols": torch.randint(0, symbols, (batch, length))},
        "tags": torch.where(torch.rand(batch, length) < missing, -1, known),
        "mask": mask,
    }


def sequences_with_joint(model: HMMTagger, symbols: list[int]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every tag sequence with its joint log probability with the symbols, straight from the story."""
    rows = model.rows()
    for z in itertools.product(range(model.num_tags), repeat=len(symbols)):
        total = rows.initial[z[0]] + rows.emission[z[0], symbols[0]]
        for t in range(1, len(z)):
            if model.order == 1:
                step = rows.transition[z[t - 1], z[t]]
            elif t == 1:
                assert rows.second is not None
                step = rows.second[z[0], z[1]]
            else:
                step = rows.transition[z[t - 2], z[t - 1], z[t]]
            total = total + step + rows.emission[z[t], symbols[t]]
        yield z, total


def agrees(z: tuple[int, ...], known: list[int]) -> bool:
    return all(k in (-1, tag) for tag, k in zip(z, known, strict=False))


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[int, list[int], list[int]]]:
    for row, n in enumerate(batch["mask"].sum(-1).tolist()):
        yield row, batch["inputs"]["symbols"][row, :n].tolist(), batch["tags"][row, :n].tolist()


@given(cases())
def test_log_prob_sums_the_joint_over_the_unknown_tags(case: tuple[HMMTagger, dict[str, Any]]) -> None:
    model, batch = case
    value, given_symbols = model.log_prob(batch), model.log_posterior(batch)
    for row, symbols, known in rows_of(batch):
        joint = list(sequences_with_joint(model, symbols))
        expected = torch.stack([p for z, p in joint if agrees(z, known)]).logsumexp(0)
        torch.testing.assert_close(value[row], expected)
        evidence = torch.stack([p for _, p in joint]).logsumexp(0)
        torch.testing.assert_close(given_symbols[row], expected - evidence)


@given(cases())
def test_first_order_is_the_hidden_markov_model(case: tuple[HMMTagger, dict[str, Any]]) -> None:
    model, batch = case
    if model.order == 2:
        return
    rows, lengths = model.rows(), batch["mask"].sum(-1)
    law = HiddenMarkovModel(rows.initial, rows.transition, dist.Categorical(logits=rows.emission), lengths=lengths)
    del batch["tags"]
    torch.testing.assert_close(model.log_prob(batch), law.log_prob(batch["inputs"]["symbols"]))


@given(cases())
def test_posterior_is_bayes_rule(case: tuple[HMMTagger, dict[str, Any]]) -> None:
    model, batch = case
    law, marginals = model.posterior(batch), model.posterior(batch).marginals
    for row, symbols, known in rows_of(batch):
        joint = [(z, p) for z, p in sequences_with_joint(model, symbols) if agrees(z, known)]
        posterior = torch.stack([p for _, p in joint]).softmax(0)
        expected = torch.zeros_like(marginals[row])
        for (z, _), p in zip(joint, posterior, strict=True):
            padded = torch.zeros(batch["mask"].shape[-1], dtype=torch.long)
            padded[: len(z)] = torch.tensor(z)
            torch.testing.assert_close(law.log_prob(padded.expand(law.batch_shape + padded.shape))[row], p.log())
            for t, k in enumerate(z):
                expected[t, k] += p
        torch.testing.assert_close(marginals[row], expected)


@given(cases())
def test_predict_is_the_best_sequence_or_the_best_tag_at_each_position(
    case: tuple[HMMTagger, dict[str, Any]],
) -> None:
    model, batch = case
    best, marginals, most_probable = model.predict(batch), model.marginals(batch), model.predict(batch, "posterior")
    for row, symbols, _ in rows_of(batch):
        joint = dict(sequences_with_joint(model, symbols))
        torch.testing.assert_close(joint[tuple(best[row, : len(symbols)].tolist())], max(joint.values()))
        for t in range(len(symbols)):
            total = torch.zeros(model.num_tags, dtype=torch.float64)
            for z, p in joint.items():
                total[z[t]] += p.exp()
            torch.testing.assert_close(marginals[row, t], total / total.sum())
            torch.testing.assert_close(total[most_probable[row, t]], total.max())
    assert not best[~batch["mask"]].any()
    assert not most_probable[~batch["mask"]].any()


@given(cases())
def test_probabilities_of_everything_of_one_length_sum_to_one(case: tuple[HMMTagger, dict[str, Any]]) -> None:
    model, batch = case
    length = batch["mask"].shape[-1]
    texts = torch.tensor(list(itertools.product(range(model.num_symbols), repeat=length)))
    total = model.log_prob({"inputs": texts, "mask": torch.ones_like(texts, dtype=torch.bool)}).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-10, rtol=0)


@given(cases(), st.booleans())
def test_loss_is_the_traces(case: tuple[HMMTagger, dict[str, Any]], without_tags: bool) -> None:
    model, batch = case
    if without_tags:
        del batch["tags"]
    model.data_size = 7
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(batch)
        torch.testing.assert_close(model.loss(batch), -trace.log_prob_sum() / 7)
        elbo = Trace_ELBO().loss(model, model.guide, batch)
        torch.testing.assert_close(model.loss(batch), torch.tensor(elbo / 7, dtype=torch.float64))


# Estimation.


def dataset(batch: dict[str, Any]) -> Dataset:
    return Dataset.from_tensors(batch)


@given(cases(), st.sampled_from([1e-3, 0.5, 3.0]))
def test_em_never_lowers_the_posterior_density(case: tuple[HMMTagger, dict[str, Any]], concentration: float) -> None:
    model, batch = case
    model.transition_concentration = model.emission_concentration = concentration
    random = torch.where(batch["mask"], -1, 0)  # no tag is known, so that EM starts from the model's own weights
    history = model.estimate(dataset({**batch, "tags": random}), iterations=8, tolerance=-1.0)
    density = [-numbers["penalised_loss"] for numbers in history]
    assert len(density) == 8
    assert all(after >= before - 1e-9 * (1 + abs(before)) for before, after in itertools.pairwise(density))


@given(cases())
def test_em_from_known_and_unknown_tags_never_lowers_likelihood_or_density(
    case: tuple[HMMTagger, dict[str, Any]],
) -> None:
    model, batch = case
    data = hmm_estimation.in_batches(model._sequences(dataset(batch)), 6)
    for concentration, column in ((1e-12, 0), (0.7, 1)):
        prior = hmm_estimation.map_rows(lambda t, c=concentration: torch.full_like(t, c), model.rows())
        _, history = hmm_estimation.maximise_expectation(model.rows(), prior, data, 8, -1.0)
        values = [numbers[column] for numbers in history]
        assert all(after >= before - 1e-7 * (1 + abs(before)) for before, after in itertools.pairwise(values))


@given(cases())
def test_variational_bayes_never_lowers_its_bound_and_stays_below_the_evidence(
    case: tuple[HMMTagger, dict[str, Any]],
) -> None:
    model, batch = case
    data = hmm_estimation.in_batches(model._sequences(dataset(batch)), 6)
    prior = hmm_estimation.map_rows(lambda t: torch.full_like(t, 0.6), model.rows())
    start = hmm_estimation.map_rows(torch.exp, model.rows())
    _, history = hmm_estimation.variational_bayes(start, prior, data, 8, -1.0)
    bounds = [bound for bound, _ in history]
    assert all(after >= before - 1e-9 * (1 + abs(before)) for before, after in itertools.pairwise(bounds))
    assert bounds[-1] <= log_evidence(model, batch, 0.6) + 1e-9


def tagged_counts(model: HMMTagger, batch: dict[str, Any]) -> Iterator[Rows]:
    """The counts of every way to tag the batch that agrees with the known tags."""
    rows = list(rows_of(batch))
    choices = [
        [z for z in itertools.product(range(model.num_tags), repeat=len(symbols)) if agrees(z, known)]
        for _, symbols, known in rows
    ]
    for combination in itertools.product(*choices):
        pairs = [(torch.tensor(s), torch.tensor(z)) for (_, s, _), z in zip(rows, combination, strict=True)]
        yield count(pairs, model.num_tags, model.num_symbols, model.order)


def log_evidence_of_tagged(counts: Rows, transition: float, emission: float) -> Tensor:
    """log p(symbols, tags) with the probabilities integrated out: each row is a Polya urn, drawn from step by step."""
    total = torch.zeros((), dtype=torch.float64)
    for name, table in zip(Rows._fields, counts, strict=True):
        c = emission if name == "emission" else transition
        for row in [] if table is None else table.reshape(-1, table.shape[-1]).int().tolist():
            total += sum(math.log(c + already) for n in row for already in range(n))
            total -= sum(math.log(c * len(row) + already) for already in range(sum(row)))
    return total


def log_evidence(model: HMMTagger, batch: dict[str, Any], concentration: float) -> Tensor:
    """log p(symbols, known tags) with the probabilities integrated out and the other tags summed out."""
    terms = [
        log_evidence_of_tagged(c, concentration, concentration)
        for c in itertools.islice(tagged_counts(model, batch), 1500)
    ]
    # Too many to enumerate: then the bound is checked for monotony alone.
    return torch.stack(terms).logsumexp(0) if len(terms) < 1500 else torch.tensor(torch.inf)


@pytest.mark.parametrize("order", [1, 2])
def test_with_all_tags_known_the_bayesian_estimate_is_the_exact_posterior(order: int) -> None:
    model = HMMTagger(3, 5, order=order, bayesian=True, transition_concentration=0.3, emission_concentration=0.2)
    history = model.estimate(dataset(BATCH))
    counts = count(model._sequences(dataset(BATCH)), 3, 5, order)
    torch.testing.assert_close(model.emission.double().exp(), counts.emission + 0.2, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.transition.double().exp(), counts.transition + 0.3, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        -history[-1]["loss"] * 3, float(log_evidence_of_tagged(counts, 0.3, 0.2)), rtol=1e-9, atol=0
    )


def test_tagged_text_weighs_in_the_prior_of_em() -> None:
    torch.manual_seed(0)
    data = Dataset(
        [
            {"inputs": torch.tensor([0, 1, 2, 1]), "tags": torch.tensor([0, 1, 1, 1])},
            {"inputs": torch.tensor([2, 0, 1]), "tags": torch.tensor([-1, -1, -1])},
        ]
    )
    model = HMMTagger(2, 3, transition_concentration=0.3, emission_concentration=0.2)
    sequences = model._sequences(data)
    known = count(sequences, 2, 3, 2)
    smoothed = smooth(known)
    expected, _ = hmm_estimation.expected_counts(smoothed, hmm_estimation.in_batches(sequences, 100))
    model.estimate(data, iterations=1)
    weight = hmm_tagger.TAGGED_WEIGHT * known.emission.sum(-1, keepdim=True)
    rows = expected.emission + 0.2 + weight * smoothed.emission.exp()
    torch.testing.assert_close(model.rows().emission.exp().double(), rows / rows.sum(-1, keepdim=True))


@pytest.mark.corpus
def test_trigrams_tag_english_web_text(corpora: Path) -> None:
    folder = corpora / "ud_english_ewt"
    train, dev = (list(read_tagged(folder / f"{part}.conllu.gz")) for part in ("train", "dev"))
    vocabulary = TaggingVocabulary.build(train)
    classes = vocabulary.classes
    accuracies = []
    for order in (1, 2):
        model = HMMTagger(vocabulary.num_tags, len(classes), order=order, parents=classes.parent)
        model.estimate(vocabulary.dataset(train, ["symbols"]))
        right = total = 0
        for batch in vocabulary.dataset(dev, ["symbols"]).batches(batch_size=64):
            right += int(((model.predict(batch) == batch["tags"]) & batch["mask"]).sum())
            total += int(batch["mask"].sum())
        accuracies.append(right / total)
    assert accuracies[0] > 0.915
    assert accuracies[1] > accuracies[0] + 0.003


def test_em_recovers_a_model_from_its_own_symbols() -> None:
    torch.manual_seed(3)
    true = HMMTagger(2, 3, order=1)
    true._set(
        Rows(
            torch.tensor([0.5, 0.5]).log(),
            None,
            torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(),
            torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.15, 0.8]]).log(),
        )
    )
    drawn = poutine.trace(true).get_trace({"mask": torch.ones(60, 40, dtype=torch.bool)})
    data = dataset({"inputs": drawn.nodes["symbols"]["value"]})
    learnt = HMMTagger(2, 3, order=1)
    learnt.estimate(data, iterations=200, tolerance=1e-7)
    rows = learnt.rows()
    swap = [0, 1] if rows.emission[0, 0] > rows.emission[1, 0] else [1, 0]
    torch.testing.assert_close(rows.emission[swap].exp(), true.rows().emission.exp(), atol=0.06, rtol=0)
    torch.testing.assert_close(rows.transition[swap][:, swap].exp(), true.rows().transition.exp(), atol=0.06, rtol=0)
    accuracy = (learnt.predict({"inputs": drawn.nodes["symbols"]["value"]}) == drawn.nodes["tags"]["value"]).float()
    assert max(accuracy.mean(), 1 - accuracy.mean()) > 0.85


# Smoothing.


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(3, 30))
def test_smoothed_rows_are_laws_that_forbid_nothing(seed: int, tags: int, symbols: int) -> None:
    torch.manual_seed(seed)
    sequences = [(torch.randint(symbols, (n,)), torch.randint(tags, (n,))) for n in (1, 2, 5, 9)]
    parents = [max(0, (s - 1) // 2) for s in range(symbols)]  # a heap
    for order in (1, 2):
        for rows in (smooth(count(sequences, tags, symbols, order), p) for p in (parents, None)):
            for table in rows:
                if table is not None:
                    assert bool((table > -torch.inf).all())
                    torch.testing.assert_close(table.logsumexp(-1), torch.zeros_like(table.logsumexp(-1)))


def test_witten_bell_on_a_hand_worked_row() -> None:
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    lower = torch.tensor([0.5, 0.25, 0.25])
    expected = torch.tensor([[4 / 6, 1.5 / 6, 0.5 / 6], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(witten_bell(counts, lower), expected)


def test_smoothed_transitions_look_forward() -> None:
    tags = torch.tensor([0, 1, 2] * 5)
    rows = smooth(count([(tags, tags)], 3, 3, order=1))
    assert rows.initial.argmax() == 0
    assert rows.transition.argmax(-1).tolist() == [1, 2, 0]
    assert rows.emission.argmax(-1).tolist() == [0, 1, 2]
    twice = torch.tensor([0, 0, 1, 1] * 5)
    rows = smooth(count([(twice, twice)] * 2, 2, 2, order=2))
    assert rows.second is not None
    assert rows.second[0].argmax() == 0
    assert rows.transition.argmax(-1).tolist() == [[1, 1], [0, 0]]


def test_a_class_counts_the_rare_words_of_the_classes_below_it() -> None:
    # 0: the root, 1 and 2: its classes, 3: a class of 1 with two rare words 5 and 6; 4: a class of 1 without any
    counts = torch.tensor([[0.0, 0, 0, 0, 0, 4, 4, 0], [0, 0, 0, 0, 0, 0, 0, 30]])
    emission = smooth_emissions(counts, parents=[0, 0, 0, 1, 1, 3, 3, 2])
    given_tags = emission / emission.sum(0)
    assert given_tags[1, 2] > 3 * given_tags[1, 4]


def test_an_unseen_class_takes_the_tags_of_the_rare_words_below_it() -> None:
    # 0: the root, 1: a class, 2: a class that has none, 3 and 4: rare words of class 1, 5: a frequent word of class 2
    counts = torch.tensor([[0.0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 50]])
    emission = smooth_emissions(counts, parents=[0, 0, 0, 1, 1, 2])
    prior = counts.sum(-1) / counts.sum()
    posterior = (emission * prior.unsqueeze(-1)) / (emission.T @ prior)
    assert posterior[0, 1] > posterior[0, 2] + 0.2
    assert emission[0, 1] > emission[0, 2]


def test_parents_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match="ancestor of itself"):
        smooth_emissions(torch.ones(2, 3), parents=[0, 2, 1])


# The program.


@pytest.mark.parametrize("order", [1, 2])
def test_predictive_draws_tags_from_the_posterior(order: int) -> None:
    torch.manual_seed(order)
    model = HMMTagger(2, 3, order=order)
    batch = {"inputs": torch.tensor([[0, 2, 1]]), "mask": torch.tensor([[True, True, True]])}
    for parallel in (False, True):
        count = 4000 if parallel else 400
        drawn = Predictive(model, num_samples=count, parallel=parallel)(batch)["tags"]
        frequency = torch.nn.functional.one_hot(drawn, 2).float().mean(0)
        # 4.5 standard errors of a frequency of at most 1/2, on 6 numbers with a fixed seed
        torch.testing.assert_close(frequency, model.marginals(batch), atol=4.5 * 0.5 * count**-0.5, rtol=0)


def test_without_symbols_both_are_drawn_from_the_story() -> None:
    model = HMMTagger(2, 3)
    trace = poutine.trace(model).get_trace({"mask": torch.ones(5000, 3, dtype=torch.bool)})
    tags, symbols = trace.nodes["tags"]["value"], trace.nodes["symbols"]["value"]
    probability = model.log_prob({"inputs": torch.tensor([[2, 0, 1]]), "tags": torch.tensor([[0, 1, 0]])}).exp()
    hits = (symbols == torch.tensor([2, 0, 1])).all(-1) & (tags == torch.tensor([0, 1, 0])).all(-1)
    assert abs(hits.float().mean() - probability.item()) < 5 * (probability.item() / 5000) ** 0.5


def test_without_symbols_the_known_tags_are_kept() -> None:
    model, known = HMMTagger(2, 3), torch.tensor([[0, -1, 1]])
    trace = poutine.trace(model).get_trace({"tags": known})
    tags, symbols = trace.nodes["tags"]["value"], trace.nodes["symbols"]["value"]
    assert tags[0, 0] == 0
    assert tags[0, 2] == 1
    torch.testing.assert_close(trace.log_prob_sum(), model.log_prob({"inputs": symbols, "tags": tags}).sum())


@pytest.mark.parametrize("without_tags", [False, True])
def test_bayesian_loss_estimates_the_bound_of_the_trace(without_tags: bool) -> None:
    model = HMMTagger(2, 3, bayesian=True, transition_concentration=1.0, emission_concentration=1.0).double()
    model.data_size = 4
    batch = {"inputs": torch.tensor([[0, 2, 1], [1, 1, 0]]), "tags": torch.tensor([[0, 1, 0], [1, 1, 1]])}
    if without_tags:
        del batch["tags"]
    pyro.set_rng_seed(1)
    count = 150
    ours = torch.stack([model.loss(batch).detach() for _ in range(count)])
    elbo = Trace_ELBO() if without_tags else TraceMeanField_ELBO()  # the latter allows no discrete site in the guide
    theirs = torch.tensor([elbo.loss(model, model.guide, batch) / 4 for _ in range(count)])
    error = ((ours.var() + theirs.var()) / count).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error  # a false alarm in 16,000 seeds, and the seed is fixed


def test_bayesian_svi_and_nuts_sum_the_tags_out() -> None:
    batch = {
        "inputs": {"symbols": torch.tensor([[0, 1, 1, 0]])},
        "tags": torch.tensor([[0, -1, 1, -1]]),
        "mask": torch.ones(1, 4).bool(),
    }
    model = HMMTagger(2, 2, order=1, bayesian=True, transition_concentration=2.0, emission_concentration=2.0)
    counts = list(tagged_counts(model, batch))
    weights = torch.stack([log_evidence_of_tagged(c, 2.0, 2.0) for c in counts]).softmax(0)
    emissions = torch.stack([(c.emission + 2) / (c.emission + 2).sum(-1, keepdim=True) for c in counts])
    expected = torch.einsum("n,nks->ks", weights, emissions)

    variational = -model.estimate(dataset(batch))[-1]["loss"]
    elbo = Trace_ELBO(num_particles=100)
    bound = -elbo.loss(model, model.guide, batch)  # below the evidence in expectation; two draws differ by about 0.5
    assert variational - 0.2 < bound < log_evidence(model, batch, 2.0) + 0.2
    SVI(model, model.guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(batch)
    torch.testing.assert_close(model.rows().emission.exp().double(), expected, atol=0.08, rtol=0)

    kernel = NUTS(poutine.block(model, hide=["tags"]), max_tree_depth=2)
    sampler = MCMC(kernel, num_samples=80, warmup_steps=20, disable_progbar=True)
    sampler.run(batch)
    samples = sampler.get_samples()
    torch.testing.assert_close(samples["emission"].mean(0).double(), expected, atol=0.12, rtol=0)
    drawn = Predictive(model, posterior_samples=samples, parallel=True)(batch)["tags"]
    assert drawn.shape == (80, 1, 4)
    assert bool((drawn[..., [0, 2]] == torch.tensor([0, 1])).all()), "what is known is drawn otherwise"


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"num_tags": 0}, "num_tags must be at least 1"),
        ({"emission_concentration": 0.0}, "emission_concentration must be above 0"),
        ({"parents": [0, 1]}, "parents must be 5 symbols"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HMMTagger(**{"num_tags": 3, "num_symbols": 5, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": torch.full((3, 5), 3)}, "tags must lie from -1 to 2, got 3"),
        ({"inputs": torch.full((3, 5), 5)}, "symbols must lie from 0 to 4, got 5"),
        ({"inputs": {"words": torch.zeros(3, 5)}}, "inputs has no 'symbols'"),
        ({"tags": torch.zeros(3, 4).long()}, "tags must have the shape of the mask"),
    ],
)
def test_bad_batches(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HMMTagger(3, 5).log_prob({**BATCH, **change})


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="data is empty"):
        HMMTagger(3, 5).estimate(Dataset([]))
    with pytest.raises(ValueError, match="has no inputs"):
        HMMTagger(3, 5).estimate(Dataset([{"tags": torch.tensor([1])}]))
