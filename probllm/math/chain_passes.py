"""One compiled pass over a batch of chains, in the narrowest arithmetic that is certified for each row.

Float32 scores start in float32, in probability space. Rows that are not certified there go on to float64, still in
probability space and now with forbidden states; what is left goes to log space, which is right for every score. A ``Pass`` holds
what each tier left behind and gives the expectations of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probllm.math.kernels import chain_log, chain_scaled
from probllm.math.kernels.threads import run_shares
from probllm.math.kernels.vectors import padded


@dataclass
class ScaledPart:
    """Rows done in probability space: P(x_{t-1} = i, x_t = j) = alpha[t - 1, i] table[i, j] weights[t, j]."""

    rows: Tensor | None  # [N] of the batch, None for all
    alpha: Tensor  # [N, T, P], padded with 0 from K to whole vectors
    weights: Tensor  # [N, T, P]
    table: Tensor  # [G, S, K, P]
    good: Tensor | None = None  # [N] rows that are certified, None for all

    def pairs(self, row_weights: Tensor | None) -> Tensor:
        """Expected transitions ``[G, S, K, K]``."""
        n, steps, width = self.alpha.shape
        groups, times, k, _ = self.table.shape
        if steps == 1:
            return self.table.new_zeros(groups, times, k, k)
        weights = self.weights
        if row_weights is not None:
            weights = weights * row_weights.to(weights.dtype).view(-1, 1, 1)
        if times == 1:
            # weights[:, 0] is 0, so the step from one row's last position to the next row's first adds nothing
            before = self.alpha.view(groups, -1, width)[:, :-1]
            after = weights.view(groups, -1, width)[:, 1:]
            sums = torch.matmul(before.transpose(1, 2), after).unsqueeze(1)
        else:
            before = self.alpha.view(groups, n // groups, steps, width)[:, :, :-1].permute(0, 2, 3, 1)
            after = weights.view(groups, n // groups, steps, width)[:, :, 1:].permute(0, 2, 1, 3)
            sums = torch.matmul(before, after)
        return sums[..., :k, :k] * self.table[..., :k]


@dataclass
class LogPart:
    """Rows done in log space."""

    rows: Tensor  # [N] of the batch
    alpha: Tensor  # [N, T, K] logarithms
    expected: Tensor  # [N, S, K, K]


@dataclass
class Pass:
    """The result of ``forward_backward``."""

    log_z: Tensor  # [B] float64
    marginals: Tensor  # [B, T, K]
    groups: int
    scaled: list[ScaledPart]
    log: LogPart | None
    dtype: torch.dtype

    def tags(self, row_weights: Tensor) -> Tensor:
        """Expected tags of each row times its weight, ``[B, T, K]``."""
        return self.marginals * row_weights.view(-1, 1, 1)

    def pairs(self, row_weights: Tensor) -> Tensor:
        """Expected transitions times the rows' weights, ``[G, S, K, K]``: summed over the rows of a group."""
        total: Tensor | None = None
        in_group = max(1, self.log_z.shape[0] // self.groups)
        for part in self.scaled:
            rows = part.rows
            if rows is None:
                found = part.pairs(row_weights)
            else:
                found = part.pairs(row_weights[rows])
                if self.groups > 1:
                    found = found.new_zeros(self.groups, *found.shape[1:]).index_add_(0, rows // in_group, found)
            total = found if total is None else total + found
        if self.log is not None:
            rows, found = self.log.rows, self.log.expected * row_weights[self.log.rows].double().view(-1, 1, 1, 1)
            found = found.new_zeros(self.groups, *found.shape[1:]).index_add_(0, rows // in_group, found)
            total = found if total is None else total + found
        assert total is not None
        return total.to(self.dtype)


def forward_backward(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, backward: int
) -> Pass:
    """Runs the compiled recursions on CPU tensors in the shapes of ``chain.Chain``.

    Args:
        backward: 0 for log Z alone, 1 to keep alpha (for sampling), 2 for expectations too.
    Raises:
        ValueError: for scores that are NaN or +inf.
    """
    emissions, transitions, start, end, lengths = (
        x.detach().contiguous() for x in (emissions, transitions, start, end, lengths)
    )
    rows, steps, k = emissions.shape
    groups = transitions.shape[0]
    log_z = torch.empty(rows, dtype=torch.float64)
    done = Pass(log_z, emissions.new_empty(0), groups, [], None, emissions.dtype)
    if rows == 0:
        return _nothing(done, transitions)
    left: Tensor | None = None  # rows still to do; None for all
    dtype = emissions.dtype
    while True:
        zeros = dtype == torch.float64
        *tables, forbids = _tables(transitions, dtype)
        if forbids and not zeros:
            dtype = torch.float64
            continue
        scores = (emissions, start, end, lengths)
        if left is not None:
            scores = tuple(x[left] for x in scores)
            if groups > 1:
                tables = [x[left // (rows // groups)] for x in tables]
        part, found, marginals, flags = _scaled(scores, tuple(tables), zeros, dtype, backward)
        if (flags & chain_scaled.BROKEN).any():
            b = int(np.flatnonzero(flags & chain_scaled.BROKEN)[0])
            raise ValueError(
                f"emissions, start or end: a score of row {b if left is None else int(left[b])} of the batch is NaN or +inf "
                "(-inf forbids)"
            )
        if left is None and not flags.any():
            done.log_z, done.marginals = found, marginals.to(emissions.dtype)
            done.scaled.append(part)
            return done
        if done.marginals.dim() == 1:
            done.marginals = emissions.new_empty((rows, steps if backward == 2 else 0, k))
        good = torch.from_numpy(flags == 0)
        index = torch.arange(rows) if left is None else left
        if bool(good.any()):
            log_z[index[good]] = found[good]
            if backward == 2:
                done.marginals[index[good]] = marginals[good].to(emissions.dtype)
            if backward:
                part.rows, part.good = left, good  # flagged rows hold zeros
                done.scaled.append(part)
        left = index[~good]
        if not left.numel():
            return done
        if zeros:
            break
        dtype = torch.float64
    _log(emissions, transitions, start, end, lengths, left, backward, done)
    return done


def _tables(transitions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(exp of the transitions [G, S, K, P], the same transposed, maxima [G, S], range in nats [G], whether some are forbidden)."""
    groups, times, k, _ = transitions.shape
    n = groups * times
    table, back = torch.empty(2, groups, times, k, padded(k), dtype=dtype).unbind()
    offsets, spread = torch.empty(2, groups, times, dtype=torch.float64).unbind()
    flags = np.zeros(n, np.int64)
    if n:
        arguments = (
            transitions.view(n, k, k).numpy(),
            *(x.view(n, k, -1).numpy() for x in (table, back)),
            *(x.view(n).numpy() for x in (offsets, spread)),
            flags,
        )
        run_shares(chain_scaled.tables, arguments, n, 10.0 * n * k * k)
    if (flags & chain_scaled.BROKEN).any():
        raise ValueError("transitions: scores must not be NaN or +inf (-inf forbids)")
    widest = spread.amax(1) if times > 1 else spread[:, 0] if times else spread.new_zeros(groups)
    return table, back, offsets, widest, bool(flags.any())


def _scaled(
    scores: tuple[Tensor, ...], tables: tuple[Tensor, ...], zeros: bool, dtype: torch.dtype, backward: int
) -> tuple[ScaledPart, Tensor, Tensor, np.ndarray]:
    emissions, start, end, lengths = scores
    table, back, offsets, spread = tables
    rows, steps, k = emissions.shape
    groups = table.shape[0]
    order = torch.argsort(lengths.view(groups, -1), dim=1, descending=True)
    if groups > 1:
        order = order + torch.arange(0, rows, rows // groups).unsqueeze(1)
    width = table.shape[-1]
    alpha = torch.empty((rows, steps if backward else 1, width), dtype=dtype)
    weights, marginals = torch.empty((2, rows, steps if backward == 2 else 0, width), dtype=dtype).unbind()
    log_z = torch.empty(rows, dtype=torch.float64)
    flags = np.empty(rows, np.int64)
    span = chain_scaled.SPAN64 if zeros else chain_scaled.SPAN32
    arguments = (
        *(x.numpy() for x in (emissions, start, end, lengths, table, back, offsets, spread)),
        order.view(-1).numpy(), zeros, span, backward,
        *(x.numpy() for x in (alpha, weights, marginals, log_z)), flags,
    )  # fmt: skip
    pieces = groups * ((rows // groups + 3) // 4)
    run_shares(chain_scaled.forward_backward, arguments, pieces, rows * steps * k * (k + 32.0) * (1 + (backward == 2)))
    return ScaledPart(None, alpha, weights, table), log_z, marginals[..., :k], flags


def _log(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    lengths: Tensor,
    which: Tensor,
    backward: int,
    done: Pass,
) -> None:
    """Does the rows ``which`` in log space and writes them into ``done``."""
    _, steps, k = emissions.shape
    n, times = which.numel(), transitions.shape[1]
    table = transitions.double()
    back = table.transpose(-1, -2).contiguous()
    alpha = torch.empty((n, steps, k) if backward else (n, 0, k), dtype=torch.float64)
    marginals = torch.empty((n, steps, k) if backward == 2 else (n, 0, k), dtype=torch.float64)
    pairs = torch.empty((n, times, k, k) if backward == 2 else (n, 0, k, k), dtype=torch.float64)
    log_z = torch.empty(n, dtype=torch.float64)
    arguments = (
        *(x.numpy() for x in (emissions, start, end, lengths, table, back, which)), backward,
        *(x.numpy() for x in (alpha, marginals, pairs, log_z)),
    )  # fmt: skip
    run_shares(chain_log.forward_backward, arguments, n, 20.0 * n * steps * k * k)
    done.log_z[which] = log_z
    if backward == 2:
        done.marginals[which] = marginals.to(done.marginals.dtype)
    if backward:
        done.log = LogPart(which, alpha, pairs)


def _nothing(done: Pass, transitions: Tensor) -> Pass:
    """The pass over an empty batch."""
    groups, _, k, _ = transitions.shape
    empty = transitions.new_zeros(groups, 0, k) if groups else transitions.new_zeros(0, 0, k)
    done.scaled.append(ScaledPart(None, empty, empty, transitions))
    return done
