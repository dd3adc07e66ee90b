"""Expectation maximisation for hidden Markov taggers whose tags are known at some places, or at none.

    E: the expected number of times that each step is taken, given the symbols and the known tags (Baum-Welch): the
       gradient of the log likelihood in the log probability of the step
    M: rows proportional to (expected counts + concentration)

**Point estimate.** Each row has a Dirichlet prior whose density is taken in the softmax basis, prod_k theta_k^c, so
that its mode is (counts + c) / sum, and any c > 0 will do (MacKay 1998, "Choice of basis for Laplace approximation").
No iteration lowers log likelihood + sum of c log theta.

**Bayesian.** Variational Bayes (Beal 2003, "Variational algorithms for approximate Bayesian inference", chapter 3): a
row's posterior is Dirichlet(counts + c), and the E step takes exp E[log theta] for the probabilities. No iteration
lowers the bound sum log Z - KL(posterior, prior). With all tags known the posterior is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn.utils.rnn import pad_sequence

from probllm.models.hmm_laws import Rows, chain


class PartlyTagged(NamedTuple):
    """A batch: symbols and tags ``[B, T]`` (-1 where not known), and lengths ``[B]``."""

    symbols: Tensor
    tags: Tensor
    lengths: Tensor


def in_batches(sequences: Sequence[tuple[Tensor, Tensor]], max_tokens: int) -> list[PartlyTagged]:
    """Symbols and tags ``[T]`` of each sequence as padded batches of similar length, of some ``max_tokens`` each."""
    return [PartlyTagged(*batch) for batch in padded(sequences, max_tokens)]


def padded(sequences: Sequence[tuple[Tensor, Tensor]], most: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of tensors ``[T, ...]`` in batches of similar length, padding counted of some ``most`` steps each.

    Returns:
        the two of each batch ``[B, T, ...]``, padded with 0, and their lengths ``[B]``.
    """
    batches: list[list[tuple[Tensor, Tensor]]] = [[]]
    for sequence in sorted(sequences, key=lambda sequence: len(sequence[0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(sequence[0]) > most:
            batches.append([])
        batches[-1].append(sequence)
    return [
        (
            pad_sequence([first for first, _ in batch], batch_first=True),
            pad_sequence([second for _, second in batch], batch_first=True),
            torch.tensor([len(first) for first, _ in batch]),
        )
        for batch in batches
    ]


def map_rows(function: Callable[..., Tensor], *rows: Rows) -> Rows:
    """``function`` applied to the tables of the same name."""
    tables = (None if table[0] is None else function(*table) for table in zip(*rows, strict=True))
    return Rows(*tables)  # type: ignore[arg-type]


def total(rows: Rows) -> Tensor:
    """The sum of all numbers in the tables."""
    return sum((table.sum() for table in rows if table is not None), torch.zeros((), dtype=torch.float64))


def weighted(counts: Rows, log_probs: Rows, weight: float) -> Rows:
    """The counts of ``weight`` copies of a text, smoothed: each row keeps its sum but has these probabilities."""
    return map_rows(lambda n, row: weight * n.sum(-1, keepdim=True) * row.exp(), counts, log_probs)


def allowed_scores(tags: Tensor, num_tags: int) -> Tensor:
    """``[*batch, T, K]``: 0 for the tags that a position may have, ``-inf`` for those that its known tag rules out."""
    tags = tags.unsqueeze(-1)
    return torch.where((tags < 0) | (tags == torch.arange(num_tags, device=tags.device)), 0.0, -torch.inf)


def expected_counts(rows: Rows, batches: Iterable[PartlyTagged]) -> tuple[Rows, Tensor]:
    """Expected counts of each step, and the log likelihood of symbols and known tags, all summed over the data.

    Args:
        rows: log probabilities (of any sum, for variational Bayes), float64.
    Raises:
        ValueError: if a sequence is impossible.
    """
    steps = map_rows(lambda table: table.detach().clone().requires_grad_(), rows)
    emission = torch.zeros_like(rows.emission.T)
    log_likelihood = torch.zeros((), dtype=torch.float64)
    for symbols, tags, lengths in batches:
        scores = rows.emission.detach().T[symbols].requires_grad_()
        with torch.enable_grad():
            log_prob = chain(steps, scores + allowed_scores(tags, scores.shape[-1]), lengths).log_partition
            log_prob.sum().backward()
        if bool((log_prob == -torch.inf).any()):
            raise ValueError("data holds a sequence that the model gives probability 0")
        emission.index_add_(0, symbols.flatten(), _gradient(scores).flatten(0, -2))  # 0 at padding
        log_likelihood += log_prob.detach().sum()
    return map_rows(_gradient, steps)._replace(emission=emission.T), log_likelihood


def _gradient(table: Tensor) -> Tensor:
    return torch.zeros_like(table) if table.grad is None else table.grad


def maximise_expectation(
    rows: Rows, concentration: Rows, batches: Iterable[PartlyTagged], iterations: int, tolerance: float
) -> tuple[Rows, list[tuple[float, float]]]:
    """Point estimate by EM.

    Args:
        rows: log probabilities to begin with.
        concentration: of the Dirichlet priors.
        batches: gone through once an iteration.
        tolerance: stop when an iteration gains less than this part of the objective.
    Returns:
        log probabilities, and of each iteration (before it) the log likelihood and the log posterior density.
    """
    history: list[tuple[float, float]] = []
    rows = map_rows(torch.Tensor.detach, rows)
    for _ in range(iterations):
        counts, log_likelihood = expected_counts(rows, batches)
        log_density = log_likelihood + total(map_rows(torch.mul, concentration, rows))
        history.append((float(log_likelihood), float(log_density)))
        rows = map_rows(lambda n, c: (n + c).log() - (n + c).sum(-1, keepdim=True).log(), counts, concentration)
        if _has_converged(history, tolerance):
            break
    return rows, history


def variational_bayes(
    posterior: Rows, prior: Rows, batches: Iterable[PartlyTagged], iterations: int, tolerance: float
) -> tuple[Rows, list[tuple[float, float]]]:
    """Dirichlet posteriors of the rows; as ``maximise_expectation``, of concentrations, the bound in both places."""
    history: list[tuple[float, float]] = []
    posterior = map_rows(torch.Tensor.detach, posterior)
    for _ in range(iterations):
        expected_log = map_rows(lambda c: torch.digamma(c) - torch.digamma(c.sum(-1, keepdim=True)), posterior)
        counts, log_partition = expected_counts(expected_log, batches)
        bound = float(log_partition - divergence(posterior, prior))
        history.append((bound, bound))
        posterior = map_rows(torch.add, counts, prior)
        if _has_converged(history, tolerance):
            break
    return posterior, history


def divergence(posterior: Rows, prior: Rows) -> Tensor:
    """KL divergence of the Dirichlets of one set of concentrations from those of another, summed over rows."""
    return total(map_rows(lambda p, q: kl_divergence(Dirichlet(p), Dirichlet(q)), posterior, prior))


def log_evidence(counts: Rows, prior: Rows) -> Tensor:
    """Log probability of a text in which all tags are known, the probabilities integrated out: Dirichlet integrals."""

    def row(counts: Tensor, prior: Tensor) -> Tensor:
        both = counts + prior
        single = torch.lgamma(both) - torch.lgamma(prior)
        return single.sum(-1) + torch.lgamma(prior.sum(-1)) - torch.lgamma(both.sum(-1))

    return total(map_rows(row, counts, prior))


def _has_converged(history: list[tuple[float, float]], tolerance: float) -> bool:
    return len(history) > 1 and history[-1][1] - history[-2][1] < tolerance * abs(history[-1][1])
