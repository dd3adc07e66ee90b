"""Forward-backward of a linear chain in probability space, scaled at every step (Rabiner 1989, section V.A).

    alpha_t(j) = q_t(j) sum_i alpha_{t-1}(i) A(i, j) / c_{t-1},   c_t = sum_j alpha_t(j)
    beta_{t-1}(i) = sum_j A(i, j) g_t(j),                          g_t(j) = q_t(j) beta_t(j) / d_{t+1},   d_t = sum_j
    g_t(j)

with q = exp(emissions - the first allowed one of the step) and A = exp(transitions - their maximum); log Z is the sum
of log c_t and of what was taken out. Four rows of the batch share the matrix product of a step (``tiles``), and the
K states of a step are padded to whole vectors. No [T, K, K] array exists, and no logarithm is taken inside.

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
from probllm.math.kernels.tiles import add_outer, product1, product4
from probllm.math.kernels.vectors import ahead, behind, multiply, scale, shift

WIDE, TINY, BROKEN = 1, 2, 4
# nats that one step may span in float32, and in float64 with zeros; below TINIEST a state is close to underflow
SPAN32, SPAN64, TINIEST, LEAST_SUM = 80.0, 200.0, 1e-200, 1e-100

# entries are finite and non-negative in a certified row, so sums may be reordered
_FAST = {"contract", "reassoc", "nsz", "arcp"}


@compiled(fastmath={"nnan", "nsz", "reassoc"}, error_model="numpy")
def extremes(x, first, last):  # type: ignore[no-untyped-def]
    high = low = x[first]
    for j in range(first + 1, last):
        high = x[j] if x[j] > high else high
        low = x[j] if x[j] < low else low
    return low, high


@compiled(fastmath={"reassoc"}, error_model="numpy")
def times_zero(x, first, last):  # type: ignore[no-untyped-def]
    """0 if every entry is finite, else NaN."""
    total = x[first] * 0
    for j in range(first, last):
        total += x[j] * 0
    return total


@compiled()
def lowest_allowed(x, first, last):  # type: ignore[no-untyped-def]
    """(least and greatest entry that is not -inf, whether a NaN or +inf is among them)."""
    low, high, broken = math.inf, -math.inf, False
    for j in range(first, last):
        if x[j] != x[j] or x[j] == math.inf:
            broken = True
        elif x[j] != -math.inf:
            low, high = min(low, x[j]), max(high, x[j])
    return low, high, broken


@compiled(fastmath={"contract"}, error_model="numpy")
def _exp32(x, bits, power, size):  # type: ignore[no-untyped-def]
    """x = exp(x) in float32 for entries in [-87, 0]: 2^n times the series of the remainder, in vector code."""
    for j in range(size):
        turns = np.rint(x[j] * np.float32(1.4426950408889634))
        bits[j] = (np.int32(turns) + np.int32(127)) << np.int32(23)
        r = (x[j] - turns * np.float32(0.693359375)) + turns * np.float32(2.12194440e-4)
        p = np.float32(1 / 5040)
        p = p * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1)
        x[j] = p * r + np.float32(1)
    for j in range(size):
        x[j] *= power[j]


@compiled(error_model="numpy")
def _exp64(x, size):  # type: ignore[no-untyped-def]
    for j in range(size):
        x[j] = math.exp(x[j])


@compiled(error_model="numpy")
def tables(transitions, table, back, offsets, spread, flags, first, step):  # type: ignore[no-untyped-def]
    """exp of the transitions around their maximum, once as they are and once transposed; one share of the [K, K]
    blocks.

    transitions [N, K, K]; table and back [N, K, P] with P - K columns of 0; offsets [N]: maxima; spread [N]: range in
    nats of the allowed scores; flags [N]: 0, WIDE if some are forbidden, BROKEN if one is NaN or +inf.
    """
    n, k, _ = transitions.shape
    size = k * k
    x = np.empty(size, table.dtype)
    bits = np.empty(size if table.itemsize == 4 else 0, np.int32)
    power = bits.view(np.float32)
    zero = transitions.dtype.type(0)
    for m in range(first, n, step):
        block = transitions[m].reshape(size)
        low, high = extremes(block, 0, size)
        flags[m] = 0
        if times_zero(block, 0, size) != 0:
            low, high, broken = lowest_allowed(block, 0, size)
            flags[m] = BROKEN if broken else WIDE
        if high < low or not high - low < 1e300:  # nothing is allowed at all
            low, high = zero, zero
        offsets[m], spread[m] = high, high - low
        for i in range(size):
            x[i] = block[i] - high
        if bits.size and flags[m] == 0 and high - low <= SPAN32:
            _exp32(x, bits, power, size)
        else:
            for i in range(size):
                x[i] = math.exp(x[i])
        for i in range(k):
            for j in range(k):
                table[m, i, j] = x[i * k + j]
                back[m, j, i] = x[i * k + j]
            for j in range(k, table.shape[2]):
                table[m, i, j] = back[m, i, j] = 0


@compiled()
def row_scores(emissions, start, end, n, width, q):  # type: ignore[no-untyped-def]
    """q[t * width + j] = the scores of one row of the batch, start and end folded in, less what is taken out of the
    first and the last step: small differences of large scores must not be rounded when start and end are added.

    The width - k columns behind each step repeat its first score. Returns what was taken out and 0, WIDE (some are
    -inf) or BROKEN (NaN or +inf).
    """
    k = emissions.shape[1]
    if width == k:
        flat = emissions.reshape(emissions.size)
        for j in range(n * k):
            q[j] = flat[j]
    else:
        for t in range(n):
            for j in range(k):
                q[t * width + j] = emissions[t, j]
            for j in range(k, width):
                q[t * width + j] = emissions[t, 0]
    last = (n - 1) * width
    offset = 0.0
    for side in range(2):
        at = last if side else 0
        extra = end if side else start
        own = q[at] if math.isfinite(q[at]) else q.dtype.type(0)
        base = extra[0] if math.isfinite(extra[0]) else q.dtype.type(0)
        offset += np.float64(own) + np.float64(base)
        for j in range(width):
            q[at + j] = (q[at + j] - own) + ((extra[j] if j < k else extra[0]) - base)
    if times_zero(q, 0, n * width) == 0:
        return offset, 0
    return offset, BROKEN if lowest_allowed(q, 0, n * width)[2] else WIDE


@compiled(error_model="numpy")
def exponentials(emissions, start, end, n, spread, zeros, span, width, q, bits, power):  # type: ignore[no-untyped-def]
    """q[t * width + j] = exp(score - the step's first allowed one), start and end folded in, for one row of the batch.

    Returns (what was taken out, flags). The width - k columns behind each step hold 1.
    """
    k, size = emissions.shape[1], n * width
    offset, flag = row_scores(emissions, start, end, n, width, q)
    finite = flag == 0
    if flag == BROKEN or (flag == WIDE and not zeros):
        return 0.0, flag
    for at in range(0, size, width):
        first = at
        while not finite and q[first] == -math.inf:
            first += 1
            if first == at + k:
                return 0.0, WIDE
        base = q[first]
        offset += base
        shift(q, base, at, width)
    if finite:
        low, high = extremes(q, 0, size)
    else:
        low, high, _ = lowest_allowed(q, 0, size)
    if not high - low + 2 * spread + math.log(k) <= span:
        return 0.0, WIDE
    if bits.size:
        _exp32(q, bits, power, size)
    else:
        _exp64(q, size)
    return offset, 0


@compiled()
def some_tiny(x, k):  # type: ignore[no-untyped-def]
    """Whether a positive entry is close to underflow."""
    seen = 0
    for j in range(k):
        seen |= (x[j] > 0) & (x[j] < TINIEST)
    return seen != 0


@compiled(fastmath=_FAST, error_model="numpy")
def forward_backward(  # type: ignore[no-untyped-def]
    emissions, start, end, lengths, forth, back, offsets, spread, order, zeros, span, backward,
    alpha, weights, marginals, log_z, flags, first, step,
):  # fmt: skip
    """One share of the blocks of four rows.

    emissions [B, T, K], start and end [B, K], lengths [B], order [B]: rows of a group by falling length
    forth and back [G, S, K, P], offsets [G, S], spread [G]: from ``tables``; S is 1 or T - 1; B / G rows in a row
    share a group
    backward: 0 log Z alone; 1 log Z and alpha; 2 everything
    alpha [B, T, P]: filtered probabilities.  marginals [B, T, P].  weights [B, T, P]: such that the pair (i, j)
        at (t - 1, t) has probability alpha[t - 1, i] forth[i, j] weights[t, j].  All are 0 at padded steps and in
        flagged rows. Where they are not wanted they are [B, 1, P], [0, 0, P].
    """
    rows, steps, k = emissions.shape
    groups, times = offsets.shape
    width = forth.shape[3]
    in_group = rows // groups
    blocks = (in_group + 3) // 4
    one = forth.dtype.type(1)
    x, y = np.zeros((4, width), forth.dtype), np.zeros((4, width), forth.dtype)
    q = np.empty((4, steps * width), forth.dtype)
    bits = np.empty(steps * width if forth.itemsize == 4 else 0, np.int32)
    power = bits.view(np.float32)
    sums = np.empty((4, steps), forth.dtype)
    inverse = np.empty(4, forth.dtype)
    which, until = np.zeros(4, np.int64), np.zeros(4, np.int64)
    product, totals = np.empty(4), np.empty(2, forth.dtype)
    for block in range(first, groups * blocks, step):
        g, at = block // blocks, 4 * (block % blocks)
        size = min(4, in_group - at)
        longest = 0
        for r in range(size):
            b = which[r] = order[g * in_group + at + r]
            n = lengths[b]
            log_z[b], flags[b] = exponentials(
                emissions[b], start[b], end[b], n, spread[g], zeros, span, width, q[r], bits, power
            )
            until[r] = 0 if flags[b] else n
            longest = max(longest, until[r])
            product[r], inverse[r] = 1.0, one
            for j in range(width):
                y[r, j] = one if j < k else one * 0
        for t in range(longest):
            s = max(0, t - 1) if times > 1 else 0
            if t:
                if size == 1:
                    product1(x, forth[g, s], y, k)
                else:
                    product4(x, forth[g, s], y, k)
            for r in range(size):
                if t >= until[r]:
                    continue
                b = which[r]
                c = ahead(y[r], inverse[r], q[r], t * width, x[r], width)
                if zeros and (c < LEAST_SUM or some_tiny(x[r], k)):
                    flags[b], until[r] = TINY, 0
                    continue
                if t:
                    log_z[b] += offsets[g, s]
                inverse[r] = one / c
                sums[r, t] = c
                if backward:
                    scale(x[r], one / c, alpha[b, t], width)
                product[r] *= c
                if product[r] < 1e-200 or product[r] > 1e200:
                    log_z[b] += math.log(product[r])
                    product[r] = 1.0
        for r in range(size):
            log_z[which[r]] += math.log(product[r])
        if backward == 2:
            for t in range(longest - 1, -1, -1):
                for r in range(size):
                    n = until[r]
                    if t >= n:
                        continue
                    b = which[r]
                    if t == n - 1:
                        inverse[r] = one
                        for j in range(width):
                            y[r, j] = one if j < k else one * 0
                    by = inverse[r]
                    behind(y[r], by, q[r], t * width, x[r], alpha[b, t], totals, width)
                    d, z = totals[0], totals[1]
                    if zeros and (z < LEAST_SUM or d < LEAST_SUM or some_tiny(x[r], k)):
                        flags[b], until[r] = TINY, 0
                        continue
                    multiply(alpha[b, t], y[r], one / z * by, marginals[b, t], width)
                    scale(x[r], one / (z * sums[r, t]), weights[b, t], width)
                    inverse[r] = one / d
                if t:
                    s = t - 1 if times > 1 else 0
                    if size == 1:
                        product1(x, back[g, s], y, k)
                    else:
                        product4(x, back[g, s], y, k)
        if backward:
            for r in range(size):
                b = which[r]
                n = 0 if flags[b] else lengths[b]
                alpha[b, n:] = 0
                if backward == 2:
                    weights[b, 0] = 0
                    weights[b, n:] = 0
                    marginals[b, n:] = 0


@compiled(error_model="numpy")
def expected_pairs(alpha, weights, row_weights, lengths, table, sums, first, step):  # type: ignore[no-untyped-def]
    """sums += expected transitions, each row times its weight; one share of the groups, or of the rows of a single
    group.

    alpha and weights [N, T, P] from ``forward_backward``; table [G, 1, K, P]; sums [G, P, P], or [shares, P, P] where
    G is 1
    """
    rows, steps, width = alpha.shape
    groups, k = table.shape[0], table.shape[2]
    in_group = rows // groups
    x, m = alpha.reshape(alpha.size), weights.reshape(weights.size)
    for piece in range(first, rows if groups == 1 else groups, step):
        for b in range(piece, piece + 1) if groups == 1 else range(piece * in_group, (piece + 1) * in_group):
            at = b * steps * width
            out = sums[first if groups == 1 else piece]
            add_outer(x, at, m, at + width, lengths[b] - 1, row_weights[b], out, k)
    if groups > 1:
        for piece in range(first, groups, step):
            for i in range(k):
                for j in range(k):
                    sums[piece, i, j] *= table[piece, 0, i, j]


@compiled()
def weighted(marginals, row_weights, tags, first, step):  # type: ignore[no-untyped-def]
    """tags [N, T, K] = marginals [N, T, P] times the weight of their row."""
    rows, steps, k = tags.shape
    width = marginals.shape[2]
    for b in range(first, rows, step):
        by = row_weights[b]
        if width == k:
            x, y = marginals[b].reshape(steps * k), tags[b].reshape(steps * k)
            for j in range(steps * k):
                y[j] = x[j] * by
        else:
            for t in range(steps):
                for j in range(k):
                    tags[b, t, j] = marginals[b, t, j] * by
