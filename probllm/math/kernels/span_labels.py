"""Sums over the labels of spans, and their gradient, in vectors of the scores' own precision.

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

WIDTH = 16  # what whole vectors may take beyond the end of a buffer
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
    """out[:n] = exp(x[at:at + n] - base), and 0 on to the end of the last vector."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, 512 // sig.args[0].dtype.bitwidth)
        data, found = emit.data(sig.args[0], arguments[0]), emit.data(sig.args[4], arguments[4])
        base = emit.spread(arguments[3])

        def use(k: Any, v: Any) -> None:
            emit.store(_exp_of_difference(emit, v, base), found, k)

        _all(emit, data, arguments[1], arguments[2], -math.inf, use)
        return context.get_dummy_value()

    return types.void(x, at, n, base, out), generate


@intrinsic  # type: ignore[untyped-decorator]
def _totals(typingctx: Any, x: Any, k: Any, n: Any, totals: Any) -> Any:
    """totals[j] = the sum of x[j k:(j + 1) k] for j < n."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, _PARTS)
        data, found = emit.data(sig.args[0], arguments[0]), emit.data(sig.args[3], arguments[3])
        _, k, n, _ = arguments
        with cgutils.for_range(builder, n, intp=emit.integer) as loop:
            total = emit.variable()
            _all(emit, data, builder.mul(loop.index, k), k, 0.0, lambda _, v: emit.add_to(total, v))
            value = context.cast(builder, emit.total(total), sig.args[0].dtype, types.float64)
            builder.store(value, builder.gep(found, [loop.index]))
        return context.get_dummy_value()

    return types.void(x, k, n, totals), generate


@intrinsic  # type: ignore[untyped-decorator]
def _shares(typingctx: Any, x: Any, at: Any, k: Any, n: Any, bases: Any, by: Any, out: Any) -> Any:
    """out[at:at + n k] = by[j] exp(x - bases[j]) for the j-th k entries of x[at:at + n k]; 0 where ``by`` is."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, _PARTS)
        data, b_data, f_data, found = (emit.data(sig.args[i], arguments[i]) for i in (0, 4, 5, 6))
        _, at, k, n = arguments[:4]
        end = builder.add(at, builder.mul(n, k))
        with cgutils.for_range(builder, n, intp=emit.integer) as loop:
            base, factor = (emit.spread(builder.load(builder.gep(d, [loop.index]))) for d in (b_data, f_data))
            none = builder.fcmp_ordered("==", factor, emit.constant(0.0))
            here = builder.add(at, builder.mul(loop.index, k))

            def use(q: Any, v: Any) -> None:
                value = builder.select(none, factor, emit.times(_exp_of_difference(emit, v, base), factor))
                place = builder.add(here, q)
                # what lies behind the span is written over by the next
                emit.store_some(value, found, place, builder.sub(end, place))

            _all(emit, data, here, k, -math.inf, use)
        return context.get_dummy_value()

    return types.void(x, at, k, n, bases, by, out), generate


@compiled()
def label_sums(spans, lengths, sums, bases, totals, first, step):  # type: ignore[no-untyped-def]
    """sums [B, T, T] = bases + log totals = log sum over labels of exp(spans [B, T, T K])."""
    rows, size, width = spans.shape
    k = width // size
    flat, sure = spans.reshape(spans.size), _SURE4 if spans.itemsize == 4 else _SURE8
    buffer, own = np.empty(width + WIDTH, spans.dtype), np.empty(k + WIDTH, spans.dtype)
    for b in range(first, rows, step):
        for i in range(lengths[b]):
            n, at = lengths[b] - i, ((b * size + i) * size + i) * k
            peak = _highest(flat, at, n * k)
            _exponentials(flat, at, n * k, peak, buffer)
            row, base, total = sums[b, i, i : i + n], bases[b, i, i : i + n], totals[b, i, i : i + n]
            _totals(buffer, k, n, total)
            least = math.inf
            for j in range(n):
                least = min(least, total[j])
                base[j] = peak
                row[j] = peak + logarithm(total[j])
            if least >= sure:
                continue
            for j in range(n):
                if not total[j] >= sure:
                    high = _highest(flat, at + j * k, k)
                    base[j] = high if high > -math.inf else 0.0
                    _exponentials(flat, at + j * k, k, base[j], own)
                    _totals(own, k, 1, total[j:])
                    row[j] = base[j] + logarithm(total[j])


@compiled()
def label_gradient(spans, lengths, bases, totals, mass, weights, gradient, first, step):  # type: ignore[no-untyped-def]
    """gradient [B, T, T K] = weights [B] mass [B, T, T] P(label | span), by what ``label_sums`` found."""
    rows, size, width = spans.shape
    k = width // size
    flat, out, by = spans.reshape(spans.size), gradient.reshape(gradient.size), np.empty(size, spans.dtype)
    for b in range(first, rows, step):
        last = lengths[b]
        gradient[b, last:] = 0.0
        for i in range(last):
            gradient[b, i, : i * k] = 0.0
            gradient[b, i, last * k :] = 0.0
            for j in range(i, last):
                share = weights[b] * mass[b, i, j]
                by[j - i] = share / totals[b, i, j] if share != 0.0 else 0.0
            at = ((b * size + i) * size + i) * k
            _shares(flat, at, k, last - i, bases[b, i, i:last], by, out)
