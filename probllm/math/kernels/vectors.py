"""Vector code for the element-wise passes of compiled recursions, emitted as LLVM IR.

Left to itself the compiler runs rows as short as a set of tags through scalar remainder loops. Here rows are padded to
whole vectors (``padded``), and LLVM lowers the vectors to whatever the processor has. ``ahead`` and ``behind`` are
passes of a scaled forward-backward step, ``climb`` and ``highest_sum`` of Viterbi; the others say what they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled


def padded(k: int) -> int:
    """Columns that a row of k entries takes, so that whole vectors fit: 4, or a multiple of 8."""
    return 4 if k <= 4 else -(-k // 8) * 8


class Emit:
    """Loads, stores and sums of vectors of one scalar type."""

    def __init__(self, context: Any, builder: Any, dtype: Any, lanes: int) -> None:
        self.context, self.builder, self.lanes = context, builder, lanes
        self.scalar = context.get_data_type(dtype)
        self.vector = ir.VectorType(self.scalar, lanes)
        self.integer = context.get_value_type(types.intp)
        self.bytes = dtype.bitwidth // 8

    def data(self, type_: Any, value: Any) -> Any:
        return self.context.make_array(type_)(self.context, self.builder, value).data

    def widened(self, value: Any) -> Any:
        """A vector in this scalar type, from one at most as wide."""
        return value if value.type == self.vector else self.builder.fpext(value, self.vector)

    def row_stride(self, type_: Any, value: Any) -> Any:
        """Elements from one row of a two-dimensional array to the next."""
        array = self.context.make_array(type_)(self.context, self.builder, value)
        return self.builder.sdiv(cgutils.unpack_tuple(self.builder, array.strides)[-2], self.integer(self.bytes))

    def _at(self, data: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [index]), self.vector.as_pointer())

    def load(self, data: Any, index: Any) -> Any:
        return self.builder.load(self._at(data, index), align=self.bytes)

    def load_some(self, data: Any, index: Any, count: Any, other: Any) -> Any:
        """The vector at ``index``, of which only the first ``count`` entries are read; ``other`` behind them."""
        builder, lanes, word = self.builder, ir.VectorType(self.integer, self.lanes), ir.IntType(32)
        counts = builder.insert_element(ir.Constant(lanes, ir.Undefined), count, word(0))
        counts = builder.shuffle_vector(counts, counts, ir.Constant(ir.VectorType(word, self.lanes), None))
        mask = builder.icmp_signed("<", ir.Constant(lanes, [self.integer(i) for i in range(self.lanes)]), counts)
        arguments = [self._at(data, index), word(self.bytes), mask, other]
        name = f"llvm.masked.load.v{self.lanes}f{self.bytes * 8}.p0"
        signature = ir.FunctionType(self.vector, [x.type for x in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)

    def store_some(self, value: Any, data: Any, index: Any, count: Any) -> None:
        """Stores the first ``count`` entries; all of them where there are more. (Masked stores take long.)"""
        builder = self.builder
        with builder.if_else(builder.icmp_signed(">=", count, self.integer(self.lanes))) as (whole, some):
            with whole:
                self.store(value, data, index)
            with some:
                room = cgutils.alloca_once(builder, self.vector)
                builder.store(value, room)
                entries = builder.bitcast(room, self.scalar.as_pointer())
                with cgutils.for_range(builder, count, intp=self.integer) as loop:
                    entry = builder.load(builder.gep(entries, [loop.index]))
                    builder.store(entry, builder.gep(data, [builder.add(index, loop.index)]))

    def store(self, value: Any, data: Any, index: Any) -> None:
        self.builder.store(value, self._at(data, index), align=self.bytes)

    def spread(self, value: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None))

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [self.scalar(value)] * self.lanes)

    def times(self, x: Any, y: Any) -> Any:
        return self.builder.fmul(x, y, flags=("contract",))

    def plus(self, x: Any, y: Any) -> Any:
        return self.builder.fadd(x, y, flags=("contract",))

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, in one instruction where there is one."""
        name = f"llvm.fmuladd.v{self.lanes}f{self.bytes * 8}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name
        )
        return self.builder.call(function, [x, y, z])

    def variable(self, value: float = 0.0) -> Any:
        """A vector variable; LLVM keeps it in a register."""
        variable = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(ir.Constant(self.vector, [self.scalar(value)] * self.lanes), variable)
        return variable

    def raise_to(self, variable: Any, value: Any) -> None:
        """variable = max(variable, value); a NaN is passed over."""
        before = self.builder.load(variable)
        above = self.builder.fcmp_ordered(">", value, before)
        self.builder.store(self.builder.select(above, value, before), variable)

    def lower_to(self, variable: Any, value: Any) -> None:
        """variable = min(variable, value); a NaN is passed over."""
        before = self.builder.load(variable)
        below = self.builder.fcmp_ordered("<", value, before)
        self.builder.store(self.builder.select(below, value, before), variable)

    def add_to(self, variable: Any, value: Any) -> None:
        self.builder.store(self.plus(self.builder.load(variable), value), variable)

    def total(self, variable: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{self.bytes * 8}"
        function_type = ir.FunctionType(self.scalar, [self.scalar, self.vector])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(function, [self.scalar(0.0), self.builder.load(variable)], fastmath=("reassoc",))

    def highest(self, variable: Any) -> Any:
        return self._extreme(variable, "fmax")

    def lowest(self, variable: Any) -> Any:
        return self._extreme(variable, "fmin")

    def _extreme(self, variable: Any, which: str) -> Any:
        name = f"llvm.vector.reduce.{which}.v{self.lanes}f{self.bytes * 8}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.scalar, [self.vector]), name
        )
        return self.builder.call(function, [self.builder.load(variable)], fastmath=("nnan",))

    def whole(self, values: Iterable[int]) -> Any:
        """A constant vector of 32-bit integers, one for each lane."""
        word = ir.IntType(32)
        return ir.Constant(ir.VectorType(word, self.lanes), [word(value) for value in values])

    def whole_variable(self, value: int) -> Any:
        variable = cgutils.alloca_once(self.builder, ir.VectorType(ir.IntType(32), self.lanes))
        self.builder.store(self.whole([value] * self.lanes), variable)
        return variable

    def whole_spread(self, value: Any) -> Any:
        word = ir.IntType(32)
        undefined = ir.Constant(ir.VectorType(word, self.lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, self.builder.trunc(value, word), word(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(undefined.type, None))

    def least_whole(self, value: Any) -> Any:
        name, word = f"llvm.vector.reduce.smin.v{self.lanes}i32", ir.IntType(32)
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(word, [value.type]), name)
        return self.builder.call(function, [value])

    def vectors(self, width: Any) -> Any:
        return cgutils.for_range_slice(
            self.builder, self.integer(0), width, self.integer(self.lanes), intp=self.integer
        )


def _ahead(lanes: int) -> Any:
    """(y, by, q, here, x, width): x = y * by * q[here:]; returns the sum."""

    @intrinsic  # type: ignore[untyped-decorator]
    def ahead(typingctx: Any, y: Any, by: Any, q: Any, here: Any, x: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
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
    """(y, at, by, scores, here, k, x, there, width): x = y - by + scores; returns the greatest entry."""

    @intrinsic  # type: ignore[untyped-decorator]
    def climb(
        typingctx: Any, y: Any, at: Any, by: Any, scores: Any, here: Any, k: Any, x: Any, there: Any, width: Any
    ) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit, given = (Emit(context, builder, sig.args[i].dtype, lanes) for i in (0, 3))
            y_data, s_data, x_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 3, 6))
            _, at, by, _, here, k, _, there, width = arguments
            base, high = emit.spread(by), emit.variable(-math.inf)
            nothing = ir.Constant(given.vector, [given.scalar(0.0)] * lanes)
            with emit.vectors(width) as (v, _):
                score = given.load_some(s_data, builder.add(here, v), builder.sub(k, v), nothing)
                value = builder.fsub(emit.load(y_data, builder.add(at, v)), base)
                value = emit.plus(value, emit.widened(score))
                emit.store(value, x_data, builder.add(there, v))
                emit.raise_to(high, value)
            return emit.highest(high)

        return by(y, at, by, scores, here, k, x, there, width), generate

    return climb


def _reach(lanes: int) -> Any:
    """(x, size): the greatest absolute value."""

    @intrinsic  # type: ignore[untyped-decorator]
    def reach(typingctx: Any, x: Any, size: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            data, bits = emit.data(sig.args[0], arguments[0]), 8 * emit.bytes
            integers, nothing = ir.VectorType(ir.IntType(bits), lanes), ir.Constant(emit.vector, None)
            no_sign = ir.Constant(integers, [integers.element(2 ** (bits - 1) - 1)] * lanes)
            high = cgutils.alloca_once_value(builder, ir.Constant(integers, None))
            with emit.vectors(arguments[1]) as (v, _):
                value = emit.load_some(data, v, builder.sub(arguments[1], v), nothing)
                # without their sign, numbers are in the order of their bits, infinity and NaN above all others
                value, before = builder.and_(builder.bitcast(value, integers), no_sign), builder.load(high)
                builder.store(builder.select(builder.icmp_signed(">", value, before), value, before), high)
            signature = ir.FunctionType(integers.element, [integers])
            function = cgutils.get_or_insert_function(
                builder.module, signature, f"llvm.vector.reduce.smax.v{lanes}i{bits}"
            )
            return builder.bitcast(builder.call(function, [builder.load(high)]), emit.scalar)

        return x.dtype(x, size), generate

    return reach


def _highest_sum(lanes: int) -> Any:
    """(x, y, width): the greatest entry of x + y."""

    @intrinsic  # type: ignore[untyped-decorator]
    def highest_sum(typingctx: Any, x: Any, y: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 1))
            high = emit.variable(-math.inf)
            with emit.vectors(arguments[2]) as (v, _):
                emit.raise_to(high, emit.plus(emit.load(x_data, v), emit.load(y_data, v)))
            return emit.highest(high)

        return x.dtype(x, y, width), generate

    return highest_sum


def _place_of_highest_sum(lanes: int) -> Any:
    """(x, y, width): where x + y is greatest, the first such place."""

    @intrinsic  # type: ignore[untyped-decorator]
    def place_of_highest_sum(typingctx: Any, x: Any, y: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 1))
            high, place = emit.variable(-math.inf), emit.whole_variable(0)
            with emit.vectors(arguments[2]) as (v, _):
                value, before = emit.plus(emit.load(x_data, v), emit.load(y_data, v)), builder.load(high)
                above = builder.fcmp_ordered(">", value, before)
                builder.store(builder.select(above, value, before), high)
                builder.store(builder.select(above, emit.whole_spread(v), builder.load(place)), place)
            best = builder.fcmp_ordered("==", builder.load(high), emit.spread(emit.highest(high)))
            places = builder.add(builder.load(place), emit.whole(range(lanes)))
            places = builder.select(best, places, emit.whole([2**31 - 1] * lanes))
            return builder.sext(emit.least_whole(places), emit.integer)

        return types.intp(x, y, width), generate

    return place_of_highest_sum


def _behind(lanes: int) -> Any:
    """(y, by, q, here, x, alpha, totals, width): x = q[here:] * y * by, totals = (sum of x, sum of alpha * y * by)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def behind(typingctx: Any, y: Any, by: Any, q: Any, here: Any, x: Any, alpha: Any, totals: Any, width: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
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
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
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
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
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
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
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
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            data, base = emit.data(sig.args[0], arguments[0]), emit.spread(arguments[1])
            with emit.vectors(arguments[3]) as (v, _):
                place = builder.add(v, arguments[2])
                emit.store(builder.fsub(emit.load(data, place), base), data, place)
            return context.get_dummy_value()

        return types.void(x, by, at, width), generate

    return shift


_ahead4, _ahead8, _ahead16 = _ahead(4), _ahead(8), _ahead(16)
_climb4, _climb8, _climb16 = _climb(4), _climb(8), _climb(16)
_reach16 = _reach(16)
_highest4, _highest8, _highest16 = _highest_sum(4), _highest_sum(8), _highest_sum(16)
_place4, _place8, _place16 = _place_of_highest_sum(4), _place_of_highest_sum(8), _place_of_highest_sum(16)
_behind4, _behind8, _behind16 = _behind(4), _behind(8), _behind(16)
_product4, _product8, _product16 = _product(4), _product(8), _product(16)
_scaled4, _scaled8, _scaled16 = _scaled(4), _scaled(8), _scaled(16)
_added4, _added8, _added16 = _added(4), _added(8), _added(16)
_shift4, _shift8, _shift16 = _shift(4), _shift(8), _shift(16)


@compiled()
def ahead(y, by, q, here, x, width):  # type: ignore[no-untyped-def]
    """x = y * by * q[here:here + width]; returns the sum."""
    if width % 16 == 0:
        return _ahead16(y, by, q, here, x, width)
    if width % 8 == 0:
        return _ahead8(y, by, q, here, x, width)
    return _ahead4(y, by, q, here, x, width)


@compiled(inline="always")  # a call would copy the many arrays' headers
def climb(y, at, by, scores, here, k, x, there, width):  # type: ignore[no-untyped-def]
    """x[there:] = y[at:] - by + the k scores at ``here`` (behind them 0), arrays taken as flat; returns the greatest
    entry. No NaN, no +inf."""
    if width % 16 == 0:
        return _climb16(y, at, by, scores, here, k, x, there, width)
    if width % 8 == 0:
        return _climb8(y, at, by, scores, here, k, x, there, width)
    return _climb4(y, at, by, scores, here, k, x, there, width)


@compiled()
def reach(x, size):  # type: ignore[no-untyped-def]
    """The greatest absolute value of x[:size]; NaN if there is a NaN."""
    return _reach16(x, size)


@compiled()
def highest_sum(x, y, width):  # type: ignore[no-untyped-def]
    """The greatest entry of x + y. No NaN, no +inf."""
    if width % 16 == 0:
        return _highest16(x, y, width)
    if width % 8 == 0:
        return _highest8(x, y, width)
    return _highest4(x, y, width)


@compiled()
def place_of_highest_sum(x, y, width):  # type: ignore[no-untyped-def]
    """The first place where x + y is greatest. No NaN, no +inf."""
    if width % 16 == 0:
        return _place16(x, y, width)
    if width % 8 == 0:
        return _place8(x, y, width)
    return _place4(x, y, width)


@compiled()
def behind(y, by, q, here, x, alpha, totals, width):  # type: ignore[no-untyped-def]
    """x = q[here:here + width] * y * by; totals = (sum of x, sum of alpha * y * by)."""
    if width % 16 == 0:
        _behind16(y, by, q, here, x, alpha, totals, width)
    elif width % 8 == 0:
        _behind8(y, by, q, here, x, alpha, totals, width)
    else:
        _behind4(y, by, q, here, x, alpha, totals, width)


@compiled()
def multiply(x, y, by, out, width):  # type: ignore[no-untyped-def]
    """out = x * y * by."""
    if width % 16 == 0:
        _product16(x, y, by, out, width)
    elif width % 8 == 0:
        _product8(x, y, by, out, width)
    else:
        _product4(x, y, by, out, width)


@compiled()
def scale(x, by, out, width):  # type: ignore[no-untyped-def]
    """out = x * by."""
    if width % 16 == 0:
        _scaled16(x, by, out, width)
    elif width % 8 == 0:
        _scaled8(x, by, out, width)
    else:
        _scaled4(x, by, out, width)


@compiled()
def add_scaled(x, by, out, width):  # type: ignore[no-untyped-def]
    """out += x * by."""
    if width % 16 == 0:
        _added16(x, by, out, width)
    elif width % 8 == 0:
        _added8(x, by, out, width)
    else:
        _added4(x, by, out, width)


@compiled()
def shift(x, by, at, width):  # type: ignore[no-untyped-def]
    """x[at:at + width] -= by."""
    if width % 16 == 0:
        _shift16(x, by, at, width)
    elif width % 8 == 0:
        _shift8(x, by, at, width)
    else:
        _shift4(x, by, at, width)
