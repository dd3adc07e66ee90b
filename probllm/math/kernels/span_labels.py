"""Sums over the labels of the spans of a sentence, and their shares of it, in vectors of the scores' own precision.

    total(i, j) = sum_k exp(spans[i, j, k]) / 2^m,   gradient[i, j, k] = exp(spans[i, j, k]) / 2^m * marginal / total

m is the whole number nearest to the greatest score over ln 2: exp(x) is 2^n exp(r) by itself, so that to divide by 2^m
is to subtract whole numbers, and no digit of a score is lost in a difference. A span that lies too far below has an m
of its own. ``log_total`` and ``log_gradient`` do the same in logarithms, for scores of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential
from probllm.math.kernels.exponentials import BROKEN, exp_vector
from probllm.math.kernels.logarithm import logarithm
from probllm.math.kernels.vectors import Emit

WIDE, UNEVEN = 1, 2  # see ``totals_of``
_PER_LN2 = 1 / math.log(2.0)
_PARTS = 8  # lanes where each span is by itself
# for 4 and 8 bytes a number: how far below the greatest score exp is 0, a total that has lost nothing, and the greatest
# score that exp is right for
_DEPTH4, _DEPTH8 = 86.0, 700.0
_SURE4, _SURE8 = 1e-28, 1e-250
_MOST4, _MOST8 = 2e4, 7e5
_LEAST_SUM = 1e-60  # of the totals of wider spans, beside which one may have a scale of its own
_REACH = 50.0  # how far above a guess of the greatest score others may be


def _all(emit: Emit, n: Any, use: Callable[[Any, Any], None]) -> None:
    """use(k, None) for whole vectors of n entries, then use(k, count) for the rest of them."""
    builder, whole = emit.builder, emit.integer
    blocks = builder.and_(n, whole(-emit.lanes))
    with cgutils.for_range_slice(builder, whole(0), blocks, whole(emit.lanes), intp=whole) as (k, _):
        use(k, None)
    with builder.if_then(builder.icmp_signed("<", blocks, n)):
        use(blocks, builder.sub(n, blocks))


def _load(emit: Emit, data: Any, at: Any, count: Any, other: float) -> Any:
    return emit.load(data, at) if count is None else emit.load_some(data, at, count, emit.constant(other))


def _store(emit: Emit, value: Any, data: Any, at: Any, count: Any) -> None:
    if count is None:
        emit.store(value, data, at)
    else:
        emit.store_some(value, data, at, count)


def _indices(indices: list[int]) -> Any:
    word = ir.IntType(32)
    return ir.Constant(ir.VectorType(word, len(indices)), [word(i) for i in indices])


def _labels_in(lanes: int, labels: int) -> int:
    """The labels of a span if whole spans fill a vector, else 0: any number of them."""
    return labels if labels <= lanes else 0


def _sums(emit: Emit, value: Any, labels: int) -> Any:
    """The sums over each ``labels`` entries, a vector of as many as there are."""
    half = labels // 2
    while half:
        value = emit.plus(
            value, emit.builder.shuffle_vector(value, value, _indices([i ^ half for i in range(emit.lanes)]))
        )
        half //= 2
    return emit.builder.shuffle_vector(value, value, _indices(list(range(0, emit.lanes, labels))))


def _before(emit: Emit, count: Any, each: int) -> Any:
    """Of each lane, whether ``each`` times its number is below count."""
    lanes = ir.VectorType(emit.integer, emit.lanes)
    counts = emit.builder.insert_element(ir.Constant(lanes, ir.Undefined), count, ir.IntType(32)(0))
    counts = emit.builder.shuffle_vector(counts, counts, _indices([0] * emit.lanes))
    return emit.builder.icmp_signed(
        "<", ir.Constant(lanes, [emit.integer(each * i) for i in range(emit.lanes)]), counts
    )


class _Any:
    """Whether a condition was ever true, in any lane."""

    def __init__(self, emit: Emit) -> None:
        self.builder, self.lanes = emit.builder, emit.lanes
        none = ir.Constant(ir.VectorType(ir.IntType(1), emit.lanes), None)
        self.found = cgutils.alloca_once_value(self.builder, none)

    def see(self, condition: Any) -> None:
        self.builder.store(self.builder.or_(self.builder.load(self.found), condition), self.found)

    def seen(self) -> Any:
        bits = ir.IntType(self.lanes)
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(self.builder.load(self.found), bits), bits(0))


@intrinsic  # type: ignore[untyped-decorator]
def _highest(typingctx: Any, x: Any, at: Any, apart: Any, n: Any, k: Any) -> Any:
    """The greatest of the n rows that begin at ``at``, ``apart`` from each other, of n k, (n - 1) k, ... entries; NaN
    if one of them is."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, 512 // sig.args[0].dtype.bitwidth)
        data, high = emit.data(sig.args[0], arguments[0]), emit.variable(-math.inf)
        _, at, apart, n, k = arguments
        broken = _Any(emit)
        with cgutils.for_range(builder, n, intp=emit.integer) as loop:
            begin = builder.add(at, builder.mul(loop.index, apart))

            def use(q: Any, count: Any) -> None:
                value = _load(emit, data, builder.add(begin, q), count, -math.inf)
                broken.see(builder.fcmp_unordered("uno", value, value))
                emit.raise_to(high, value)

            _all(emit, builder.mul(builder.sub(n, loop.index), k), use)
        return builder.select(broken.seen(), emit.scalar(math.nan), emit.highest(high))

    return x.dtype(x, at, apart, n, k), generate


def _exponentials(labels: int) -> Any:
    """(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found): out = exp(x) / 2^base, 0 where
    x is not above least, of n rows as in ``_highest``, those of ``out`` from ``place`` and ``stride`` apart; totals of
    each span, row i from i (wide + 1). found: the least of the totals, the sum of those of more than one word, and
    whether (not 0) some x is NaN or above ``most``: then the rest is worth nothing."""

    @intrinsic  # type: ignore[untyped-decorator]
    def exponentials(
        typingctx: Any, x: Any, at: Any, apart: Any, n: Any, k: Any, base: Any, least: Any, most: Any, out: Any,
        place: Any, stride: Any, totals: Any, wide: Any, found: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            dtype = sig.args[0].dtype
            emit = Emit(context, builder, dtype, 512 // dtype.bitwidth)
            each = _labels_in(emit.lanes, labels)
            part = Emit(context, builder, dtype, emit.lanes // each if each else 1)
            data, o_data, t_data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 8, 11, 13))
            _, at, apart, n, k, base, least, most, _, place, stride, _, wide, _ = arguments
            base, least, most = emit.spread(base), emit.spread(least), emit.spread(most)
            beyond = _Any(emit)
            low, all_ = part.variable(math.inf), part.variable()
            bits = ir.VectorType(ir.IntType(1), part.lanes)
            first, none = ir.Constant(bits, [i == 0 for i in range(part.lanes)]), ir.Constant(bits, None)
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                begin = builder.add(at, builder.mul(loop.index, apart))
                there = builder.add(place, builder.mul(loop.index, stride))
                row = builder.mul(loop.index, builder.add(wide, emit.integer(1)))
                spans = builder.sub(n, loop.index)

                def sum_up(total: Any, span: Any, real: Any) -> None:
                    part.store(total, t_data, builder.add(row, span))
                    leaf = builder.icmp_signed("==", span, emit.integer(0))
                    part.add_to(all_, builder.select(builder.select(leaf, first, none), part.constant(0.0), total))
                    part.lower_to(low, total if real is None else builder.select(real, total, part.constant(math.inf)))

                def use(q: Any, count: Any) -> None:
                    scores = _load(emit, data, builder.add(begin, q), count, -math.inf)
                    beyond.see(builder.fcmp_unordered(">", scores, most))
                    above = builder.fcmp_ordered(">", scores, least)
                    value = builder.select(above, exp_vector(emit, scores, base), emit.constant(0.0))
                    _store(emit, value, o_data, builder.add(there, q), count)
                    if each:
                        real = None if count is None else _before(part, count, each)
                        sum_up(_sums(emit, value, each), builder.sdiv(q, emit.integer(each)), real)

                _all(emit, builder.mul(spans, k), use)
                if not each:
                    eight = Emit(context, builder, dtype, _PARTS)
                    with cgutils.for_range(builder, spans, intp=emit.integer) as inner:
                        total, here = eight.variable(), builder.add(there, builder.mul(inner.index, k))
                        _all(
                            eight, k, lambda q, count: eight.add_to(
                                total, _load(eight, o_data, builder.add(here, q), count, 0.0)
                            ),
                        )  # fmt: skip
                        sum_up(part.spread(eight.total(total)), inner.index, None)
            for i, value in enumerate((part.lowest(low), part.total(all_))):
                wider = context.cast(builder, value, dtype, types.float64)
                builder.store(wider, builder.gep(f_data, [emit.integer(i)]))
            seen = builder.uitofp(beyond.seen(), context.get_value_type(types.float64))
            builder.store(seen, builder.gep(f_data, [emit.integer(2)]))
            return context.get_dummy_value()

        arguments = (x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
        return types.void(*arguments), generate

    return exponentials


def _products(labels: int) -> Any:
    """(x, at, end, apart, n, k, by, there, wide): x times by, of n rows as in ``_highest``; by: row i from there +
    i (wide + 1). What lies between the rows, and before the end, becomes 0."""

    @intrinsic  # type: ignore[untyped-decorator]
    def products(
        typingctx: Any, x: Any, at: Any, end: Any, apart: Any, n: Any, k: Any, by: Any, there: Any, wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            dtype = sig.args[0].dtype
            emit = Emit(context, builder, dtype, 512 // dtype.bitwidth)
            each = _labels_in(emit.lanes, labels)
            part = Emit(context, builder, dtype, emit.lanes // each if each else 1)
            data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 6))
            _, at, end, apart, n, k, _, there, wide = arguments
            done = cgutils.alloca_once_value(builder, at)

            def clear(until: Any) -> None:
                first = builder.load(done)
                size = builder.mul(builder.sub(until, first), emit.integer(emit.bytes))
                cgutils.memset(builder, builder.gep(data, [first]), size, 0)

            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                begin = builder.add(at, builder.mul(loop.index, apart))
                factors = builder.add(there, builder.mul(loop.index, builder.add(wide, emit.integer(1))))
                spans = builder.sub(n, loop.index)
                clear(begin)
                builder.store(builder.add(begin, builder.mul(spans, k)), done)
                if each:

                    def use(q: Any, count: Any) -> None:
                        factor = part.load(f_data, builder.add(factors, builder.sdiv(q, emit.integer(each))))
                        factor = builder.shuffle_vector(
                            factor, factor, _indices([i // each for i in range(emit.lanes)])
                        )
                        place = builder.add(begin, q)
                        _store(emit, emit.times(_load(emit, data, place, count, 0.0), factor), data, place, count)

                    _all(emit, builder.mul(spans, k), use)
                else:
                    eight = Emit(context, builder, dtype, _PARTS)
                    with cgutils.for_range(builder, spans, intp=emit.integer) as inner:
                        factor = eight.spread(builder.load(builder.gep(f_data, [builder.add(factors, inner.index)])))
                        here = builder.add(begin, builder.mul(inner.index, k))

                        def multiply(q: Any, count: Any) -> None:
                            place = builder.add(here, q)
                            value = emit.times(_load(eight, data, place, count, 0.0), factor)
                            _store(eight, value, data, place, count)

                        _all(eight, k, multiply)
            clear(end)
            return context.get_dummy_value()

        return types.void(x, at, end, apart, n, k, by, there, wide), generate

    return products


_exponentials0, _exponentials1, _exponentials2, _exponentials4, _exponentials8, _exponentials16 = (
    _exponentials(k) for k in (0, 1, 2, 4, 8, 16)
)
_products0, _products1, _products2, _products4, _products8, _products16 = (_products(k) for k in (0, 1, 2, 4, 8, 16))


@compiled()
def _all_exponentials(  # type: ignore[no-untyped-def]
    x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found
):
    """See ``_exponentials``."""
    if k == 1:
        _exponentials1(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
    elif k == 2:
        _exponentials2(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
    elif k == 4:
        _exponentials4(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
    elif k == 8:
        _exponentials8(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
    elif k == 16:
        _exponentials16(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)
    else:
        _exponentials0(x, at, apart, n, k, base, least, most, out, place, stride, totals, wide, found)


@compiled()
def totals_of(x, at, apart, n, k, out, place, stride, totals, wide, ratios):  # type: ignore[no-untyped-def]
    """(m, the sum of the totals of wider spans, what the leaves are below 2^m in all, in nats, and how it went): of the
    sentence of n words at ``at``, rows ``apart``.

    totals: that of i..j at i wide + j; out: the exponentials, row i from place + i stride. It went well (0), or UNEVEN:
    a wider span is in a scale of its own, by which ratios [T, T], else 0, says to multiply its total (where that is 0,
    it is only too small for a number); or WIDE: not to be done here; or BROKEN: there is a NaN or +inf.
    """
    narrow, found = x.itemsize == 4, np.empty(3)
    dtype = x.dtype.type
    most, depth, sure = (_MOST4, _DEPTH4, _SURE4) if narrow else (_MOST8, _DEPTH8, _SURE8)
    high = _highest(x, at, 0, 1, n * k)  # of the spans that begin the sentence: a guess, in reach of most others
    for certain in range(2):
        if certain:
            high = _highest(x, at, apart, n, k)
        if high != high or high == math.inf:
            return 0.0, 0.0, 0.0, BROKEN
        if abs(high) > most and high > -math.inf:
            if certain:
                return 0.0, 0.0, 0.0, WIDE
            continue
        high = high if high > -math.inf else dtype(0.0)
        m = np.rint(np.float64(high) * _PER_LN2)
        base, least, up_to = dtype(m), dtype(high - depth), dtype(high + _REACH)
        _all_exponentials(x, at, apart, n, k, base, least, up_to, out, place, stride, totals, wide, found)
        if found[2] == 0.0:
            break
    below, flag = 0.0, 0
    every = found[1]
    for i in range(n if found[0] < sure else 0):
        for j in range(i, n):
            if totals[i * wide + j] >= sure:
                continue
            begin, span = at + i * apart + (j - i) * k, totals[i * wide + j : i * wide + j + 1]
            high = _highest(x, begin, 0, 1, k)
            if high == -math.inf:
                continue
            if high >= -most:
                own = np.rint(np.float64(high) * _PER_LN2)
                base, least, there = dtype(own), dtype(high - depth), place + i * stride + (j - i) * k
                _exponentials0(x, begin, 0, 1, k, base, least, high, out, there, 0, span, 0, found)
            elif i < j:
                own = -math.inf
            else:
                return 0.0, 0.0, 0.0, WIDE
            if i == j:
                below += (own - m) * math.log(2.0)
                continue
            if every < _LEAST_SUM:  # the leaves are far above all others
                return 0.0, 0.0, 0.0, WIDE
            if flag == 0:
                ratios[:n, :n] = 0.0
            flag, ratios[i, j] = UNEVEN, 2.0 ** max(own - m, -1000.0)
    return m, every, below, flag


@compiled()
def shares_of(x, at, end, apart, n, k, by, there, wide):  # type: ignore[no-untyped-def]
    """x, which ``totals_of`` wrote, times by of its span, that of i..j at there + i wide + j; all else, to the end,
    becomes 0."""
    if k == 1:
        _products1(x, at, end, apart, n, k, by, there, wide)
    elif k == 2:
        _products2(x, at, end, apart, n, k, by, there, wide)
    elif k == 4:
        _products4(x, at, end, apart, n, k, by, there, wide)
    elif k == 8:
        _products8(x, at, end, apart, n, k, by, there, wide)
    elif k == 16:
        _products16(x, at, end, apart, n, k, by, there, wide)
    else:
        _products0(x, at, end, apart, n, k, by, there, wide)


@compiled()
def _log_total(scores):  # type: ignore[no-untyped-def]
    """(the greatest score, the sum of the exponentials of what they are below it)."""
    high, total = -math.inf, 0.0
    for k in range(len(scores)):
        high = max(high, np.float64(scores[k]))
    if high > -math.inf:
        for k in range(len(scores)):
            total += exponential(scores[k] - high)
    return high, total


@compiled()
def log_total(scores):  # type: ignore[no-untyped-def]
    """log of the sum of the exponentials, -inf if none is allowed."""
    high, total = _log_total(scores)
    return high + logarithm(total)


@compiled()
def log_gradient(spans, n, mass, gradient):  # type: ignore[no-untyped-def]
    """gradient [T, T, K] = mass [T, T] times the labels' shares by spans [T, T, K], for the first n words, else 0."""
    gradient[:] = 0
    for i in range(n):
        for j in range(i, n):
            if mass[i, j] > 0.0:
                high, total = _log_total(spans[i, j])
                for k in range(spans.shape[2]):
                    gradient[i, j, k] = mass[i, j] / total * exponential(spans[i, j, k] - high)
