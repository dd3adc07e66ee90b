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
from probllm.math.kernels.tiles import add_outer, product4

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
def _add_four(x, y, out):  # type: ignore[no-untyped-def]
    """out += x.T @ y for four rows each."""
    for q in range(out.shape[0]):
        x0, x1, x2, x3 = x[0, q], x[1, q], x[2, q], x[3, q]
        for a in range(out.shape[1]):
            out[q, a] += x0 * y[0, a] + x1 * y[1, a] + x2 * y[2, a] + x3 * y[3, a]


@compiled(fastmath=_FAST)
def _add_children(to_lefts, to_rights, shares, i, j, d):  # type: ignore[no-untyped-def]
    """Adds the gradients of the children of (i, j), a row a split, to those of their spans."""
    for q in range(j - i - 2):
        by = shares[i + 1 + q]
        for a in range(d.shape[2]):
            d[i, i + 1 + q, a] += by * to_lefts[q, a]
        for a in range(d.shape[2]):
            d[i + 2 + q, j, a] += to_rights[q, a]


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


@compiled()
def _pairs(chart, ends, i, j, shares, lefts, y, n):  # type: ignore[no-untyped-def]
    """y [N4, Np] = Y_ij, of the splits whose children are both wider than a word; lefts become the weighted left
    children, a row each. ``ends[j, i]`` is ``chart[i, j]``."""
    count, width = j - i - 2, chart.shape[2]
    for q in range(count):
        by = shares[i + 1 + q]
        for x in range(width):
            lefts[q, x] = by * chart[i, i + 1 + q, x]
    y[:] = 0.0
    rights = ends[j].ravel()
    add_outer(lefts.ravel(), 0, rights, (i + 2) * width, count, 1.0, y, n)


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
    lefts, ends, turned = np.zeros((size, width)), np.zeros((size, size, width)), np.empty((size, size))
    pairs, products = np.zeros((4, n4 * width)), np.zeros((4, width))
    factor, tops, shares = np.zeros(width), np.zeros(4), np.zeros((4, size))
    for b in range(first, rows, step):
        g = b if tables.shape[0] > 1 else 0
        n = lengths[b]
        scale, chart = scales[b], starts[b]
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
                        y = pairs[s].reshape(n4, width)
                        _pairs(chart, ends, i, i + w - 1, shares[s], lefts, y, n_all)
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
                        _add_rows(chart[i + 1, j], n_all, left_leaves[b, i], shares[s, i], u)
                        _add_rows(chart[i, j - 1], n_all, right_leaves[b, j], shares[s, j - 1], u)
                    high, peak = -math.inf, 0.0
                    for a in range(n_all):
                        high = max(high, spans[b, i, j, a])
                    if high == -math.inf:
                        continue
                    for a in range(n_all):
                        factor[a] = exponential(spans[b, i, j, a] - high)
                        peak = max(peak, factor[a] * u[a])
                        if careful and spans[b, i, j, a] > -math.inf and factor[a] < SMALL:
                            flags[b] = 1
                    if careful:
                        for k in range(i, j):
                            below = scale[i, k] + scale[k + 1, j] - top
                            if -math.inf < below < LITTLE:
                                flags[b] = 1
                    if not peak > 0.0:
                        continue
                    scale[i, j] = turned[j, i] = high + greatest[g] + top + math.log(peak)
                    for a in range(n_all):
                        passed[b, i, j, a] = factor[a] / peak
                        chart[i, j, a] = ends[j, i, a] = factor[a] * u[a] / peak
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
    lefts, ends, turned = np.zeros((size + 4, width)), np.zeros((size, size + 4, width)), np.empty((size, size))
    pairs, to_pairs, d_products = np.zeros((4, n4 * width)), np.zeros((4, n4 * width)), np.zeros((4, width))
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
        d[:n, :n] = 0.0
        for i in range(n):
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
                            if chart[i, i + w - 1, a] > 0.0:
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
                    by = shares[i]
                    _add_rows_back(chart[i + 1, j], n_all, left_leaves[b, i], by, du, d[i + 1, j], to_left[b, i])
                    by = shares[j - 1]
                    _add_rows_back(chart[i, j - 1], n_all, right_leaves[b, j], by, du, d[i, j - 1], to_right[b, j])
                    if w == 3:
                        continue
                    _pairs(chart, ends, i, j, shares, lefts, pairs[s].reshape(n4, width), n_all)
                    dy, count = to_pairs[s].reshape(n4, width), j - i - 2
                    for x in range(n_all):
                        for z in range(n_all):
                            across[z, x] = dy[x, z]
                    for q in range(0, count, 4):
                        product4(lefts[q : q + 4], dy, to_rights[q : q + 4], n_all)
                        product4(ends[j, i + 2 + q : i + 6 + q], across, to_lefts[q : q + 4], n_all)
                    _add_children(to_lefts, to_rights, shares, i, j, d)
                if w > 3:
                    _add_four(pairs, d_products, to_tables[own])
        for i in range(n):
            for a in range(n_all):
                to_leaves[b, i, a] += d[i, i, a]
