"""The second-order law against enumeration: its whole surface, and agreement with the first order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.distributions.second_order_crf import SecondOrderCRF


@st.composite
def laws(draw: st.DrawFn, forbidden: bool = True) -> SecondOrderCRF:
    batch, length, tags = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, share = draw(st.sampled_from([1.0, 5.0])), draw(st.sampled_from([0.0, 0.2])) if forbidden else 0.0

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    own = (batch,) if draw(st.booleans()) else ()
    return SecondOrderCRF(
        scores(batch, length, tags),
        scores(*own, tags, tags, tags),
        scores(*own, tags, tags),
        scores(*own, tags),
        lengths,
    )


def sequences(law: SecondOrderCRF, row: int) -> Tensor:
    """Every sequence of a row, padded: ``[N, T]``."""
    length, n = law.event_shape[0], int(law.lengths[row])
    every = list(itertools.product(range(law.emissions.shape[-1]), repeat=n))
    return torch.nn.functional.pad(torch.tensor(every), (0, length - n))


def scores_of(law: SecondOrderCRF, row: int) -> Tensor:
    """The score of each, added up by hand."""
    emissions, start, second, transitions = (
        law.parts[name].expand(*law.batch_shape, *law.parts[name].shape[law.parts[name].ndim - order :])[row]
        for name, order in (("emissions", 2), ("start", 1), ("second", 2), ("transitions", 3))
    )
    totals = []
    for z in sequences(law, row)[:, : int(law.lengths[row])].tolist():
        total = start[z[0]] + sum(emissions[t, k] for t, k in enumerate(z))
        total = total + second[z[0], z[1]] if len(z) > 1 else total
        totals.append(total + sum(transitions[tuple(z[t - 2 : t + 1])] for t in range(2, len(z))))
    return torch.stack([torch.as_tensor(x) for x in totals])


def in_row(law: SecondOrderCRF, row: int, values: Tensor, method: str) -> Tensor:
    """A law's numbers for values ``[N, T]`` of one row."""
    every = torch.zeros(len(values), *law.batch_shape, *law.event_shape, dtype=torch.long)
    every[:, row] = values
    found: Tensor = getattr(law, method)(every)[:, row]
    return found


@given(laws())
def test_score_log_prob_entropy_count_and_marginals_are_those_of_the_enumerated_law(law: SecondOrderCRF) -> None:
    for row in range(law.batch_shape[0]):
        every, totals = sequences(law, row), scores_of(law, row)
        torch.testing.assert_close(in_row(law, row, every, "score"), totals)
        possible = totals > -torch.inf
        if not bool(possible.any()):
            assert law.log_partition[row] == -torch.inf
            assert bool((in_row(law, row, every, "log_prob") == -torch.inf).all())
            assert law.entropy()[row] == 0
            assert not law.marginals[row].any()
            continue
        log_probs = totals.log_softmax(0)
        torch.testing.assert_close(in_row(law, row, every, "log_prob"), log_probs)
        entropy = -(log_probs.exp() * torch.where(possible, log_probs, 0.0)).sum()
        torch.testing.assert_close(law.entropy()[row], entropy, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(law.log_count[row].exp(), possible.sum().double())
        one_hot = torch.nn.functional.one_hot(every, law.emissions.shape[-1]).double()
        expected = torch.einsum("n,ntk->tk", log_probs.exp(), one_hot)
        expected[law.lengths[row] :] = 0
        torch.testing.assert_close(law.marginals[row], expected)


@given(laws(), st.integers(1, 5))
def test_topk_is_sorted_distinct_and_the_best_there_are(law: SecondOrderCRF, k: int) -> None:
    scores, found = law.topk(k)
    for row in range(law.batch_shape[0]):
        totals = scores_of(law, row)
        best = totals.sort(descending=True).values[:k]
        torch.testing.assert_close(scores[: len(best), row], best)
        possible = found[:, row][scores[:, row] > -torch.inf]
        assert len({tuple(z) for z in possible.tolist()}) == len(possible)
        if best[0] > -torch.inf:
            torch.testing.assert_close(in_row(law, row, law.mode[row : row + 1], "score")[0], best[0])


@given(laws(forbidden=False), st.integers(0, 100))
def test_cross_entropy_and_divergence_are_the_enumerated_ones(law: SecondOrderCRF, seed: int) -> None:
    torch.manual_seed(seed)
    other = law._with(**{name: x + torch.randn_like(x) for name, x in law.parts.items()})
    torch.testing.assert_close(
        kl_divergence(law, law), torch.zeros(law.batch_shape, dtype=torch.float64), atol=1e-9, rtol=0
    )
    for row in range(law.batch_shape[0]):
        p, q = (scores_of(x, row).log_softmax(0) for x in (law, other))
        torch.testing.assert_close(law.cross_entropy(other)[row], -(p.exp() * q).sum())
        torch.testing.assert_close(kl_divergence(law, other)[row], (p.exp() * (p - q)).sum(), atol=1e-9, rtol=1e-7)


@given(laws(), st.integers(0, 100))
def test_log_prob_partial_sums_over_the_allowed_sequences(law: SecondOrderCRF, seed: int) -> None:
    allowed = torch.rand(law.emissions.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    value = law.log_prob_partial(allowed)
    for row, n in enumerate(law.lengths.tolist()):
        totals, every = scores_of(law, row), sequences(law, row)
        inside = torch.stack([allowed[row, torch.arange(n), z[:n]].all() for z in every])
        if bool((totals == -torch.inf).all()):
            assert value[row] == -torch.inf
        else:
            expected = torch.where(inside, totals, -torch.inf).logsumexp(0) - totals.logsumexp(0)
            torch.testing.assert_close(value[row], expected)


def test_transitions_that_look_one_tag_back_give_the_first_order_law() -> None:
    torch.manual_seed(0)
    emissions, transitions, start = torch.randn(2, 5, 3), torch.randn(3, 3), torch.randn(3)
    lengths = torch.tensor([5, 3])
    first = LinearChainCRF(emissions, transitions, start, lengths=lengths)
    law = SecondOrderCRF(emissions, transitions.expand(3, 3, 3), transitions, start, lengths)
    torch.testing.assert_close(law.log_partition, first.log_partition)
    torch.testing.assert_close(law.marginals, first.marginals)
    torch.testing.assert_close(law.entropy(), first.entropy())
    assert torch.equal(law.mode, first.mode)
    assert torch.equal(law.topk(4)[1], first.topk(4)[1])


def test_expanded_law_is_the_same_law_and_samples_are_independent() -> None:
    torch.manual_seed(0)
    law = SecondOrderCRF(torch.randn(2, 3, 2), torch.randn(2, 2, 2), torch.randn(2, 2), torch.randn(2)).expand([500, 2])
    drawn = law.sample((2,))
    assert drawn.shape == (2, 500, 2, 3)
    assert len(drawn[:, :, 0].flatten(0, 1).unique(dim=0)) > 3
    assert law.log_prob(drawn).shape == (2, 500, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": torch.zeros(2, 2)}, r"transitions must end in \[2, 2, 2\]"),
        ({"start": torch.zeros(3)}, r"start must end in \[2\]"),
        ({"lengths": torch.tensor([0])}, "lengths must lie from 1 to 3, got 0"),
        ({"emissions": torch.zeros(2)}, "emissions must be"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    scores = {name: torch.zeros((2,) * order) for name, order in (("transitions", 3), ("second", 2), ("start", 1))}
    scores["emissions"] = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=message):
        SecondOrderCRF(**{**scores, **change})
