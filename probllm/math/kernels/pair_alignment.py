"""Alignments of two sequences, compiled: sums over monotone paths through a grid, their gradient, best and drawn paths.

    alpha(i, j) = log sum_m exp(alpha(i - a_m, j - b_m) + scores(i, j, m))
    P(move m into (i, j)) = P(i, j) exp(alpha(i - a_m, j - b_m) + scores(i, j, m) - alpha(i, j))

in log space and float64. P goes back from the end of the grid, where it is 1; every node shares its own out among the
moves into it, so no difference of large numbers is taken. Each kernel does the rows first, first + step, ...
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled


@compiled()
def forward(scores, moves, lengths, alpha, log_z, first, step):  # type: ignore[no-untyped-def]
    """alpha [B, I, J] and log_z [B] from scores [B, I, J, M], moves [M, 2] and lengths [B, 2]."""
    rows, count = len(lengths), len(moves)
    ways = np.empty(count)
    for b in range(first, rows, step):
        source = scores[b if scores.shape[0] > 1 else 0]
        for i in range(lengths[b, 0] + 1):
            for j in range(lengths[b, 1] + 1):
                if i == 0 and j == 0:
                    alpha[b, 0, 0] = 0.0
                    continue
                high = -math.inf
                for m in range(count):
                    before, above = i - moves[m, 0], j - moves[m, 1]
                    ways[m] = -math.inf
                    if before >= 0 and above >= 0:
                        ways[m] = alpha[b, before, above] + source[i, j, m]
                    high = max(high, ways[m])
                total = 0.0
                if high > -math.inf:
                    for m in range(count):
                        total += math.exp(ways[m] - high)
                alpha[b, i, j] = high + math.log(total) if total > 0.0 else -math.inf
        log_z[b] = alpha[b, lengths[b, 0], lengths[b, 1]]


@compiled()
def backward(scores, moves, lengths, alpha, weights, expected, first, step):  # type: ignore[no-untyped-def]
    """expected [B, I, J, M] (0 on entry): the probability of each move, times the row's weight."""
    rows, count = len(lengths), len(moves)
    ways = np.empty(count)
    mass = np.empty(alpha.shape[1:])
    for b in range(first, rows, step):
        n, w = lengths[b, 0], lengths[b, 1]
        if weights[b] == 0.0 or alpha[b, n, w] == -math.inf:
            continue
        source = scores[b if scores.shape[0] > 1 else 0]
        mass[:] = 0.0
        mass[n, w] = 1.0
        for i in range(n, -1, -1):
            for j in range(w, -1, -1):
                if mass[i, j] == 0.0 or i + j == 0:
                    continue
                total = 0.0
                for m in range(count):
                    before, above = i - moves[m, 0], j - moves[m, 1]
                    ways[m] = 0.0
                    if before >= 0 and above >= 0:
                        score = alpha[b, before, above] + source[i, j, m]
                        ways[m] = math.exp(score - alpha[b, i, j]) if score > -math.inf else 0.0
                    total += ways[m]
                for m in range(count):
                    if ways[m] > 0.0:
                        share = mass[i, j] * (ways[m] / total)
                        mass[i - moves[m, 0], j - moves[m, 1]] += share
                        expected[b, i, j, m] = share * weights[b]


@compiled()
def best(scores, moves, lengths, paths, first, step):  # type: ignore[no-untyped-def]
    """paths [B, L] (0 on entry): one plus the moves of a path of the highest score; -1 where all is forbidden."""
    rows, count = len(lengths), len(moves)
    delta, back = np.empty(scores.shape[1:3]), np.empty(scores.shape[1:3], np.int16)
    for b in range(first, rows, step):
        source = scores[b if scores.shape[0] > 1 else 0]
        n, w = lengths[b, 0], lengths[b, 1]
        for i in range(n + 1):
            for j in range(w + 1):
                delta[i, j] = 0.0 if i + j == 0 else -math.inf
                for m in range(count):
                    before, above = i - moves[m, 0], j - moves[m, 1]
                    if before >= 0 and above >= 0 and delta[before, above] + source[i, j, m] > delta[i, j]:
                        delta[i, j] = delta[before, above] + source[i, j, m]
                        back[i, j] = m
        if delta[n, w] == -math.inf:
            paths[b] = -1
            continue
        i, j, length = n, w, 0
        while i + j > 0:
            m = back[i, j]
            paths[b, length] = m + 1
            length += 1
            i, j = i - moves[m, 0], j - moves[m, 1]
        paths[b, :length] = paths[b, :length][::-1].copy()


@compiled()
def sample(scores, moves, lengths, alpha, uniforms, paths, first, step):  # type: ignore[no-untyped-def]
    """paths [N, B, L] (0 on entry) of forward's alpha, drawn with uniforms [N, B, L] in [0, 1)."""
    rows, count = len(lengths), len(moves)
    ways = np.empty(count)
    for b in range(first, rows, step):
        source = scores[b if scores.shape[0] > 1 else 0]
        n, w = lengths[b, 0], lengths[b, 1]
        if alpha[b, n, w] == -math.inf:
            paths[:, b] = -1
            continue
        for draw in range(paths.shape[0]):
            i, j, length = n, w, 0
            while i + j > 0:
                total, last = 0.0, 0
                for m in range(count):
                    before, above = i - moves[m, 0], j - moves[m, 1]
                    weight = 0.0
                    if before >= 0 and above >= 0:
                        score = alpha[b, before, above] + source[i, j, m]
                        weight = math.exp(score - alpha[b, i, j]) if score > -math.inf else 0.0
                    if weight > 0.0:
                        last = m
                    total += weight
                    ways[m] = total
                chosen, threshold = 0, uniforms[draw, b, length] * total
                while chosen < last and ways[chosen] <= threshold:
                    chosen += 1
                paths[draw, b, length] = chosen + 1
                length += 1
                i, j = i - moves[chosen, 0], j - moves[chosen, 1]
            paths[draw, b, :length] = paths[draw, b, :length][::-1].copy()
