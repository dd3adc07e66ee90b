"""Positive numbers m 2^e with an exponent of their own, in arrays: sums and products over any range, and no logarithm.

e is a whole number, kept as a float; 0 is m = 0 with e = ``NONE``. Mantissas are brought back to [1, 2) now and then by
``renew``: a step of a recursion changes them by a small factor, and a double has room for hundreds of such steps. All
loops are straight-line code that the compiler turns into vector code. Without NaN and +inf everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import ROUNDS, near_exponential, two_to_the_rounded

NONE = -1e300
LN2 = math.log(2.0)
_FAR = 1e15  # scores beyond it are whole numbers of ln 2 to within their rounding
_LEAST = -1000.0  # an addend that many powers of 2 below the greatest is nothing


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typingctx: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _of_bits(typingctx: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@compiled(inline="always")
def power(e):  # type: ignore[no-untyped-def]
    """2^e for whole e of 0 and less; 0 below ``_LEAST``."""
    some = e > _LEAST
    return two_to_the_rounded((e if some else 0.0) + ROUNDS) if some else 0.0


@compiled(fastmath={"contract"}, error_model="numpy")
def split(x, m, e):  # type: ignore[no-untyped-def]
    """m 2^e = exp(x), x from -inf."""
    for s in range(x.size):
        v = x[s]
        none, far = v < -1e299, abs(v) > _FAR
        p, n = near_exponential(0.0 if none | far else v)
        m[s] = 0.0 if none else p
        e[s] = NONE if none else np.floor(v * (1 / LN2)) if far else n


@compiled(fastmath={"contract"}, error_model="numpy")
def highest_exponents(e, by, top):  # type: ignore[no-untyped-def]
    """top = the greater of top and e + by."""
    for s in range(top.size):
        v = e[s] + by[s]
        top[s] = v if v > top[s] else top[s]


@compiled(fastmath={"contract"}, error_model="numpy")
def add_product(m, e, by_m, by_e, top, mass):  # type: ignore[no-untyped-def]
    """mass += m by_m 2^(e + by_e - top), top being at least the exponent of what is added."""
    for s in range(mass.size):
        mass[s] += m[s] * by_m[s] * power(e[s] + by_e[s] - top[s])


@compiled(fastmath={"contract"}, error_model="numpy")
def join_three(m, e, at, back, by_m, by_e, by_at, along, out_m, out_e, low, high):  # type: ignore[no-untyped-def]
    """out[s] = sum over d of 0, 1, 2 of m 2^e [at + s + d back] times by_m 2^by_e [d, by_at + s + d along], s from low
    to high. Places are unsigned, for which the compiler need not look whether they are negative."""
    a0, a1, a2 = np.uint64(at), np.uint64(at + back), np.uint64(at + 2 * back)
    b0, b1, b2 = np.uint64(by_at), np.uint64(by_at + along), np.uint64(by_at + 2 * along)
    m0, m1, m2, e0, e1, e2 = by_m[0], by_m[1], by_m[2], by_e[0], by_e[1], by_e[2]
    for s in range(np.uint64(low), np.uint64(high)):
        x, y, z = e[s + a0] + e0[s + b0], e[s + a1] + e1[s + b1], e[s + a2] + e2[s + b2]
        top = x if x > y else y
        top = z if z > top else top
        out_m[s] = (
            m[s + a0] * m0[s + b0] * power(x - top)
            + m[s + a1] * m1[s + b1] * power(y - top)
            + m[s + a2] * m2[s + b2] * power(z - top)
        )
        out_e[s] = top


@compiled(fastmath={"contract"}, error_model="numpy")
def multiply(m, e, by_m, by_e, out_m, out_e):  # type: ignore[no-untyped-def]
    """out = m 2^e by_m 2^by_e."""
    for s in range(out_m.size):
        v = m[s] * by_m[s]
        out_m[s] = v
        out_e[s] = e[s] + by_e[s] if v > 0.0 else NONE


@compiled(error_model="numpy")
def renew(m, e):  # type: ignore[no-untyped-def]
    """Brings the mantissas to [1, 2)."""
    for s in range(m.size):
        bits = _bits(m[s])
        v = _of_bits((bits & 0x000FFFFFFFFFFFFF) | (1023 << 52))
        some = m[s] > 0.0
        e[s] = e[s] + np.float64((bits >> 52) - 1023) if some else NONE
        m[s] = v if some else 0.0


@compiled(fastmath={"contract", "reassoc", "nsz", "nnan"}, error_model="numpy")
def products(m, e, by_m, by_e, out):  # type: ignore[no-untyped-def]
    """out = the products, divided by 2^top; returns top, the greatest exponent, and the sum of out."""
    top, total = NONE, 0.0
    for s in range(out.size):
        v = e[s] + by_e[s]
        top = v if v > top else top
    for s in range(out.size):
        out[s] = m[s] * by_m[s] * power(e[s] + by_e[s] - top)
        total += out[s]
    return top, total
