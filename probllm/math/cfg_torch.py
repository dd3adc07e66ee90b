"""The sums of ``probllm.math.cfg`` over any semiring, in torch operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.semirings import LOG, Semiring


class HardRow(NamedTuple):
    """A row of a batch that a faster way has left to these sums."""

    row: int
    scores: tuple[Tensor, ...]  # its own, leaves of a graph
    log_z: Tensor  # of that graph


def hard_rows(
    twin: Callable[[Semiring, tuple[Tensor, ...], Tensor], Tensor],
    scores: tuple[Tensor, ...],
    lengths: Tensor,
    rows: Iterable[int],
    keep: bool,
) -> list[HardRow]:
    """log Z of some rows by ``inside`` or ``low_rank_inside``; ``keep``: with what ``add_hard`` needs."""
    found = []
    for row in rows:
        own = tuple(x.detach()[row if x.shape[0] > 1 else 0].double().requires_grad_(keep) for x in scores)
        with torch.set_grad_enabled(keep):
            value = twin(LOG, tuple(LOG.lift(x) for x in own), lengths[row])[0]
        found.append(HardRow(row, own, value))
    return found


def add_hard(slopes: list[Tensor], hard: list[HardRow], weights: Tensor) -> None:
    """Adds weights ``[B]`` times the gradient of log Z of the hard rows to that of the others, in place."""
    for row, own, value in hard:
        if bool(torch.isfinite(value)):
            parts = torch.autograd.grad(value, own, weights[row], retain_graph=True, allow_unused=True)
            for x, part in zip(slopes, parts, strict=True):
                if part is not None:
                    x[row if x.shape[0] > 1 else 0] += part


def inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Z ``[width, *lead]`` of spans ``[width, *lead, T, T, M]``, rules ``[.., N, M, M]``, root ``[.., N]`` and unary
    ``[.., N, P]``; one launch for all spans of a width."""
    spans, rules, root, unary = parts
    flat = rules.flatten(-2).unsqueeze(-3)  # [.., 1, N, M * M]

    def rewrite(left: Tensor, right: Tensor) -> Tensor:
        pairs = semiring.matmul(left.transpose(-1, -2), right)  # [.., spans, M, M]
        return semiring.dot(flat, pairs.flatten(-2).unsqueeze(-2), -1)

    return _inside(semiring, spans, root, unary, lengths, rewrite, None, None)


def low_rank_inside(semiring: Semiring, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """Z ``[width, *lead]`` of spans ``[width, *lead, T, T, M]``, head ``[.., N, R]``, left and right ``[.., R, M]``,
    root ``[.., N]`` and unary ``[.., N, P]``."""
    spans, head, left, right, root, unary = parts

    def rewrite(first: Tensor, second: Tensor) -> Tensor:
        ranks = semiring.dot(first, second, -2)  # [.., spans, R]
        return semiring.dot(head.unsqueeze(-3), ranks.unsqueeze(-2), -1)

    def project(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda beta: semiring.dot(table[..., : beta.shape[-1]].unsqueeze(-3), beta.unsqueeze(-2), -1)

    return _inside(semiring, spans, root, unary, lengths, rewrite, project(left), project(right))


def _inside(
    semiring: Semiring, spans: Tensor, root: Tensor, unary: Tensor, lengths: Tensor,
    rewrite: Callable[[Tensor, Tensor], Tensor], as_left: Callable[[Tensor], Tensor] | None,
    as_right: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """``rewrite``: what children ``[.., spans, splits, X]`` make, ``[.., spans, N]``. ``as_left`` and ``as_right``:
    symbols ``[.., spans, M or N]`` as such children (whose absent preterminals are zeros if None)."""
    size, symbols = spans.shape[-3], spans.shape[-1]
    n = root.shape[-1]
    leaves = spans.diagonal(dim1=-3, dim2=-2).transpose(-1, -2)  # [.., T, M]
    words = leaves[..., n:]
    single = semiring.times(semiring.dot(unary.unsqueeze(-3), words.unsqueeze(-2), -1), leaves[..., :n])
    total = single[..., 0, :]
    beta = torch.cat([single, words], -1)

    def child(make: Callable[[Tensor], Tensor] | None, beta: Tensor) -> Tensor:
        if make is not None:
            return make(beta)
        if beta.shape[-1] == symbols:
            return beta
        return torch.cat([beta, semiring.zeros((*beta.shape[1:-1], symbols - n), beta)], -1)

    # as in ``probllm.math.span_trees``: by first leaf, narrowest first; by last leaf, widest first
    by_first, by_last = child(as_left, beta).unsqueeze(-2), child(as_right, beta).unsqueeze(-2)
    for width in range(2, size + 1):
        made = rewrite(by_first[..., :-1, :, :], by_last[..., 1:, :, :])
        scores = spans.diagonal(width - 1, dim1=-3, dim2=-2).transpose(-1, -2)[..., :n]
        beta = semiring.times(made, scores)
        by_first = torch.cat([by_first[..., :-1, :, :], child(as_left, beta).unsqueeze(-2)], -2)
        by_last = torch.cat([child(as_right, beta).unsqueeze(-2), by_last[..., 1:, :, :]], -2)
        total = torch.where((lengths == width).unsqueeze(-1), beta[..., 0, :], total)
    return semiring.dot(root, total, -1)
