"""What a Transformer that writes one token at a time spends its time on: products with few rows, and one query's
attention. Both are as fast as the weights, keys and values can be read from memory.

The product reads each row of the matrix once, front to back, and multiplies it with four rows of x at a time while it
is in the cache; several rows of the matrix at once would be several streams, which take longer to come from memory.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled

CHUNK = 64  # rows of the matrix that a thread takes at a time


@compiled(fastmath={"contract", "reassoc", "nsz"})
def times_transposed(x, weight, bias, y, first, step):  # type: ignore[no-untyped-def]
    """y [M, N] = x [M, K] weight[N, K]^T + bias [N] or [1], one share of the chunks of N."""
    rows, inner = x.shape
    outer, one_bias = weight.shape[0], bias.size == 1
    zero = x.dtype.type(0)
    for chunk in range(first, -(-outer // CHUNK), step):
        for n in range(CHUNK * chunk, min(outer, CHUNK * (chunk + 1))):
            w, b = weight[n], bias[0 if one_bias else n]
            m = 0
            while m + 4 <= rows:
                s0 = s1 = s2 = s3 = zero
                for k in range(inner):
                    v = w[k]
                    s0 += x[m, k] * v
                    s1 += x[m + 1, k] * v
                    s2 += x[m + 2, k] * v
                    s3 += x[m + 3, k] * v
                y[m, n], y[m + 1, n], y[m + 2, n], y[m + 3, n] = s0 + b, s1 + b, s2 + b, s3 + b
                m += 4
            while m < rows:
                s0 = zero
                for k in range(inner):
                    s0 += x[m, k] * w[k]
                y[m, n] = s0 + b
                m += 1


@compiled(fastmath={"contract", "reassoc", "nsz"})
def perceptron(x, first_weight, first_bias, is_gelu, second_weight, second_bias, hidden, y):  # type: ignore[no-untyped-def]
    """y [M, N] = a(x [M, K] first_weight^T + first_bias) second_weight^T + second_bias, a: GELU or ReLU; hidden [M, H]:
    room."""
    times_transposed(x, first_weight, first_bias, hidden, 0, 1)
    flat = hidden.reshape(hidden.size)
    zero = x.dtype.type(0)
    if is_gelu:
        gelu(flat)
    else:
        for i in range(flat.size):
            flat[i] = max(flat[i], zero) if flat[i] == flat[i] else flat[i]
    times_transposed(hidden, second_weight, second_bias, y, 0, 1)


@compiled(fastmath={"contract", "reassoc", "nsz"})
def gelu(x):  # type: ignore[no-untyped-def]
    """x = x (1 + erf(x / sqrt 2)) / 2, in place, for float32.

    erf(z) = z P(z^2) / Q(z^2) for |z| <= 4, where it is 1 in float32: the approximation that Eigen and XLA use, within
    4 units in the last place.
    """
    one, half, most = np.float32(1), np.float32(0.5), np.float32(4)
    for i in range(x.size):
        z = x[i] * np.float32(0.7071067811865476)
        z = max(min(z, most), -most)
        t = z * z
        p = np.float32(-2.72614225801306e-10)
        p = p * t + np.float32(2.77068142495902e-08)
        p = p * t + np.float32(-2.10102402082508e-06)
        p = p * t + np.float32(-5.69250639462346e-05)
        p = p * t + np.float32(-7.34990630326855e-04)
        p = p * t + np.float32(-2.95459980854025e-03)
        p = p * t + np.float32(-1.60960333262415e-02)
        q = np.float32(-1.45660718464996e-05)
        q = q * t + np.float32(-2.13374055278905e-04)
        q = q * t + np.float32(-1.68282697438203e-03)
        q = q * t + np.float32(-7.37332916720468e-03)
        q = q * t + np.float32(-1.42647390514189e-02)
        x[i] = x[i] * half * (one + z * p / q)


@compiled(fastmath={"contract", "reassoc", "nsz"})
def attend_from_one(q, keys, values, strides, scores, mixed, first, step):  # type: ignore[no-untyped-def]
    """mixed [B, H, E] = softmax(q [B, H, E] k / sqrt E) v, one share of the rows and heads.

    keys, values: flat; key s of row b and its head h stands at b strides[0, 0] + h strides[0, 1] + s strides[0, 2],
        values likewise at strides[1]; each of the ``strides[2, 0]`` heads of keys serves as many heads of queries
    scores [N, S]: room, of which ``first`` is this share's
    """
    rows, heads, size = q.shape
    many, group = scores.shape[1], heads // strides[2, 0]
    zero, scale = q.dtype.type(0), q.dtype.type(1 / math.sqrt(size))
    own = scores[first]
    for piece in range(first, rows * heads, step):
        b, h = piece // heads, piece % heads
        at = b * strides[0, 0] + h // group * strides[0, 1]
        query, out = q[b, h], mixed[b, h]
        highest = q.dtype.type(-math.inf)
        for s in range(many):
            key = keys[at + s * strides[0, 2] : at + s * strides[0, 2] + size]
            found = zero
            for e in range(size):
                found += query[e] * key[e]
            own[s] = found * scale
            highest = max(highest, own[s])
        total = zero
        for s in range(many):
            own[s] = math.exp(own[s] - highest)
            total += own[s]
        out[:] = zero
        at = b * strides[1, 0] + h // group * strides[1, 1]
        for s in range(many):
            value, by = values[at + s * strides[1, 2] : at + s * strides[1, 2] + size], own[s] / total
            for e in range(size):
                out[e] += by * value[e]
