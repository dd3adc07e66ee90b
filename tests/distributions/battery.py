"""What every law over structures must satisfy, checked against the list of all its structures.

A test file gives cases (a law in float64, every structure, and the score of each added up by hand) and runs ``CHECKS``.
Each check states an identity of the law p(x) = exp(score(x)) / Z; the right-hand side is always a sum over the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from probllm.distributions.structure import StructuredDistribution
from probllm.objectives import structured_hinge

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A law with all its structures. Main parts come first in ``parts``."""

    law: StructuredDistribution
    build: Callable[..., StructuredDistribution]  # (**parts) -> the same structure with other scores
    structures: Tensor  # [N, *batch, *event] long
    listed: Tensor  # [N, *batch] bool: False where a row has fewer structures than N
    score: Callable[[Parts], Tensor]  # parts -> [N, *batch], differentiable
    seed: int

    @property
    def scores(self) -> Tensor:
        """``[N, *batch]``, -inf where a structure is forbidden or not one of the row's."""
        return self.score(self.law.parts).masked_fill(~self.listed, -torch.inf)

    @property
    def log_z(self) -> Tensor:
        return self.scores.logsumexp(0)

    @property
    def feasible(self) -> Tensor:
        return self.log_z > -torch.inf

    @property
    def probabilities(self) -> Tensor:
        """``[N, *batch]``, 0 in a row in which nothing is allowed."""
        return torch.where(self.feasible, self.scores.softmax(0), 0.0)

    @property
    def main(self) -> str:
        return next(iter(self.law.parts))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def noise(self, like: Tensor, forbidden: float = 0.0) -> Tensor:
        generator = self.generator()
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return noise.masked_fill(torch.rand(like.shape, generator=generator) < forbidden, -torch.inf)

    def mean(self, values: Tensor) -> Tensor:
        """Expectation of values ``[N, *batch]``; what has probability 0 does not count."""
        p = self.probabilities
        return (p * torch.where(p > 0, values, 0.0)).sum(0)

    def expected(self, parts: Parts) -> Parts:
        """The expected parts, as the derivative of the mean hand-made score."""
        leaves = {name: x.detach().clone().requires_grad_() for name, x in parts.items()}
        p = self.probabilities
        total = (p * torch.where(p > 0, self.score(leaves), 0.0)).sum()
        return gradients(total, leaves)

    def whole(self) -> Parts:
        """The parts with the main scores in the shape of the marginals."""
        parts = self.law.parts
        return {**parts, self.main: parts[self.main].expand(self.law.marginals.shape)}


def gradients(total: Tensor, parts: Parts) -> Parts:
    """The derivative in each part; 0 where ``total`` does not hold it (no pair in a sequence of one step)."""
    found = torch.autograd.grad(total, list(parts.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(parts.items(), found, strict=True)}


def close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-9, atol=1e-8 * scale)


def size_of(case: Case) -> float:
    """The greatest finite score: what differences of scores are rounded at."""
    scores = case.scores[case.scores > -torch.inf]
    return 1.0 + (float(scores.abs().max()) * 1e-7 if scores.numel() else 0.0)


def log_partition_is_the_sum_over_all_structures(case: Case) -> None:
    assert case.law.log_partition.shape == case.law.batch_shape
    close(case.law.log_partition, case.log_z)


def log_prob_sums_to_one_and_is_score_less_log_partition(case: Case) -> None:
    score, log_prob = case.law.score(case.structures), case.law.log_prob(case.structures)
    close(score.masked_fill(~case.listed, -torch.inf), case.scores)
    expected = torch.where(case.feasible, case.scores - torch.where(case.feasible, case.log_z, 0.0), -torch.inf)
    listed = log_prob.masked_fill(~case.listed, -torch.inf)
    close(listed, expected, size_of(case))
    close(listed.exp().sum(0), case.feasible.double(), size_of(case))


def log_prob_depends_on_the_scores_as_by_hand(case: Case) -> None:
    """The gradient of one log probability: its own parts less the expected ones; 0 where nothing is allowed."""
    p = case.probabilities
    best = p.argmax(0, keepdim=True)
    ones = (1,) * len(case.law.event_shape)
    value = case.structures.gather(0, best.reshape(*best.shape, *ones).expand(1, *case.structures.shape[1:]))[0]
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.whole().items()}
    log_prob = case.build(**leaves).log_prob(value)
    assert bool((log_prob > -torch.inf).eq(case.feasible).all())
    found = gradients(log_prob.sum(), leaves)
    again = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    own = case.score(again).gather(0, best).masked_fill(~case.feasible, 0.0).sum()
    observed, expected = gradients(own, again), case.expected(leaves)
    for name, gradient in found.items():
        close(gradient, observed[name] - expected[name], size_of(case))


def marginals_are_gradients_of_log_partition_and_enumerated_probabilities(case: Case) -> None:
    parts = case.whole()
    expected = case.expected(parts)
    close(case.law.marginals, expected[case.main], size_of(case))
    leaves = {name: x.detach().clone().requires_grad_() for name, x in parts.items()}
    total = case.build(**leaves).log_partition.sum()
    for name, gradient in gradients(total, leaves).items():
        close(gradient, expected[name], size_of(case))


def mode_attains_the_maximum(case: Case) -> None:
    mode = case.law.mode
    assert mode.dtype == torch.long
    assert mode.shape == case.law.batch_shape + case.law.event_shape
    assert bool((mode[~case.feasible] == -1).all())
    close(torch.where(case.feasible, case.law.score(mode), -torch.inf), case.scores.amax(0))
    same = (case.structures == mode).flatten(1 + len(case.law.batch_shape)).all(-1) & case.listed
    assert bool(same.any(0)[case.feasible].all()), "the mode is none of the structures"


def topk_is_the_sorted_enumeration(case: Case) -> None:
    count = case.structures.shape[0]
    for k in {1, 2, count + 2}:
        scores, found = case.law.topk(k)
        assert scores.shape == (k, *case.law.batch_shape)
        assert found.shape == (k, *case.law.batch_shape, *case.law.event_shape)
        expected = case.scores.sort(0, descending=True).values[:k]
        expected = torch.cat([expected, expected.new_full((k - len(expected), *case.law.batch_shape), -torch.inf)])
        close(scores, expected)
        rows = case.feasible.numel()
        flat = found.reshape(k, rows, case.law.event_shape.numel())
        for row, row_scores in zip(flat.unbind(1), scores.reshape(k, rows).unbind(1), strict=True):
            there = row_scores > -torch.inf
            assert bool((row[~there] == -1).all())
            assert len({tuple(x) for x in row[there].tolist()}) == int(there.sum()), "structures repeat"
        again = case.law.score(found.clamp_min(0))
        assert torch.equal(again[scores > -torch.inf], scores[scores > -torch.inf])


def samples_have_the_frequencies_of_the_law(case: Case) -> None:
    """Chi-square on each row, at a false-alarm rate of one in a million; with fixed seeds the answer is fixed."""
    count = 1500
    torch.manual_seed(case.seed)
    drawn = case.law.sample((count,))
    assert drawn.shape == (count, *case.law.batch_shape, *case.law.event_shape)
    rows = case.feasible.numel()
    width = case.law.event_shape.numel()
    every = case.structures.reshape(len(case.structures), rows, width)
    p, listed = (x.reshape(len(case.structures), rows) for x in (case.probabilities, case.listed))
    for row, feasible in enumerate(case.feasible.reshape(-1).tolist()):
        mine = drawn.reshape(count, rows, width)[:, row]
        if not feasible:
            assert bool((mine == -1).all())
            continue
        same = (mine.unsqueeze(1) == every[:, row]).all(-1) & listed[:, row]
        assert bool(same.any(1).all()), "a sample is none of the structures"
        observed, expected = same.double().sum(0), count * p[:, row]
        assert bool((observed[expected < 1e-12] == 0).all()), "a forbidden structure was drawn"
        # what is rare is counted together, with the rarest of the others, so that chi-square holds
        o, e = observed[expected.argsort()], expected.sort().values
        rare = min(int((e.cumsum(0) < 5).sum()) + 1, len(e))
        o, e = (torch.cat([x[:rare].sum()[None], x[rare:]]) for x in (o, e))
        if len(e) > 1:
            statistic = float(((o - e) ** 2 / e).sum())
            assert scipy.stats.chi2.sf(statistic, len(e) - 1) > 1e-6


def entropy_is_the_enumerated_one(case: Case) -> None:
    p = case.probabilities
    entropy = case.law.entropy()
    close(entropy, torch.special.entr(p).sum(0), size_of(case))
    assert bool((entropy >= 0).all())


def cross_entropy_and_divergence_are_the_enumerated_ones(case: Case) -> None:
    # marginals are right to some 1e-10 where scores are huge, and are multiplied by the other law's scores
    rounding = 1 + size_of(case) * 1e5 if size_of(case) > 1.01 else 1.0
    for forbidden in (0.0, 0.2):
        parts = {name: x + case.noise(x, forbidden) for name, x in case.law.parts.items()}
        other = case.build(**parts)
        log_q = case.score(parts).masked_fill(~case.listed, -torch.inf).log_softmax(0)
        log_q = torch.where(log_q.isnan(), -torch.inf, log_q)  # q allows nothing
        p = case.probabilities
        terms = torch.where(p > 0, -p * log_q, 0.0)
        expected = torch.where((p > 0) & (log_q == -torch.inf), torch.inf, terms).sum(0)
        # where p is so small that it may be 0 in the recursion, either answer is right
        sure = ((p == 0) | (log_q > -torch.inf) | (p > 1e-290)).all(0)
        found = case.law.cross_entropy(other)
        close(found[sure], expected[sure], rounding)
        divergence = kl_divergence(case.law, other)
        close(divergence[sure], (expected - torch.special.entr(p).sum(0))[sure], rounding)
        assert bool((divergence >= 0).all())
    close(kl_divergence(case.law, case.law), torch.zeros(case.law.batch_shape), rounding)


def expectation_is_the_enumerated_mean(case: Case) -> None:
    scores = {name: case.noise(x) for name, x in case.law.parts.items()}
    close(case.law.expectation(scores), case.mean(case.score(scores)), size_of(case))
    main = case.noise(case.whole()[case.main])
    zeros = {name: torch.zeros_like(x) for name, x in case.law.parts.items()}
    close(case.law.expectation(main), case.mean(case.score({**zeros, case.main: main})), size_of(case))


def indicators(case: Case) -> Tensor:
    """``[N, *batch, *main]``: 1 at the main parts that a structure uses, by the derivative of its score."""
    zeros = {name: torch.zeros_like(x) for name, x in case.whole().items()}
    leaf = zeros[case.main].requires_grad_()
    scores = case.score({**zeros, case.main: leaf})
    return torch.stack([torch.autograd.grad(row.sum(), leaf, retain_graph=True)[0] for row in scores])


def minimum_risk_structure_has_the_least_expected_number_of_errors(case: Case) -> None:
    found = case.law.min_risk()
    assert bool((found[~case.feasible] == -1).all())
    used = indicators(case).flatten(1 + len(case.law.batch_shape))
    errors = (used.unsqueeze(1) - used).abs().sum(-1)  # [N, N, *batch]
    risk = (errors * case.probabilities).sum(1)
    allowed = case.scores > -torch.inf
    least = risk.masked_fill(~allowed, torch.inf).amin(0)
    same = (case.structures == found).flatten(1 + len(case.law.batch_shape)).all(-1) & allowed
    assert bool(same.any(0)[case.feasible].all()), "the structure is not allowed"
    mine = risk.masked_fill(~same, torch.inf).amin(0)
    close(mine[case.feasible], least[case.feasible], size_of(case))


def parts_of_a_structure_are_its_indicator(case: Case) -> None:
    found = case.law.parts_of(case.structures)
    expected = indicators(case)
    listed = case.listed.reshape(*case.listed.shape, *(1,) * (expected.dim() - case.listed.dim()))
    assert torch.equal(found.masked_fill(~listed, 0.0), expected.masked_fill(~listed, 0.0))
    assert float(case.law.parts_of(torch.full_like(case.law.mode, -1)[~case.feasible.any()]).abs().sum()) == 0


def hinge_is_the_greatest_violation_of_the_margin(case: Case) -> None:
    value = torch.where(
        case.feasible.reshape(*case.feasible.shape, *(1,) * len(case.law.event_shape)), case.law.mode, 0
    )
    used = indicators(case).flatten(1 + len(case.law.batch_shape))
    differences = (used - case.law.parts_of(value).flatten(len(case.law.batch_shape))).abs().sum(-1)
    expected = (case.scores + 0.5 * differences).amax(0) - case.scores.amax(0)
    expected = torch.where(case.feasible, expected, 0.0)
    close(structured_hinge(case.law, case.law.mode, 0.5), expected, size_of(case))


def score_function_gradient_is_the_exact_one(case: Case) -> None:
    """sum of p(x) f(x) grad log p(x) = grad E[f] for an additive f, which takes second derivatives of log Z."""
    values = {name: case.noise(x) for name, x in case.law.parts.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.whole().items()}
    law = case.build(**leaves)
    exact = gradients(law.expectation(values).sum(), leaves)
    log_prob = law.log_prob(case.structures)
    weight = case.probabilities * torch.where(case.probabilities > 0, case.score(values), 0.0)
    surrogate = torch.where(weight != 0, weight * torch.where(weight != 0, log_prob, 0.0), 0.0)
    for name, gradient in gradients(surrogate.sum(), leaves).items():
        close(exact[name], gradient, 10 * size_of(case))


def temperature_divides_the_scores(case: Case) -> None:
    """p at temperature t is p^(1/t) normalised: hot, all allowed structures are alike; cold, the best has all."""
    for temperature in (0.5, 3.0):
        law = case.law.with_temperature(temperature)
        assert type(law) is type(case.law)
        assert law.batch_shape == case.law.batch_shape
        close(law.log_partition, (case.scores / temperature).logsumexp(0), size_of(case))
    hot = case.law.with_temperature(1e18 * size_of(case))
    close(hot.log_partition, case.law.log_count)
    close(hot.entropy(), torch.where(case.feasible, case.law.log_count, 0.0))
    sorted_scores = case.scores.sort(0, descending=True).values
    gap = sorted_scores[0] - sorted_scores[1] if len(sorted_scores) > 1 else torch.full_like(case.log_z, torch.inf)
    clear = case.feasible & (gap > 1e-4)
    cold = case.law.with_temperature(1e-7)
    close(cold.log_prob(case.law.mode)[clear], torch.zeros_like(case.log_z)[clear], 1e7 * size_of(case))


def conditioning_is_bayes_rule(case: Case) -> None:
    whole = case.whole()[case.main]
    allowed = torch.rand(whole.shape, generator=case.generator()) < 0.7
    zeros = {name: torch.zeros_like(x) for name, x in case.law.parts.items()}
    inside = case.score({**zeros, case.main: torch.where(allowed, 0.0, -torch.inf).double()}) > -torch.inf
    left = case.scores.masked_fill(~inside, -torch.inf)
    law = case.law.condition(allowed)
    assert type(law) is type(case.law)
    assert law.batch_shape == case.law.batch_shape
    close(law.log_partition, left.logsumexp(0))
    posterior = left.log_softmax(0)
    posterior = torch.where(posterior.isnan(), -torch.inf, posterior)
    close(law.log_prob(case.structures).masked_fill(~case.listed, -torch.inf), posterior, size_of(case))
    partial = torch.where(case.feasible, left.logsumexp(0) - torch.where(case.feasible, case.log_z, 0.0), -torch.inf)
    close(case.law.log_prob_partial(allowed), partial, size_of(case))
    assert bool((case.law.log_prob_partial(allowed) <= 0).all())
    every = torch.ones_like(allowed)
    close(case.law.log_prob_partial(every), torch.where(case.feasible, 0.0, -torch.inf).double(), size_of(case))


def log_count_counts_the_allowed_structures(case: Case) -> None:
    assert case.law.log_count.dtype == torch.float64
    close(case.law.log_count, (case.scores > -torch.inf).sum(0).double().log())


def scores_that_no_structure_uses_are_irrelevant(case: Case) -> None:
    touched = touched_parts(case)
    scores = case.whole()[case.main]
    noise = case.noise(scores, 0.3) * 100
    other = case.build(**{**case.law.parts, case.main: torch.where(touched, scores, noise)})
    close(other.log_partition, case.law.log_partition)
    close(other.marginals, case.law.marginals)
    close(other.entropy(), case.law.entropy())
    close(other.log_prob(case.structures), case.law.log_prob(case.structures))
    close(other.topk(2)[0], case.law.topk(2)[0])
    close(other.log_count, case.law.log_count)
    assert torch.equal(other.mode, case.law.mode)


def touched_parts(case: Case) -> Tensor:
    """Main parts that some structure of the row holds."""
    zeros = {name: torch.zeros_like(x) for name, x in case.whole().items()}
    leaf = zeros[case.main].requires_grad_()
    total = torch.where(case.listed, case.score({**zeros, case.main: leaf}), 0.0).sum()
    return torch.autograd.grad(total, leaf)[0] > 0


def expanded_law_is_the_same_law(case: Case) -> None:
    law = case.law
    law.log_partition  # noqa: B018  (computed once, and shared by what is expanded)
    wide = law.expand((5, *law.batch_shape))
    assert type(wide) is type(law)
    assert wide.batch_shape == (5, *law.batch_shape)
    assert wide.event_shape == law.event_shape
    assert wide.log_partition.data_ptr() == law.log_partition.data_ptr()
    for name in ("log_partition", "marginals", "mode", "log_count"):
        assert torch.equal(getattr(wide, name), getattr(law, name).expand(5, *getattr(law, name).shape)), name
    assert torch.equal(wide.entropy(), law.entropy().expand(wide.batch_shape))
    value = case.structures.unsqueeze(1)
    assert torch.equal(wide.log_prob(value), law.log_prob(value).expand(-1, 5, *[-1] * len(law.batch_shape)))
    assert wide.topk(2)[1].shape == (2, 5, *law.batch_shape, *law.event_shape)
    assert torch.equal(wide.topk(2)[0][:, 3], law.topk(2)[0])
    assert torch.equal(wide.min_risk()[2], law.min_risk())
    assert wide.cross_entropy(law).shape == wide.batch_shape
    assert kl_divergence(law, wide).shape == wide.batch_shape
    assert wide.condition(torch.ones_like(law.marginals, dtype=torch.bool)).batch_shape == wide.batch_shape
    assert wide.expectation(law.marginals).shape == wide.batch_shape
    assert wide.sample((2,)).shape == (2, 5, *law.batch_shape, *law.event_shape)


def narrow_dtypes_are_summed_wide(case: Case) -> None:
    sizes = [
        float(x[x.abs() < torch.inf].abs().amax()) for x in case.law.parts.values() if bool((x.abs() < torch.inf).any())
    ]
    greatest = max(sizes, default=0.0)
    for dtype, digits in ((torch.float32, 1e-4), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        if dtype == torch.float16 and greatest > 1e3:
            continue
        narrow = case.build(**{name: x.to(dtype) for name, x in case.law.parts.items()})
        wide = case.build(**{name: x.to(dtype).double() for name, x in case.law.parts.items()})
        assert narrow.log_partition.dtype == narrow.marginals.dtype == narrow.entropy().dtype == dtype
        assert narrow.log_prob(case.structures).dtype == narrow.topk(1)[0].dtype == dtype
        close_to = {"rtol": max(digits, 1e-4), "atol": max(digits * 0.01, 1e-5, greatest * 1e-7), "check_dtype": False}
        torch.testing.assert_close(narrow.log_partition.double(), wide.log_partition, **close_to)
        torch.testing.assert_close(
            narrow.log_prob(case.structures).double(), wide.log_prob(case.structures), **close_to
        )
        torch.testing.assert_close(narrow.marginals.double(), wide.marginals, **{**close_to, "atol": max(digits, 1e-4)})
        torch.testing.assert_close(narrow.entropy().double(), wide.entropy(), **close_to)
        leaf = case.whole()[case.main].to(dtype).detach().clone().requires_grad_()
        parts = {**{name: x.to(dtype) for name, x in case.law.parts.items()}, case.main: leaf}
        (gradient,) = torch.autograd.grad(case.build(**parts).log_partition.sum(), leaf)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, narrow.marginals, rtol=max(digits, 1e-4), atol=1e-5)


CHECKS: tuple[Callable[[Case], None], ...] = (
    log_partition_is_the_sum_over_all_structures,
    log_prob_sums_to_one_and_is_score_less_log_partition,
    log_prob_depends_on_the_scores_as_by_hand,
    marginals_are_gradients_of_log_partition_and_enumerated_probabilities,
    mode_attains_the_maximum,
    topk_is_the_sorted_enumeration,
    samples_have_the_frequencies_of_the_law,
    entropy_is_the_enumerated_one,
    cross_entropy_and_divergence_are_the_enumerated_ones,
    expectation_is_the_enumerated_mean,
    minimum_risk_structure_has_the_least_expected_number_of_errors,
    parts_of_a_structure_are_its_indicator,
    hinge_is_the_greatest_violation_of_the_margin,
    score_function_gradient_is_the_exact_one,
    temperature_divides_the_scores,
    conditioning_is_bayes_rule,
    log_count_counts_the_allowed_structures,
    scores_that_no_structure_uses_are_irrelevant,
    expanded_law_is_the_same_law,
    narrow_dtypes_are_summed_wide,
)
