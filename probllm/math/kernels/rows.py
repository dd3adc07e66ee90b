"""Vector code for sums along stretches of two rows of tables, emitted as LLVM IR; see ``vectors`` for why.

A stretch begins at an index into the table laid out flat and takes n entries, and on to whole vectors of ``LANES``.
"""

from __future__ import annotations

import math
from typing import Any

from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.vectors import Emit

LANES = 4


@intrinsic  # type: ignore[untyped-decorator]
def dot(typingctx: Any, x: Any, at: Any, y: Any, to: Any, n: Any) -> Any:
    """(x, at, y, to, n): the sum of x[at + k] y[to + k]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, LANES)
        x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2))
        total = emit.variable()
        with emit.vectors(arguments[4]) as (v, _):
            one = emit.load(x_data, builder.add(v, arguments[1]))
            emit.add_to(total, emit.times(one, emit.load(y_data, builder.add(v, arguments[3]))))
        return emit.total(total)

    return x.dtype(x, at, y, to, n), generate


@intrinsic  # type: ignore[untyped-decorator]
def highest(typingctx: Any, x: Any, at: Any, y: Any, to: Any, n: Any) -> Any:
    """(x, at, y, to, n): the maximum of x[at + k] + y[to + k]; no NaN, no +inf."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, LANES)
        x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2))
        high = emit.variable(-math.inf)
        with emit.vectors(arguments[4]) as (v, _):
            one = emit.load(x_data, builder.add(v, arguments[1]))
            emit.raise_to(high, emit.plus(one, emit.load(y_data, builder.add(v, arguments[3]))))
        return emit.highest(high)

    return x.dtype(x, at, y, to, n), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(typingctx: Any, by: Any, x: Any, at: Any, y: Any, to: Any, n: Any) -> Any:
    """(by, x, at, y, to, n): y[to:] += by * x[at:]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[1].dtype, LANES)
        x_data, y_data = (emit.data(sig.args[i], arguments[i]) for i in (1, 3))
        factor = emit.spread(arguments[0])
        with emit.vectors(arguments[5]) as (v, _):
            here, there = builder.add(v, arguments[2]), builder.add(v, arguments[4])
            change = emit.times(factor, emit.load(x_data, here))
            emit.store(emit.plus(emit.load(y_data, there), change), y_data, there)
        return context.get_dummy_value()

    return types.void(by, x, at, y, to, n), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(typingctx: Any, g: Any, x: Any, dx: Any, at: Any, y: Any, dy: Any, to: Any, n: Any) -> Any:
    """(g, x, dx, at, y, dy, to, n): the derivatives of ``dot`` times g, added to dx[at:] and dy[to:]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[1].dtype, LANES)
        x_data, dx_data, y_data, dy_data = (emit.data(sig.args[i], arguments[i]) for i in (1, 2, 4, 5))
        factor = emit.spread(arguments[0])
        with emit.vectors(arguments[7]) as (v, _):
            here, there = builder.add(v, arguments[3]), builder.add(v, arguments[6])
            one, other = emit.load(x_data, here), emit.load(y_data, there)
            emit.store(emit.plus(emit.load(dx_data, here), emit.times(factor, other)), dx_data, here)
            emit.store(emit.plus(emit.load(dy_data, there), emit.times(factor, one)), dy_data, there)
        return context.get_dummy_value()

    return types.void(g, x, dx, at, y, dy, to, n), generate
