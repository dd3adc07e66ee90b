"""log as straight-line code, which the compiler turns into vector code where it stands in a loop.

log(x) = e ln 2 + log(m) with x = m 2^e and m from sqrt(1/2) to sqrt(2); log(m) = 2 atanh(f), f = (m - 1) / (m + 1), by
its series in f^2 <= 0.0295, whose remainder after f^19 is below 1e-17.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import ROUNDS

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROOT_OF_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
_C3, _C5, _C7, _C9, _C11, _C13, _C15, _C17, _C19 = (2 / n for n in range(3, 21, 2))


@intrinsic  # type: ignore[untyped-decorator]
def _parts(typingctx: Any, x: Any) -> Any:
    """(m, e + ROUNDS) of a positive normal number."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        whole, double = ir.IntType(64), ir.DoubleType()
        bits = builder.bitcast(arguments[0], whole)
        e = builder.ashr(builder.sub(bits, whole(_ROOT_OF_HALF)), whole(52))
        m = builder.bitcast(builder.sub(bits, builder.shl(e, whole(52))), double)
        shifted = builder.bitcast(builder.add(e, builder.bitcast(double(ROUNDS), whole)), double)
        return context.make_tuple(builder, sig.return_type, (m, shifted))

    return types.UniTuple(types.float64, 2)(types.float64), generate


@compiled(fastmath={"contract"})
def logarithm(x):  # type: ignore[no-untyped-def]
    """log(x) for x = 0 or a positive normal number, to the last digit or two."""
    m, shifted = _parts(x)
    e = shifted - ROUNDS
    f = (m - 1.0) / (m + 1.0)
    g = f * f
    p = _C17 + g * _C19
    p = _C15 + g * p
    p = _C13 + g * p
    p = _C11 + g * p
    p = _C9 + g * p
    p = _C7 + g * p
    p = _C5 + g * p
    p = _C3 + g * p
    value = e * _LN2_HIGH + (2.0 * f + (f * g * p + e * _LN2_LOW))
    return value if x > 0.0 else -math.inf
