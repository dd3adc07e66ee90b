"""Connectionist temporal classification, compiled: the lattice of a row of labels, and its gradient taken back.

Between the two stand the kernels of ``kernels.alignment``. States are labels with blanks around; see ``math.ctc``.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled


@compiled()
def lattice(log_probs, packed, labels, emissions, steps, start, end, first, step):  # type: ignore[no-untyped-def]
    """One share of the rows.

    log_probs [1 or B, T, V], packed [B, 3 + U] (frames, labels, blank, and the labels); labels [B, S], emissions
    [B, T, S], steps [B, 3, S] and end [B, S], 0 on entry; start [1, S] of the first row alone.
    """
    rows, states = labels.shape
    for b in range(first, rows, step):
        frames, count, blank = packed[b, 0], packed[b, 1], packed[b, 2]
        source = log_probs[b if log_probs.shape[0] > 1 else 0]
        for s in range(states):
            labels[b, s] = packed[b, 3 + s // 2] if s % 2 == 1 and s < 2 * count else blank
        for s in range(states):
            if s < 2 or labels[b, s] == blank or labels[b, s] == labels[b, s - 2]:
                steps[b, 2, s] = -math.inf
            if s < 2 * count - 1 or s > 2 * count:
                end[b, s] = -math.inf
            if b == 0 and s > 1:
                start[0, s] = -math.inf
        for t in range(frames):
            of_blank = source[t, blank]
            for s in range(0, states, 2):
                emissions[b, t, s] = of_blank
            for s in range(1, states, 2):
                emissions[b, t, s] = source[t, labels[b, s]]


@compiled()
def scatter(marginals, weights, packed, labels, gradient, first, step):  # type: ignore[no-untyped-def]
    """gradient [B, T, V] (0 on entry): the probability of each label at each frame, times the row's weight."""
    rows, states = labels.shape
    for b in range(first, rows, step):
        w, blank = weights[b], packed[b, 2]
        if w == 0.0:
            continue
        for t in range(packed[b, 0]):
            of_blank = 0.0
            for s in range(0, states, 2):
                of_blank += marginals[b, t, s]
            for s in range(1, states, 2):
                gradient[b, t, labels[b, s]] += np.float64(marginals[b, t, s] * w)
            gradient[b, t, blank] += np.float64(of_blank * w)
