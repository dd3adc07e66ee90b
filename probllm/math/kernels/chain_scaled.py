"""Forward-backward of a linear chain in probability space, scaled at every step (Rabiner 1989, section V.A).

    alpha_t(j) = q_t(j) sum_i alpha_{t-1}(i) A(i, j) / c_{t-1},   c_t = sum_j alpha_t(j)
    beta_{t-1}(i) = sum_j A(i, j) g_t(j),                          g_t(j) = q_t(j) beta_t(j) / d_{t+1},   d_t = sum_j
    g_t(j)

with q = exp(emissions - the first allowed one of the step) and A = exp(transitions - their maximum); log Z is the sum
of log c_t and of what was taken out. ``forward`` goes forward alone; ``both_ways`` turns back at the end of each block
of four rows, while its q and alpha are in the cache, for the expected tags and transitions. The rows of a block share
the matrix product of a step (``tiles``), and the K states of a step are padded to whole vectors. No [T, K, K] array
exists, and no logarithm is taken inside.

Every row is certified, or says in ``flags`` why it is not (bits):
    WIDE    its scores range too widely for this precision, or a score is forbidden where ``zeros`` is False,
    TINY    a reachable state came close to underflow (checked where ``zeros`` is True),
    BROKEN  a score is NaN or +inf.
The outputs of a flagged row are 0: the caller computes it again in a wider precision or in log space.

Why the certificate holds. Let span = range of one step's emissions + 2 (range of the transitions) + ln K. Without
zeros all sums and quotients of a step lie within exp(+-span), so nothing over- or underflows. With zeros a state may
decay over many steps; one step shrinks it by at most exp(-span), so it must pass between TINIEST * exp(-span) and
TINIEST before it can vanish, and is seen there.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import (
    BROKEN,
    WIDE,
    exp_less,
    exponentials,
    extremes,
    lowest_allowed,
    times_zero,
)
from probllm.math.kernels.scaled_steps import backward_step, backward_steps, forward_step, forward_steps
from probllm.math.kernels.tiles import add_outer, product1, product4

TINY = 2
# nats that one step may span in float32, and in float64 with zeros; below TINIEST a state is close to underflow
SPAN32, SPAN64, TINIEST, LEAST_SUM = 80.0, 200.0, 1e-200, 1e-100

# entries are finite and non-negative in a certified row, so sums may be reordered
FAST = {"contract", "reassoc", "nsz", "arcp"}


@compiled()
def tables(transitions, both, numbers, first, step):  # type: ignore[no-untyped-def]
    """exp of the transitions around their maximum, one share of the [K, K] blocks.

    transitions [G, S, K, K]; both [2, G, S, K, P]: as they are and transposed, with P - K columns of 0
    numbers [3, G, S]: maxima; range in nats of the allowed scores; 0, WIDE if some are forbidden, BROKEN if one is NaN
    or +inf.
    """
    groups, times, k, _ = transitions.shape
    size = k * k
    x = np.zeros(size + 16, both.dtype)
    zero = transitions.dtype.type(0)
    for piece in range(first, groups * times, step):
        g, s = piece // times, piece % times
        block = transitions[g, s].reshape(size)
        low, high = extremes(block, 0, size)
        flag = 0
        if times_zero(block, 0, size) != 0:
            low, high, broken = lowest_allowed(block, 0, size)
            flag = BROKEN if broken else WIDE
        if high < low or not high - low < 1e300:  # nothing is allowed at all
            low, high = zero, zero
        numbers[0, g, s], numbers[1, g, s], numbers[2, g, s] = high, high - low, flag
        if flag == 0 and high - low <= SPAN32:
            for i in range(size):
                x[i] = block[i]
            exp_less(x, x.dtype.type(high), (size + 15) // 16 * 16)
        else:
            for i in range(size):
                x[i] = math.exp(block[i] - high)
        for i in range(k):
            for j in range(k):
                both[0, g, s, i, j] = x[i * k + j]
                both[1, g, s, j, i] = x[i * k + j]
            for j in range(k, both.shape[4]):
                both[0, g, s, i, j] = both[1, g, s, i, j] = 0


@compiled()
def some_tiny(x, k):  # type: ignore[no-untyped-def]
    """Whether a positive entry is close to underflow."""
    seen = 0
    for j in range(k):
        seen |= (x[j] > 0) & (x[j] < TINIEST)
    return seen != 0


@compiled()
def by_falling_length(lengths, groups, steps):  # type: ignore[no-untyped-def]
    """The rows of each group, the longest first, so that the four of a block end at about the same step."""
    rows = lengths.size
    order, places = np.arange(rows), np.zeros(steps + 2, np.int64)
    in_group = rows // groups
    for g in range(groups):
        places[:] = 0
        for b in range(g * in_group, (g + 1) * in_group):
            places[steps - lengths[b] + 1] += 1
        places[0] = g * in_group
        for n in range(1, steps + 1):
            places[n] += places[n - 1]
        for b in range(g * in_group, (g + 1) * in_group):
            order[places[steps - lengths[b]]] = b
            places[steps - lengths[b]] += 1
    return order


@compiled()
def set_out(lengths, order, begin, end, which, until, state, inverse, k):  # type: ignore[no-untyped-def]
    """Sets a block of rows out at a step before which nothing came: places [4] of the rows in the batch, their lengths,
    and a product of 1 in each of the K states. Returns how many rows there are."""
    size = min(4, end - begin)
    one = state.dtype.type(1)
    until[:] = 0
    for r in range(size):
        which[r], inverse[r] = order[begin + r], one
        until[r] = lengths[which[r]]
        for j in range(state.shape[1]):
            state[r, j] = one if j < k else one * 0
    return size


@compiled(fastmath=FAST)
def _forward_block(  # type: ignore[no-untyped-def]
    emissions, start, end, table, numbers, zeros, keep, places, home, q, sums, alpha, log_z, flags, which, until,
    size, x, y, inverse, totals,
):  # fmt: skip
    """``forward_block``, behind the exponentials of the scores."""
    width, found = table.shape[2], np.empty(4)
    most = allowance(numbers, zeros, table.shape[1])
    for r in range(size):
        b, n = which[r], until[r]
        room = q[places[r] * width : (places[r] + n) * width]
        log_z[b], flags[b] = exponentials(emissions[b], start[b], end[b], n, most, zeros, width, room, found)
        until[r] = 0 if flags[b] else n
    forward_block(
        table, numbers, zeros, keep, places, home, q, sums, alpha, log_z, flags, which, until, size, x, y, inverse,
        totals,
    )  # fmt: skip


@compiled()
def allowance(numbers, zeros, k):  # type: ignore[no-untyped-def]
    """How many nats the scores of a step may span beside the transitions, whose numbers [3, S] are those of
    ``tables``."""
    spread = 0.0
    for s in range(numbers.shape[1]):
        spread = max(spread, numbers[1, s])
    return (SPAN64 if zeros else SPAN32) - 2 * spread - math.log(k)


@compiled(fastmath=FAST)
def forward_block(  # type: ignore[no-untyped-def]
    table, numbers, zeros, keep, places, home, q, sums, alpha, log_z, flags, which, until, size, x, y, inverse,
    totals,
):  # fmt: skip
    """The way forward of the rows ``which`` [4] of a block.

    table [S, K, P] and numbers [3, S]: of their group
    places, home [4]: where a row begins in q and sums, and in alpha, in steps
    q: exponentials of the scores; what was taken out of them stands in log_z [B]
    until [4]: lengths, 0 for a row to pass over; becomes 0 where a row is flagged
    """
    k, width, times = table.shape[1], table.shape[2], table.shape[0]
    product, longest = np.ones(4), until.max()
    together = until.min() if size == 4 and not zeros else 0  # steps that four rows have in common
    for t in range(longest):
        s, there = max(0, t - 1) if times > 1 else 0, t if keep else 0
        if t:
            if size == 1:
                product1(x, table[s], y, k)
            else:
                product4(x, table[s], y, k)
        if t < together:
            forward_steps(y, inverse, q, places, t, x, alpha, home, there, sums, totals, width)
            low, high = 1.0, 1.0
            for r in range(4):
                product[r] *= totals[r]
                low, high = min(low, product[r]), max(high, product[r])
            if low < 1e-200 or high > 1e200:
                for r in range(4):
                    log_z[which[r]] += math.log(product[r])
                    product[r] = 1.0
            continue
        for r in range(size):
            if t >= until[r]:
                continue
            forward_step(y, inverse, q, places, t, x, alpha, home, there, sums, totals, width, r)
            c, b = totals[r], which[r]
            if zeros and (c < LEAST_SUM or some_tiny(x[r], k)):
                flags[b], until[r] = TINY, 0
                continue
            product[r] *= c
            if product[r] < 1e-200 or product[r] > 1e200:
                log_z[b] += math.log(product[r])
                product[r] = 1.0
    for r in range(size):
        b = which[r]
        log_z[b] += math.log(product[r])
        if times == 1:
            log_z[b] += (until[r] - 1) * numbers[0, 0]
        else:
            for t in range(1, until[r]):
                log_z[b] += numbers[0, t - 1]


@compiled(fastmath=FAST)
def backward_block(  # type: ignore[no-untyped-def]
    q, sums, alpha, table, zeros, row_weights, places, tags, flags, which, until, size, x, y, inverse,
    totals,
):  # fmt: skip
    """The way back of the rows ``which`` [4] of a block.

    table [S, K, P]: of their group, transposed
    places [4]: where a row begins in q, sums and alpha, in steps; q is used up (see ``backward_step``)
    until [4]: lengths, 0 for a row to pass over; becomes 0 where a row is flagged
    """
    k, width, times, steps = tags.shape[2], table.shape[2], table.shape[0], tags.shape[1]
    dtype = table.dtype
    one = dtype.type(1)
    by, home = np.empty(4, dtype), np.empty(4, np.int64)
    longest = 0
    for r in range(size):
        by[r], home[r] = row_weights[which[r]], which[r] * steps
        longest = max(longest, until[r])
    together = until.min() if size == 4 and not zeros else 0  # steps that four rows have in common
    for t in range(longest - 1, -1, -1):
        for r in range(size if t >= together - 1 else 0):
            if t == until[r] - 1:  # a row begins
                inverse[r] = one
                for j in range(width):
                    y[r, j] = one if j < k else one * 0
        if t < together:
            backward_steps(y, inverse, q, places, t, x, alpha, sums, by, tags, k, home, totals, width)
        else:
            for r in range(size):
                if t >= until[r]:
                    continue
                backward_step(y, inverse, q, places, t, x, alpha, sums, by, tags, k, home, totals, width, r)
                least = min(totals[r], one / inverse[r])
                if zeros and (least < LEAST_SUM or some_tiny(x[r], k)):
                    flags[which[r]], until[r] = TINY, 0
        if t:
            s = 0 if times == 1 else t - 1
            if size == 1:
                product1(x, table[s], y, k)
            else:
                product4(x, table[s], y, k)


@compiled(fastmath=FAST)
def forward(  # type: ignore[no-untyped-def]
    emissions, start, end, lengths, both, numbers, zeros, keep, q, sums, alpha, log_z, flags, first, step
):  # fmt: skip
    """The way forward of one share of the blocks of four rows.

    emissions [B, T, K], start and end [B, K], lengths [B]
    both [2, G, S, K, P] and numbers [3, G, S]: from ``tables``; S is 1 or T - 1; B / G rows in a row share a group
    q [N R P] and sums [N, R]: room for N rows of R >= T steps, four a share
    keep: whether alpha [B, T, P], filtered probabilities, is wanted; nothing is written behind the end of a row. Else
        it is room for four rows a share.
    log_z [B] and flags [B] are set.
    """
    rows, steps, k = emissions.shape
    _, groups, _, _, width = both.shape
    dtype = both.dtype
    in_group = rows // groups
    blocks = (in_group + 3) // 4
    order = by_falling_length(lengths, groups, steps)
    x, y = np.zeros((4, width), dtype), np.zeros((4, width), dtype)
    inverse, totals = np.empty(4, dtype), np.empty(4, dtype)
    which, until, home, places = np.zeros((4, 4), np.int64)
    for r in range(4):
        home[r] = 4 * first + r
        places[r] = home[r] * sums.shape[1]
    for block in range(first, groups * blocks, step):
        g, begin = block // blocks, block // blocks * in_group + 4 * (block % blocks)
        size = set_out(lengths, order, begin, (g + 1) * in_group, which, until, y, inverse, k)
        for r in range(size if keep else 0):
            home[r] = which[r] * steps
        _forward_block(
            emissions, start, end, both[0, g], numbers[:, g], zeros, keep, places, home, q, sums, alpha, log_z, flags,
            which, until, size, x, y, inverse, totals,
        )  # fmt: skip


@compiled(fastmath=FAST)
def both_ways(  # type: ignore[no-untyped-def]
    emissions, start, end, lengths, row_weights, both, numbers, zeros, q, sums, alpha, log_z, flags, tags, pairs,
    first, step,
):  # fmt: skip
    """The way forward and back of one share: of the blocks of four rows, or of the groups where there are several.

    emissions to numbers as in ``forward``; row_weights [B]
    q and alpha [N R P] and sums [N, R]: room for N rows of R >= T steps, four a share if S = 1. Else N = B and R = T,
        and there is left in them: the pair (i, j) at (t - 1, t) has probability alpha[t - 1, i] A[i, j] q[t, j], times
        the weight of the row; both are 0 where there is none
    tags [B, T, K]: probabilities of the tags, times the weight of the row; 0 where there is none
    pairs [shares or G, K, K] if S = 1: sums of the probabilities of pairs, times the weights of their rows
    """
    rows, steps, k = emissions.shape
    _, groups, times, _, width = both.shape
    dtype = both.dtype
    in_group = rows // groups
    blocks = (in_group + 3) // 4
    order = by_falling_length(lengths, groups, steps)
    one = dtype.type(1)
    shared = times == 1
    x, y = np.zeros((4, width), dtype), np.zeros((4, width), dtype)
    total = np.zeros((width, width), dtype)
    inverse, totals = np.empty(4, dtype), np.empty(4, dtype)
    which, until, places = np.zeros((3, 4), np.int64)
    # one group: its blocks are shared out, and each share has sums of its own
    pieces, in_piece = (blocks, 1) if groups == 1 else (groups, blocks)
    for piece in range(first, pieces, step):
        for block in range(piece * in_piece, (piece + 1) * in_piece):
            g, begin = block // blocks, block // blocks * in_group + 4 * (block % blocks)
            size = set_out(lengths, order, begin, (g + 1) * in_group, which, until, y, inverse, k)
            for r in range(size):
                places[r] = (4 * first + r if shared else which[r]) * sums.shape[1]
            _forward_block(
                emissions, start, end, both[0, g], numbers[:, g], zeros, True, places, places, q, sums, alpha, log_z,
                flags, which, until, size, x, y, inverse, totals,
            )  # fmt: skip
            backward_block(
                q, sums, alpha, both[1, g], zeros, row_weights, places, tags, flags, which, until, size, x, y,
                inverse, totals,
            )  # fmt: skip
            for r in range(size):
                b, n, at = which[r], until[r], places[r] * width
                tags[b, n:] = 0
                if not shared:
                    alpha[at + n * width : at + steps * width] = 0
                    q[at : at + width] = 0
                    q[at + width : at + n * width] *= one * row_weights[b]
                    q[at + n * width : at + steps * width] = 0
                elif n > 1:
                    add_outer(alpha, at, q, at + width, n - 1, one * row_weights[b], total, k)
        if shared and groups > 1:
            for i in range(k):
                for j in range(k):
                    pairs[piece, i, j] = total[i, j] * both[0, piece, 0, i, j]
            total[:] = 0
    if shared and groups == 1:
        for i in range(k):
            for j in range(k):
                pairs[first, i, j] = total[i, j] * both[0, 0, 0, i, j]
