"""From scores to the numbers that a scaled recursion multiplies: exponentials in vector code, around each step's first.

    exp(x) = 2^n exp(r),   n = round(x / ln 2),   r = x - n ln 2 in two parts (Cody and Waite 1980)

One pass over a row takes each step's first score out, finds the range of what is left and exponentiates. Where the
range is too wide for the precision, or a score is not finite, the exponentials are thrown away and the row is looked at
again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit, shift

# what a row may be: certified (0), too wide or partly forbidden, or with a NaN or +inf
WIDE, BROKEN = 1, 4
# exp(r) for |r| <= ln 2 / 2 to 3e-9, the least error of this degree; in eight bytes the series does to the last bit
_NARROW = [1.0, 1.0, 0.49999993448, 0.16666520632, 0.041668388051, 0.0083687168981, 0.0013814598366]


def exp_vector(emit: Emit, x: Any, base: Any = None) -> Any:
    """exp(x) / 2^base, base being whole numbers; any number where the result is not a normal one."""
    builder, narrow = emit.builder, emit.bytes == 4
    mantissa = 23 if narrow else 52
    series = _NARROW if narrow else [1.0 / math.factorial(i) for i in range(14)]
    high = 0.693359375 if narrow else 6.93147180369123816490e-01
    low = math.log(2.0) - high if narrow else 1.90821492927058770002e-10

    # added to 1.5 * 2^mantissa a number loses its fraction and leaves n in the lowest bits
    magic = emit.constant(1.5 * 2.0**mantissa)
    magic = magic if base is None else builder.fsub(magic, base)  # then n - base: the exponent of the result
    shifted = emit.plus(emit.times(x, emit.constant(1.0 / math.log(2.0))), magic)
    n = builder.fsub(shifted, magic)
    r = emit.plus(x, emit.times(n, emit.constant(-high)))
    r = emit.plus(r, emit.times(n, emit.constant(-low)))
    value = emit.constant(series[-1])
    for coefficient in series[-2::-1]:
        value = emit.plus(emit.times(value, r), emit.constant(coefficient))
    whole = ir.VectorType(ir.IntType(8 * emit.bytes), emit.lanes)
    exponent = builder.shl(builder.bitcast(shifted, whole), ir.Constant(whole, [whole.element(mantissa)] * emit.lanes))
    return builder.bitcast(builder.add(builder.bitcast(value, whole), exponent), emit.vector)


def widened(builder: Any, value: Any, wide: Any) -> Any:
    """The value, or vector, in the wider type."""
    return value if value.type == wide else builder.fpext(value, wide)


def _exp_steps(lanes: int) -> Any:
    """(x, at, k, steps, width, q, place, found): q = exp(each step of x - its first score).

    The steps of x are k long and begin at ``at``, those of q ``width`` long at ``place``; the columns behind k get 1.
    found: the least and the greatest exponent, the sum of the exponents (not finite if one is not), that of the first
    scores.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def exp_steps(
        typingctx: Any, x: Any, at: Any, k: Any, steps: Any, width: Any, q: Any, place: Any, found: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            given = Emit(context, builder, sig.args[0].dtype, lanes)
            emit = Emit(context, builder, sig.args[5].dtype, lanes)
            x_data, q_data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 5, 7))
            _, at, k, steps, width, _, place, _ = arguments
            wide = context.get_value_type(types.float64)
            low, high, total = emit.variable(math.inf), emit.variable(-math.inf), emit.variable()
            firsts = cgutils.alloca_once_value(builder, wide(0.0))
            with cgutils.for_range(builder, steps, intp=emit.integer) as loop:
                here = builder.add(at, builder.mul(loop.index, k))
                there = builder.add(place, builder.mul(loop.index, width))
                first = builder.load(builder.gep(x_data, [here]))
                builder.store(builder.fadd(builder.load(firsts), widened(builder, first, wide)), firsts)
                padding, base = given.spread(first), emit.spread(widened(builder, first, emit.scalar))
                with emit.vectors(width) as (v, _):
                    scores = given.load_some(x_data, builder.add(here, v), builder.sub(k, v), padding)
                    scores = builder.fsub(widened(builder, scores, emit.vector), base)
                    emit.raise_to(high, scores)
                    emit.lower_to(low, scores)
                    emit.add_to(total, scores)
                    emit.store(exp_vector(emit, scores), q_data, builder.add(there, v))
            values = (emit.lowest(low), emit.highest(high), emit.total(total))
            for i, value in enumerate(values):
                builder.store(widened(builder, value, wide), builder.gep(f_data, [emit.integer(i)]))
            builder.store(builder.load(firsts), builder.gep(f_data, [emit.integer(3)]))
            return context.get_dummy_value()

        return types.void(x, at, k, steps, width, q, place, found), generate

    return exp_steps


def _exp_less(lanes: int) -> Any:
    """(x, by, size): x = exp(x - by)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def exp_less(typingctx: Any, x: Any, by: Any, size: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            data, base = emit.data(sig.args[0], arguments[0]), emit.spread(arguments[1])
            with emit.vectors(arguments[2]) as (v, _):
                emit.store(exp_vector(emit, builder.fsub(emit.load(data, v), base)), data, v)
            return context.get_dummy_value()

        return types.void(x, by, size), generate

    return exp_less


_steps4, _steps8, _steps16 = _exp_steps(4), _exp_steps(8), _exp_steps(16)
_exp_less16 = _exp_less(16)


@compiled()
def exp_less(x, by, size):  # type: ignore[no-untyped-def]
    """x[:size] = exp(x - by), for results that are normal numbers; size is a multiple of 16."""
    _exp_less16(x, by, size)


@compiled()
def exp_steps(x, at, k, steps, width, q, place, found):  # type: ignore[no-untyped-def]
    """See ``_exp_steps``."""
    if width % 16 == 0:
        _steps16(x, at, k, steps, width, q, place, found)
    elif width % 8 == 0:
        _steps8(x, at, k, steps, width, q, place, found)
    else:
        _steps4(x, at, k, steps, width, q, place, found)


@compiled(fastmath={"nnan", "nsz", "reassoc"})
def extremes(x, first, last):  # type: ignore[no-untyped-def]
    high = low = x[first]
    for j in range(first + 1, last):
        high = x[j] if x[j] > high else high
        low = x[j] if x[j] < low else low
    return low, high


@compiled(fastmath={"reassoc"})
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


@compiled()
def outer_steps(emissions, start, end, n, width, q, last):  # type: ignore[no-untyped-def]
    """The first step of ``row_scores`` at q[0:] and the last one at q[last:]; returns what was taken out of them."""
    k = emissions.shape[1]
    offset = 0.0
    for side in range(2):
        t, at = (n - 1, last) if side else (0, 0)
        extra = end if side else start
        if side == 0 or n > 1:
            for j in range(width):
                q[at + j] = emissions[t, j if j < k else 0]
        own = q[at] if math.isfinite(q[at]) else q.dtype.type(0)
        base = extra[0] if math.isfinite(extra[0]) else q.dtype.type(0)
        offset += np.float64(own) + np.float64(base)
        for j in range(width):
            q[at + j] = (q[at + j] - own) + ((extra[j] if j < k else extra[0]) - base)
    return offset


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
        for j in range(k, (n - 1) * k):
            q[j] = flat[j]
    else:
        for t in range(1, n - 1):
            for j in range(k):
                q[t * width + j] = emissions[t, j]
            for j in range(k, width):
                q[t * width + j] = emissions[t, 0]
    offset = outer_steps(emissions, start, end, n, width, q, (n - 1) * width)
    if times_zero(q, 0, n * width) == 0:
        return offset, 0
    return offset, BROKEN if lowest_allowed(q, 0, n * width)[2] else WIDE


@compiled()
def exponentials(emissions, start, end, n, most, zeros, width, q, found):  # type: ignore[no-untyped-def]
    """q[t * width + j] = exp(score - the step's first allowed one), start and end folded in, for one row of the batch.

    most: nats that the scores of the row may span; zeros: whether some may be -inf; found: room for four numbers.
    Returns (what was taken out, flag). The width - k columns behind each step hold 1.
    """
    k, last = emissions.shape[1], (n - 1) * width
    offset = outer_steps(emissions, start, end, n, width, q, last)
    exp_steps(q, 0, width, 1, width, q, 0, found)
    low, high, total = found[0], found[1], found[2]
    offset += found[3]
    if n > 1:
        exp_steps(q, last, width, 1, width, q, last, found)
        low, high, total = min(low, found[0]), max(high, found[1]), total + found[2]
        offset += found[3]
    if n > 2:
        exp_steps(emissions.reshape(emissions.size), k, k, n - 2, width, q, width, found)
        low, high, total = min(low, found[0]), max(high, found[1]), total + found[2]
        offset += found[3]
    if math.isfinite(total) and high - low <= most:
        return offset, 0
    return _with_forbidden(emissions, start, end, n, most, zeros, width, q)


@compiled()
def _with_forbidden(emissions, start, end, n, most, zeros, width, q):  # type: ignore[no-untyped-def]
    """``exponentials`` of a row that is not finite or spans too much: says which, or goes around what is forbidden."""
    k, size = emissions.shape[1], n * width
    offset, flag = row_scores(emissions, start, end, n, width, q)
    if flag != WIDE or not zeros:
        return 0.0, BROKEN if flag == BROKEN else WIDE
    for at in range(0, size, width):
        first = at
        while q[first] == -math.inf:
            first += 1
            if first == at + k:
                return 0.0, WIDE
        base = q[first]
        offset += base
        shift(q, base, at, width)
    low, high, _ = lowest_allowed(q, 0, size)
    if not high - low <= most:
        return 0.0, WIDE
    for j in range(size):
        q[j] = math.exp(q[j])
    return offset, 0
