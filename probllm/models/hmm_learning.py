"""EM, variational Bayes and stochastic EM of a hidden Markov model with conjugate emissions.

    E: gamma_t(k) = P(z_t = k | x) and the expected transitions, by one pass over the chain (Baum-Welch)
    M: each row of the chain to the mode of its Dirichlet, each emission to the mode of its posterior

The point estimate never lowers log likelihood + log prior. Variational Bayes (Beal 2003, chapter 3) keeps the
posteriors in place of their modes and never lowers the bound, sum log Z - KL. Stochastic EM (Cappe and Moulines 2009)
averages the statistics of minibatches with steps (t + 2)^-step, and sees the data once or a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probllm.math.chain import as_chain
from probllm.math.conjugate import dirichlet_divergence, expected_log
from probllm.math.hmm import expected_steps
from probllm.models.hmm_emissions import Emissions, Statistics
from probllm.models.hmm_estimation import padded


class Series(NamedTuple):
    """A batch of sequences: observations ``[B, T, ...]``, lengths ``[B]``, and which steps were observed ``[B, T]``."""

    observations: Tensor
    lengths: Tensor
    seen: Tensor


Rows = tuple[Tensor, ...]  # log probabilities of the chain, or counts: initial [K], transition [K, K], durations, ...
# rows and scores [B, T, K] and lengths -> log Z [B], gamma [B, T, K] and the rows' expected counts
Expect = Callable[[Rows, Tensor, Tensor], tuple[Tensor, Tensor, Rows]]


@dataclass
class Estimate:
    """The state of a run: the chain's rows, float64, and the emissions, whose parameters it changes."""

    rows: Rows
    concentrations: Rows  # of the Dirichlet priors, 0 where something is forbidden for good
    emissions: Emissions
    expect: Expect

    @property
    def num_states(self) -> int:
        return len(self.rows[0])


class Sums(NamedTuple):
    """Expected statistics of some sequences, and their log likelihood."""

    log_likelihood: Tensor
    rows: Rows
    emission: Statistics

    def mixed(self, other: Sums, mine: float, theirs: float) -> Sums:
        """``mine`` times these and ``theirs`` times the others."""

        def mix(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(mine * a + theirs * b for a, b in zip(one, two, strict=True))

        (log_likelihood,) = mix((self.log_likelihood,), (other.log_likelihood,))
        return Sums(log_likelihood, mix(self.rows, other.rows), mix(self.emission, other.emission))


def batches_of(sequences: Sequence[tuple[Tensor, Tensor]], max_steps: int) -> list[Series]:
    """Observations ``[T, ...]`` and what was seen ``[T]`` as padded batches of similar length."""
    return [Series(x, lengths, seen) for x, seen, lengths in padded(sequences, max_steps)]


def chain_steps(rows: Rows, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Rows]:
    """The E step of a first-order chain (``Expect``)."""
    log_z, gamma, moves = expected_steps(as_chain(scores, rows[1], rows[0], None, lengths))
    return log_z, gamma, (gamma[:, 0].sum(0), moves)


def expect(run: Estimate, rows: Rows, score: Callable[[Tensor], Tensor], batch: Series) -> tuple[Sums, Tensor]:
    """The E step of one batch under ``score(observations [N, ...]) -> [N, K]``, and gamma ``[B, T, K]``.

    Raises:
        ValueError: if a sequence is impossible.
    """
    seen = batch.seen
    observed = batch.observations[seen]
    scores = torch.zeros(*seen.shape, run.num_states, dtype=torch.float64)
    scores[seen] = score(observed)
    log_z, gamma, counts = run.expect(rows, scores, batch.lengths)
    if bool((log_z == -torch.inf).any()):
        raise ValueError("data holds a sequence that the model gives probability 0")
    return Sums(log_z.sum(), counts, run.emissions.statistics(observed, gamma[seen])), gamma


def _expect_all(run: Estimate, rows: Rows, score: Callable[[Tensor], Tensor], data: list[Series]) -> Sums:
    total: Sums | None = None
    for batch in data:
        found = expect(run, rows, score, batch)[0]
        total = found if total is None else total.mixed(found, 1.0, 1.0)
    assert total is not None
    return total


def log_prior(run: Estimate) -> Tensor:
    """In the softmax basis, where the mode of a Dirichlet is (counts + concentration) / sum."""
    rows = (torch.where(c > 0, c * row, 0.0).sum() for row, c in zip(run.rows, run.concentrations, strict=True))
    return sum(rows, run.emissions.log_prior())


def _normalised(counts: Tensor, concentration: Tensor) -> Tensor:
    """log of (counts + concentration) / sum; -inf where forbidden."""
    return torch.where(concentration > 0, (counts + concentration).log(), -torch.inf).log_softmax(-1)


def _maximise(run: Estimate, sums: Sums) -> None:
    run.rows = tuple(_normalised(n, c) for n, c in zip(sums.rows, run.concentrations, strict=True))
    run.emissions.maximise(sums.emission)


def maximise_expectation(
    run: Estimate, data: list[Series], iterations: int, tolerance: float
) -> Iterator[tuple[float, float]]:
    """EM; yields log likelihood and log posterior density before each iteration, and stops when they gain little."""
    before = -torch.inf
    for _ in range(iterations):
        sums = _expect_all(run, run.rows, run.emissions.log_prob, data)
        density = float(sums.log_likelihood + log_prior(run))
        yield float(sums.log_likelihood), density
        if density - before < tolerance * (abs(density) + 1):
            return
        before = density
        _maximise(run, sums)


def variational_bayes(
    run: Estimate, data: list[Series], iterations: int, tolerance: float
) -> Iterator[tuple[float, float]]:
    """Variational Bayes from the point estimate; yields the bound, twice, before each iteration.

    The run ends with the parameters that stand for the posterior.
    """
    sums = _expect_all(run, run.rows, run.emissions.log_prob, data)
    before = -torch.inf
    for _ in range(iterations):
        counts, emission = sums.rows, sums.emission
        posterior = run.emissions.posterior(emission)

        def score(x: Tensor, posterior: Any = posterior) -> Tensor:
            return run.emissions.expected_log_prob(posterior, x)

        pairs = list(zip(counts, run.concentrations, strict=True))
        expected = tuple(_in_allowed(expected_log, n + c, c, -torch.inf) for n, c in pairs)
        sums = _expect_all(run, expected, score, data)
        divergence = sum(float(dirichlet_divergence(_allowed(n + c, c), _allowed(c, c))) for n, c in pairs)
        bound = float(sums.log_likelihood - run.emissions.divergence(posterior, emission)) - divergence
        run.rows = tuple(_normalised(n, c) for n, c in pairs)
        run.emissions.set_mean(posterior)
        yield bound, bound
        if bound - before < tolerance * (abs(bound) + 1):
            return
        before = bound


def _allowed(x: Tensor, concentration: Tensor) -> Tensor:
    """What is not forbidden, as many a row."""
    return x[concentration > 0].reshape(*x.shape[:-1], -1)


def _in_allowed(function: Callable[[Tensor], Tensor], x: Tensor, concentration: Tensor, rest: float) -> Tensor:
    """The function of the rows without what is forbidden, in their places; ``rest`` elsewhere."""
    return torch.full_like(x, rest).masked_scatter(concentration > 0, function(_allowed(x, concentration)))


def stochastic_em(
    run: Estimate, data: list[Series], epochs: int, step: float, seed: int
) -> Iterator[tuple[float, float]]:
    """Stochastic EM; yields the running log likelihood and posterior density of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(batch.lengths) for batch in data)
    sums: Sums | None = None
    turn = 0
    for _ in range(epochs):
        log_likelihood = 0.0
        for index in torch.randperm(len(data), generator=generator).tolist():
            batch = data[index]
            found = expect(run, run.rows, run.emissions.log_prob, batch)[0]
            log_likelihood += float(found.log_likelihood)
            scale = total / len(batch.lengths)
            rate = 1.0 if sums is None else (turn + 2) ** -step
            sums = (found if sums is None else sums).mixed(found, 1 - rate, rate * scale)
            turn += 1
            _maximise(run, sums)
        yield log_likelihood, log_likelihood + float(log_prior(run))


def matched(one: Tensor, other: Tensor) -> Tensor:
    """The order in which ``other``'s states come closest to those of ``one``.

    Args:
        one, other: probabilities of states at the same steps, ``[N, K]`` each.
    Returns:
        ``order [K]``: state i of ``one`` is state ``order[i]`` of ``other``, by the assignment of the greatest expected
        number of steps at which both are in matched states (Kuhn 1955).
    """
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    if one.shape != other.shape:
        raise ValueError(f"other: expected shape {list(one.shape)}, got {list(other.shape)}")
    return torch.from_numpy(linear_sum_assignment(-(one.T @ other).numpy())[1])
