"""Joint multigrams, compiled: all ways to cut two sequences into paired chunks, summed over a corpus.

    alpha(i, j) = sum_m alpha(i - a_m, j - b_m) w(pair of the chunks that end at i and j)

in probability space: the caller's weights are probabilities against uniform ones (times L^a P^b), which multiplies all
cuts of a word alike and keeps the sums near 1. See ``math.chunk_pairs``.
"""

from __future__ import annotations

import math

from probllm.math.kernels.compiled import compiled


@compiled()
def keys(source, sources, target, targets, moves, bases, arcs, offsets, first, step):  # type: ignore[no-untyped-def]
    """arcs: for each word, (i, j) and move, the number of the pair of chunks that ends there, -1 where there is none.

    source [.] and target [.] hold the words end to end, cut at sources and targets [N + 1]; bases: letters, phonemes,
    and the number of codes of a phoneme chunk.
    """
    for n in range(first, len(offsets) - 1, step):
        x0, y0 = sources[n], targets[n]
        at = offsets[n]
        for i in range(sources[n + 1] - x0 + 1):
            for j in range(targets[n + 1] - y0 + 1):
                for m in range(len(moves)):
                    a, b = moves[m, 0], moves[m, 1]
                    arcs[at] = -1
                    if i >= a and j >= b:
                        x = y = 0
                        for k in range(i - a, i):
                            x = x * (bases[0] + 1) + source[x0 + k] + 1
                        for k in range(j - b, j):
                            y = y * (bases[1] + 1) + target[y0 + k] + 1
                        arcs[at] = x * bases[2] + y
                    at += 1


@compiled()
def expect(sources, targets, moves, arcs, offsets, weights, alpha, beta, counts, totals, first, step):  # type: ignore[no-untyped-def]
    """Adds the expected pairs to counts[first]; the log of the sums, and how many words have a cut, to totals[first].

    alpha and beta [shares, most nodes] are room for the work.
    """
    forward, backward, mine = alpha[first], beta[first], counts[first]
    for n in range(first, len(offsets) - 1, step):
        rows, columns = sources[n + 1] - sources[n] + 1, targets[n + 1] - targets[n] + 1
        moved, at = len(moves), offsets[n]
        for i in range(rows):
            for j in range(columns):
                total = 1.0 if i + j == 0 else 0.0
                for m in range(moved):
                    pair = arcs[at]
                    at += 1
                    if pair >= 0:
                        total += forward[(i - moves[m, 0]) * columns + j - moves[m, 1]] * weights[pair]
                forward[i * columns + j] = total
                backward[i * columns + j] = 0.0
        last = rows * columns - 1
        if not 0.0 < forward[last] < math.inf:
            continue
        totals[first, 0] += math.log(forward[last])
        totals[first, 1] += 1.0
        backward[last] = 1.0 / forward[last]
        for i in range(rows - 1, -1, -1):
            for j in range(columns - 1, -1, -1):
                here = backward[i * columns + j]
                at -= moved
                if here == 0.0:
                    continue
                for m in range(moved):
                    pair = arcs[at + m]
                    if pair >= 0:
                        before = (i - moves[m, 0]) * columns + j - moves[m, 1]
                        share = here * weights[pair]
                        mine[pair] += forward[before] * share
                        backward[before] += share


@compiled()
def align(sources, targets, moves, arcs, offsets, logs, delta, back, paths, sizes, first, step):  # type: ignore[no-untyped-def]
    """paths [N, longest] and sizes [N]: the pairs of each word's best cut; size 0 where there is none."""
    best, moved_by = delta[first], back[first]
    for n in range(first, len(offsets) - 1, step):
        rows, columns = sources[n + 1] - sources[n] + 1, targets[n + 1] - targets[n] + 1
        moved, at = len(moves), offsets[n]
        for i in range(rows):
            for j in range(columns):
                high, by = 0.0 if i + j == 0 else -math.inf, -1
                for m in range(moved):
                    pair = arcs[at]
                    at += 1
                    if pair >= 0:
                        score = best[(i - moves[m, 0]) * columns + j - moves[m, 1]] + logs[pair]
                        if score > high:
                            high, by = score, m
                best[i * columns + j] = high
                moved_by[i * columns + j] = by
        sizes[n] = 0
        if best[rows * columns - 1] == -math.inf:
            continue
        i, j = rows - 1, columns - 1
        while i + j > 0:
            m = moved_by[i * columns + j]
            paths[n, sizes[n]] = arcs[offsets[n] + (i * columns + j) * moved + m]
            sizes[n] += 1
            i, j = i - moves[m, 0], j - moves[m, 1]
        paths[n, : sizes[n]] = paths[n, : sizes[n]][::-1].copy()
