"""A linear chain as a product of matrices, multiplied in pairs: log Z in O(log T) depth, for long chains on a GPU.

    M_t(i, j) = A_t(i, j) + e_t(j),      Z = (start + e_1) M_2 M_3 ... M_n exp(end)      in the semiring's + and x

The product is associative (Hillis and Steele 1986; Sarkka and Garcia-Fernandez 2021 for hidden Markov models), so
neighbours are multiplied, then the products, and so on: T K^3 work in log2 T steps, where the recursion of ``chain``
does T K^2 in T steps. Its gradient runs back through the same tree and gives all expected parts in as few steps; over
``MAX`` it is one best sequence, over ``SAMPLING`` a random one. Steps behind a row's end are the neutral matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probllm.math.chain import is_wrapped
from probllm.math.chain_torch import safe_logsumexp
from probllm.math.semirings import LOG, Log, Semiring

# nats below the greatest factors at which an entry of a product is no longer certain: the reciprocal of its square,
# which second derivatives hold, must not overflow either
SMALLEST = {torch.float64: -220.0, torch.float32: -28.0}


def log_partition(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor) -> Tensor:
    """log Z ``[B]`` of scores in the shapes of ``chain.Chain``: equal to ``chain_torch.log_partition``.

    Differentiable any number of times and under ``torch.func``; log2 T steps, O(T K^2) memory a row.
    """
    groups = transitions.shape[0]
    by_group = [LOG.lift(x.unflatten(0, (groups, -1))) for x in (emissions, start, end)]
    parts = (by_group[0], LOG.lift(transitions.unsqueeze(1)), *by_group[1:])
    return inside(LOG, parts, lengths.view(groups, -1)).flatten()


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The semiring's sum over all tag sequences, ``[width, *lead]``.

    Args:
        parts: emissions ``[width, *lead, T, K]``, transitions ``[width, *lead, S, K, K]`` with S = 1 or T - 1,
            start and end ``[width, *lead, K]``; 1 in place of what a part shares.
        lengths: ``[*lead]`` from 1 to T.
    """
    emissions, transitions, start, end = parts
    steps, k = emissions.shape[-2:]
    total = semiring.times(emissions[..., 0, :], start)
    if steps > 1:
        matrices = semiring.times(transitions, emissions[..., 1:, None, :])
        like = emissions.detach()[0, ..., :1, 0]  # [*lead, 1]
        diagonal = torch.eye(k, dtype=torch.bool, device=emissions.device)
        neutral = torch.where(diagonal, semiring.ones((1, 1), like), semiring.zeros((1, 1), like))
        neutral = neutral.view(semiring.width, *(1,) * (matrices.dim() - 3), k, k)
        real = torch.arange(1, steps, device=lengths.device) < lengths.unsqueeze(-1)  # [*lead, T - 1]
        whole = product(semiring, torch.where(real[..., None, None], matrices, neutral))
        total = semiring.dot(total.unsqueeze(-1), whole, -2)
    return semiring.sum(semiring.times(total, end), -1)


def product(semiring: Semiring, matrices: Tensor) -> Tensor:
    """The product, in order, of matrices ``[width, ..., N, K, K]``, N >= 1: ``[width, ..., K, K]`` in log2 N steps."""
    while (count := matrices.shape[-3]) > 1:
        even = count - count % 2
        joined = matmul(semiring, matrices[..., 0:even:2, :, :], matrices[..., 1:even:2, :, :])
        matrices = joined if even == count else torch.cat([joined, matrices[..., even:, :, :]], -3)
    return matrices.squeeze(-3)


def matmul(semiring: Semiring, left: Tensor, right: Tensor) -> Tensor:
    """The semiring's product of square matrices; over logs by an ordinary product where that is exact."""
    if type(semiring) is not Log:
        return semiring.matmul(left, right)
    if is_wrapped(left) or is_wrapped(right) or left.dtype not in SMALLEST:
        return LOG.matmul(left, right)
    return log_matmul(left, right)


def log_matmul(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) @ exp(right)) of ``[..., K, K]``, exact for every score and differentiable.

    Rows and columns are scaled so that what ranges widely but alike in all rows (a step's emissions, the far past)
    cancels. An entry that could be reached and still came out tiny may have lost its terms: such matrices are done
    again by logsumexp.
    """
    # constants that cancel in the result, so that they need no gradient
    with torch.no_grad():
        by_row = _finite(right.amax(-1, keepdim=True))  # [..., K, 1]
        by_column = _finite((right - by_row).amax(-2, keepdim=True))  # [..., 1, K]
        by_left = _finite((left + by_row.mT).amax(-1, keepdim=True))  # [..., K, 1]
    sums = (left + by_row.mT - by_left).exp() @ (right - by_row - by_column).exp()
    tiny = sums < math.exp(SMALLEST[left.dtype])
    result = torch.where(tiny, -math.inf, torch.where(tiny, 1.0, sums).log() + by_left + by_column)
    with torch.no_grad():
        reached = (left > -math.inf).to(left.dtype) @ (right > -math.inf).to(left.dtype) > 0
        unsure = (tiny & reached).flatten(-2).any(-1)
    if bool(unsure.any()):
        exact = safe_logsumexp(left[unsure].unsqueeze(-1) + right[unsure].unsqueeze(-3), -2)
        result = result.index_put((unsure,), exact)
    return result


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -math.inf, 0.0, x)
