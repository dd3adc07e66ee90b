"""Inside and outside over the binary trees of eight sentences at once, a vector lane each: see ``probllm.math.span_trees``.

    rate(i, j) = c sum_{i <= k < j} beta(i, k) beta(k + 1, j),   beta(i, j) = total(i, j) rate(i, j)
    d(i, j) = sum_{t > j} p(i, t) beta(j + 1, t) + sum_{t < i} p(t, j) beta(t, i - 1),   p(i, j) = c d(i, j) total(i, j)

with total the sum over a span's labels in the sentence's own scale, which c makes 1 on average, and d the gradient of
log Z in beta. Tables are flat, [words, wide, 8] and ``wide`` odd: a column then lies in all sets of a cache. That of
beta and that of p hold each entry twice, at [i, j] and [j, i], so that both factors of a sum stand in rows. Columns are
done in pairs, which load half as much of what is not in the first cache.
"""

from __future__ import annotations

import math
from typing import Any

from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.lanes import LANES, Cells
from probllm.math.kernels.vectors import Emit

FLOOR, CEILING = 1e-140, 1e140
RAISED = 1e-200  # the least total that is not 0


def _join(columns: int) -> Any:
    """(betas, totals, rates, times, extremes, i, j, wide): fills betas and rates at i..j, i < j, then at i..j + 1 if
    ``columns`` is 2. Betas are 0 where the sum or the total is, else at least ``FLOOR``; extremes [2, 8]: the least
    that is not 0, and the greatest."""

    @intrinsic  # type: ignore[untyped-decorator]
    def join(
        typingctx: Any, betas: Any, totals: Any, rates: Any, times: Any, extremes: Any, i: Any, j: Any, wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            b, t, r, c, e = (emit.data(sig.args[q], arguments[q]) for q in range(5))
            i, j, wide = arguments[5:]
            cells = Cells(emit, wide)
            ends, sums = [cells.after(j, q) for q in range(columns)], cells.sums(columns)
            second = cells.after(i)
            with cells.each(second, j) as (k, _):
                left = cells.get(b, i, k)
                for end, total in zip(ends, sums, strict=True):
                    cells.add(total, left, cells.get(b, end, cells.after(k)))
            zero, floor, by = emit.constant(0.0), emit.constant(FLOOR), emit.load(c, emit.integer(0))
            leaf, before = cells.get(b, i, i), None
            for q, (end, total) in enumerate(zip(ends, sums, strict=True)):
                cells.add(total, leaf, cells.get(b, end, second))  # the newest of all stands last
                if before is not None:
                    cells.add(total, before, cells.get(b, end, end))
                rate, labels = emit.times(cells.read(total), by), cells.get(t, i, end)
                value = emit.times(rate, labels)
                value = builder.select(builder.fcmp_ordered("<", value, floor), floor, value)
                allowed = builder.and_(builder.fcmp_ordered(">", rate, zero), builder.fcmp_ordered(">", labels, zero))
                least, most = (emit.load(e, emit.integer(x * LANES)) for x in range(2))
                lower = builder.and_(allowed, builder.fcmp_ordered("<", value, least))
                emit.store(builder.select(lower, value, least), e, emit.integer(0))
                before = builder.select(allowed, value, zero)
                higher = builder.fcmp_ordered(">", before, most)
                emit.store(builder.select(higher, before, most), e, emit.integer(LANES))
                cells.put(rate, r, i, end)
                cells.put(before, b, i, end)
                cells.put(before, b, end, i)
            return context.get_dummy_value()

        return types.void(betas, totals, rates, times, extremes, i, j, wide), generate

    return join


def _split(columns: int) -> Any:
    """(betas, totals, rates, times, by, roots, lost, i, j, last, wide): by = p at i..j, then at i..j - 1 if ``columns``
    is 2; rates become d times the rate, which is the marginal over the total. roots [words + 1, 8]: d of 0..j, and
    zeros; lost [8]: the marginals of what was raised are added."""

    @intrinsic  # type: ignore[untyped-decorator]
    def split(
        typingctx: Any, betas: Any, totals: Any, rates: Any, times: Any, by: Any, roots: Any, lost: Any, i: Any, j: Any,
        last: Any, wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            b, t, r, c, p, d, o = (emit.data(sig.args[q], arguments[q]) for q in range(7))
            i, j, last, wide = arguments[7:]
            cells, none = Cells(emit, wide), emit.integer(0)
            ends, sums = [cells.after(j, -q) for q in range(columns)], cells.sums(columns)
            with cells.each(cells.after(j), cells.after(last)) as (k, _):
                wider = cells.get(p, i, k)
                for end, total in zip(ends, sums, strict=True):
                    cells.add(total, wider, cells.get(b, cells.after(end), k))
            above = cells.after(i, -1)
            with cells.each(none, above) as (k, _):
                left = cells.get(b, above, k)
                for end, total in zip(ends, sums, strict=True):
                    cells.add(total, cells.get(p, end, k), left)
            first = builder.icmp_signed("==", i, none)
            with builder.if_else(first) as (then, otherwise):
                with then:
                    for end, total in zip(ends, sums, strict=True):
                        emit.add_to(total, emit.load(d, builder.mul(end, emit.integer(LANES))))
                with otherwise:
                    left = cells.get(b, above, above)
                    for end, total in zip(ends, sums, strict=True):
                        cells.add(total, cells.get(p, end, above), left)
            zero, floor, least = (emit.constant(x) for x in (0.0, FLOOR, RAISED))
            before, times = None, emit.load(c, none)
            for end, total in zip(ends, sums, strict=True):
                if before is not None:
                    cells.add(total, before, cells.get(b, j, j))
                beta, labels = cells.get(b, i, end), cells.get(t, i, end)
                value = builder.select(builder.fcmp_ordered(">", beta, zero), cells.read(total), zero)
                raised = builder.or_(builder.fcmp_ordered("<=", beta, floor), builder.fcmp_ordered("<=", labels, least))
                mass = builder.select(raised, emit.times(value, beta), zero)
                emit.store(emit.plus(emit.load(o, none), mass), o, none)
                cells.put(emit.times(value, cells.get(r, i, end)), r, i, end)
                before = emit.times(emit.times(value, labels), times)
                cells.put(before, p, i, end)
                cells.put(before, p, end, i)
            return context.get_dummy_value()

        return types.void(betas, totals, rates, times, by, roots, lost, i, j, last, wide), generate

    return split


_join1, _join2 = _join(1), _join(2)
_split1, _split2 = _split(1), _split(2)


@compiled()
def inside(totals, times, last, wide, betas, rates, extremes):  # type: ignore[no-untyped-def]
    """Fills betas and rates of words 0 to ``last`` from totals and c = ``times`` [8]."""
    extremes[:LANES], extremes[LANES:] = math.inf, 0.0
    for j in range(0, last + 1, 2):
        both = j < last
        for k in range(j, j + 1 + both):
            at = (k * wide + k) * LANES
            for lane in range(LANES):
                total = totals[at + lane]
                betas[at + lane] = 0.25 if total > 0.0 else 0.0
                rates[at + lane] = 0.25 / total if total > 0.0 else 0.0
        if both:
            _join1(betas, totals, rates, times, extremes, j, j + 1, wide)
        for i in range(j - 1, -1, -1):
            if both:
                _join2(betas, totals, rates, times, extremes, i, j, wide)
            else:
                _join1(betas, totals, rates, times, extremes, i, j, wide)


@compiled()
def outside(betas, totals, rates, times, by, roots, lost, last, wide):  # type: ignore[no-untyped-def]
    """Rates become marginals over totals, from roots: 1 / betas [0, n - 1] at a sentence's n - 1, else 0."""
    lost[:] = 0.0
    for j in range(last, -1, -2):
        for i in range(j):
            _split2(betas, totals, rates, times, by, roots, lost, i, j, last, wide)
        _split1(betas, totals, rates, times, by, roots, lost, j, j, last, wide)
