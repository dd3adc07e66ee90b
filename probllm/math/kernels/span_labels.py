"""Sums over the labels of spans, and their shares of it, in vectors of the scores' own precision.

s(i, j) = log sum_k exp(spans[i, j, k]): all spans that begin at one leaf are exponentiated in one pass, less their
greatest score. What a float32 loses in that difference is added to the exponent again: far from the greatest score it
is more than the rounding of exp. A span that lies too far below gets a base of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import exp_vector
from probllm.math.kernels.logarithm import logarithm
from probllm.math.kernels.vectors import Emit

_PARTS = 8  # lanes where each span is by itself
_LEAST = {4: -87.0, 8: -700.0}  # by bytes a number: exp is 0 below
_SURE4, _SURE8 = 1e-28, 1e-250  # likewise: a sum of exponentials that is no less has lost nothing


def _all(emit: Emit, data: Any, at: Any, n: Any, other: float, use: Callable[[Any, Any], None]) -> None:
    """use(k, vector at k) for whole vectors of n entries from ``at``, and the rest of them with ``other`` behind."""
    builder, whole = emit.builder, emit.integer
    blocks = builder.and_(n, whole(-emit.lanes))
    with cgutils.for_range_slice(builder, whole(0), blocks, whole(emit.lanes), intp=whole) as (k, _):
        use(k, emit.load(data, builder.add(at, k)))
    with builder.if_then(builder.icmp_signed("<", blocks, n)):
        nothing = emit.constant(other)
        use(blocks, emit.load_some(data, builder.add(at, blocks), builder.sub(n, blocks), nothing))


def _exp_of_difference(emit: Emit, x: Any, base: Any) -> Any:
    """exp(x - base), 0 where it is no normal number."""
    builder, more = emit.builder, None
    d = builder.fsub(x, base)
    if emit.bytes == 4:
        taken = builder.fsub(d, x)
        more = builder.fsub(builder.fsub(x, builder.fsub(d, taken)), builder.fadd(base, taken))
    value = exp_vector(emit, d, more)
    return builder.select(builder.fcmp_ordered(">", d, emit.constant(_LEAST[emit.bytes])), value, emit.constant(0.0))


@intrinsic  # type: ignore[untyped-decorator]
def _highest(typingctx: Any, x: Any, at: Any, n: Any) -> Any:
    """The greatest of x[at:at + n]; no NaN."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, 512 // sig.args[0].dtype.bitwidth)
        data, high = emit.data(sig.args[0], arguments[0]), emit.variable(-math.inf)
        _all(emit, data, arguments[1], arguments[2], -math.inf, lambda k, v: emit.raise_to(high, v))
        return emit.highest(high)

    return x.dtype(x, at, n), generate


@intrinsic  # type: ignore[untyped-decorator]
def _exponentials(typingctx: Any, x: Any, at: Any, n: Any, base: Any, out: Any) -> Any:
    """out[at:at + n] = exp(x[at:at + n] - base)."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, 512 // sig.args[0].dtype.bitwidth)
        data, found = emit.data(sig.args[0], arguments[0]), emit.data(sig.args[4], arguments[4])
        base = emit.spread(arguments[3])

        def use(k: Any, v: Any) -> None:
            value = _exp_of_difference(emit, v, base)
            emit.store_some(value, found, builder.add(arguments[1], k), builder.sub(arguments[2], k))

        _all(emit, data, arguments[1], arguments[2], -math.inf, use)
        return context.get_dummy_value()

    return types.void(x, at, n, base, out), generate


@intrinsic  # type: ignore[untyped-decorator]
def _totals(typingctx: Any, x: Any, at: Any, k: Any, n: Any, totals: Any) -> Any:
    """totals[j] = the sum of the j-th k entries of x[at:at + n k]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, _PARTS)
        data, found = emit.data(sig.args[0], arguments[0]), emit.data(sig.args[4], arguments[4])
        _, at, k, n, _ = arguments
        with cgutils.for_range(builder, n, intp=emit.integer) as loop:
            total, here = emit.variable(), builder.add(at, builder.mul(loop.index, k))
            _all(emit, data, here, k, 0.0, lambda _, v: emit.add_to(total, v))
            value = context.cast(builder, emit.total(total), sig.args[0].dtype, types.float64)
            builder.store(value, builder.gep(found, [loop.index]))
        return context.get_dummy_value()

    return types.void(x, at, k, n, totals), generate


@intrinsic  # type: ignore[untyped-decorator]
def _products(typingctx: Any, x: Any, at: Any, k: Any, n: Any, by: Any, out: Any) -> Any:
    """out[at:at + n k] = by[j] x for the j-th k entries of x[at:at + n k]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, _PARTS)
        data, f_data, found = (emit.data(sig.args[i], arguments[i]) for i in (0, 4, 5))
        _, at, k, n, _, _ = arguments
        end = builder.add(at, builder.mul(n, k))
        with cgutils.for_range(builder, n, intp=emit.integer) as loop:
            factor = emit.spread(builder.load(builder.gep(f_data, [loop.index])))
            here = builder.add(at, builder.mul(loop.index, k))

            def use(q: Any, v: Any) -> None:
                place = builder.add(here, q)
                # what lies behind the span is written over by the next
                emit.store_some(emit.times(v, factor), found, place, builder.sub(end, place))

            _all(emit, data, here, k, 0.0, use)
        return context.get_dummy_value()

    return types.void(x, at, k, n, by, out), generate


@intrinsic  # type: ignore[untyped-decorator]
def _clear(typingctx: Any, x: Any, first: Any, last: Any) -> Any:
    """x[first:last] = 0."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, _PARTS)
        begin = builder.gep(emit.data(sig.args[0], arguments[0]), [arguments[1]])
        size = builder.mul(builder.sub(arguments[2], arguments[1]), emit.integer(emit.bytes))
        cgutils.memset(builder, begin, size, 0)
        return context.get_dummy_value()

    return types.void(x, first, last), generate


@compiled(fastmath={"nnan", "nsz", "reassoc"})
def _least(x, n):  # type: ignore[no-untyped-def]
    low = math.inf
    for j in range(n):
        low = x[j] if x[j] < low else low
    return low


@compiled()
def label_sums(spans, lengths, sums, terms, totals, first, step):  # type: ignore[no-untyped-def]
    """sums [B, T, T] = log sum over labels of exp(spans [B, T, T K]); terms, alike, and their totals [B, T, T]: the
    exponentials up to a factor of each span."""
    rows, size, width = spans.shape
    k = width // size
    flat, out = spans.reshape(spans.size), terms.reshape(terms.size)
    sure = _SURE4 if spans.itemsize == 4 else _SURE8
    for b in range(first, rows, step):
        for i in range(lengths[b]):
            n, at = lengths[b] - i, ((b * size + i) * size + i) * k
            row, total = sums[b, i, i : i + n], totals[b, i, i : i + n]
            peak = _highest(flat, at, n * k)
            _exponentials(flat, at, n * k, peak, out)
            _totals(out, at, k, n, total)
            for j in range(n):
                row[j] = peak + logarithm(total[j])
            if _least(total, n) >= sure:
                continue
            for j in range(n):
                if not total[j] >= sure:
                    base = _highest(flat, at + j * k, k)
                    _exponentials(flat, at + j * k, k, base, out)
                    _totals(out, at + j * k, k, 1, total[j:])
                    row[j] = base + logarithm(total[j])


@compiled()
def _shares(weight, mass, totals, by):  # type: ignore[no-untyped-def]
    """by = weight mass / totals, 0 where the total is."""
    for j in range(len(mass)):
        by[j] = weight * mass[j] / (totals[j] if totals[j] > 0.0 else 1.0)


@compiled()
def label_gradient(terms, lengths, totals, mass, weights, gradient, first, step):  # type: ignore[no-untyped-def]
    """gradient [B, T, T K] = weights [B] mass [B, T, T] terms / totals, by what ``label_sums`` found."""
    rows, size, width = terms.shape
    k = width // size
    flat, out, by = terms.reshape(terms.size), gradient.reshape(gradient.size), np.empty(size, terms.dtype)
    for b in range(first, rows, step):
        last, done = lengths[b], b * size * width  # all before is written
        for i in range(last):
            at = ((b * size + i) * size + i) * k
            _clear(out, done, at)
            _shares(weights[b], mass[b, i, i:last], totals[b, i, i:last], by)
            _products(flat, at, k, last - i, by, out)
            done = at + (last - i) * k
        _clear(out, done, (b + 1) * size * width)
