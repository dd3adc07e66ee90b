"""Eisner's recursion over eight sentences at once, a vector lane each, and its gradient: see ``probllm.math.eisner``.

The root is a word 0 that heads to its right only. Tables are flat, [words + 1, wide, 8] and ``wide`` odd: a column then
lies in all sets of a cache. Above the diagonal stand spans and arcs headed by their first word, below by their last:

    spans [i, j]: right(i, j)    [j, i]: left(i, j)    [j, j]: 1         for i < j
    heads [i, j]: i is the head of j, which ends there    [j, i]: j is the head of i, which starts there
    arcs  [i, j]: the weight of j under i    [j, i]: of i under j

With one root, spans [0, j] are 0 for j > 0: no second arc joins them; the sums are kept beside the table.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.eisner import TINY, scaled
from probllm.math.kernels.lanes import LANES, Cells, aligned
from probllm.math.kernels.vectors import Emit


def _attach(columns: int) -> Any:
    """(spans, heads, arcs, i, j, wide): fills both entries of spans and heads for i..j, i < j; then for i..j + 1, if
    ``columns`` is 2. Two columns at once load half as much of what is not in the first cache."""

    @intrinsic  # type: ignore[untyped-decorator]
    def attach(typingctx: Any, spans: Any, heads: Any, arcs: Any, i: Any, j: Any, wide: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            s, h, a = (emit.data(sig.args[q], arguments[q]) for q in range(3))
            i, j, wide = arguments[3:]
            cells = Cells(emit, wide)
            ends = [cells.after(j, c) for c in range(columns)]
            sums = [cells.sums(3) for _ in ends]
            second = cells.after(i)
            with cells.each(second, j) as (m, _):
                right, ahead, left = cells.get(s, i, m), cells.get(h, i, m), cells.get(s, m, i)
                for end, (between, to_right, to_left) in zip(ends, sums, strict=True):
                    cells.add(between, right, cells.get(s, end, cells.after(m)))
                    cells.add(to_right, ahead, cells.get(s, m, end))
                    cells.add(to_left, left, cells.get(h, end, m))
            for c, (end, (between, to_right, to_left)) in enumerate(zip(ends, sums, strict=True)):
                if c > 0:  # the column before this one has just been filled
                    emit.add_to(between, right)
                    cells.add(to_right, ahead, cells.get(s, j, end))
                    cells.add(to_left, left, cells.get(h, end, j))
                gap = cells.read(between, cells.get(s, end, second))
                ahead, back = emit.times(cells.get(a, i, end), gap), emit.times(cells.get(a, end, i), gap)
                right, left = cells.read(to_right, ahead), cells.read(to_left, back)
                for value, table, row, column in ((ahead, h, i, end), (back, h, end, i), (right, s, i, end)):
                    cells.put(value, table, row, column)
                cells.put(left, s, end, i)
            return context.get_dummy_value()

        return types.void(spans, heads, arcs, i, j, wide), generate

    return attach


def _detach(columns: int) -> Any:
    """(spans, heads, arcs, by_spans, by_gaps, joins, i, j, last, wide): the gradient in both entries of spans for i..j,
    i < j, and in the sum between two heads, by_gaps [i, j]; arcs then hold the gradient times the weight. Then the same
    for i..j - 1, if ``columns`` is 2. joins: the row of by_gaps of the sums that right(i, j) is in."""

    @intrinsic  # type: ignore[untyped-decorator]
    def detach(
        typingctx: Any, spans: Any, heads: Any, arcs: Any, by_spans: Any, by_gaps: Any, joins: Any, i: Any, j: Any,
        last: Any, wide: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, LANES)
            s, h, a, d, g = (emit.data(sig.args[q], arguments[q]) for q in range(5))
            joins, i, j, last, wide = arguments[5:]
            cells = Cells(emit, wide)
            ends = [cells.after(j, -c) for c in range(columns)]
            sums = [cells.sums(4) for _ in ends]
            with cells.each(cells.after(j), cells.after(last)) as (t, _):
                by_gap, by_left, by_right = cells.get(g, joins, t), cells.get(d, t, i), cells.get(d, i, t)
                for end, (right, left, ahead, _) in zip(ends, sums, strict=True):
                    cells.add(right, by_gap, cells.get(s, t, cells.after(end)))
                    cells.add(left, by_left, cells.get(h, t, end))
                    cells.add(ahead, by_right, cells.get(s, end, t))
            with cells.each(emit.integer(0), i) as (t, _):
                above, between, below = cells.get(h, t, i), cells.get(s, t, cells.after(i, -1)), cells.get(s, i, t)
                for end, (right, left, _, back) in zip(ends, sums, strict=True):
                    cells.add(right, cells.get(d, t, end), above)
                    cells.add(left, cells.get(g, t, end), between)
                    cells.add(back, cells.get(d, end, t), below)
            for c, (end, (right, left, ahead, back)) in enumerate(zip(ends, sums, strict=True)):
                if c > 0:  # the column behind this one has just been filled
                    emit.add_to(right, by_gap)
                    cells.add(left, by_left, cells.get(h, j, end))
                    cells.add(ahead, by_right, cells.get(s, end, j))
                by_right, by_left = cells.read(right, cells.get(d, i, end)), cells.read(left)
                by_ahead, by_back = cells.read(ahead, by_right), cells.read(back, by_left)
                by_gap = emit.times(by_ahead, cells.get(a, i, end))
                by_gap = emit.plus(by_gap, emit.times(by_back, cells.get(a, end, i)))
                cells.put(by_right, d, i, end)
                cells.put(by_left, d, end, i)
                cells.put(by_gap, g, i, end)
                cells.put(emit.times(by_ahead, cells.get(h, i, end)), a, i, end)
                cells.put(emit.times(by_back, cells.get(h, end, i)), a, end, i)
            return context.get_dummy_value()

        return types.void(spans, heads, arcs, by_spans, by_gaps, joins, i, j, last, wide), generate

    return detach


_attach1, _attach2 = _attach(1), _attach(2)
_detach1, _detach2 = _detach(1), _detach(2)


@compiled()
def _inside(arcs, last, single, wide, spans, heads, totals):  # type: ignore[no-untyped-def]
    """Fills spans and heads of words 0 to ``last``, and totals [words + 1, 8]: the sums over the first words' trees."""
    spans[:LANES] = 1.0
    for j in range(1, last + 1, 2):
        both = j < last
        for k in range(j, j + 1 + both):
            spans[(k * wide + k) * LANES : (k * wide + k + 1) * LANES] = 1.0
        if both:
            _attach1(spans, heads, arcs, j, j + 1, wide)
        for i in range(j - 1, 0, -1):
            if both:
                _attach2(spans, heads, arcs, i, j, wide)
            else:
                _attach1(spans, heads, arcs, i, j, wide)
        for k in range(j, j + 1 + both):
            _attach1(spans, heads, arcs, 0, k, wide)
            for lane in range(LANES):
                totals[k, lane] = spans[k * LANES + lane]
            if single:
                spans[k * LANES : (k + 1) * LANES] = 0.0


@compiled()
def _outside(spans, heads, arcs, by_spans, by_gaps, last, single, wide):  # type: ignore[no-untyped-def]
    """From by_spans, 0 but for the gradient in the totals [0, j]: arcs become their marginals."""
    # with one root no arc joins what it heads: a row of zeros
    joins = last + 1 if single else 0
    by_gaps[joins * wide * LANES : (joins + 1) * wide * LANES] = 0.0
    for j in range(last, 0, -2):
        both = j > 1
        for k in range(j, j - 1 - both, -1):
            _detach1(spans, heads, arcs, by_spans, by_gaps, joins, 0, k, last, wide)
        for i in range(1, j - both):
            if both:
                _detach2(spans, heads, arcs, by_spans, by_gaps, i, i, j, last, wide)
            else:
                _detach1(spans, heads, arcs, by_spans, by_gaps, i, i, j, last, wide)
        if both:
            _detach1(spans, heads, arcs, by_spans, by_gaps, j - 1, j - 1, j, last, wide)


@compiled()
def _gather(scores, n, lane, wide, row, peaks, arcs):  # type: ignore[no-untyped-def]
    """Writes a lane of the arcs [longest + 1, wide, 8], 0 on entry, from scores [T, T]; returns what was taken out."""
    taken = scaled(scores, n, peaks, row)
    for h in range(n):
        at = (h + 1) * wide * LANES + lane
        for d in range(n):
            arcs[at + (d + 1) * LANES] = row[h, d]
        arcs[(h + 1) * LANES + lane] = row[h, h]
    return taken


@compiled()
def sums(scores, lengths, order, single, keep, log_z, marginals, good, first, step):  # type: ignore[no-untyped-def]
    """log_z [B] of scores [B, T, T], the roots' on the diagonal; marginals alike, 0 on entry, if ``keep``.

    Eight rows at a time in the order given, of similar lengths best. Where ``good`` [B] comes out False, the others'
    results are no less right.
    """
    words = scores.shape[1]
    wide = (words + 1) | 1
    volume = (words + 2) * wide * LANES
    arcs, spans, heads = aligned(volume), aligned(volume), aligned(volume)
    by_spans, by_gaps = aligned(volume if keep else 0), aligned(volume if keep else 0)
    row, peaks = np.empty((words, words)), np.empty(words)
    totals, taken, n = np.empty((words + 1, LANES)), np.empty(LANES), np.empty(LANES, np.int64)
    for group in range(first, (len(order) + LANES - 1) // LANES, step):
        members = order[group * LANES : (group + 1) * LANES]
        last = 0
        for b in members:
            last = max(last, lengths[b])
        used = (last + 2) * wide * LANES
        arcs[:used] = 0.0
        for lane in range(len(members)):
            b = members[lane]
            n[lane] = lengths[b]
            taken[lane] = _gather(scores[b], n[lane], lane, wide, row, peaks, arcs)
        _inside(arcs, last, single, wide, spans, heads, totals)
        if keep:
            by_spans[:used] = 0.0
        for lane in range(len(members)):
            b = members[lane]
            total = totals[n[lane], lane]
            good[b] = total >= TINY
            if good[b]:
                log_z[b] = math.log(total) + taken[lane]
                if keep:
                    by_spans[n[lane] * LANES + lane] = 1.0 / total
        if not keep:
            continue
        _outside(spans, heads, arcs, by_spans, by_gaps, last, single, wide)
        for lane in range(len(members)):
            b = members[lane]
            for h in range(n[lane]):
                at = (h + 1) * wide * LANES + lane
                for d in range(n[lane]):
                    marginals[b, h, d] = arcs[at + (d + 1) * LANES]
                marginals[b, h, h] = arcs[(h + 1) * LANES + lane]
