"""What a Transformer that writes one token at a time spends its time on: products with few rows, and one query's
attention. Both are as fast as the weights, keys and values can be read from memory.

The product reads each row of the matrix once, front to back, and multiplies it with four rows of x at a time while it
is in the cache; several rows of the matrix at once would be several streams, which take longer to come from memory.
"""

from __future__ import annotations

import math

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
