"""The hidden semi-Markov model against enumeration of its segmentations, Bayes' rule, and hidden Markov models."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive
from torch import Tensor

from probllm.distributions import HiddenMarkovModel, HiddenSemiMarkovModel, SemiMarkovCRF
from probllm.math import semimarkov


class Case(NamedTuple):
    logits: tuple[Tensor, Tensor, Tensor, Tensor]  # initial, transition, duration, of the observations
    lengths: Tensor | None
    value: Tensor  # [*batch, T]
    observed: Tensor
    right_censored: bool

    @property
    def law(self) -> HiddenSemiMarkovModel:
        return self.build(*self.logits)

    def build(self, *logits: Tensor) -> HiddenSemiMarkovModel:
        observation = dist.Categorical(logits=logits[3], validate_args=False)
        return HiddenSemiMarkovModel(
            *logits[:3], observation, self.lengths, duration=self.value.shape[-1], right_censored=self.right_censored
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (3, 3), (1, 3), (4, 1), (2, 2)]))
    longest = draw(st.integers(1, steps + 1))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (1,)]))
    share = draw(st.sampled_from([0.0, 0.0, 0.3]))

    def logits(*event: int) -> Tensor:
        shape = (*draw(st.sampled_from([(), batch])), *event)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    over = draw(st.sampled_from([(k,), (steps, k), (*batch, steps, k)]))
    observation = torch.randn(*over, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, steps + 1, batch, generator=generator) if draw(st.booleans()) else None
    return Case(
        (logits(k), logits(k, k), logits(k, longest), observation),
        lengths,
        torch.randint(0, 3, (*batch, steps), generator=generator),
        torch.rand(*batch, steps, generator=generator) < draw(st.sampled_from([1.0, 0.6])),
        draw(st.booleans()),
    )


def normalised(logits: Tensor) -> Tensor:
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, -math.inf, torch.where(nothing, 0.0, logits).log_softmax(-1))


def joint(case: Case, logits: tuple[Tensor, ...], seen: bool = True) -> tuple[Tensor, Tensor]:
    """Every segmentation ``[N, T]`` and log p(z, x) ``[N, *batch]``, walked through segment by segment.

    Without right censoring: before it is given that a segment ends with the sequence. ``seen`` False: log p(z).
    """
    steps, batch = case.value.shape[-1], case.value.shape[:-1]
    k, longest = logits[2].shape[-2:]
    initial = normalised(logits[0]).expand(*batch, k).reshape(-1, k)
    moves = normalised(logits[1]).expand(*batch, k, k).reshape(-1, k, k)
    durations = normalised(logits[2]).expand(*batch, k, longest).reshape(-1, k, longest)
    each = logits[3].log_softmax(-1).expand(*batch, steps, k, 3)
    each = each.gather(-1, case.value[..., None, None].expand(*batch, steps, k, 1)).squeeze(-1).reshape(-1, steps, k)
    each = torch.where(case.observed.reshape(-1, steps, 1) & torch.tensor(seen), each, 0.0)
    lengths = torch.full(batch, steps) if case.lengths is None else case.lengths
    every = list(itertools.product(range(k + 1), repeat=steps))
    rows = []
    for row, n in enumerate(lengths.reshape(-1).tolist()):
        scores = []
        for z in every:
            cuts = [t for t in range(n) if z[t]] + [n]
            spans = list(itertools.pairwise(cuts))
            if z[0] == 0 or any(z[n:]) or any(stop - begin > longest for begin, stop in spans):
                scores.append(torch.tensor(-math.inf, dtype=torch.float64))
                continue
            total = torch.zeros((), dtype=torch.float64)
            for i, (begin, stop) in enumerate(spans):
                label, d = z[begin] - 1, stop - begin
                total = total + (initial[row, label] if i == 0 else moves[row, z[spans[i - 1][0]] - 1, label])
                is_last = stop == n and case.right_censored
                of_duration = durations[row, label, d - 1 :] if is_last else durations[row, label, d - 1 : d]
                dead = bool((of_duration == -math.inf).all())
                total = total + (-math.inf if dead else of_duration[of_duration > -math.inf].logsumexp(-1))
                total = total + each[row, begin:stop, label].sum()
            scores.append(total)
        rows.append(torch.stack(scores))
    return torch.tensor(every), torch.stack(rows, 1).reshape(len(every), *batch)


def total(scores: Tensor) -> Tensor:
    """logsumexp over segmentations, with gradient 0 where it is -inf."""
    feasible = (scores > -math.inf).any(0)
    return torch.where(feasible, torch.where(feasible, scores, 0.0).logsumexp(0), -math.inf)


def log_prob_by_hand(case: Case, logits: tuple[Tensor, ...]) -> Tensor:
    found = total(joint(case, logits)[1])
    boundary = total(joint(case, logits, seen=False)[1])
    return found if case.right_censored else found - torch.where(boundary == -math.inf, 0.0, boundary)


@given(cases())
def test_log_prob_and_its_gradient_are_the_sum_over_segmentations(case: Case) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in case.logits)
    again = tuple(x.clone().requires_grad_() for x in case.logits)
    found, expected = case.build(*leaves).log_prob(case.value, case.observed), log_prob_by_hand(case, again)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found[found > -math.inf].sum(), leaves, allow_unused=True)
    if not expected.requires_grad:
        return
    by_hand = torch.autograd.grad(expected[expected > -math.inf].sum(), again, allow_unused=True)
    for x, y, leaf in zip(gradients, by_hand, leaves, strict=True):
        zeros = torch.zeros_like(leaf)
        torch.testing.assert_close(zeros if x is None else x, zeros if y is None else y)


@given(cases())
def test_posterior_is_bayes_rule(case: Case) -> None:
    law = case.law
    log_p = law.log_prob(case.value, case.observed)
    z, scores = joint(case, case.logits)
    posterior = law.posterior(case.value, case.observed)
    assert isinstance(posterior, SemiMarkovCRF)
    torch.testing.assert_close(posterior.log_partition, log_p)
    structures = z.reshape(len(z), *(1,) * log_p.dim(), -1).expand(*scores.shape, -1)
    listed = scores > -math.inf
    found = posterior.log_prob(structures)
    expected = scores - total(scores)
    torch.testing.assert_close(found[listed], expected[listed])
    of_joint = law.log_prob_joint(structures, case.value, case.observed)
    torch.testing.assert_close(of_joint[listed], (expected + log_p)[listed])


@given(cases())
def test_viterbi_and_state_marginals_are_the_enumerated_ones(case: Case) -> None:
    z, scores = joint(case, case.logits)
    law, steps = case.law, case.value.shape[-1]
    best = law.viterbi(case.value, case.observed)
    assert best.shape == case.value.shape
    feasible = (scores > -math.inf).any(0)
    assert bool((best[~feasible] == -1).all())
    is_best = (best.unsqueeze(0) == z.reshape(len(z), *(1,) * feasible.dim(), steps)).all(-1)
    attained = torch.where(is_best, scores, -math.inf).amax(0)
    torch.testing.assert_close(attained, scores.amax(0))
    p = torch.where(feasible, scores.softmax(0), 0.0)
    labels = torch.tensor([[max(z_t for z_t in [0, row[t]]) for t in range(steps)] for row in z.tolist()])
    for t in range(1, steps):
        labels[:, t] = torch.where(labels[:, t] == 0, labels[:, t - 1], labels[:, t])
    expected = torch.stack([(p * (labels == 1 + k).reshape(-1, *(1,) * feasible.dim(), steps).movedim(-1, 0)).sum(1)
                            for k in range(law.num_states)], -1)  # fmt: skip
    n = torch.full(feasible.shape, steps) if case.lengths is None else case.lengths
    real = torch.arange(steps).reshape(-1, *(1,) * feasible.dim()) < n
    expected = torch.where(real.unsqueeze(-1), expected, 0.0).movedim(0, -2)
    torch.testing.assert_close(law.state_marginals(case.value, case.observed), expected)


@pytest.mark.parametrize("right_censored", [True, False])
@pytest.mark.parametrize("longest", [1, 2, 5])
def test_probabilities_of_all_observation_sequences_sum_to_one(longest: int, right_censored: bool) -> None:
    torch.manual_seed(0)
    observation = dist.Categorical(logits=torch.randn(2, 3, dtype=torch.float64))
    law = HiddenSemiMarkovModel(
        torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64),
        torch.randn(2, longest, dtype=torch.float64), observation, right_censored=right_censored,
    )  # fmt: skip
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    torch.testing.assert_close(law.log_prob(every).exp().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("right_censored", [True, False])
def test_sample_joint_has_the_frequencies_of_the_law(right_censored: bool) -> None:
    """Chi-square at a false-alarm rate of one in a million."""
    torch.manual_seed(3)
    lengths = torch.tensor([3, 2])
    law = HiddenSemiMarkovModel(
        torch.randn(2), torch.randn(2, 2), torch.randn(2, 2), dist.Categorical(logits=torch.randn(2, 2)), lengths,
        duration=3, right_censored=right_censored,
    )  # fmt: skip
    count = 4000
    z, x = law.sample_joint((count,))
    assert z.shape == x.shape == (count, 2, 3)
    for row, n in enumerate(lengths.tolist()):
        assert not z[:, row, n:].any() and not x[:, row, n:].any(), "padding is 0"  # noqa: PT018
        outcomes = torch.tensor([(*a, *b) for a in itertools.product(range(3), repeat=n) if a[0]
                                 for b in itertools.product(range(2), repeat=n)])  # fmt: skip
        padded = torch.zeros(len(outcomes), 2, 3, dtype=torch.long)
        states, seen = padded.clone(), padded.clone()
        states[:, 0, 0] = states[:, 1, 0] = 1
        states[:, row, :n], seen[:, row, :n] = outcomes[:, :n], outcomes[:, n:]
        p = law.log_prob_joint(states, seen)[:, row].exp().double()
        torch.testing.assert_close(float(p.sum()), 1.0, rtol=1e-5, atol=0)
        mine = torch.cat([z[:, row, :n], x[:, row, :n]], -1)
        same = (mine.unsqueeze(1) == outcomes).all(-1)
        assert bool(same.any(1).all())
        possible = p > 0
        observed, expected = same.double().sum(0), count * p
        assert not observed[~possible].any()
        statistic = float(((observed - expected)[possible] ** 2 / expected[possible]).sum())
        assert scipy.stats.chi2.sf(statistic, int(possible.sum()) - 1) > 1e-6


def test_durations_of_one_step_make_it_a_hidden_markov_model() -> None:
    torch.manual_seed(0)
    initial, moves, observation = torch.randn(3), torch.randn(3, 3), dist.Normal(torch.randn(3), 1.0)
    x = torch.randn(4, 7)
    semi = HiddenSemiMarkovModel(initial, moves, torch.zeros(3, 1), observation)
    torch.testing.assert_close(semi.log_prob(x), HiddenMarkovModel(initial, moves, observation).log_prob(x))


def test_geometric_durations_make_it_a_hidden_markov_model() -> None:
    """Staying with probability s each step, a state lasts d steps with probability s^(d-1) (1 - s)."""
    torch.manual_seed(0)
    stay = torch.tensor([0.5, 0.3, 0.7], dtype=torch.float64)
    leave = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0.0)
    leave = leave / leave.sum(-1, keepdim=True)
    moves = torch.diag(stay) + (1 - stay).unsqueeze(-1) * leave
    observation = dist.Normal(torch.randn(3, dtype=torch.float64), 1.0)
    initial = torch.randn(3, dtype=torch.float64)
    durations = dist.Geometric(1 - stay.unsqueeze(-1)).log_prob(torch.arange(200.0, dtype=torch.float64))
    x = torch.randn(2, 9, dtype=torch.float64)
    semi = HiddenSemiMarkovModel(initial, leave.log(), durations, observation)
    torch.testing.assert_close(semi.log_prob(x), HiddenMarkovModel(initial, moves.log(), observation).log_prob(x))


def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, gradient, Viterbi, state marginals and samples make nothing with an entry for each segment."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("made T D K scores")

    for name in ("segment_scores", "inside", "inside_additive"):
        monkeypatch.setattr(semimarkov, name, refuse)
    torch.manual_seed(0)
    durations = torch.zeros(2, 300, requires_grad=True)
    law = HiddenSemiMarkovModel(
        torch.zeros(2), torch.zeros(2, 2), durations, dist.Normal(torch.tensor([0.0, 1.0]), 1.0), duration=3000
    )
    x = law.sample()
    law.log_prob(x).backward()  # type: ignore[no-untyped-call]
    assert durations.grad is not None
    torch.testing.assert_close(law.state_marginals(x).sum(-1), torch.ones(3000))
    assert law.viterbi(x).shape == (3000,)


def test_second_derivatives_agree_with_differences() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (2, 2), (2, 3))]
    x = torch.randn(2, 4, dtype=torch.float64)

    def value(*given: Tensor) -> Tensor:
        observation = dist.Normal(torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0)
        return HiddenSemiMarkovModel(*given, observation, torch.tensor([4, 2])).log_prob(x)

    assert torch.autograd.gradcheck(value, logits)
    assert torch.autograd.gradgradcheck(value, logits)


def test_vmap_over_parameters_is_a_loop() -> None:
    torch.manual_seed(0)
    initial, moves, durations = torch.randn(3, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 3)
    emission = torch.randn(3, 2, 4)
    x, lengths = torch.randint(0, 4, (2, 5)), torch.tensor([5, 2])

    def value(a: Tensor, b: Tensor, c: Tensor, e: Tensor) -> Tensor:
        return HiddenSemiMarkovModel(a, b, c, dist.Categorical(logits=e, validate_args=False), lengths).log_prob(x)

    loop = torch.stack([value(*parts) for parts in zip(initial, moves, durations, emission, strict=True)])
    torch.testing.assert_close(torch.func.vmap(value)(initial, moves, durations, emission), loop)


def test_an_observation_that_no_state_emits_has_probability_zero_and_no_nan() -> None:
    emission = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -1.0, -math.inf]])
    durations = torch.zeros(2, 3, requires_grad=True)
    law = HiddenSemiMarkovModel(torch.zeros(2), torch.zeros(2, 2), durations, dist.Categorical(logits=emission))
    x = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 0]])
    found = law.log_prob(x)
    assert float(found[0].detach()) == -math.inf
    (gradient,) = torch.autograd.grad(found.sum(), durations)
    assert bool(gradient.isfinite().all())
    assert bool((law.viterbi(x)[0] == -1).all())
    assert bool((law.state_marginals(x)[0] == 0).all())


def test_an_empty_batch_gives_nothing() -> None:
    law = _law(initial_logits=torch.zeros(0, 2))
    x = law.sample((3,))
    assert x.shape == (3, 0, 4)
    assert law.log_prob(x).shape == (3, 0)
    assert law.viterbi(x).shape == (3, 0, 4)
    assert law.state_marginals(x).shape == (3, 0, 4, 2)
    assert law.posterior(x).mode.shape == (3, 0, 4)


def test_pyro_program_traces_predicts_and_learns() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (4, 6))
    lengths = torch.tensor([6, 3, 1, 5])

    def model(given: Tensor | None = None) -> Tensor:
        names = {"initial": (2,), "moves": (2, 2), "durations": (2, 3), "emission": (2, 3)}
        a, b, d, c = (pyro.param(n, lambda shape=shape: torch.randn(shape)) for n, shape in names.items())
        with pyro.plate("data", 4):
            law = HiddenSemiMarkovModel(a, b, d, dist.Categorical(logits=c), lengths, duration=6)
            found: Tensor = pyro.sample("x", law, obs=given)
            return found

    with pyro.validation_enabled(True):
        trace = pyro.poutine.trace(model).get_trace(x)
        law = trace.nodes["x"]["fn"]
        torch.testing.assert_close(trace.log_prob_sum(), law.log_prob(x).sum())
        svi = SVI(model, lambda given: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        losses = [svi.step(x) for _ in range(20)]
        assert losses[-1] < losses[0]
        drawn = Predictive(model, num_samples=5)()["x"]
    assert drawn.shape == (5, 4, 6)


def test_expanded_law_scores_and_samples() -> None:
    law = _law()
    wide = law.expand((3, 2))
    assert wide.batch_shape == (3, 2)
    x = wide.sample((5,))
    assert x.shape == (5, 3, 2, 4)
    assert len(x.reshape(-1, 4).unique(dim=0)) > 10, "copies are drawn independently"
    torch.testing.assert_close(wide.log_prob(x), law.log_prob(x))


@pytest.mark.parametrize("member", ["mode", "entropy", "mean", "variance", "start"])
def test_intractable_members_raise(member: str) -> None:
    with pytest.raises(NotImplementedError):
        getattr(_law(), member)()


def _law(**change: Any) -> HiddenSemiMarkovModel:
    given: dict[str, Any] = {
        "initial_logits": torch.zeros(2), "transition_logits": torch.zeros(2, 2), "duration_logits": torch.zeros(2, 3),
        "observation_dist": dist.Categorical(logits=torch.zeros(2, 3)), "lengths": None, "duration": 4,
    }  # fmt: skip
    return HiddenSemiMarkovModel(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial_logits": torch.tensor(0.0)}, ValueError, "initial_logits"),
        ({"transition_logits": torch.zeros(3, 2)}, ValueError, "transition_logits"),
        ({"transition_logits": [0.0]}, TypeError, "transition_logits"),
        ({"duration_logits": torch.zeros(3)}, ValueError, r"duration_logits: expected shape \[..., 2, D\]"),
        ({"duration_logits": torch.zeros(3, 2)}, ValueError, r"duration_logits: expected shape \[..., 2, D\]"),
        ({"duration_logits": torch.zeros(2, 0)}, ValueError, r"duration_logits: expected shape \[..., 2, D\]"),
        ({"duration_logits": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "duration_logits"),
        ({"duration_logits": [[0.0]]}, TypeError, "duration_logits: expected a tensor, got list"),
        (
            {"duration_logits": torch.zeros(3, 2, 3), "initial_logits": torch.zeros(4, 2)},
            ValueError,
            r"duration_logits: batch shape \[3\] does not broadcast with \[4\]",
        ),
        ({"observation_dist": dist.Normal(torch.zeros(3), 1.0)}, ValueError, "observation_dist"),
        ({"lengths": torch.tensor([5])}, ValueError, "lengths"),
        ({"duration": 0}, ValueError, "duration"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _law(**change)


def test_nan_logits_are_refused_and_a_law_is_not_sampled_without_duration() -> None:
    for name, shape in (("transition_logits", (2, 2)), ("duration_logits", (2, 3)), ("initial_logits", (2,))):
        with pytest.raises(ValueError, match=f"{name}.*NaN"):
            _law(**{name: torch.full(shape, math.nan)}).log_prob(torch.zeros(4).long())
    with pytest.raises(ValueError, match="duration"):
        _law(duration=None).sample()
