"""A step of ``chain_scaled`` beside the matrix product, for one row of a block or for its four rows at once.

What belongs to the rows of a block comes in arrays of four entries. q and alpha are flat and hold the K states of a
step padded to whole vectors of ``width`` entries; the tags are flat too and hold K a step. A step's place in them
is counted in steps: ``begin[r] + t``.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit


class _Rows(Emit):
    """Reads and writes one entry for each of the rows ``first``, ``first`` + 1, ..."""

    def __init__(self, context: Any, builder: Any, dtype: Any, lanes: int, rows: int, first: Any) -> None:
        super().__init__(context, builder, dtype, lanes)
        self.rows = [builder.add(first, self.integer(r)) for r in range(rows)]

    def each(self, data: Any) -> list[Any]:
        return [self.builder.load(self.builder.gep(data, [r])) for r in self.rows]

    def put(self, values: list[Any], data: Any) -> None:
        for r, value in zip(self.rows, values, strict=True):
            self.builder.store(value, self.builder.gep(data, [r]))

    def places(self, begin: Any, t: Any, width: Any) -> list[Any]:
        """Where step t of each row begins, in entries."""
        return [self.builder.mul(self.builder.add(b, t), width) for b in self.each(begin)]

    def inverses(self, values: list[Any]) -> list[Any]:
        return [self.builder.fdiv(self.scalar(1.0), value) for value in values]


def _forward(lanes: int, rows: int) -> Any:
    """(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first): see ``forward_step``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def forward(
        typingctx: Any, y: Any, inverse: Any, q: Any, begin: Any, t: Any, x: Any, alpha: Any, home: Any, there: Any,
        sums: Any, totals: Any, width: Any, first: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Rows(context, builder, sig.args[0].dtype, lanes, rows, arguments[12])
            y_data, i_data, q_data, begin, x_data, a_data, home, s_data, totals = (
                emit.data(sig.args[i], arguments[i]) for i in (0, 1, 2, 3, 5, 6, 7, 9, 10)
            )
            t, there, width = arguments[4], arguments[8], arguments[11]
            local = [builder.mul(r, width) for r in emit.rows]
            here, out = emit.places(begin, t, width), emit.places(home, there, width)
            factors = [emit.spread(value) for value in emit.each(i_data)]
            steps = emit.places(begin, t, emit.integer(1))
            sums = [emit.variable() for _ in range(rows)]
            with emit.vectors(width) as (v, _):
                for r in range(rows):
                    place = builder.add(local[r], v)
                    value = emit.times(emit.load(y_data, place), factors[r])
                    value = emit.times(value, emit.load(q_data, builder.add(here[r], v)))
                    emit.store(value, x_data, place)
                    emit.add_to(sums[r], value)
            found = [emit.total(x) for x in sums]
            inverses = emit.inverses(found)
            emit.put(found, totals)
            for place, value in zip(steps, found, strict=True):
                builder.store(value, builder.gep(s_data, [place]))
            emit.put(inverses, i_data)
            factors = [emit.spread(value) for value in inverses]
            with emit.vectors(width) as (v, _):
                for r in range(rows):
                    value = emit.times(emit.load(x_data, builder.add(local[r], v)), factors[r])
                    emit.store(value, a_data, builder.add(out[r], v))
            return context.get_dummy_value()

        return types.void(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first), generate

    return forward


def _backward(lanes: int, rows: int) -> Any:
    """(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first): see
    ``backward_step``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def backward(
        typingctx: Any, y: Any, inverse: Any, q: Any, begin: Any, t: Any, x: Any, alpha: Any, sums: Any,
        row_weights: Any, tags: Any, k: Any, home: Any, totals: Any, width: Any, first: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = _Rows(context, builder, sig.args[0].dtype, lanes, rows, arguments[14])
            tags_out = Emit(context, builder, sig.args[9].dtype, lanes)
            y_data, i_data, q_data, begin, x_data, a_data, s_data, by_data, tags_data, home, totals = (
                emit.data(sig.args[i], arguments[i]) for i in (0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12)
            )
            t, k, width = arguments[4], arguments[10], arguments[13]
            local = [builder.mul(r, width) for r in emit.rows]
            here, there = emit.places(begin, t, width), emit.places(home, t, k)
            steps = emit.places(begin, t, emit.integer(1))
            by = emit.each(i_data)
            factors = [emit.spread(value) for value in by]
            d_sums, z_sums = [emit.variable() for _ in by], [emit.variable() for _ in by]
            with emit.vectors(width) as (v, _):
                for r in range(rows):
                    place = builder.add(local[r], v)
                    value = emit.times(emit.load(y_data, place), factors[r])
                    emit.add_to(z_sums[r], emit.times(value, emit.load(a_data, builder.add(here[r], v))))
                    value = emit.times(value, emit.load(q_data, builder.add(here[r], v)))
                    emit.store(value, x_data, place)
                    emit.add_to(d_sums[r], value)
            d, z = [emit.total(x) for x in d_sums], [emit.total(x) for x in z_sums]
            emit.put(z, totals)
            emit.put(emit.inverses(d), i_data)
            of_tags, of_pairs = [], []
            for r, weight in enumerate(emit.each(by_data)):
                of_tags.append(emit.spread(builder.fmul(builder.fdiv(weight, z[r]), by[r])))
                scale = builder.load(builder.gep(s_data, [steps[r]]))
                of_pairs.append(emit.spread(builder.fdiv(emit.scalar(1.0), builder.fmul(z[r], scale))))
            with emit.vectors(width) as (v, _):
                for r in range(rows):
                    place = builder.add(local[r], v)
                    value = emit.times(emit.load(a_data, builder.add(here[r], v)), emit.load(y_data, place))
                    value = emit.times(value, of_tags[r])
                    if tags_out.bytes != emit.bytes:
                        narrow = tags_out.bytes == 4
                        change = builder.fptrunc if narrow else builder.fpext
                        value = change(value, tags_out.vector)
                    tags_out.store_some(value, tags_data, builder.add(there[r], v), builder.sub(k, v))
                    value = emit.times(emit.load(x_data, place), of_pairs[r])
                    emit.store(value, q_data, builder.add(here[r], v))
            return context.get_dummy_value()

        return (
            types.void(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first),
            generate,
        )

    return backward


_forward4, _forward8, _forward16 = (_forward(lanes, 1) for lanes in (4, 8, 16))
_forward4x4, _forward8x4, _forward16x4 = (_forward(lanes, 4) for lanes in (4, 8, 16))
_backward4, _backward8, _backward16 = (_backward(lanes, 1) for lanes in (4, 8, 16))
_backward4x4, _backward8x4, _backward16x4 = (_backward(lanes, 4) for lanes in (4, 8, 16))


@compiled(inline="always")  # a call would copy the many arrays' headers
def forward_step(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first):  # type: ignore[no-untyped-def]
    """For row ``first``: x = y times the inverse sum of the step before times q at step t; totals and sums = sum of x;
    inverse = 1 / sum; alpha at step ``home + there`` = x / sum."""
    if width % 16 == 0:
        _forward16(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first)
    elif width % 8 == 0:
        _forward8(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first)
    else:
        _forward4(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, first)


@compiled(inline="always")
def forward_steps(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width):  # type: ignore[no-untyped-def]
    """``forward_step`` of four rows."""
    if width % 16 == 0:
        _forward16x4(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, 0)
    elif width % 8 == 0:
        _forward8x4(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, 0)
    else:
        _forward4x4(y, inverse, q, begin, t, x, alpha, home, there, sums, totals, width, 0)


@compiled(inline="always")
def backward_step(  # type: ignore[no-untyped-def]
    y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first
):  # fmt: skip
    """For row ``first``, with beta = y times the inverse sum of the step behind, q, alpha and sums at step t:

    x = q beta;  inverse = 1 / sum of x;  totals = z = sum of alpha beta
    the k tags at step ``home + t`` = row_weight alpha beta / z;  then q = x / (z sums)
    """
    if width % 16 == 0:
        _backward16(
            y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first
        )  # fmt: skip
    elif width % 8 == 0:
        _backward8(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first)
    else:
        _backward4(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, first)


@compiled(inline="always")
def backward_steps(  # type: ignore[no-untyped-def]
    y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width
):  # fmt: skip
    """``backward_step`` of four rows."""
    if width % 16 == 0:
        _backward16x4(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, 0)
    elif width % 8 == 0:
        _backward8x4(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, 0)
    else:
        _backward4x4(y, inverse, q, begin, t, x, alpha, sums, row_weights, tags, k, home, totals, width, 0)
