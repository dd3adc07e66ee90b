"""Inside and outside over the binary trees of eight sentences at once, a vector lane each: ``probllm.math.span_trees``.

    beta(i, j) = total(i, j) sum_{i <= k < j} beta(i, k) beta(k + 1, j)
    d(i, j) = sum_{t > j} p(i, t) beta(j + 1, t) + sum_{t < i} p(t, j) beta(t, i - 1),   p(i, j) = d(i, j) total(i, j)

with total the sum over a span's labels times c, which makes it 1 on average, and d the gradient of log Z in beta. The
gradient in the sum over labels is d times the rate, c beta / total.

Tables are flat, [words, wide, 8] and ``wide`` odd: a column then lies in all sets of a cache. That of beta and that of
p hold each entry twice, at [i, j] and [j, i], so that both factors of a sum stand in rows. Four columns are done at
once, which then load a fourth of what is not in the first cache.
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
    """(betas, totals, rates, times, extremes, i, j, wide): fills betas and rates at i..j, i < j, and at as many
    ``columns`` from j on. Betas are 0 where the sum or the total is, else at least ``FLOOR``; extremes [2, 8]: the
    least that is not 0, and the greatest."""

    @intrinsic  # type: ignore[untyped-decorator]
    def join(
        typingctx: Any, betas: Any, totals: Any, rates: Any, times: Any, extremes: Any, i: Any, j: Any, wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            b, t, r, c, e = (emit.data(sig.args[q], arguments[q]) for q in range(5))
            i, j, wide = arguments[5:]
            cells = Cells(emit, wide)

            def higher(x: Any, y: Any) -> Any:
                return builder.select(builder.fcmp_ordered(">", x, y), x, y)

            ends, sums = [cells.after(j, q) for q in range(columns)], cells.sums(columns)
            second = cells.after(i)
            with cells.each(second, j) as (k, _):
                left = cells.get(b, i, k)
                for end, total in zip(ends, sums, strict=True):
                    cells.add(total, left, cells.get(b, end, cells.after(k)))
            zero, floor, endless = (emit.constant(x) for x in (0.0, FLOOR, math.inf))
            by = emit.load(c, emit.integer(0))
            leaf, least, most = cells.get(b, i, i), *(emit.load(e, emit.integer(x * LANES)) for x in range(2))
            before: list[Any] = []
            for end, total in zip(ends, sums, strict=True):
                cells.add(total, leaf, cells.get(b, end, second))  # the newest of all stands last
                for left, between in zip(before, ends[1:], strict=False):
                    cells.add(total, left, cells.get(b, end, between))
                sum_, labels = cells.read(total), cells.get(t, i, end)
                allowed = builder.and_(builder.fcmp_ordered(">", sum_, zero), builder.fcmp_ordered(">", labels, zero))
                value = higher(emit.times(sum_, labels), builder.select(allowed, floor, zero))
                cells.put(value, b, i, end)
                cells.put(value, b, end, i)
                cells.put(emit.times(sum_, by), r, i, end)
                before.append(value)
                most, some = higher(value, most), builder.select(allowed, value, endless)
                least = builder.select(builder.fcmp_ordered("<", some, least), some, least)
            emit.store(least, e, emit.integer(0))
            emit.store(most, e, emit.integer(LANES))
            return context.get_dummy_value()

        return types.void(betas, totals, rates, times, extremes, i, j, wide), generate

    return join


def _split(columns: int) -> Any:
    """(betas, totals, rates, by, roots, lost, i, j, last, wide): by = p at i..j, and at as many ``columns`` from
    j down; rates become d times the rate. roots [words + 1, 8]: d of 0..j, and
    zeros; lost [8]: the marginals of what was raised are added."""

    @intrinsic  # type: ignore[untyped-decorator]
    def split(
        typingctx: Any, betas: Any, totals: Any, rates: Any, by: Any, roots: Any, lost: Any, i: Any, j: Any, last: Any,
        wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            b, t, r, p, d, o = (emit.data(sig.args[q], arguments[q]) for q in range(6))
            i, j, last, wide = arguments[6:]
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
            before: list[Any] = []
            mass = emit.load(o, none)
            for end, total in zip(ends, sums, strict=True):
                for wider, other in zip(before, ends, strict=False):
                    cells.add(total, wider, cells.get(b, cells.after(end), other))
                value, beta, labels = cells.read(total), cells.get(b, i, end), cells.get(t, i, end)
                allowed = builder.fcmp_ordered(">", beta, zero)
                passed = builder.select(allowed, emit.times(value, labels), zero)
                cells.put(passed, p, i, end)
                cells.put(passed, p, end, i)
                before.append(passed)
                cells.put(builder.select(allowed, emit.times(value, cells.get(r, i, end)), zero), r, i, end)
                raised = builder.or_(builder.fcmp_ordered("<=", beta, floor), builder.fcmp_ordered("<=", labels, least))
                raised = builder.and_(raised, allowed)
                mass = emit.plus(mass, builder.select(raised, emit.times(value, beta), zero))
            emit.store(mass, o, none)
            return context.get_dummy_value()

        return types.void(betas, totals, rates, by, roots, lost, i, j, last, wide), generate

    return split


_join1, _join2, _join4 = _join(1), _join(2), _join(4)
_split1, _split2, _split4 = _split(1), _split(2), _split(4)


@compiled()
def _columns(left):  # type: ignore[no-untyped-def]
    """How many columns to do at once of those that are left."""
    return 4 if left >= 4 else 2 if left >= 2 else 1


@compiled()
def inside(totals, times, last, wide, betas, rates, extremes):  # type: ignore[no-untyped-def]
    """Fills betas and rates of words 0 to ``last`` from totals and c = ``times`` [8]."""
    extremes[:LANES], extremes[LANES:] = math.inf, 0.0
    j = 0
    while j <= last:
        columns = _columns(last + 1 - j)
        for end in range(j, j + columns):
            at = (end * wide + end) * LANES
            for lane in range(LANES):
                total = totals[at + lane]
                betas[at + lane] = 0.25 if total > 0.0 else 0.0
                rates[at + lane] = 0.25 * times[lane] / total if total > 0.0 else 0.0
            for i in range(end - 1, j - 1, -1):
                _join1(betas, totals, rates, times, extremes, i, end, wide)
        for i in range(j - 1, -1, -1):
            if columns == 4:
                _join4(betas, totals, rates, times, extremes, i, j, wide)
            elif columns == 2:
                _join2(betas, totals, rates, times, extremes, i, j, wide)
            else:
                _join1(betas, totals, rates, times, extremes, i, j, wide)
        j += columns


@compiled()
def outside(betas, totals, rates, by, roots, lost, last, wide):  # type: ignore[no-untyped-def]
    """Rates become marginals over the sums over labels. roots: 1 / betas [0, n - 1] at a sentence's n - 1, else 0."""
    j = last
    while j >= 0:
        columns = _columns(j + 1)
        for i in range(j + 2 - columns):
            if columns == 4:
                _split4(betas, totals, rates, by, roots, lost, i, j, last, wide)
            elif columns == 2:
                _split2(betas, totals, rates, by, roots, lost, i, j, last, wide)
            else:
                _split1(betas, totals, rates, by, roots, lost, i, j, last, wide)
        for i in range(j + 2 - columns, j + 1):
            for end in range(j, i - 1, -1):
                _split1(betas, totals, rates, by, roots, lost, i, end, last, wide)
        j -= columns
