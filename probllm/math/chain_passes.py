"""One compiled pass over a batch of chains, in the narrowest arithmetic that is certified for each row.

Float32 scores start in float32, in probability space. Rows that are not certified there go on to float64, still in
probability space and now with forbidden states; what is left goes to log space, which is right for every score. A
``Pass`` holds what each tier left behind and gives the expectations of the whole batch.
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
    lengths: np.ndarray  # [N]
    alpha: Tensor  # [N, T, P], padded with 0 from K to whole vectors
    weights: Tensor  # [N, T, P]
    table: Tensor  # [G, S, K, P]
    back: Tensor  # [G, S, K, P]: the same, transposed
    good: Tensor | None = None  # [N] rows that are certified, None for all

    def pairs(self, row_weights: Tensor) -> Tensor:
        """Expected transitions ``[G, S, K, K]``, summed over the rows of a group, each times its weight."""
        n, steps, width = self.alpha.shape
        groups, times, k, _ = self.table.shape
        if steps == 1:
            return self.table.new_zeros(groups, times, k, k)
        if times > 1:
            after = self.weights[:, 1:] * row_weights.to(self.weights.dtype).view(-1, 1, 1)
            before = self.alpha[:, :-1].reshape(groups, n // groups, steps - 1, width).permute(0, 2, 3, 1)
            sums = torch.matmul(before, after.view(groups, n // groups, steps - 1, width).permute(0, 2, 1, 3))
            return sums[..., :k, :k] * self.table[..., :k]
        counts = np.zeros((torch.get_num_threads() if groups == 1 else groups, width, width), self.alpha.numpy().dtype)
        by = row_weights.to(self.weights.dtype).contiguous().numpy()
        arguments = (self.alpha.numpy(), self.weights.numpy(), by, self.lengths, self.table.numpy(), counts)
        run_shares(chain_scaled.expected_pairs, arguments, n if groups == 1 else groups, 0.025 * n * steps * k * k)
        if groups == 1:
            return torch.from_numpy(counts.sum(0)[:k, :k] * self.table.numpy()[0, 0, :, :k]).view(1, 1, k, k)
        return torch.from_numpy(counts[:, None, :k, :k])


@dataclass
class LogPart:
    """Rows done in log space."""

    rows: Tensor  # [N] of the batch
    alpha: Tensor  # [N, T, K] logarithms
    back: Tensor  # [G, S, K, K]: transposed transitions in float64
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
    # the marginals [B, T, P] as one scaled pass left them, where no other was needed
    dense: np.ndarray | None = None

    def tags(self, row_weights: Tensor) -> Tensor:
        """Expected tags of each row times its weight, ``[B, T, K]``."""
        rows, steps, k = self.marginals.shape
        if self.dense is None:
            return self.marginals * row_weights.view(-1, 1, 1)
        # torch would wake its threads for this small product, which costs more than the product
        tags: np.ndarray = np.empty((rows, steps, k), self.dense.dtype)
        by = row_weights.contiguous().numpy()
        run_shares(chain_scaled.weighted, (self.dense, by, tags), rows, 0.15 * rows * steps * k)
        return torch.from_numpy(tags)

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
    arrays = [x.detach().contiguous().numpy() for x in (emissions, transitions, start, end, lengths)]
    scores, transitions_ = [arrays[0], *arrays[2:]], arrays[1]
    rows, steps, k = emissions.shape
    groups = transitions.shape[0]
    done = Pass(torch.empty(0), torch.empty(0), groups, [], None, emissions.dtype)
    if rows == 0:
        return _nothing(done, transitions)
    left: np.ndarray | None = None  # rows still to do; None for all
    dtype: type = arrays[0].dtype.type
    while True:
        zeros = dtype is np.float64
        tables, forbids = _tables(transitions_, dtype)
        if forbids and not zeros:
            dtype = np.float64
            continue
        if left is None:
            its = scores
        else:
            its = [x[left] for x in scores]
            if groups > 1:
                tables = [x[left // (rows // groups)] for x in tables]
        part, log_z, marginals, flags = _scaled(its, tables, zeros, dtype, backward)
        if left is None and not flags.any():
            done.log_z, done.marginals = torch.from_numpy(log_z), marginals[..., :k].to(emissions.dtype)
            if marginals.dtype == emissions.dtype and backward == 2:
                done.dense = marginals.numpy()
            done.scaled.append(part)
            return done
        if (flags & chain_scaled.BROKEN).any():
            b = int(np.flatnonzero(flags & chain_scaled.BROKEN)[0])
            raise ValueError(
                f"emissions, start or end: a score of row {b if left is None else left[b]} of the batch is NaN or +inf "
                "(-inf forbids)"
            )
        if left is None:
            done.log_z = torch.empty(rows, dtype=torch.float64)
            done.marginals = emissions.new_empty((rows, steps if backward == 2 else 0, k))
        good = flags == 0
        index = np.arange(rows) if left is None else left
        if good.any():
            done.log_z[index[good]] = torch.from_numpy(log_z[good])
            if backward == 2:
                done.marginals[index[good]] = marginals[torch.from_numpy(good), :, :k].to(emissions.dtype)
            if backward:
                part.rows = None if left is None else torch.from_numpy(left)
                part.good = torch.from_numpy(good)  # flagged rows hold zeros
                done.scaled.append(part)
        left = index[~good]
        if not left.size:
            return done
        if zeros:
            break
        dtype = np.float64
    _log(scores, transitions_, left, backward, done)
    return done


def _tables(transitions: np.ndarray, dtype: type) -> tuple[list[np.ndarray], bool]:
    """The four arguments of the kernel that speak of transitions, and whether some are forbidden.

    They are exp of the transitions ``[G, S, K, P]``, the same transposed, maxima ``[G, S]``, range in nats ``[G]``.
    """
    groups, times, k, _ = transitions.shape
    n = groups * times
    both = np.empty((2, n, k, padded(k)), dtype)
    numbers = np.zeros((2, n))
    flags = np.zeros(n, np.int64)
    if n:
        arguments = (transitions.reshape(n, k, k), both[0], both[1], numbers[0], numbers[1], flags)
        run_shares(chain_scaled.tables, arguments, n, 2.0 * n * k * k)
    seen = flags[0] if n == 1 else np.bitwise_or.reduce(flags)
    if seen & chain_scaled.BROKEN:
        raise ValueError("transitions: scores must not be NaN or +inf (-inf forbids)")
    spread = numbers[1] if times == 1 else numbers[1].reshape(groups, times).max(1, initial=0.0)
    shape = (groups, times, k, both.shape[-1])
    return [both[0].reshape(shape), both[1].reshape(shape), numbers[0].reshape(groups, times), spread], bool(seen)


def _scaled(
    scores: list[np.ndarray], tables: list[np.ndarray], zeros: bool, dtype: type, backward: int
) -> tuple[ScaledPart, np.ndarray, Tensor, np.ndarray]:
    emissions, lengths = scores[0], scores[3]
    rows, steps, k = emissions.shape
    groups, width = tables[0].shape[0], tables[0].shape[-1]
    order = np.argsort(-lengths.reshape(groups, -1), axis=1, kind="stable")
    if groups > 1:
        order += np.arange(0, rows, rows // groups)[:, None]
    if backward == 2:
        # one block: where it is large, numpy asks for huge pages, and thousands of page faults fall away
        block: np.ndarray = np.empty((3, rows, steps, width), dtype)
        alpha, weights, marginals = block
    else:
        alpha, weights, marginals = (np.empty((rows, n, width), dtype) for n in (steps if backward else 1, 0, 0))
    log_z, flags = np.empty(rows), np.empty(rows, np.int64)
    span = chain_scaled.SPAN64 if zeros else chain_scaled.SPAN32
    arguments = (*scores, *tables, order.reshape(-1), zeros, span, backward, alpha, weights, marginals, log_z, flags)
    pieces = groups * ((rows // groups + 3) // 4)
    run_shares(
        chain_scaled.forward_backward, arguments, pieces, 0.025 * rows * steps * k * (k + 32) * (1 + (backward == 2))
    )
    part = ScaledPart(None, lengths, *(torch.from_numpy(x) for x in (alpha, weights, tables[0], tables[1])))
    return part, log_z, torch.from_numpy(marginals), flags


def _log(scores: list[np.ndarray], transitions: np.ndarray, which: np.ndarray, backward: int, done: Pass) -> None:
    """Does the rows ``which`` in log space and writes them into ``done``."""
    _, steps, k = scores[0].shape
    n, times = which.size, transitions.shape[1]
    table = transitions.astype(np.float64)
    back = np.ascontiguousarray(table.swapaxes(-1, -2))
    alpha = np.empty((n, steps if backward else 0, k))
    marginals = np.empty((n, steps if backward == 2 else 0, k))
    pairs = np.empty((n, times if backward == 2 else 0, k, k))
    log_z = np.empty(n)
    arguments = (*scores, table, back, which, backward, alpha, marginals, pairs, log_z)
    run_shares(chain_log.forward_backward, arguments, n, 20.0 * n * steps * k * k)
    rows = torch.from_numpy(which)
    done.log_z[rows] = torch.from_numpy(log_z)
    if backward == 2:
        done.marginals[rows] = torch.from_numpy(marginals).to(done.marginals.dtype)
    if backward:
        done.log = LogPart(rows, torch.from_numpy(alpha), torch.from_numpy(back), torch.from_numpy(pairs))


def _nothing(done: Pass, transitions: Tensor) -> Pass:
    """The pass over an empty batch."""
    groups, _, k, _ = transitions.shape
    empty = transitions.new_zeros(groups, 0, k) if groups else transitions.new_zeros(0, 0, k)
    done.scaled.append(ScaledPart(None, np.zeros(0, np.int64), empty, empty, transitions, transitions))
    return done
