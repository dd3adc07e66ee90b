"""exp as straight-line code, which the compiler turns into vector code where it stands in a loop.

exp(x) = 2^n exp(r) with n the integer nearest to x / ln 2 and the Taylor polynomial of degree 13 in r = x - n ln 2,
|r| <= 0.35, whose remainder is below 1e-17; ln 2 is taken in two parts, so that r is exact (Cody and Waite 1980).
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled

LEAST = -700.0  # below it exp is 0 here
_PER_LN2 = 1 / math.log(2)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = (1 / math.factorial(n) for n in range(2, 14))


ROUNDS = 1.5 * 2.0**52  # added to a number below 2^51, it leaves the nearest integer in the lowest bits


@intrinsic  # type: ignore[untyped-decorator]
def two_to_the_rounded(typingctx: Any, t: Any) -> Any:
    """2^n for t = n + ``ROUNDS``, n an integer from -1022 to 1023: its bits become the exponent's."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        shifted = builder.shl(builder.bitcast(arguments[0], whole), ir.Constant(whole, 52))
        return builder.bitcast(builder.add(shifted, ir.Constant(whole, 1023 << 52)), ir.DoubleType())

    return types.float64(types.float64), generate


@compiled(inline="always", fastmath={"contract"})
def near_exponential(x):  # type: ignore[no-untyped-def]
    """(p, n) with exp(x) = p 2^n, n whole and p between 0.7 and 1.5; x below 1e15 in size."""
    n = (x * _PER_LN2 + ROUNDS) - ROUNDS
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _C12 + r * _C13
    p = _C11 + r * p
    p = _C10 + r * p
    p = _C9 + r * p
    p = _C8 + r * p
    p = _C7 + r * p
    p = _C6 + r * p
    p = _C5 + r * p
    p = _C4 + r * p
    p = _C3 + r * p
    p = _C2 + r * p
    return 1.0 + r * (1.0 + r * p), n


@compiled(fastmath={"contract"})
def exponential(x):  # type: ignore[no-untyped-def]
    """exp(x) for x from -inf to 700, to the last digit or two; 0 below ``LEAST``. No NaN."""
    low = x < LEAST
    p, n = near_exponential(0.0 if low else x)
    return 0.0 if low else p * two_to_the_rounded(n + ROUNDS)


@compiled(fastmath={"contract"})
def exponentials(x, n):  # type: ignore[no-untyped-def]
    """x[:n] = exp(x[:n]), as ``exponential``."""
    for q in range(n):
        x[q] = exponential(x[q])
