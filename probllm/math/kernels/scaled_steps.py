"""One row's part of a step of ``chain_scaled`` beside the matrix product, fused in vector code.

Arrays are flat and come with the place where their K states, padded to whole vectors, begin.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import Emit


def _forward(lanes: int) -> Any:
    """(y, at, by, q, here, x, alpha, there, width): see ``forward_step``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def forward(
        typingctx: Any, y: Any, at: Any, by: Any, q: Any, here: Any, x: Any, alpha: Any, there: Any, width: Any
    ) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            y_data, q_data, x_data, a_data = (emit.data(sig.args[i], arguments[i]) for i in (0, 3, 5, 6))
            _, at, by, _, here, _, _, there, width = arguments
            factor, total = emit.spread(by), emit.variable()
            with emit.vectors(width) as (v, _):
                place = builder.add(at, v)
                value = emit.times(
                    emit.times(emit.load(y_data, place), factor), emit.load(q_data, builder.add(here, v))
                )
                emit.store(value, x_data, place)
                emit.add_to(total, value)
            c = emit.total(total)
            factor = emit.spread(builder.fdiv(emit.scalar(1.0), c))
            with emit.vectors(width) as (v, _):
                value = emit.times(emit.load(x_data, builder.add(at, v)), factor)
                emit.store(value, a_data, builder.add(there, v))
            return c

        return by(y, at, by, q, here, x, alpha, there, width), generate

    return forward


def _backward(lanes: int) -> Any:
    """(y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width): see ``backward_step``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def backward(
        typingctx: Any, y: Any, at: Any, by: Any, q: Any, here: Any, x: Any, alpha: Any, c: Any, weight: Any, tags: Any,
        there: Any, k: Any, after: Any, place: Any, totals: Any, width: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            emit = Emit(context, builder, sig.args[0].dtype, lanes)
            out = Emit(context, builder, sig.args[9].dtype, lanes)
            y_data, q_data, x_data, a_data, tags_data, after_data, t_data = (
                emit.data(sig.args[i], arguments[i]) for i in (0, 3, 5, 6, 9, 12, 14)
            )
            _, at, by, _, here, _, _, c, weight, _, there, k, _, place, _, width = arguments
            factor, d, z = emit.spread(by), emit.variable(), emit.variable()
            with emit.vectors(width) as (v, _):
                value = emit.times(emit.load(y_data, builder.add(at, v)), factor)
                emit.add_to(z, emit.times(value, emit.load(a_data, builder.add(here, v))))
                value = emit.times(value, emit.load(q_data, builder.add(here, v)))
                emit.store(value, x_data, builder.add(at, v))
                emit.add_to(d, value)
            d_sum, z_sum = emit.total(d), emit.total(z)
            builder.store(d_sum, t_data)
            builder.store(z_sum, builder.gep(t_data, [emit.integer(1)]))
            of_tags = emit.spread(builder.fmul(builder.fdiv(weight, z_sum), by))
            of_pairs = emit.spread(builder.fdiv(emit.scalar(1.0), builder.fmul(z_sum, c)))
            with emit.vectors(width) as (v, _):
                value = emit.times(emit.load(a_data, builder.add(here, v)), emit.load(y_data, builder.add(at, v)))
                value = emit.times(value, of_tags)
                if out.bytes != emit.bytes:
                    value = builder.fptrunc(value, out.vector) if out.bytes == 4 else builder.fpext(value, out.vector)
                out.store_some(value, tags_data, builder.add(there, v), builder.sub(k, v))
                value = emit.times(emit.load(x_data, builder.add(at, v)), of_pairs)
                emit.store(value, after_data, builder.add(place, v))
            return context.get_dummy_value()

        return (
            types.void(y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width),
            generate,
        )

    return backward


_forward4, _forward8, _forward16 = _forward(4), _forward(8), _forward(16)
_backward4, _backward8, _backward16 = _backward(4), _backward(8), _backward(16)


@compiled(inline="always")  # a call would copy the many arrays' headers
def forward_step(y, at, by, q, here, x, alpha, there, width):  # type: ignore[no-untyped-def]
    """x = y by q at ``at``, ``at`` and ``here``, and alpha at ``there`` = x divided by its sum, which is returned."""
    if width % 16 == 0:
        return _forward16(y, at, by, q, here, x, alpha, there, width)
    if width % 8 == 0:
        return _forward8(y, at, by, q, here, x, alpha, there, width)
    return _forward4(y, at, by, q, here, x, alpha, there, width)


@compiled(inline="always")  # a call would copy the many arrays' headers
def backward_step(  # type: ignore[no-untyped-def]
    y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width
):  # fmt: skip
    """With beta = y by at ``at``, q and alpha at ``here``:

    x = q beta at ``at``;  totals = (d, z) = (sum of x, sum of alpha beta)
    the k tags at ``there`` = weight alpha beta / z;  after = x / (z c) at ``place``
    """
    if width % 16 == 0:
        _backward16(y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width)
    elif width % 8 == 0:
        _backward8(y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width)
    else:
        _backward4(y, at, by, q, here, x, alpha, c, weight, tags, there, k, after, place, totals, width)
