"""Inside and outside of a grammar in Chomsky normal form, compiled: matrix products over symbols, scaled span by span.

    beta(i, j, A) = exp(m_ij) b_ij[A],  max over A of b = 1        rules = exp(greatest) r
    Y_ij[X, Z] = sum_k exp(m_ik + m_{k+1,j} - top) b_ik[X] b_{k+1,j}[Z]
    U_ij[A] = sum_{X, Z} r[A, X, Z] Y_ij[X, Z]

where both children are wider than a word; a child of one word meets rules that were summed over its symbols before
(``left_leaves`` and ``right_leaves``), so that preterminals never enter the cubic part. Four spans of a width share
each pass over the rules. The caller certifies that nothing that matters underflows, or asks to be told (``careful``).
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponential import exponential
from probllm.math.kernels.tiles import add_outer, add_products, product1, product4

SMALL, LITTLE = 1e-60, -138.0  # products of five factors that are no smaller do not underflow; its logarithm
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # nothing here is -inf or NaN where sums are reordered


@compiled(fastmath=_FAST)
def _add_rows(x, n, table, by, out):  # type: ignore[no-untyped-def]
    """out += by * x[:n] @ table[:n]."""
    for q in range(n):
        s = by * x[q]
        for a in range(out.size):
            out[a] += s * table[q, a]


@compiled(fastmath=_FAST)
def _add_rows_back(x, n, table, by, d, to_x, to_table):  # type: ignore[no-untyped-def]
    """The gradient of ``_add_rows`` in x and table, d being that of out, added."""
    for q in range(n):
        s, total = by * x[q], 0.0
        for a in range(d.size):
            to_table[q, a] += s * d[a]
            total += table[q, a] * d[a]
        to_x[q] += by * total


@compiled(fastmath=_FAST)
def _add_children(to_lefts, to_rights, shares, i, j, d):  # type: ignore[no-untyped-def]
    """Adds the gradients of the children of (i, j), a row a split, to those of their spans."""
    for q in range(j - i - 2):
        by = shares[i + 1 + q]
        for a in range(d.shape[2]):
            d[i, i + 1 + q, a] += by * to_lefts[q, a]
        for a in range(d.shape[2]):
            d[i + 2 + q, j, a] += by * to_rights[q, a]


@compiled(fastmath={"nnan", "nsz"})
def _shares(lefts, rights, i, j, shares):  # type: ignore[no-untyped-def]
    """shares[k] = exp(lefts[k] + rights[k + 1] - top) for i <= k < j; returns top, the greatest exponent."""
    top = -math.inf
    for k in range(i, j):
        s = lefts[k] + rights[k + 1]
        top = s if s > top else top
    if top > -math.inf:
        for k in range(i, j):
            shares[k] = exponential(lefts[k] + rights[k + 1] - top)
    return top


@compiled(fastmath={"nnan", "nsz"})
def _factors(scores, n, u, factor):  # type: ignore[no-untyped-def]
    """factor = exp(scores - high) of n scores; returns high, their greatest, and the greatest factor * u."""
    high, low, peak = -math.inf, math.inf, 0.0
    for a in range(n):
        v = scores[a]
        high = v if v > high else high
        low = v if v < low else low
    if high > -math.inf:
        for a in range(n):
            factor[a] = 1.0 if low == high else exponential(scores[a] - high)
        for a in range(n):
            v = factor[a] * u[a]
            peak = v if v > peak else peak
    return high, peak


@compiled(fastmath=_FAST)
def _add_two(x, by_x, y, by_y, out):  # type: ignore[no-untyped-def]
    """out += by_x * x + by_y * y."""
    for a in range(out.size):
        out[a] += by_x * x[a] + by_y * y[a]


@compiled()
def inside(  # type: ignore[no-untyped-def]
    spans, leaves, leaf_scales, left_leaves, right_leaves, tables, greatest, root, lengths, careful, starts, scales,
    passed, log_z, flags, first, step
):  # fmt: skip
    """log_z [B], and what ``outside`` needs.

    spans [B, T, T, M]: scores; leaves [B, T, M], leaf_scales [B, T]: beta of a word and its scale; left_leaves
    [B, T, M, Np]: sum_X leaf[X] r[A, X, Z] as [Z, A]; right_leaves [B, T, N, Np]: sum_Z leaf[Z] r[A, X, Z] as [X, A];
    tables [G, N4 Np, Np]: r as [(X, Z), A]; Np, N4: N in whole vectors of 8, and of 4
    greatest [G], root [G, N]: exponentials of scores less their greatest
    starts [B, T, T, Np] = b (0 on entry), scales [B, T, T] = m (-inf on entry), passed = b / U in the shape of b; flags
    [B]: 1 where something is so small that it may have been lost, if ``careful``
    """
    rows, size, _, symbols = spans.shape
    n_all, width = root.shape[1], starts.shape[3]
    n4 = tables.shape[1] // width
    ends, turned = np.zeros((size, size, width)), np.empty((size, size))
    pairs, products = np.zeros((4, n4 * width)), np.zeros((4, width))
    factor, tops, shares, edges = np.zeros(width), np.zeros(4), np.zeros((4, size)), np.zeros((2, width))
    for b in range(first, rows, step):
        g = b if tables.shape[0] > 1 else 0
        n = lengths[b]
        scale, chart = scales[b], starts[b]
        chart_flat, ends_flat = chart.ravel(), ends.ravel()
        ends[:] = 0.0
        turned[:] = -math.inf
        for i in range(n):
            scale[i, i] = turned[i, i] = leaf_scales[b, i]
            chart[i, i, :n_all] = leaves[b, i, :n_all]
        for w in range(2, n + 1):
            for begin in range(0, n - w + 1, 4):
                here = min(4, n - w + 1 - begin)
                products[:] = 0.0
                for s in range(here):
                    i = begin + s
                    tops[s] = _shares(scale[i], turned[i + w - 1], i, i + w - 1, shares[s])
                    if w > 3 and tops[s] > -math.inf:
                        at, after = (i * size + i + 1) * width, ((i + w - 1) * size + i + 2) * width
                        y = pairs[s].reshape(n4, width)
                        add_outer(chart_flat, at, ends_flat, after, w - 3, shares[s, i + 1 :], y, n_all)
                if w > 3:
                    product4(pairs, tables[g], products, n4 * width)
                for s in range(here):
                    i, top = begin + s, tops[s]
                    j = i + w - 1
                    if top == -math.inf:
                        continue
                    u = products[s]
                    if w == 2:
                        _add_rows(leaves[b, j], symbols, left_leaves[b, i], 1.0, u)
                    else:
                        product1(chart[i + 1, j : j + 1], left_leaves[b, i], edges[0:1], n_all)
                        product1(chart[i, j - 1 : j], right_leaves[b, j], edges[1:2], n_all)
                        _add_two(edges[0], shares[s, i], edges[1], shares[s, j - 1], u)
                    high, peak = _factors(spans[b, i, j], n_all, u, factor)
                    if high == -math.inf:
                        continue
                    if careful:
                        for a in range(n_all):
                            if spans[b, i, j, a] > -math.inf and factor[a] < SMALL:
                                flags[b] = 1
                        for k in range(i, j):
                            below = scale[i, k] + scale[k + 1, j] - top
                            if -math.inf < below < LITTLE:
                                flags[b] = 1
                    if not peak > 0.0:
                        continue
                    scale[i, j] = turned[j, i] = high + greatest[g] + top + math.log(peak)
                    for a in range(n_all):
                        by = factor[a] / peak
                        passed[b, i, j, a] = by if u[a] > 0.0 else 0.0
                        chart[i, j, a] = ends[j, i, a] = by * u[a]
                    if careful:
                        for a in range(n_all):
                            if 0.0 < chart[i, j, a] < SMALL:
                                flags[b] = 1
        total = 0.0
        for a in range(n_all):
            total += root[g, a] * chart[0, n - 1, a]
        log_z[b] = scale[0, n - 1] + math.log(total) if total > 0.0 and scale[0, n - 1] > -math.inf else -math.inf


@compiled()
def outside(  # type: ignore[no-untyped-def]
    leaves, left_leaves, right_leaves, tables, transposed, root, lengths, starts, scales, passed, weights, mass,
    to_leaves, to_left, to_right, to_tables, to_root, first, step
):  # fmt: skip
    """The gradient of the sum of weights [B] times log Z (weight 0 where there is none); arguments as ``inside``.

    transposed [G, Np, N4 Np]: tables; mass [B, T, T, M]: that in the scores of spans, wide ones and nonterminals;
    to_leaves, to_left, to_right: that in leaves, left_leaves, right_leaves; to_tables [S, N4 Np, Np], to_root [S, N]:
    in tables and (root's logarithm) root, summed over a share's rows, or a row's own where G > 1. 0 on entry.
    """
    rows, size, symbols = leaves.shape
    n_all, width = root.shape[1], starts.shape[3]
    n4 = tables.shape[1] // width
    ends, turned = np.zeros((size, size + 4, width)), np.empty((size, size))
    pairs, to_pairs, d_products = np.zeros((4, n4 * width)), np.zeros((4, n4 * width)), np.zeros((4, width))
    by_left, by_right = np.zeros((size, size, width)), np.zeros((size, size, width))
    left_across, right_across = np.zeros((size, n_all, width)), np.zeros((size, n_all, width))
    edges, total_edge = np.zeros((2, width)), np.zeros((n4, width))
    across, to_rights, to_lefts = np.zeros((width, width)), np.zeros((size + 4, width)), np.zeros((size + 4, width))
    shares = np.zeros(size)
    d = np.zeros((size, size, width))
    for b in range(first, rows, step):
        if weights[b] == 0.0:
            continue
        g = b if tables.shape[0] > 1 else 0
        own = b if tables.shape[0] > 1 else first
        n = lengths[b]
        scale, chart = scales[b], starts[b]
        chart_flat, ends_flat = chart.ravel(), ends.ravel()
        d[:n, :n] = by_left[:n, :n] = by_right[:n, :n] = 0.0
        for i in range(n):
            for x in range(n_all):
                for a in range(n_all):
                    left_across[i, a, x] = left_leaves[b, i, x, a]
                    right_across[i, a, x] = right_leaves[b, i, x, a]
            for j in range(n):
                turned[j, i] = scale[i, j]
                for a in range(width):
                    ends[j, i, a] = chart[i, j, a] if j > i else 0.0
        total = 0.0
        for a in range(n_all):
            total += root[g, a] * chart[0, n - 1, a]
        for a in range(n_all):
            d[0, n - 1, a] = weights[b] * root[g, a] / total
            to_root[own, a] += d[0, n - 1, a] * chart[0, n - 1, a]
        for w in range(n, 1, -1):
            for begin in range(0, n - w + 1, 4):
                here = min(4, n - w + 1 - begin)
                for s in range(4):
                    d_products[s] = 0.0
                    if s < here:
                        i = begin + s
                        for a in range(n_all):
                            mass[b, i, i + w - 1, a] = d[i, i + w - 1, a] * chart[i, i + w - 1, a]
                            d_products[s, a] = d[i, i + w - 1, a] * passed[b, i, i + w - 1, a]
                if w > 3:
                    product4(d_products, transposed[g], to_pairs, n_all)
                for s in range(4):
                    i = begin + s
                    j = i + w - 1
                    if s >= here or scale[i, j] == -math.inf:
                        pairs[s] = 0.0
                        continue
                    du = d_products[s]
                    if w == 2:
                        _add_rows_back(
                            leaves[b, j], symbols, left_leaves[b, i], 1.0, du, to_leaves[b, j], to_left[b, i]
                        )
                        continue
                    _shares(scale[i], turned[j], i, j, shares)
                    product1(d_products[s : s + 1], left_across[i], edges[0:1], n_all)
                    product1(d_products[s : s + 1], right_across[j], edges[1:2], n_all)
                    for a in range(width):
                        d[i + 1, j, a] += shares[i] * edges[0, a]
                        d[i, j - 1, a] += shares[j - 1] * edges[1, a]
                        by_left[i, j, a] = shares[i] * du[a]
                        by_right[j, i, a] = shares[j - 1] * du[a]
                    if w == 3:
                        continue
                    at, after, count = (i * size + i + 1) * width, (j * (size + 4) + i + 2) * width, j - i - 2
                    y, dy = pairs[s].reshape(n4, width), to_pairs[s].reshape(n4, width)
                    add_outer(chart_flat, at, ends_flat, after, count, shares[i + 1 :], y, n_all)
                    for x in range(n_all):
                        for z in range(n_all):
                            across[z, x] = dy[x, z]
                    for q in range(0, count, 4):
                        product4(chart[i, i + 1 + q : i + 5 + q], dy, to_rights[q : q + 4], n_all)
                        product4(ends[j, i + 2 + q : i + 6 + q], across, to_lefts[q : q + 4], n_all)
                    _add_children(to_lefts, to_rights, shares, i, j, d)
                if w > 3:
                    add_products(pairs, d_products, to_tables[own])
        for i in range(n):
            for a in range(n_all):
                to_leaves[b, i, a] += d[i, i, a]
            # the gradients of all (i, j) whose left, and whose right child is this word
            after, before = max(n - i - 2, 0), max(i - 1, 0)
            total_edge[:] = 0.0
            at = i * size + i + 2
            add_outer(chart_flat, (at + size) * width, by_left.ravel(), at * width, after, 1.0, total_edge, n_all)
            to_left[b, i, :n_all] += total_edge[:n_all]
            total_edge[:] = 0.0
            at = (i - 1) * (size + 4) * width
            add_outer(ends_flat, at, by_right.ravel(), i * size * width, before, 1.0, total_edge, n_all)
            to_right[b, i] += total_edge[:n_all]
