"""Vector code for the inner passes of compiled recursions, emitted as LLVM IR so that no processor runs a scalar
remainder loop.

Rows are padded to whole vectors (``padded``). ``product4`` and ``product1`` are register tiles, out[r, :] = x[r, :] @
matrix: the sums of four rows by two vectors stay in registers while a column of the tile is walked, as in the inner
kernel of a BLAS (Goto and van de Geijn 2008). ``ahead`` and ``behind`` are the element-wise passes of a scaled
forward-backward step, ``shift`` subtracts. LLVM lowers the vectors to whatever the processor has.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def padded(k: int) -> int:
    """Columns that a row of k entries takes, so that whole vectors fit: 4, 8, or a multiple of 16."""
    return 4 if k <= 4 else 8 if k <= 8 else -(-k // 16) * 16


class _Emit:
    """Loads, stores and sums of vectors of one scalar type."""

    def __init__(self, context: Any, builder: Any, dtype: Any, lanes: int) -> None:
        self.context, self.builder, self.lanes = context, builder, lanes
        self.scalar = context.get_data_type(dtype)
        self.vector = ir.VectorType(self.scalar, lanes)
        self.integer = context.get_value_type(types.intp)
        self.bytes = dtype.bitwidth // 8

    def data(self, type_: Any, value: Any) -> Any:
        return self.context.make_array(type_)(self.context, self.builder, value).data

    def row_stride(self, type_: Any, value: Any) -> Any:
        """Elements from one row of a two-dimensional array to the next."""
        array = self.context.make_array(type_)(self.context, self.builder, value)
        return self.builder.sdiv(cgutils.unpack_tuple(self.builder, array.strides)[-2], self.integer(self.bytes))

    def _at(self, data: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [index]), self.vector.as_pointer())

    def load(self, data: Any, index: Any) -> Any:
        return self.builder.load(self._at(data, index), align=self.bytes)

    def store(self, value: Any, data: Any, index: Any) -> None:
        self.builder.store(value, self._at(data, index), align=self.bytes)

    def spread(self, value: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None))

    def times(self, x: Any, y: Any) -> Any:
        return self.builder.fmul(x, y, flags=("contract",))

    def plus(self, x: Any, y: Any) -> Any:
        return self.builder.fadd(x, y, flags=("contract",))

    def variable(self, value: float = 0.0) -> Any:
        """A vector variable; LLVM keeps it in a register."""
        variable = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(ir.Constant(self.vector, [self.scalar(value)] * self.lanes), variable)
        return variable

    def raise_to(self, variable: Any, value: Any) -> None:
        """variable = max(variable, value); no NaN may come."""
        before = self.builder.load(variable)
        above = self.builder.fcmp_ordered(">", value, before, flags=("nnan",))
        self.builder.store(self.builder.select(above, value, before), variable)

    def add_to(self, variable: Any, value: Any) -> None:
        self.builder.store(self.plus(self.builder.load(variable), value), variable)

    def total(self, variable: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{self.bytes * 8}"
        function_type = ir.FunctionType(self.scalar, [self.scalar, self.vector])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(function, [self.scalar(0.0), self.builder.load(variable)], fastmath=("reassoc",))

    def highest(self, variable: Any) -> Any:
        name = f"llvm.vector.reduce.fmax.v{self.lanes}f{self.bytes * 8}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.scalar, [self.vector]), name
        )
        return self.builder.call(function, [self.builder.load(variable)], fastmath=("nnan",))

    def vectors(self, width: Any) -> Any:
        return cgutils.for_range_slice(
            self.builder, self.integer(0), width, self.integer(self.lanes), intp=self.integer
        )


def _tile(lanes: int, vectors: int, rows: int, best: bool = False) -> Any:
    """(x, matrix, out, k, column): out[:rows, column:column + lanes * vectors] = x[:rows, :k] @ matrix[:k, the same
    columns].

    With ``best`` the product is that of (max, +): out[r, j] = max_i x[r, i] + matrix[i, j].
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, x: Any, matrix: Any, out: Any, k: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, m_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in range(3))
            x_stride, m_stride, o_stride = (emit.row_stride(sig.args[i], arguments[i]) for i in range(3))
            at = arguments[4]
            sums = [[emit.variable(-math.inf if best else 0.0) for _ in range(vectors)] for _ in range(rows)]
            with cgutils.for_range(builder, arguments[3], intp=emit.integer) as loop:
                base = builder.add(builder.mul(loop.index, m_stride), at)
                columns = [emit.load(m_data, builder.add(base, emit.integer(v * lanes))) for v in range(vectors)]
                for r in range(rows):
                    place = builder.add(builder.mul(emit.integer(r), x_stride), loop.index)
                    value = emit.spread(builder.load(builder.gep(x_data, [place])))
                    for v in range(vectors):
                        if best:
                            emit.raise_to(sums[r][v], emit.plus(value, columns[v]))
                        else:
                            emit.add_to(sums[r][v], emit.times(value, columns[v]))
            for r in range(rows):
                for v in range(vectors):
                    place = builder.add(builder.mul(emit.integer(r), o_stride), at)
                    emit.store(builder.load(sums[r][v]), o_data, builder.add(place, emit.integer(v * lanes)))
            return context.get_dummy_value()

        return types.void(x, matrix, out, k, column), generate

    return tile


def _outer(lanes: int, vectors: int) -> Any:
    """(x, at, m, after, stride, n, by, out, row, column): four rows of out += by * sum over t < n of x_t (outer) m_t.

    x and m are flat; x_t starts at ``at + t stride``, m_t at ``after + t stride``; out is two-dimensional.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def outer(
        typingctx: Any, x: Any, at: Any, m: Any, after: Any, stride: Any, n: Any, by: Any, out: Any, row: Any, column:
        Any
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, m_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2, 7))
            _, at, _, after, stride, n, by, _, row, column = arguments
            sums = [[emit.variable() for _ in range(vectors)] for _ in range(4)]
            with cgutils.for_range(builder, n, intp=emit.integer) as loop:
                moved = builder.mul(loop.index, stride)
                x_at = builder.add(builder.add(at, moved), row)
                m_at = builder.add(builder.add(after, moved), column)
                columns = [emit.load(m_data, builder.add(m_at, emit.integer(v * lanes))) for v in range(vectors)]
                for r in range(4):
                    value = emit.spread(builder.load(builder.gep(x_data, [builder.add(x_at, emit.integer(r))])))
                    for v in range(vectors):
                        emit.add_to(sums[r][v], emit.times(value, columns[v]))
            factor, o_stride = emit.spread(by), emit.row_stride(sig.args[7], arguments[7])
            for r in range(4):
                for v in range(vectors):
                    place = builder.add(builder.mul(builder.add(row, emit.integer(r)), o_stride), column)
                    place = builder.add(place, emit.integer(v * lanes))
                    total = emit.plus(emit.load(o_data, place), emit.times(builder.load(sums[r][v]), factor))
                    emit.store(total, o_data, place)
            return context.get_dummy_value()

        return types.void(x, at, m, after, stride, n, by, out, row, column), generate

    return outer


def _ahead(lanes: int) -> Any:
    """(y, by, q, here, x, width): x = y * by * q[here:]; returns the sum."""

    @intrinsic  # type: ignore[untyped-decorator]
    def ahead(typingctx: Any, y: Any, by: Any, q: Any, here: Any, x: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            y_data, q_data, x_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2, 4))
            factor, total = emit.spread(arguments[1]), emit.variable()
            with emit.vectors(arguments[5]) as (v, _):
                value = emit.times(
                    emit.times(emit.load(y_data, v), factor), emit.load(q_data, builder.add(v, arguments[3]))
                )
                emit.store(value, x_data, v)
                emit.add_to(total, value)
            return emit.total(total)

        return by(y, by, q, here, x, width), generate

    return ahead


def _climb(lanes: int) -> Any:
    """(y, by, q, here, x, width): x = y - by + q[here:]; returns the greatest entry."""

    @intrinsic  # type: ignore[untyped-decorator]
    def climb(typingctx: Any, y: Any, by: Any, q: Any, here: Any, x: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            y_data, q_data, x_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2, 4))
            base, high = emit.spread(arguments[1]), emit.variable(-math.inf)
            with emit.vectors(arguments[5]) as (v, _):
                value = builder.fsub(emit.load(y_data, v), base)
                value = emit.plus(value, emit.load(q_data, builder.add(v, arguments[3])))
                emit.store(value, x_data, v)
                emit.raise_to(high, value)
            return emit.highest(high)

        return by(y, by, q, here, x, width), generate

    return climb


def _highest_sum(lanes: int) -> Any:
    """(x, y, width): the greatest entry of x + y."""

    @intrinsic  # type: ignore[untyped-decorator]
    def highest_sum(typingctx: Any, x: Any, y: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 1))
            high = emit.variable(-math.inf)
            with emit.vectors(arguments[2]) as (v, _):
                emit.raise_to(high, emit.plus(emit.load(x_data, v), emit.load(y_data, v)))
            return emit.highest(high)

        return x.dtype(x, y, width), generate

    return highest_sum


def _behind(lanes: int) -> Any:
    """(y, by, q, here, x, alpha, totals, width): x = q[here:] * y * by, totals = (sum of x, sum of alpha * y * by)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def behind(typingctx: Any, y: Any, by: Any, q: Any, here: Any, x: Any, alpha: Any, totals: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            y_data, q_data, x_data, a_data, t_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2, 4, 5, 6))
            factor, d, z = emit.spread(arguments[1]), emit.variable(), emit.variable()
            with emit.vectors(arguments[7]) as (v, _):
                value = emit.times(emit.load(y_data, v), factor)
                emit.add_to(z, emit.times(value, emit.load(a_data, v)))
                value = emit.times(value, emit.load(q_data, builder.add(v, arguments[3])))
                emit.store(value, x_data, v)
                emit.add_to(d, value)
            for i, variable in enumerate((d, z)):
                builder.store(emit.total(variable), builder.gep(t_data, [emit.integer(i)]))
            return context.get_dummy_value()

        return types.void(y, by, q, here, x, alpha, totals, width), generate

    return behind


def _product(lanes: int) -> Any:
    """(x, y, by, out, width): out = x * y * by."""

    @intrinsic  # type: ignore[untyped-decorator]
    def product(typingctx: Any, x: Any, y: Any, by: Any, out: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, y_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 1, 3))
            factor = emit.spread(arguments[2])
            with emit.vectors(arguments[4]) as (v, _):
                emit.store(emit.times(emit.times(emit.load(x_data, v), factor), emit.load(y_data, v)), o_data, v)
            return context.get_dummy_value()

        return types.void(x, y, by, out, width), generate

    return product


def _scaled(lanes: int) -> Any:
    """(x, by, out, width): out = x * by."""

    @intrinsic  # type: ignore[untyped-decorator]
    def scaled(typingctx: Any, x: Any, by: Any, out: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2))
            factor = emit.spread(arguments[1])
            with emit.vectors(arguments[3]) as (v, _):
                emit.store(emit.times(emit.load(x_data, v), factor), o_data, v)
            return context.get_dummy_value()

        return types.void(x, by, out, width), generate

    return scaled


def _added(lanes: int) -> Any:
    """(x, by, out, width): out += x * by."""

    @intrinsic  # type: ignore[untyped-decorator]
    def added(typingctx: Any, x: Any, by: Any, out: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, o_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2))
            factor = emit.spread(arguments[1])
            with emit.vectors(arguments[3]) as (v, _):
                emit.store(emit.plus(emit.load(o_data, v), emit.times(emit.load(x_data, v), factor)), o_data, v)
            return context.get_dummy_value()

        return types.void(x, by, out, width), generate

    return added


def _shift(lanes: int) -> Any:
    """(x, by, at, width): x[at:at + width] -= by."""

    @intrinsic  # type: ignore[untyped-decorator]
    def shift(typingctx: Any, x: Any, by: Any, at: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Emit(context, builder, sig.args[0].dtype, lanes)
            data, base = emit.data(sig.args[0], arguments[0]), emit.spread(arguments[1])
            with emit.vectors(arguments[3]) as (v, _):
                place = builder.add(v, arguments[2])
                emit.store(builder.fsub(emit.load(data, place), base), data, place)
            return context.get_dummy_value()

        return types.void(x, by, at, width), generate

    return shift


_four4, _four8, _four16, _four32 = _tile(4, 1, 4), _tile(8, 1, 4), _tile(16, 1, 4), _tile(16, 2, 4)
_best4, _best8, _best16, _best32 = (
    _tile(4, 1, 4, best=True), _tile(8, 1, 4, best=True), _tile(16, 1, 4, best=True), _tile(16, 2, 4, best=True)
)  # fmt: skip
_one4, _one8, _one16, _one64 = _tile(4, 1, 1), _tile(8, 1, 1), _tile(16, 1, 1), _tile(16, 4, 1)
_outer4, _outer8, _outer16, _outer32 = _outer(4, 1), _outer(8, 1), _outer(16, 1), _outer(16, 2)
_ahead4, _ahead8, _ahead16 = _ahead(4), _ahead(8), _ahead(16)
_climb4, _climb8, _climb16 = _climb(4), _climb(8), _climb(16)
_highest4, _highest8, _highest16 = _highest_sum(4), _highest_sum(8), _highest_sum(16)
_behind4, _behind8, _behind16 = _behind(4), _behind(8), _behind(16)
_product4, _product8, _product16 = _product(4), _product(8), _product(16)
_scaled4, _scaled8, _scaled16 = _scaled(4), _scaled(8), _scaled(16)
_added4, _added8, _added16 = _added(4), _added(8), _added(16)
_shift4, _shift8, _shift16 = _shift(4), _shift(8), _shift(16)


@njit(cache=True, nogil=True)
def product4(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """out[r, :width] = x[r, :k] @ matrix[:k, :width] for four rows; width = matrix.shape[1] as ``padded`` gives it."""
    width = matrix.shape[1]
    if width == 4:
        _four4(x, matrix, out, k, 0)
    elif width == 8:
        _four8(x, matrix, out, k, 0)
    else:
        column = 0
        while column + 32 <= width:
            _four32(x, matrix, out, k, column)
            column += 32
        if column < width:
            _four16(x, matrix, out, k, column)


@njit(cache=True, nogil=True)
def best4(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """out[r, j] = max over i < k of x[r, i] + matrix[i, j], for four rows; no NaN, no +inf."""
    width = matrix.shape[1]
    if width == 4:
        _best4(x, matrix, out, k, 0)
    elif width == 8:
        _best8(x, matrix, out, k, 0)
    else:
        column = 0
        while column + 32 <= width:
            _best32(x, matrix, out, k, column)
            column += 32
        if column < width:
            _best16(x, matrix, out, k, column)


@njit(cache=True, nogil=True)
def product1(x, matrix, out, k):  # type: ignore[no-untyped-def]
    """The same for one row."""
    width = matrix.shape[1]
    if width == 4:
        _one4(x, matrix, out, k, 0)
    elif width == 8:
        _one8(x, matrix, out, k, 0)
    else:
        column = 0
        while column + 64 <= width:
            _one64(x, matrix, out, k, column)
            column += 64
        while column < width:
            _one16(x, matrix, out, k, column)
            column += 16


@njit(cache=True, nogil=True)
def add_outer(x, at, m, after, n, by, out, k):  # type: ignore[no-untyped-def]
    """out[i, j] += by * sum over t < n of x[at + t P + i] m[after + t P + j], i < k; out [P, P], x and m flat, P
    as ``padded``."""
    width = out.shape[1]
    for row in range(0, k, 4):
        if width == 4:
            _outer4(x, at, m, after, width, n, by, out, row, 0)
        elif width == 8:
            _outer8(x, at, m, after, width, n, by, out, row, 0)
        else:
            column = 0
            while column + 32 <= width:
                _outer32(x, at, m, after, width, n, by, out, row, column)
                column += 32
            if column < width:
                _outer16(x, at, m, after, width, n, by, out, row, column)


@njit(cache=True, nogil=True)
def ahead(y, by, q, here, x, width):  # type: ignore[no-untyped-def]
    """x = y * by * q[here:here + width]; returns the sum."""
    if width % 16 == 0:
        return _ahead16(y, by, q, here, x, width)
    if width == 8:
        return _ahead8(y, by, q, here, x, width)
    return _ahead4(y, by, q, here, x, width)


@njit(cache=True, nogil=True)
def climb(y, by, q, here, x, width):  # type: ignore[no-untyped-def]
    """x = y - by + q[here:here + width]; returns the greatest entry. No NaN, no +inf."""
    if width % 16 == 0:
        return _climb16(y, by, q, here, x, width)
    if width == 8:
        return _climb8(y, by, q, here, x, width)
    return _climb4(y, by, q, here, x, width)


@njit(cache=True, nogil=True)
def highest_sum(x, y, width):  # type: ignore[no-untyped-def]
    """The greatest entry of x + y. No NaN, no +inf."""
    if width % 16 == 0:
        return _highest16(x, y, width)
    if width == 8:
        return _highest8(x, y, width)
    return _highest4(x, y, width)


@njit(cache=True, nogil=True)
def behind(y, by, q, here, x, alpha, totals, width):  # type: ignore[no-untyped-def]
    """x = q[here:here + width] * y * by; totals = (sum of x, sum of alpha * y * by)."""
    if width % 16 == 0:
        _behind16(y, by, q, here, x, alpha, totals, width)
    elif width == 8:
        _behind8(y, by, q, here, x, alpha, totals, width)
    else:
        _behind4(y, by, q, here, x, alpha, totals, width)


@njit(cache=True, nogil=True)
def multiply(x, y, by, out, width):  # type: ignore[no-untyped-def]
    """out = x * y * by."""
    if width % 16 == 0:
        _product16(x, y, by, out, width)
    elif width == 8:
        _product8(x, y, by, out, width)
    else:
        _product4(x, y, by, out, width)


@njit(cache=True, nogil=True)
def scale(x, by, out, width):  # type: ignore[no-untyped-def]
    """out = x * by."""
    if width % 16 == 0:
        _scaled16(x, by, out, width)
    elif width == 8:
        _scaled8(x, by, out, width)
    else:
        _scaled4(x, by, out, width)


@njit(cache=True, nogil=True)
def add_scaled(x, by, out, width):  # type: ignore[no-untyped-def]
    """out += x * by."""
    if width % 16 == 0:
        _added16(x, by, out, width)
    elif width == 8:
        _added8(x, by, out, width)
    else:
        _added4(x, by, out, width)


@njit(cache=True, nogil=True)
def shift(x, by, at, width):  # type: ignore[no-untyped-def]
    """x[at:at + width] -= by."""
    if width % 16 == 0:
        _shift16(x, by, at, width)
    elif width == 8:
        _shift8(x, by, at, width)
    else:
        _shift4(x, by, at, width)
