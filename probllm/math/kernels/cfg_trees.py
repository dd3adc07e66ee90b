"""Parse trees of a grammar in Chomsky normal form, compiled: the best one, and draws.

A tree grows from the top. Where the symbol A covers the words i to j, its children X and Z and then the split k follow

    R[A, X, Z] + Y_ij[X, Z],    Y_ij[X, Z] = max or log sum over k of beta_ik[X] + beta_{k+1,j}[Z]

in logarithms, or in products of the scaled numbers that ``inside`` leaves. The best values on the way up are the same
tiles as there, in (max, +). Charts hold nonterminals of wider spans; ``words`` hold all symbols of single words.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential
from probllm.math.kernels.tiles import best_sums


@compiled()
def _raise_four(x, matrix, out, k, one):  # type: ignore[no-untyped-def]
    """out[r, a] = max over q < k of x[r, q] + matrix[q, a], four rows; ``one`` is 1: see ``best_sums``."""
    best_sums(x, matrix, out, k, one, 4)


@compiled(fastmath={"nnan", "nsz"})
def _raise_rows(x, n, table, out):  # type: ignore[no-untyped-def]
    """out = max(out, x[q] + table[q]) over q < n."""
    for q in range(n):
        s = x[q]
        for a in range(out.size):
            v = s + table[q, a]
            out[a] = v if v > out[a] else out[a]


@compiled(fastmath={"nnan", "nsz"})
def _highest_rule(rules, pairs):  # type: ignore[no-untyped-def]
    """Where rules + pairs [M, M] is greatest: (X, Z); -inf may be among them."""
    high, left, right = -math.inf, 0, 0
    for x in range(pairs.shape[0]):
        top = -math.inf
        for z in range(pairs.shape[1]):
            v = rules[x, z] + pairs[x, z]
            top = v if v > top else top
        if top > high:
            high, left = top, x
    while rules[left, right] + pairs[left, right] < high:
        right += 1
    return left, right


@compiled(fastmath={"nnan", "nsz"})
def _best_pairs(chart, words, i, j, n, y):  # type: ignore[no-untyped-def]
    """y [M, M] = Y_ij, the greatest over splits."""
    y[:] = -math.inf
    for k in range(i, j):
        left = words[i] if k == i else chart[i, k]
        right = words[j] if k + 1 == j else chart[k + 1, j]
        rights = y.shape[1] if k + 1 == j else n
        for x in range(y.shape[0] if k == i else n):
            s = left[x]
            for z in range(rights):
                v = s + right[z]
                y[x, z] = v if v > y[x, z] else y[x, z]


@compiled()
def _sum_pairs(chart, words, i, j, n, y):  # type: ignore[no-untyped-def]
    """y [M, M] = Y_ij, summed over splits, all in logarithms."""
    high = y.copy()
    _best_pairs(chart, words, i, j, n, high)
    y[:] = 0.0
    for k in range(i, j):
        left = words[i] if k == i else chart[i, k]
        right = words[j] if k + 1 == j else chart[k + 1, j]
        rights = y.shape[1] if k + 1 == j else n
        for x in range(y.shape[0] if k == i else n):
            for z in range(rights):
                if high[x, z] > -math.inf:
                    y[x, z] += exponential(left[x] + right[z] - high[x, z])
    for x in range(y.shape[0]):
        for z in range(y.shape[1]):
            y[x, z] = high[x, z] + math.log(y[x, z]) if y[x, z] > 0.0 else -math.inf


@compiled(fastmath={"contract"})
def _multiply_pairs(chart, words, shares, i, j, n, y):  # type: ignore[no-untyped-def]
    """y [M, M] = Y_ij in scaled numbers, each split times its share."""
    y[:] = 0.0
    for k in range(i, j):
        left = words[i] if k == i else chart[i, k]
        right = words[j] if k + 1 == j else chart[k + 1, j]
        rights = y.shape[1] if k + 1 == j else n
        for x in range(y.shape[0] if k == i else n):
            s = shares[k] * left[x]
            for z in range(rights):
                y[x, z] += s * right[z]


@compiled()
def _child_sums(chart, words, i, j, x, z, n, out):  # type: ignore[no-untyped-def]
    """out[k - i] = left child X + right child Z of the split k."""
    for k in range(i, j):
        left = words[i, x] if k == i else (chart[i, k, x] if x < n else -math.inf)
        right = words[j, z] if k + 1 == j else (chart[k + 1, j, z] if z < n else -math.inf)
        out[k - i] = left + right


@compiled()
def _choose(weights, count, uniform):  # type: ignore[no-untyped-def]
    """An index drawn in proportion to weights[:count], never one without weight; -1 where all are 0."""
    total, chosen = 0.0, -1
    for q in range(count):
        total += weights[q]
    left = uniform * total
    for q in range(count):
        if weights[q] > 0.0:
            chosen = q
            left -= weights[q]
            if left < 0.0:
                break
    return chosen


@compiled()
def _choose_log(logs, count, uniform):  # type: ignore[no-untyped-def]
    """The same of logarithms, which become weights."""
    high = -math.inf
    for q in range(count):
        high = max(high, logs[q])
    high = high if high > -math.inf else 0.0
    for q in range(count):
        logs[q] = exponential(logs[q] - high)
    return _choose(logs, count, uniform)


@compiled()
def best(  # type: ignore[no-untyped-def]
    spans, words, rules, tables, by_first, by_last, root, unary, lengths, one, trees, first, step
):  # fmt: skip
    """trees [B, T, T] (0 on entry): a best tree, 1 + label at its spans; -1 if none.

    spans [B, T, T, M]; words [B, T4, M]: the best of single words, T4 a multiple of 4; rules [G, N, M, M], root [G, N],
    unary [G, N, P]; tables [G, N4 Np, Np]: rules as [(X, Z), A], by_first [G, M, M Np]: as [X, (Z, A)], by_last
    [G, M, N Np]: as [Z, (X, A)], -inf in what pads N to Np, whole vectors of 8, and to N4, of 4; one: 1
    """
    rows, size, _, m = spans.shape
    n_all, width = root.shape[1], tables.shape[2]
    n4, padded = tables.shape[1] // width, words.shape[1]
    chart, ends = np.full((size, size, width), -math.inf), np.full((size, size, width), -math.inf)
    turned = np.full((size, n4, size), -math.inf)
    left_words, right_words = np.empty((padded, m * width)), np.empty((padded, n_all * width))
    pairs, products = np.empty((4, n4 * width)), np.empty((4, width))
    y, sums, stack = np.empty((m, m)), np.empty(size), np.empty((size + 1, 3), np.int64)
    for b in range(first, rows, step):
        g = b if tables.shape[0] > 1 else 0
        n = lengths[b]
        for t in range(0, n, 4):
            _raise_four(words[b, t : t + 4, 0:], by_first[g], left_words[t : t + 4], m, one)
            _raise_four(words[b, t : t + 4, 0:], by_last[g], right_words[t : t + 4], m, one)
        for w in range(2, n + 1):
            for begin in range(0, n - w + 1, 4):
                here = min(4, n - w + 1 - begin)
                if w > 3:
                    for s in range(here):
                        i = begin + s
                        j = i + w - 1
                        y_here = pairs[s].reshape(n4, width)
                        for x in range(0, n4, 4):
                            lefts = turned[i, x : x + 4, i + 1 :]
                            _raise_four(lefts, ends[j, i + 2 :], y_here[x : x + 4], w - 3, one)
                    _raise_four(pairs[:, 0:], tables[g], products, n4 * width, one)
                else:
                    products[:] = -math.inf
                for s in range(here):
                    i = begin + s
                    j = i + w - 1
                    u, left, right = products[s], left_words[i].reshape(m, width), right_words[j].reshape(n_all, width)
                    if w == 2:
                        _raise_rows(words[b, j], m, left, u)
                    else:
                        _raise_rows(chart[i + 1, j], n_all, left, u)
                        _raise_rows(chart[i, j - 1], n_all, right, u)
                    for a in range(n_all):
                        chart[i, j, a] = ends[j, i, a] = turned[i, a, j] = spans[b, i, j, a] + u[a]
        high, top = -math.inf, 0
        for a in range(n_all):
            v = root[g, a] + (words[b, 0, a] if n == 1 else chart[0, n - 1, a])
            if v > high:
                high, top = v, a
        if high == -math.inf:
            trees[b] = -1
            continue
        stack[0, 0], stack[0, 1], stack[0, 2], waiting = 0, n - 1, top, 1
        while waiting > 0:
            waiting -= 1
            i, j, a = stack[waiting, 0], stack[waiting, 1], stack[waiting, 2]
            trees[b, i, j] = 1 + a
            if i < j:
                _best_pairs(chart, words[b], i, j, n_all, y)
                x, z = _highest_rule(rules[g, a], y)
                _child_sums(chart, words[b], i, j, x, z, n_all, sums)
                k = i + np.argmax(sums[: j - i])
                stack[waiting, 0], stack[waiting, 1], stack[waiting, 2] = i, k, x
                stack[waiting + 1, 0], stack[waiting + 1, 1], stack[waiting + 1, 2] = k + 1, j, z
                waiting += 2
            elif a < n_all:
                p = 0
                for q in range(1, m - n_all):
                    if unary[g, a, q] + words[b, i, n_all + q] > unary[g, a, p] + words[b, i, n_all + p]:
                        p = q
                trees[b, i, j] = 1 + m + a * (m - n_all) + p


@compiled()
def log_inside(spans, words, rules, lengths, picked, charts, first, step):  # type: ignore[no-untyped-def]
    """charts [H, T, T, N] = log beta of the rows picked [H]; arguments as ``best``, words [B, T, M] their log beta."""
    n_all, m = charts.shape[3], words.shape[2]
    y, sums = np.empty((m, m)), np.empty((m, m))
    for h in range(first, len(picked), step):
        b, chart = picked[h], charts[h]
        g = b if rules.shape[0] > 1 else 0
        for w in range(2, lengths[b] + 1):
            for i in range(lengths[b] - w + 1):
                j = i + w - 1
                _sum_pairs(chart, words[b], i, j, n_all, y)
                for a in range(n_all):
                    high, total = -math.inf, 0.0
                    for x in range(m):
                        for z in range(m):
                            sums[x, z] = rules[g, a, x, z] + y[x, z]
                            high = max(high, sums[x, z])
                    if high > -math.inf:
                        for x in range(m):
                            for z in range(m):
                                total += exponential(sums[x, z] - high)
                        high += math.log(total)
                    chart[i, j, a] = spans[b, i, j, a] + high


@compiled()
def draw(  # type: ignore[no-untyped-def]
    starts, scales, leaves, tables, roots, hard, charts, words, rules, root, unary, lengths, uniforms, trees, first,
    step
):  # fmt: skip
    """trees [K, B, T, T] (0 on entry), drawn; -1 if none.

    starts, scales, leaves, roots: as ``inside``; tables [G, N, M, M]: exponentials of rules, less their greatest. hard
    [B]: -1, or which of charts [H, T, T, N], of ``log_inside``, has the row; words [B, T, M], rules, root and unary:
    logarithms as there. uniforms [K, B, 4 T], from 0 to 1. Shares divide draws and rows.
    """
    count, rows, size, _ = trees.shape
    n_all, m = root.shape[1], words.shape[2]
    y, sums, stack = np.empty((m, m)), np.empty(max(size, m)), np.empty((size + 1, 3), np.int64)
    shares = np.empty(size)
    for piece in range(first, count * rows, step):
        b = piece % rows
        tree, uniform = trees[piece // rows, b], uniforms[piece // rows, b]
        g = b if rules.shape[0] > 1 else 0
        n, plain = lengths[b], hard[b] >= 0
        scale, chart = scales[b], charts[hard[b]] if plain else starts[b]
        values = words[b] if plain else leaves[b]
        for a in range(n_all):
            top = values[0, a] if n == 1 else chart[0, n - 1, a]
            sums[a] = root[g, a] + top if plain else roots[g, a] * top
        top = _choose_log(sums, n_all, uniform[0]) if plain else _choose(sums, n_all, uniform[0])
        if top < 0:
            tree[:] = -1
            continue
        stack[0, 0], stack[0, 1], stack[0, 2], waiting, used = 0, n - 1, top, 1, 1
        while waiting > 0:
            waiting -= 1
            i, j, a = stack[waiting, 0], stack[waiting, 1], stack[waiting, 2]
            tree[i, j] = 1 + a
            if i == j:
                if a < n_all:
                    for p in range(m - n_all):
                        sums[p] = unary[g, a, p] + words[b, i, n_all + p]
                    p = _choose_log(sums, m - n_all, uniform[used])
                    tree[i, j] = 1 + m + a * (m - n_all) + p
                    used += 1
                continue
            if plain:
                _sum_pairs(chart, values, i, j, n_all, y)
                y += rules[g, a]
                both = _choose_log(y.ravel(), m * m, uniform[used])
                x, z = both // m, both % m
                _child_sums(chart, values, i, j, x, z, n_all, sums)
                k = i + _choose_log(sums, j - i, uniform[used + 1])
            else:
                high = -math.inf
                for k in range(i, j):
                    shares[k] = scale[i, k] + scale[k + 1, j]
                    high = max(high, shares[k])
                for k in range(i, j):
                    shares[k] = exponential(shares[k] - high)
                _multiply_pairs(chart, values, shares, i, j, n_all, y)
                y *= tables[g, a]
                both = _choose(y.ravel(), m * m, uniform[used])
                x, z = both // m, both % m
                for k in range(i, j):
                    left = values[i, x] if k == i else (chart[i, k, x] if x < n_all else 0.0)
                    right = values[j, z] if k + 1 == j else (chart[k + 1, j, z] if z < n_all else 0.0)
                    sums[k - i] = shares[k] * left * right
                k = i + _choose(sums, j - i, uniform[used + 1])
            stack[waiting, 0], stack[waiting, 1], stack[waiting, 2] = i, k, x
            stack[waiting + 1, 0], stack[waiting + 1, 1], stack[waiting + 1, 2] = k + 1, j, z
            waiting += 2
            used += 2
