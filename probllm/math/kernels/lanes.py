"""Charts of eight sentences at once: each vector holds the same entry of eight charts, ``LANES`` doubles side by side.

Rows of a chart are flat: entry k of a row that begins at ``at`` stands at ``at + 8 k``. Sums of products over a row
then need no sum across a vector, and short rows are no worse than long ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit

LANES = 8
_BLOCK = 4  # sums that are kept apart, so that one addition need not wait for the last


@compiled()
def aligned(size):  # type: ignore[no-untyped-def]
    """``size`` doubles from the begin of a cache line: no vector then lies in two."""
    room = np.empty(size + LANES)
    skip = -(room.ctypes.data // room.itemsize) % LANES
    return room[skip : skip + size]


def _sum_of_products(emit: Emit, sums: list[Any], x: Any, at: Any, y: Any, after: Any, n: Any) -> None:
    """Adds x[at + 8 k] y[after + 8 k], k < n, to the sums in turn."""
    builder, whole = emit.builder, emit.integer

    def add(k: Any, which: int) -> None:
        moved = builder.mul(k, whole(LANES))
        left = emit.load(x, builder.add(at, moved))
        right = emit.load(y, builder.add(after, moved))
        emit.add_to(sums[which], emit.times(left, right))

    blocks = builder.and_(n, whole(-_BLOCK))
    with cgutils.for_range_slice(builder, whole(0), blocks, whole(_BLOCK), intp=whole) as (k, _):
        for which in range(_BLOCK):
            add(builder.add(k, whole(which)), which)
    with cgutils.for_range_slice(builder, blocks, n, whole(1), intp=whole) as (k, _):
        add(k, 0)


def _total(emit: Emit, sums: list[Any]) -> Any:
    total = emit.builder.load(sums[0])
    for one in sums[1:]:
        total = emit.plus(total, emit.builder.load(one))
    return total


@intrinsic  # type: ignore[untyped-decorator]
def join(
    typingctx: Any, x: Any, at: Any, y: Any, after: Any, n: Any, factor: Any, here: Any, there: Any, floor: Any
) -> Any:  # fmt: skip
    """x[here] = y[there] = factor[here] * sum over k < n of x[at + 8 k] y[after + 8 k], in each lane: 0 where the sum
    or the factor is, else at least ``floor``."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, LANES)
        x_data, y_data, f_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 2, 5))
        _, at, _, after, n, _, here, there, floor = arguments
        sums = [emit.variable() for _ in range(_BLOCK)]
        _sum_of_products(emit, sums, x_data, at, y_data, after, n)
        total, factors = _total(emit, sums), emit.load(f_data, here)
        zero, least = emit.spread(emit.scalar(0.0)), emit.spread(floor)
        value = emit.times(total, factors)
        value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
        allowed = builder.and_(builder.fcmp_ordered(">", total, zero), builder.fcmp_ordered(">", factors, zero))
        value = builder.select(allowed, value, zero)
        emit.store(value, x_data, here)
        emit.store(value, y_data, there)
        return context.get_dummy_value()

    return types.void(x, at, y, after, n, factor, here, there, floor), generate


@intrinsic  # type: ignore[untyped-decorator]
def split(
    typingctx: Any, x: Any, y: Any, by_x: Any, by_y: Any, factor: Any, mass: Any, here: Any, there: Any, behind: Any,
    beyond: Any, n: Any, before: Any, above: Any, m: Any
) -> Any:  # fmt: skip
    """The gradient d of the entry at ``here``, in each lane: what ``mass[here]`` holds, plus the sum over k < n of
    by_x[behind + 8 k] x[beyond + 8 k], plus that over k < m of by_y[before + 8 k] y[above + 8 k]. Then
    mass[here] = d x[here] and by_x[here] = by_y[there] = d factor[here], 0 where x[here] is."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, sig.args[0].dtype, LANES)
        x_data, y_data, bx_data, by_data, f_data, m_data = (emit.data(sig.args[i], arguments[i]) for i in range(6))
        here, there, behind, beyond, n, before, above, m = arguments[6:]
        sums = [emit.variable() for _ in range(_BLOCK)]
        _sum_of_products(emit, sums, bx_data, behind, x_data, beyond, n)
        _sum_of_products(emit, sums, by_data, before, y_data, above, m)
        d = emit.plus(_total(emit, sums), emit.load(m_data, here))
        zero, value = emit.spread(emit.scalar(0.0)), emit.load(x_data, here)
        d = builder.select(builder.fcmp_ordered(">", value, zero), d, zero)
        emit.store(emit.times(d, value), m_data, here)
        passed = emit.times(d, emit.load(f_data, here))
        emit.store(passed, bx_data, here)
        emit.store(passed, by_data, there)
        return context.get_dummy_value()

    signature = types.void(x, y, by_x, by_y, factor, mass, here, there, behind, beyond, n, before, above, m)
    return signature, generate
