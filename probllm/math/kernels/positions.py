"""Sums of products where the lanes of a vector are neighbouring places in a row.

Arrays are flat, and a row is a run of places; each function says by how many entries its sums step from one row to the
next. Sums stay in registers, ``side`` (4 or 5) rows by as many; rows come in multiples of it, and their places in
vectors of 64 bytes (``lanes`` of them, 8 doubles or 16 floats), the last of 32 where that will do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import exp_vector
from probllm.math.kernels.vectors import Emit

PAD = 16  # zeros before the first place of a row: a vector may begin before it


@compiled()
def row_of(places, lanes):  # type: ignore[no-untyped-def]
    """Entries from one row to the next."""
    return PAD + -(-places // lanes) * lanes


@compiled()
def aligned_zeros(size, like):  # type: ignore[no-untyped-def]
    """``size`` zeros of the type of ``like`` from the begin of a cache line: no vector then lies in two."""
    room = np.zeros(size + PAD, like.dtype)
    skip = -(room.ctypes.data // room.itemsize) % (64 // room.itemsize)
    return room[skip : skip + size]


def _emit(context: Any, builder: Any, array: Any, parts: int) -> Emit:
    """For vectors of 64 bytes, or of one of so many parts of that."""
    return Emit(context, builder, array.dtype, 512 // array.dtype.bitwidth // parts)


def _place(builder: Any, start: Any, *moves: tuple[Any, Any]) -> Any:
    for index, stride in moves:
        start = builder.add(start, builder.mul(index, stride))
    return start


def _outer(parts: int, side: int) -> Any:
    """(x, at, step, z, after, stride, row, n, out, there, wide, narrow): for r, c < side, in each lane,

    out[there + r wide + c narrow] = sum over t < n of x[at + t step + r row] z[after + t stride + c row].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def outer(
        typingctx: Any, x: Any, at: Any, step: Any, z: Any, after: Any, stride: Any, row: Any, n: Any, out: Any,
        there: Any, wide: Any, narrow: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _emit(context, builder, sig.args[0], parts)
            x_data, z_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 3, 8))
            _, at, step, _, after, stride, row, n, _, there, wide, narrow = arguments
            numbers = [emit.integer(i) for i in range(side)]
            sums = [[emit.variable() for _ in numbers] for _ in numbers]
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                left, right = _place(builder, at, (loop.index, step)), _place(builder, after, (loop.index, stride))
                columns = [emit.load(z_data, _place(builder, right, (c, row))) for c in numbers]
                for r in numbers:
                    value = emit.load(x_data, _place(builder, left, (r, row)))
                    for total, column in zip(sums[r.constant], columns, strict=True):
                        emit.add_to(total, emit.times(value, column))
            for r in numbers:
                for c in numbers:
                    place = _place(builder, there, (r, wide), (c, narrow))
                    emit.store(builder.load(sums[r.constant][c.constant]), o_data, place)
            return context.get_dummy_value()

        return types.void(x, at, step, z, after, stride, row, n, out, there, wide, narrow), generate

    return outer


def _apply(parts: int, side: int, several: int) -> Any:
    """(m, at, along, across, v, after, down, step, n, out, there, row, stride): for r < side and k < several,

    out[there + r row + k stride] += sum over q < n of m[at + q along + r across] v[after + q down + k step].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def apply(
        typingctx: Any, m: Any, at: Any, along: Any, across: Any, v: Any, after: Any, down: Any, step: Any, n: Any,
        out: Any, there: Any, row: Any, stride: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _emit(context, builder, sig.args[0], parts)
            m_data, v_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 4, 9))
            _, at, along, across, _, after, down, step, n, _, there, row, stride = arguments
            rows, copies = ([emit.integer(i) for i in range(count)] for count in (side, several))
            sums = [[emit.variable() for _ in copies] for _ in rows]
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                first, second = _place(builder, at, (loop.index, along)), _place(builder, after, (loop.index, down))
                vectors = [emit.load(v_data, _place(builder, second, (k, step))) for k in copies]
                for r in rows:
                    value = emit.load(m_data, _place(builder, first, (r, across)))
                    for total, vector in zip(sums[r.constant], vectors, strict=True):
                        emit.add_to(total, emit.times(value, vector))
            for k in copies:
                for r in rows:
                    place = _place(builder, there, (r, row), (k, stride))
                    total = emit.plus(emit.load(o_data, place), builder.load(sums[r.constant][k.constant]))
                    emit.store(total, o_data, place)
            return context.get_dummy_value()

        return types.void(m, at, along, across, v, after, down, step, n, out, there, row, stride), generate

    return apply


def _tile(parts: int, vectors: int, rows: int) -> Any:
    """(x, at, across, along, m, after, down, n, out, there, row, more): for r < rows and the places c of the vectors,

    out[there + r row + c] = sum over q < n of x[at + r across + q along] m[after + q down + c], added if ``more``.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typingctx: Any, x: Any, at: Any, across: Any, along: Any, m: Any, after: Any, down: Any, n: Any, out: Any,
        there: Any, row: Any, more: Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _emit(context, builder, sig.args[0], parts)
            x_data, m_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 4, 8))
            _, at, across, along, _, after, down, n, _, there, row, more = arguments
            numbers = [emit.integer(i) for i in range(rows)]
            ahead = [emit.integer(v * emit.lanes) for v in range(vectors)]
            sums = [[emit.variable() for _ in ahead] for _ in numbers]
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                first, second = _place(builder, at, (loop.index, along)), _place(builder, after, (loop.index, down))
                columns = [emit.load(m_data, builder.add(second, v)) for v in ahead]
                for r in numbers:
                    value = emit.spread(builder.load(builder.gep(x_data, [_place(builder, first, (r, across))])))
                    for total, column in zip(sums[r.constant], columns, strict=True):
                        emit.add_to(total, emit.times(value, column))
            places = [[builder.add(_place(builder, there, (r, row)), v) for v in ahead] for r in numbers]
            pairs = [pair for r in numbers for pair in zip(sums[r.constant], places[r.constant], strict=True)]
            with builder.if_then(more):
                for total, place in pairs:
                    emit.add_to(total, emit.load(o_data, place))
            for total, place in pairs:
                emit.store(builder.load(total), o_data, place)
            return context.get_dummy_value()

        return types.void(x, at, across, along, m, after, down, n, out, there, row, more), generate

    return tile


@intrinsic  # type: ignore[untyped-decorator]
def exponentiate(typingctx: Any, x: Any, at: Any, row: Any, rows: Any, width: Any) -> Any:
    """x = exp(x) over the first ``width`` places, a multiple of ``lanes``, of rows from ``at`` on, 0 where x is -inf;
    returns the greatest absolute value of the others. No NaN, no +inf."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = _emit(context, builder, sig.args[0], 1)
        data, (_, at, row, rows, width) = emit.data(sig.args[0], arguments[0]), arguments
        low, high, zero = emit.variable(), emit.variable(), emit.constant(0.0)
        with cgutils.for_range(builder, rows, intp=emit.integer) as loop, emit.vectors(width) as (v, _):
            place = builder.add(_place(builder, at, (loop.index, row)), v)
            score = emit.load(data, place)
            allowed = builder.fcmp_ordered(">", score, emit.constant(-math.inf))
            score = builder.select(allowed, score, zero)
            emit.raise_to(high, score)
            emit.lower_to(low, score)
            emit.store(builder.select(allowed, exp_vector(emit, score), zero), data, place)
        highest, lowest = emit.highest(high), builder.fsub(emit.scalar(0.0), emit.lowest(low))
        return builder.select(builder.fcmp_ordered(">", highest, lowest), highest, lowest)

    return x.dtype(x, at, row, rows, width), generate


class _Bounds:
    """The least entry that is not 0, and the greatest, of vectors with nothing below 0."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.low, self.high = emit, emit.variable(math.inf), emit.variable()

    def add(self, value: Any) -> None:
        builder, emit = self.emit.builder, self.emit
        empty = builder.fcmp_ordered("==", value, emit.constant(0.0))
        emit.lower_to(self.low, builder.select(empty, emit.constant(math.inf), value))
        emit.raise_to(self.high, value)

    def write(self, found: Any) -> None:
        for i, value in enumerate((self.emit.lowest(self.low), self.emit.highest(self.high))):
            self.emit.builder.store(value, self.emit.builder.gep(found, [self.emit.integer(i)]))


@intrinsic  # type: ignore[untyped-decorator]
def multiply_places(
    typingctx: Any, x: Any, at: Any, row: Any, y: Any, out: Any, after: Any, down: Any, rows: Any, width: Any,
    found: Any
) -> Any:  # fmt: skip
    """out = x * y over the first ``width`` places, a multiple of ``lanes``, of rows; those of y and out begin and step
    alike. found: the least product that is not 0, and the greatest. Nothing is below 0."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = _emit(context, builder, sig.args[0], 1)
        x_data, y_data, o_data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 3, 4, 9))
        _, at, row, _, _, after, down, rows, width, _ = arguments
        bounds = _Bounds(emit)
        with cgutils.for_range(builder, rows, intp=emit.integer) as loop, emit.vectors(width) as (v, _):
            first = builder.add(_place(builder, at, (loop.index, row)), v)
            second = builder.add(_place(builder, after, (loop.index, down)), v)
            value = emit.times(emit.load(x_data, first), emit.load(y_data, second))
            emit.store(value, o_data, second)
            bounds.add(value)
        bounds.write(f_data)
        return context.get_dummy_value()

    return types.void(x, at, row, y, out, after, down, rows, width, found), generate


@intrinsic  # type: ignore[untyped-decorator]
def split_places(
    typingctx: Any, d: Any, x: Any, y: Any, at: Any, row: Any, out: Any, down: Any, rows: Any, width: Any
) -> Any:  # fmt: skip
    """out = d * x, then d *= y, over the first ``width`` places, a multiple of ``lanes``, of rows; those of d, x and y
    begin and step alike."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = _emit(context, builder, sig.args[0], 1)
        d_data, x_data, y_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 1, 2, 5))
        _, _, _, at, row, _, down, rows, width = arguments
        with cgutils.for_range(builder, rows, intp=emit.integer) as loop, emit.vectors(width) as (v, _):
            place = builder.add(_place(builder, at, (loop.index, row)), v)
            value = emit.load(d_data, place)
            product = emit.times(value, emit.load(x_data, place))
            emit.store(product, o_data, builder.add(builder.mul(loop.index, down), v))
            emit.store(emit.times(value, emit.load(y_data, place)), d_data, place)
        return context.get_dummy_value()

    return types.void(d, x, y, at, row, out, down, rows, width), generate


@intrinsic  # type: ignore[untyped-decorator]
def scale_places(typingctx: Any, by: Any, y: Any, at: Any, width: Any, found: Any) -> Any:
    """y *= by over ``width`` places, a multiple of 8; found as in ``multiply_places``."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = _emit(context, builder, sig.args[1], 1)
        by, _, at, width, _ = arguments
        y_data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (1, 4))
        factor, bounds = emit.spread(by), _Bounds(emit)
        with emit.vectors(width) as (v, _):
            place = builder.add(at, v)
            value = emit.times(emit.load(y_data, place), factor)
            emit.store(value, y_data, place)
            bounds.add(value)
        bounds.write(f_data)
        return context.get_dummy_value()

    return types.void(by, y, at, width, found), generate


_outer1x4, _outer1x5, _outer2x4, _outer2x5 = _outer(1, 4), _outer(1, 5), _outer(2, 4), _outer(2, 5)
_apply1x4, _apply1x5, _apply2x4, _apply2x5 = _apply(1, 4, 1), _apply(1, 5, 1), _apply(2, 4, 1), _apply(2, 5, 1)
_many1x4, _many1x5, _many2x4, _many2x5 = _apply(1, 4, 4), _apply(1, 5, 4), _apply(2, 4, 4), _apply(2, 5, 4)
_two1x4, _two1x5, _two1x8, _two1x10 = _tile(1, 2, 4), _tile(1, 2, 5), _tile(1, 2, 8), _tile(1, 2, 10)
_tile1x4, _tile1x5, _tile1x8, _tile1x10 = _tile(1, 1, 4), _tile(1, 1, 5), _tile(1, 1, 8), _tile(1, 1, 10)
_tile2x4, _tile2x5, _tile2x8, _tile2x10 = _tile(2, 1, 4), _tile(2, 1, 5), _tile(2, 1, 8), _tile(2, 1, 10)


@compiled()
def outer_sums(x, at, step, z, after, stride, row, n, out, there, wide, narrow, side, symbols, places):  # type: ignore[no-untyped-def]
    """``_outer`` of all rows, ``symbols`` of x by as many of z, over ``places``."""
    lanes = 64 // x.itemsize
    for v in range(0, places, lanes):
        half = places - v <= lanes // 2
        for r in range(0, symbols, side):
            for c in range(0, symbols, side):
                a, b, o = at + v + r * row, after + v + c * row, there + v + r * wide + c * narrow
                if side == 5:
                    if half:
                        _outer2x5(x, a, step, z, b, stride, row, n, out, o, wide, narrow)
                    else:
                        _outer1x5(x, a, step, z, b, stride, row, n, out, o, wide, narrow)
                elif half:
                    _outer2x4(x, a, step, z, b, stride, row, n, out, o, wide, narrow)
                else:
                    _outer1x4(x, a, step, z, b, stride, row, n, out, o, wide, narrow)


@compiled()
def apply(m, at, along, across, v, after, down, step, n, out, there, row, stride, side, rows, several, places):  # type: ignore[no-untyped-def]
    """``_apply`` of ``rows``, for k < several, over ``places``."""
    lanes = 64 // m.itemsize
    for i in range(0, places, lanes):
        half = places - i <= lanes // 2
        for r in range(0, rows, side):
            a, o = at + i + r * across, there + i + r * row
            k = 0
            while k < several:
                b, p = after + i + k * step, o + k * stride
                many = several - k >= 4
                if side == 5:
                    if many:
                        if half:
                            _many2x5(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                        else:
                            _many1x5(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                    elif half:
                        _apply2x5(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                    else:
                        _apply1x5(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                elif many:
                    if half:
                        _many2x4(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                    else:
                        _many1x4(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                elif half:
                    _apply2x4(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                else:
                    _apply1x4(m, a, along, across, v, b, down, step, n, out, p, row, stride)
                k += 4 if many else 1


@compiled()
def multiply_rows(x, at, across, along, m, after, down, n, out, there, row, more, side, rows, places):  # type: ignore[no-untyped-def]
    """``_tile`` of ``rows``, over ``places`` (rounded up to half a vector)."""
    lanes = 64 // x.itemsize
    column = 0
    while column < places:
        left = places - column
        two, half = left > lanes + lanes // 2, left <= lanes // 2
        b, o = after + column, there + column
        r = 0
        while r < rows:
            double = rows - r >= 2 * side
            a, p = at + r * across, o + r * row
            if side == 5:
                if two:
                    if double:
                        _two1x10(x, a, across, along, m, b, down, n, out, p, row, more)
                    else:
                        _two1x5(x, a, across, along, m, b, down, n, out, p, row, more)
                elif half:
                    if double:
                        _tile2x10(x, a, across, along, m, b, down, n, out, p, row, more)
                    else:
                        _tile2x5(x, a, across, along, m, b, down, n, out, p, row, more)
                elif double:
                    _tile1x10(x, a, across, along, m, b, down, n, out, p, row, more)
                else:
                    _tile1x5(x, a, across, along, m, b, down, n, out, p, row, more)
            elif two:
                if double:
                    _two1x8(x, a, across, along, m, b, down, n, out, p, row, more)
                else:
                    _two1x4(x, a, across, along, m, b, down, n, out, p, row, more)
            elif half:
                if double:
                    _tile2x8(x, a, across, along, m, b, down, n, out, p, row, more)
                else:
                    _tile2x4(x, a, across, along, m, b, down, n, out, p, row, more)
            elif double:
                _tile1x8(x, a, across, along, m, b, down, n, out, p, row, more)
            else:
                _tile1x4(x, a, across, along, m, b, down, n, out, p, row, more)
            r += 2 * side if double else side
        column += 2 * lanes if two else lanes
