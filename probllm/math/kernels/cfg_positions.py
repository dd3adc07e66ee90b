"""Inside and outside of a grammar in Chomsky normal form, spans of one width side by side in a vector's lanes.

With the words' scores w_i and a growth g of the sentence taken out,

    beta(i, j, A) = exp(sum of w_i .. w_j + (j - i) greatest - (j - i + 1) log g) b_w[A, i],    w = j - i + 1
    Y_w[X, Z, i] = sum_k b_k[X, i] b_{w-k}[Z, i + k]                                 over 1 < k < w - 1
    u_w[A, i] = sum_{X, Z} r[A, X, Z] Y_w[X, Z, i] + sum_Z L[A, Z, i] b_{w-1}[Z, i + 1]
              + sum_X R[A, X, i + w - 1] b_{w-1}[X, i],    b_w[A, i] = exp(s(i, j, A)) u_w[A, i]

where L and R are the rules summed over the symbols of a left and a right child that is a word. All splits of a span
have one scale, so products need no factor of their own. g follows the sentence so that the greatest b of a width stays
near 1; a row with a b that is beyond bounds then is given up, so that nothing underflows in one that is not.

A chart is flat, [T widths, Np symbols, row] with rows as in ``positions``; Np, Mp: N and M in whole sides; width 1
holds nonterminals that are words.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.positions import (
    PAD,
    aligned_zeros,
    apply,
    exponentiate,
    multiply_places,
    multiply_rows,
    outer_sums,
    row_of,
    scale_places,
    split_places,
)


@compiled()
def _words(leaves, n, by, row, words):  # type: ignore[no-untyped-def]
    """words [symbols, row] = by * leaves [T, symbols]."""
    words[:] = 0.0
    for q in range(leaves.shape[1]):
        for i in range(n):
            words[q * row + PAD + i] = by * leaves[i, q]


@compiled()
def _word_rules(tables, at, words, n, n_all, low, live, side, row, lefts, rights):  # type: ignore[no-untyped-def]
    """lefts [Np, Mp, row] = L and rights [Np, Np, row] = R of the grammar at ``at`` of the tables [.., Np, Mp, Mp]."""
    padded = -(-n_all // side) * side
    across = len(lefts) // (padded * row)
    for a in range(n_all):
        table = at + a * across * across
        multiply_rows(
            tables, table + low * across, 1, across, words, PAD, row, live, lefts, a * across * row + PAD, row, False,
            side, across, n,
        )  # fmt: skip
        multiply_rows(
            tables, table + low, across, 1, words, PAD, row, live, rights, a * padded * row + PAD, row, False, side,
            padded, n,
        )  # fmt: skip


@compiled()
def _gather(spans, w, count, n_all, lanes, row, out, at):  # type: ignore[no-untyped-def]
    """Writes the scores of all spans of a width; -inf behind them, up to a whole vector."""
    for i in range(count):
        for a in range(n_all):
            out[at + a * row + i] = spans[i, i + w - 1, a]
    for i in range(count, -(-count // lanes) * lanes):
        for a in range(n_all):
            out[at + a * row + i] = -math.inf


@compiled()
def _grow(by, chart, level, widths, words, lefts, rights, least, most, found):  # type: ignore[no-untyped-def]
    """Multiplies every word by ``by``; returns whether the chart is within bounds then."""
    power, good = 1.0, True
    for w in range(1, widths + 1):
        power *= by
        scale_places(chart.dtype.type(power), chart, (w - 1) * level, level, found)
        good = good and (w == 1 or (found[0] >= least and found[1] <= most))
    for x in (words, lefts, rights):
        scale_places(x.dtype.type(by), x, 0, len(x), found)
    return good


@compiled()
def _pairs(chart, w, count, level, row, side, padded, pairs, wide):  # type: ignore[no-untyped-def]
    """pairs [Np, Np, wide] = Y_w."""
    outer_sums(
        chart, level + PAD, level, chart, (w - 3) * level + PAD + 2, 1 - level, row, w - 3, pairs, 0, padded * wide,
        wide, side, padded, count,
    )  # fmt: skip


@compiled()
def inside(  # type: ignore[no-untyped-def]
    spans, leaves, leaf_scales, tables, by_parent, greatest, root, lengths, low, side, bounds, charts, factors, growth,
    log_z, flags, first, step,
):  # fmt: skip
    """log_z [B], and what ``outside`` needs; flags [B]: 1 where a row is given up (or was, on entry).

    spans [B, T, T, M]: scores; leaves [B, T, M - low], leaf_scales [B, T]: beta of a word's symbols from ``low`` (0, or
    N where no nonterminal is a word) and what was taken out of it; tables [G, Np, Mp, Mp]: r, 0 behind N and M
    by_parent [G, Np, Np Np]: r of nonterminals; greatest [G], root [G, N]: exponentials of scores less their greatest
    bounds: the least and the greatest b allowed, the greatest absolute score, and how far the greatest b of a width may
    stray from 1 before all are scaled
    charts, factors [B, T Np row]: b, exp(s); growth [B]: 1 / g
    """
    rows, size, _, _ = spans.shape
    n_all, live, lanes = root.shape[1], leaves.shape[2], 64 // leaves.itemsize
    row, padded, all_padded = row_of(size, lanes), by_parent.shape[1], tables.shape[2]
    level, wide, across = padded * row, -(-size // lanes) * lanes, all_padded * row
    words = aligned_zeros((live + side) * row + PAD, leaves)
    lefts, rights = aligned_zeros(padded * across + PAD, leaves), aligned_zeros(padded * level + PAD, leaves)
    pairs, made = aligned_zeros(padded * padded * wide, leaves), aligned_zeros(padded * wide, leaves)
    flat, flat_parent, found = tables.ravel(), by_parent.ravel(), np.empty(2, leaves.dtype)
    least, greatest_b, reach, stray = bounds
    for b in range(first, rows, step):
        log_z[b] = -math.inf
        if flags[b]:
            continue
        g = b if tables.shape[0] > 1 else 0
        n, chart, factor = lengths[b], charts[b], factors[b]
        chart[:] = 0.0
        growth[b] = 1.0
        _words(leaves[b], n, 1.0, row, words)
        _word_rules(flat, g * padded * all_padded**2, words, n, n_all, low, live, side, row, lefts, rights)
        if low == 0:
            chart[: n_all * row] = words[: n_all * row]
        good = True
        for w in range(2, n + 1):
            here, below, count = (w - 1) * level + PAD, (w - 2) * level + PAD, n - w + 1
            _gather(spans[b], w, count, n_all, lanes, row, factor, here)
            vectors = -(-count // lanes) * lanes
            if exponentiate(factor, here, row, n_all, vectors) > reach:
                good = False
                break
            if w > 3:
                _pairs(chart, w, count, level, row, side, padded, pairs, wide)
                multiply_rows(
                    flat_parent, g * padded**3, padded * padded, 1, pairs, 0, wide, n_all * padded, made, 0, wide,
                    False, side, padded, count,
                )  # fmt: skip
            else:
                made[:] = 0.0
            apply(
                lefts, PAD, row, across, chart, below + 1, row, 0, n_all, made, 0, wide, 0, side, padded, 1, count
            )  # fmt: skip
            if w > 2:
                apply(
                    rights, PAD + w - 1, row, level, chart, below, row, 0, n_all, made, 0, wide, 0, side, padded, 1,
                    count,
                )  # fmt: skip
            else:
                preterminals = (n_all - low) * row + PAD + 1
                apply(
                    lefts, PAD + n_all * row, row, across, words, preterminals, row, 0, low + live - n_all, made, 0,
                    wide, 0, side, padded, 1, count,
                )  # fmt: skip
            multiply_places(made, 0, wide, factor, chart, here, row, n_all, vectors, found)
            most = np.float64(found[1])
            if found[0] < least or not most <= greatest_b:
                good = False
                break
            if most > stray or 0.0 < most < 1.0 / stray:
                by = np.float64(leaves.dtype.type(most ** (-1.0 / w)))
                growth[b] *= by
                if not _grow(by, chart, level, w, words, lefts, rights, least, greatest_b, found):
                    good = False
                    break
        if not good:
            flags[b] = 1
            continue
        total = 0.0
        for a in range(n_all):
            total += root[g, a] * chart[(n - 1) * level + a * row + PAD]
        if total > 0.0:
            log_z[b] = math.log(total) + (n - 1) * greatest[g] - n * math.log(growth[b])
            for i in range(n):
                log_z[b] += leaf_scales[b, i]


@compiled()
def outside(  # type: ignore[no-untyped-def]
    leaves, tables, by_parent, by_pair, root, lengths, low, side, charts, factors, growth, weights, mass, to_leaves,
    to_left, to_right, to_pairs, to_root, first, step,
):  # fmt: skip
    """The gradient of the sum of weights [B] times log Z (a row of weight 0 is passed over); arguments as ``inside``.

    by_pair [G, Np Np, N8]: by_parent; mass [B, T, T, M]: the gradient in the scores of wide spans; to_leaves, to_root
    [S, N]: in the logarithms of leaves and root; to_left [S, Np, Mp, L8], to_right [S, Np, Np, L8], to_pairs
    [S, Np Np, N8]: in tables, as [A, Z, X], [A, X, Z] and [(X, Z), A], the child from ``low`` on last that is a word;
    summed over a share's rows, or a row's own where G > 1. N8, L8: N and M - low in whole vectors. All but mass are 0
    on entry.
    """
    rows, size, live = leaves.shape
    symbols = mass.shape[3]
    n_all, lanes = root.shape[1], 64 // leaves.itemsize
    row, padded, all_padded, parents = row_of(size, lanes), by_parent.shape[1], tables.shape[2], by_pair.shape[2]
    level, wide, across, last = padded * row, -(-size // lanes) * lanes, all_padded * row, to_left.shape[3]
    words, d_words = aligned_zeros((live + side) * row + PAD, leaves), aligned_zeros((live + side) * row + PAD, leaves)
    lefts, d_lefts = aligned_zeros(padded * across + PAD, leaves), aligned_zeros(padded * across + PAD, leaves)
    rights, d_rights = aligned_zeros(padded * level + PAD, leaves), aligned_zeros(padded * level + PAD, leaves)
    pairs, d_pairs = aligned_zeros(padded * padded * wide, leaves), aligned_zeros(padded * padded * wide, leaves)
    d, turned = aligned_zeros(charts.shape[1], leaves), aligned_zeros(wide * parents, leaves)
    leaf, made = aligned_zeros(wide * last, leaves), aligned_zeros(padded * wide, leaves)
    flat, flat_pair = tables.ravel(), by_pair.ravel()
    for b in range(first, rows, step):
        mass[b] = 0.0
        if weights[b] == 0.0:
            continue
        of_spans = mass[b].ravel()
        g = b if tables.shape[0] > 1 else 0
        own = b if tables.shape[0] > 1 else first
        n, chart, factor = lengths[b], charts[b], factors[b]
        by_left, by_right, by_both = to_left[own].ravel(), to_right[own].ravel(), to_pairs[own].ravel()
        _words(leaves[b], n, growth[b], row, words)
        _word_rules(flat, g * padded * all_padded**2, words, n, n_all, low, live, side, row, lefts, rights)
        d[:] = 0.0
        d_words[:] = 0.0
        top, total = (n - 1) * level + PAD, 0.0
        for a in range(n_all):
            total += root[g, a] * chart[top + a * row]
        for a in range(n_all):
            d[top + a * row] = weights[b] * root[g, a] / total
            to_root[own, a] += d[top + a * row] * chart[top + a * row]
        for w in range(n, 1, -1):
            here, below, count = (w - 1) * level + PAD, (w - 2) * level + PAD, n - w + 1
            split_places(d, chart, factor, here, row, made, wide, n_all, -(-count // lanes) * lanes)
            for i in range(count):
                for a in range(n_all):
                    of_spans[(i * (size + 1) + w - 1) * symbols + a] = made[a * wide + i]
                    turned[i * parents + a] = d[here + a * row + i]
            apply(
                lefts, PAD, across, row, d, here, row, 0, n_all, d, below + 1, row, 0, side, padded, 1, count
            )  # fmt: skip
            if w == 2:
                preterminals = (n_all - low) * row + PAD + 1
                apply(
                    lefts, PAD + n_all * row, across, row, d, here, row, 0, n_all, d_words, preterminals, row, 0, side,
                    -(-(low + live - n_all) // side) * side, 1, count,
                )  # fmt: skip
                continue
            apply(
                rights, PAD + w - 1, level, row, d, here, row, 0, n_all, d, below, row, 0, side, padded, 1, count
            )  # fmt: skip
            if w == 3:
                continue
            _pairs(chart, w, count, level, row, side, padded, pairs, wide)
            multiply_rows(
                pairs, 0, wide, 1, turned, 0, parents, count, by_both, 0, parents, True, side, padded * padded, n_all
            )  # fmt: skip
            multiply_rows(
                flat_pair, g * padded * padded * parents, parents, 1, d, here, row, n_all, d_pairs, 0, wide, False,
                side, padded * padded, count,
            )  # fmt: skip
            after = (w - 3) * level + PAD
            apply(
                d_pairs, 0, wide, padded * wide, chart, after + 2, row, 1 - level, n_all, d, level + PAD, row, level,
                side, padded, w - 3, count,
            )  # fmt: skip
            apply(
                d_pairs, 0, padded * wide, wide, chart, level + PAD, row, level, n_all, d, after + 2, row, 1 - level,
                side, padded, w - 3, count,
            )  # fmt: skip
        _to_word_rules(chart, words, d, n, n_all, low, live, level, lanes, row, side, d_lefts, d_rights)
        for i in range(n):
            for q in range(live):
                leaf[i * last + q] = words[q * row + PAD + i]
        for a in range(n_all):
            table = g * padded * all_padded**2 + a * all_padded**2
            at_left, at_right = a * across + PAD, a * level + PAD
            multiply_rows(
                flat, table + low * all_padded, all_padded, 1, d_lefts, at_left, row, all_padded, d_words, PAD, row,
                True, side, -(-live // side) * side, n,
            )  # fmt: skip
            multiply_rows(
                flat, table + low, 1, all_padded, d_rights, at_right, row, n_all, d_words, PAD, row, True, side,
                -(-live // side) * side, n,
            )  # fmt: skip
            multiply_rows(
                d_lefts, at_left, row, 1, leaf, 0, last, n, by_left, a * all_padded * last, last, True, side,
                all_padded, live,
            )  # fmt: skip
            multiply_rows(
                d_rights, at_right, row, 1, leaf, 0, last, n, by_right, a * padded * last, last, True, side, padded,
                live,
            )  # fmt: skip
        for q in range(live):
            for i in range(n):
                to_leaves[b, i, q] = d_words[q * row + PAD + i] * words[q * row + PAD + i]
        if low == 0:
            for q in range(n_all):
                for i in range(n):
                    to_leaves[b, i, q] += d[q * row + PAD + i] * words[q * row + PAD + i]


@compiled()
def _to_word_rules(chart, words, d, n, n_all, low, live, level, lanes, row, side, d_lefts, d_rights):  # type: ignore[no-untyped-def]
    """The gradients in L and R, d holding that in u."""
    padded = level // row
    across = len(d_lefts) // level * row
    for i in range(0, n, lanes):
        # the spans that begin with these words, from two words on; and those that end with them, from three on
        outer_sums(
            d, level + PAD + i, level, chart, PAD + i + 1, level, row, n - i - 1, d_lefts, PAD + i, across, row, side,
            padded, min(lanes, n - i),
        )  # fmt: skip
        outer_sums(
            d, 2 * level + PAD + i - 2, level - 1, chart, level + PAD + i - 2, level - 1, row, min(n, i + lanes) - 2,
            d_rights, PAD + i, level, row, side, padded, min(lanes, n - i),
        )  # fmt: skip
    preterminals = (n_all - low) * row + PAD + 1
    for v in range(0, n, lanes):
        for r in range(0, padded, side):
            for c in range(0, low + live - n_all, side):
                outer_sums(
                    d, level + PAD + v + r * row, 0, words, preterminals + v + c * row, 0, row, 1 if n > 1 else 0,
                    d_lefts, PAD + v + r * across + (n_all + c) * row, across, row, side, side, min(lanes, n - v),
                )  # fmt: skip
