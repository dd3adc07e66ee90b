"""Register tiles: the matrix products inside compiled recursions, in vector code.

The sums of four rows by two vectors stay in registers while a column of the tile is walked, as in the inner kernel of a
BLAS (Goto and van de Geijn 2008). Tables are padded to whole vectors (``vectors.padded``).
"""

from __future__ import annotations

import math
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit


def _walk(emit: Emit, sig: Any, arguments: Any, vectors: int, rows: int, best: bool) -> None:
    """Emits a tile: see ``_tile`` and ``_best``."""
    builder = emit.builder
    x_data, m_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in range(3))
    x_stride, m_stride, o_stride = (emit.row_stride(sig.args[i], arguments[i]) for i in range(3))
    at = arguments[4]
    one = emit.spread(arguments[5]) if best else None
    sums = [[emit.variable(-math.inf if best else 0.0) for _ in range(vectors)] for _ in range(rows)]
    with cgutils.for_range(builder, arguments[3], intp=emit.integer) as loop:
        base = builder.add(builder.mul(loop.index, m_stride), at)
        columns = [emit.load(m_data, builder.add(base, emit.integer(v * emit.lanes))) for v in range(vectors)]
        for r in range(rows):
            place = builder.add(builder.mul(emit.integer(r), x_stride), loop.index)
            value = emit.spread(builder.load(builder.gep(x_data, [place])))
            for v in range(vectors):
                if best:
                    emit.raise_to(sums[r][v], emit.multiply_add(columns[v], one, value))
                else:
                    emit.add_to(sums[r][v], emit.times(value, columns[v]))
    for r in range(rows):
        for v in range(vectors):
            place = builder.add(builder.mul(emit.integer(r), o_stride), at)
            emit.store(builder.load(sums[r][v]), o_data, builder.add(place, emit.integer(v * emit.lanes)))


def _tile(lanes: int, vectors: int, rows: int) -> Any:
    """(x, matrix, out, k, column): out[:rows, column:column + lanes * vectors] = x[:rows, :k] @ matrix[:k, the same
    columns]."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, x: Any, matrix: Any, out: Any, k: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            _walk(Emit(context, builder, sig.args[0].dtype, lanes), sig, arguments, vectors, rows, best=False)
            return context.get_dummy_value()

        return types.void(x, matrix, out, k, column), generate

    return tile


def _best(lanes: int, vectors: int, rows: int) -> Any:
    """(x, matrix, out, k, column, one): the product of ``_tile`` in (max, +): out[r, j] = max_i x[r, i] + matrix[i, j].

    The sum is emitted as x + matrix * one: a multiply-add runs beside a maximum where a plain sum waits for it. ``one``
    comes at run time, or the compiler would see that it is 1.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, x: Any, matrix: Any, out: Any, k: Any, column: Any, one: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            _walk(Emit(context, builder, sig.args[0].dtype, lanes), sig, arguments, vectors, rows, best=True)
            return context.get_dummy_value()

        return types.void(x, matrix, out, k, column, one), generate

    return tile


def _outer(lanes: int, vectors: int) -> Any:
    """(x, at, along, m, after, stride, n, by, out, row, column): four rows of sums over t < n of x_t (outer) m_t.

    x and m are flat; x_t starts at ``at + t along``, m_t at ``after + t stride``; out is two-dimensional. Where ``by``
    is a number: out += by * the sum; where it is an array: out = the sum, each term times by[t].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def outer(
        typingctx: Any, x: Any, at: Any, along: Any, m: Any, after: Any, stride: Any, n: Any, by: Any, out: Any,
        row: Any, column: Any
    ) -> Any:  # fmt: skip
        weighted = isinstance(by, types.Array)

        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, m_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 3, 8))
            _, at, along, _, after, stride, n, by, _, row, column = arguments
            sums = [[emit.variable() for _ in range(vectors)] for _ in range(4)]
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                x_at = builder.add(builder.add(at, builder.mul(loop.index, along)), row)
                m_at = builder.add(builder.add(after, builder.mul(loop.index, stride)), column)
                columns = [emit.load(m_data, builder.add(m_at, emit.integer(v * lanes))) for v in range(vectors)]
                if weighted:
                    weight = emit.spread(builder.load(builder.gep(emit.data(sig.args[7], by), [loop.index])))
                    columns = [emit.times(c, weight) for c in columns]
                for r in range(4):
                    value = emit.spread(builder.load(builder.gep(x_data, [builder.add(x_at, emit.integer(r))])))
                    for v in range(vectors):
                        emit.add_to(sums[r][v], emit.times(value, columns[v]))
            factor = None if weighted else emit.spread(by)
            o_stride = emit.row_stride(sig.args[8], arguments[8])
            for r in range(4):
                for v in range(vectors):
                    place = builder.add(builder.mul(builder.add(row, emit.integer(r)), o_stride), column)
                    place = builder.add(place, emit.integer(v * lanes))
                    total = builder.load(sums[r][v])
                    if factor is not None:
                        total = emit.plus(emit.load(o_data, place), emit.times(total, factor))
                    emit.store(total, o_data, place)
            return context.get_dummy_value()

        return types.void(x, at, along, m, after, stride, n, by, out, row, column), generate

    return outer


_four4, _four8, _four16, _four32 = _tile(4, 1, 4), _tile(8, 1, 4), _tile(16, 1, 4), _tile(16, 2, 4)
_best4x1, _best8x1, _best16x1, _best64x1 = _best(4, 1, 1), _best(8, 1, 1), _best(16, 1, 1), _best(16, 4, 1)
_best4x4, _best8x4, _best16x4, _best64x4 = _best(4, 1, 4), _best(8, 1, 4), _best(16, 1, 4), _best(16, 4, 4)
_best32x4 = _best(16, 2, 4)
_one4, _one8, _one16, _one64 = _tile(4, 1, 1), _tile(8, 1, 1), _tile(16, 1, 1), _tile(16, 4, 1)
_outer4, _outer8, _outer16, _outer32, _outer64 = (
    _outer(*shape) for shape in ((4, 1), (8, 1), (16, 1), (16, 2), (16, 4))
)


@compiled(inline="always")  # a call would copy the arrays' headers
def product4(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """out[r, :width] = x[r, :k] @ matrix[:k, :width] for four rows; width = matrix.shape[1] as ``padded`` gives it."""
    width = matrix.shape[1]
    if width == 4:
        _four4(x, matrix, out, k, 0)
    else:
        column = 0
        while column + 32 <= width:
            _four32(x, matrix, out, k, column)
            column += 32
        if column + 16 <= width:
            _four16(x, matrix, out, k, column)
            column += 16
        if column < width:
            _four8(x, matrix, out, k, column)


@compiled(inline="always")  # a call would copy the arrays' headers
def best_sums(x, matrix, out, k, one, rows):  # type: ignore[no-untyped-def]
    """out[r, j] = max over i < k of x[r, i] + matrix[i, j], for one row, or for four; no NaN, no +inf. ``one`` is 1:
    see ``_best``."""
    width, column = matrix.shape[1], 0
    if rows == 1:
        if width == 4:
            _best4x1(x, matrix, out, k, 0, one)
        else:
            while column + 64 <= width:
                _best64x1(x, matrix, out, k, column, one)
                column += 64
            while column + 16 <= width:
                _best16x1(x, matrix, out, k, column, one)
                column += 16
            if column < width:
                _best8x1(x, matrix, out, k, column, one)
    elif width == 4:
        _best4x4(x, matrix, out, k, 0, one)
    else:
        while column + 64 <= width:
            _best64x4(x, matrix, out, k, column, one)
            column += 64
        if column + 32 <= width:
            _best32x4(x, matrix, out, k, column, one)
            column += 32
        if column + 16 <= width:
            _best16x4(x, matrix, out, k, column, one)
            column += 16
        if column < width:
            _best8x4(x, matrix, out, k, column, one)


@compiled()
def product1(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """The same for one row."""
    width = matrix.shape[1]
    if width == 4:
        _one4(x, matrix, out, k, 0)
    else:
        column = 0
        while column + 64 <= width:
            _one64(x, matrix, out, k, column)
            column += 64
        while column + 16 <= width:
            _one16(x, matrix, out, k, column)
            column += 16
        if column < width:
            _one8(x, matrix, out, k, column)


@compiled()
def add_outer(x, at, m, after, n, by, out, k):  # type: ignore[no-untyped-def]
    """out[i, j] += by * sum over t < n of x[at + t P + i] m[after + t P + j], i < k; out [P, P], x and m flat, P
    as ``padded``. With an array by [n]: out[i, j] = sum of by[t] x[..] m[..]."""
    _outers(x, at, out.shape[1], m, after, n, by, out, k)


@compiled()
def add_products(x, m, out):  # type: ignore[no-untyped-def]
    """out += x.T @ m of x [n, K], m [n, P] and out [K, P], K a multiple of 4, P as ``padded``."""
    _outers(x.ravel(), 0, x.shape[1], m.ravel(), 0, m.shape[0], 1.0, out, x.shape[1])


@compiled(inline="always")
def _outers(x, at, along, m, after, n, by, out, k):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for row in range(0, k, 4):
        if width == 4:
            _outer4(x, at, along, m, after, width, n, by, out, row, 0)
        else:
            column = 0
            while column + 64 <= width:
                _outer64(x, at, along, m, after, width, n, by, out, row, column)
                column += 64
            if column + 32 <= width:
                _outer32(x, at, along, m, after, width, n, by, out, row, column)
                column += 32
            if column + 16 <= width:
                _outer16(x, at, along, m, after, width, n, by, out, row, column)
                column += 16
            if column < width:
                _outer8(x, at, along, m, after, width, n, by, out, row, column)
