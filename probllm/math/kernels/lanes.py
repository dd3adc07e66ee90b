"""Charts of eight sentences at once: each vector holds the same entry of eight charts, ``LANES`` doubles side by side.

Rows of a chart are flat: entry k of a row that begins at ``at`` stands at ``at + 8 k``. Sums of products over a row
then need no sum across a vector, and short rows are no worse than long ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit

LANES = 8


@compiled()
def aligned(size):  # type: ignore[no-untyped-def]
    """``size`` doubles from the begin of a cache line: no vector then lies in two."""
    room = np.empty(size + LANES)
    skip = -(room.ctypes.data // room.itemsize) % LANES
    return room[skip : skip + size]


class Cells:
    """Entries of tables [..., wide, 8], and sums of products of entries."""

    def __init__(self, emit: Emit, wide: Any) -> None:
        self.emit, self.wide = emit, wide

    def at(self, row: Any, column: Any) -> Any:
        builder = self.emit.builder
        return builder.mul(builder.add(builder.mul(row, self.wide), column), self.emit.integer(LANES))

    def get(self, table: Any, row: Any, column: Any) -> Any:
        return self.emit.load(table, self.at(row, column))

    def put(self, value: Any, table: Any, row: Any, column: Any) -> None:
        self.emit.store(value, table, self.at(row, column))

    def after(self, index: Any, by: int = 1) -> Any:
        return self.emit.builder.add(index, self.emit.integer(by))

    def sums(self, count: int) -> list[Any]:
        return [self.emit.variable() for _ in range(count)]

    def add(self, total: Any, x: Any, y: Any) -> None:
        self.emit.add_to(total, self.emit.times(x, y))

    def read(self, total: Any, *others: Any) -> Any:
        value = self.emit.builder.load(total)
        for other in others:
            value = self.emit.plus(value, other)
        return value

    def each(self, first: Any, last: Any) -> Any:
        """A loop over first <= k < last."""
        whole = self.emit.integer
        return cgutils.for_range_slice(self.emit.builder, first, last, whole(1), intp=whole)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of eight vectors of eight: each round takes the first bit of a row's number to its columns' end."""
    word = ir.IntType(32)
    halves = [
        ir.Constant(ir.VectorType(word, 8), [word(q) for i in range(first, first + 4) for q in (i, i + 8)])
        for first in (0, 4)
    ]
    for _ in range(3):
        rows = [builder.shuffle_vector(rows[i], rows[i + 4], half) for i in range(4) for half in halves]
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def to_lanes(typingctx: Any, x: Any, at: Any, apart: Any, n: Any, by: Any, table: Any, there: Any) -> Any:
    """table[there + 8 j + lane] = by[lane] x[at + lane apart + j], j < n; up to seven more are read and written
    behind."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        given, emit = (Emit(context, builder, sig.args[i].dtype, LANES) for i in (0, 5))
        data, found = given.data(sig.args[0], arguments[0]), emit.data(sig.args[5], arguments[5])
        _, at, apart, n, _, _, there = arguments
        factors = emit.load(emit.data(sig.args[4], arguments[4]), emit.integer(0))
        with emit.vectors(n) as (j, _):
            place = builder.add(at, j)
            rows = [given.load(data, builder.add(place, builder.mul(apart, emit.integer(i)))) for i in range(LANES)]
            begin = builder.add(there, builder.mul(j, emit.integer(LANES)))
            for i, column in enumerate(_transposed(builder, rows)):
                emit.store(
                    emit.times(emit.widened(column), factors), found, builder.add(begin, emit.integer(i * LANES))
                )
        return context.get_dummy_value()

    return types.void(x, at, apart, n, by, table, there), generate


@intrinsic  # type: ignore[untyped-decorator]
def from_lanes(typingctx: Any, table: Any, there: Any, n: Any, x: Any, at: Any, apart: Any) -> Any:
    """x[at + lane apart + j] = table[there + 8 j + lane], j < n; up to seven more are read and written behind."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        given, emit = (Emit(context, builder, sig.args[i].dtype, LANES) for i in (0, 3))
        data, found = given.data(sig.args[0], arguments[0]), emit.data(sig.args[3], arguments[3])
        _, there, n, _, at, apart = arguments
        with emit.vectors(n) as (j, _):
            begin = builder.add(there, builder.mul(j, emit.integer(LANES)))
            columns = [given.load(data, builder.add(begin, emit.integer(i * LANES))) for i in range(LANES)]
            if emit.vector != given.vector:
                columns = [builder.fptrunc(column, emit.vector) for column in columns]
            place = builder.add(at, j)
            for i, row in enumerate(_transposed(builder, columns)):
                emit.store(row, found, builder.add(place, builder.mul(apart, emit.integer(i))))
        return context.get_dummy_value()

    return types.void(table, there, n, x, at, apart), generate
