"""Connectionist temporal classification, compiled: the lattice of a row of labels, and its gradient taken back.

Between the two stand the kernels of ``kernels.alignment``. States are labels with blanks around; see ``math.ctc``.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.exponentials import lowest_allowed
from probllm.math.kernels.selection import kth_greatest
from probllm.math.kernels.vectors import reach


@compiled()
def pack(targets, lengths, counts, blank, size, frames, packed):  # type: ignore[no-untyped-def]
    """packed [B, 3 + U] of targets [B, U]: see ``math.ctc.pack``. Returns whether all is in range."""
    rows, most = targets.shape
    for b in range(rows):
        n, count = lengths[b], counts[b]
        if n < 1 or n > frames or count < 0 or count > most:
            return False
        packed[b, 0], packed[b, 1], packed[b, 2] = n, count, blank
        for u in range(most):
            label = targets[b, u] if u < count else blank
            if u < count and (label < 0 or label >= size or label == blank):
                return False
            packed[b, 3 + u] = label
    return True


@compiled()
def lattice(log_probs, packed, labels, emissions, steps, start, end, bad, first, step):  # type: ignore[no-untyped-def]
    """One share of the rows; ``bad`` [1 or B]: whether a log probability is NaN or +inf.

    log_probs [1 or B, T, V], packed [B, 3 + U] (frames, labels, blank, and the labels); labels [B, S], emissions
    [B, T, S], steps [B, 3, S] and end [B, S], 0 on entry; start [1, S] of the first row alone.
    """
    rows, states = labels.shape
    for b in range(first, rows, step):
        frames, count, blank = packed[b, 0], packed[b, 1], packed[b, 2]
        source = log_probs[b if log_probs.shape[0] > 1 else 0]
        if b < log_probs.shape[0]:
            flat = source.reshape(source.size)
            high = reach(flat, flat.size)  # NaN if there is one, +inf for either infinity
            bad[b] = not high < math.inf and lowest_allowed(flat, 0, flat.size)[2]
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


@compiled()
def _plus(x, y):  # type: ignore[no-untyped-def]
    """log(exp x + exp y)."""
    high, low = max(x, y), min(x, y)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high


@compiled()
def search(log_probs, lengths, blank, beam, labels, scores, first, step):  # type: ignore[no-untyped-def]
    """Prefix beam search. labels [K, B, T] hold the blank on entry, scores [K, B] -inf.

    log_probs [B, T, V]. Prefixes are nodes of a tree, so that equal ones are one; a prefix's mass is kept apart by
    whether its last frame is a blank. K is at most ``beam``.
    """
    rows, frames, size = log_probs.shape
    nodes = frames * beam + 1
    slots = 2
    while slots < 2 * nodes:
        slots *= 2
    parent, label, slot_of = np.empty(nodes, np.int64), np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    table = np.empty(slots, np.int64)
    alive, then = np.empty(beam, np.int64), np.empty(beam, np.int64)
    in_blank, in_label, total = np.empty(beam), np.empty(beam), np.empty(beam)
    to_blank, to_label = np.empty(beam), np.empty(beam)
    then_blank, then_label = np.empty(beam), np.empty(beam)
    new_mass, new_from, new_label = (
        np.empty(beam * size),
        np.empty(beam * size, np.int64),
        np.empty(beam * size, np.int64),
    )
    mass = np.empty(beam * (size + 1))
    for b in range(first, rows, step):
        table[:] = -1
        parent[0], label[0], slot_of[0], made = -1, -1, 0, 1
        alive[0], in_blank[0], in_label[0], count = 0, 0.0, -math.inf, 1
        for t in range(lengths[b]):
            row = log_probs[b, t]
            for h in range(count):
                v = alive[h]
                total[h] = _plus(in_blank[h], in_label[h])
                to_blank[h] = total[h] + row[blank]
                to_label[h] = in_label[h] + row[label[v]] if v > 0 else -math.inf
            found = 0
            for h in range(count):
                v = alive[h]
                for k in range(size):
                    if k == blank:
                        continue
                    gain = (in_blank[h] if k == label[v] else total[h]) + row[k]
                    if gain == -math.inf:
                        continue
                    child = table[_place(table, parent, label, v, k)]
                    if child >= 0 and slot_of[child] >= 0:
                        to_label[slot_of[child]] = _plus(to_label[slot_of[child]], gain)
                    else:
                        new_mass[found], new_from[found], new_label[found] = gain, v, k
                        found += 1
            for h in range(count):
                total[h] = mass[h] = _plus(to_blank[h], to_label[h])
            mass[count : count + found] = new_mass[:found]
            cut = -math.inf
            if count + found > beam:
                cut = kth_greatest(mass, count + found, beam)
            kept = 0
            # what is above the cut first, then as many at the cut as there is room for
            for strict in (True, False):
                for h in range(count):
                    if kept < beam and (total[h] > cut if strict else total[h] == cut) and total[h] > -math.inf:
                        then[kept], then_blank[kept], then_label[kept] = alive[h], to_blank[h], to_label[h]
                        kept += 1
                for c in range(found):
                    if kept < beam and (new_mass[c] > cut if strict else new_mass[c] == cut):
                        place = _place(table, parent, label, new_from[c], new_label[c])
                        if table[place] < 0:
                            table[place] = made
                            parent[made], label[made], slot_of[made] = new_from[c], new_label[c], -1
                            made += 1
                        then[kept], then_blank[kept], then_label[kept] = table[place], -math.inf, new_mass[c]
                        kept += 1
            for h in range(count):
                slot_of[alive[h]] = -1
            count = kept
            for h in range(count):
                alive[h], in_blank[h], in_label[h] = then[h], then_blank[h], then_label[h]
                slot_of[alive[h]] = h
            if count == 0:
                break
        for h in range(count):
            total[h] = _plus(in_blank[h], in_label[h])
        for i in range(min(count, scores.shape[0])):
            best = 0
            for h in range(1, count):
                best = h if total[h] > total[best] else best
            v, length = alive[best], 0
            scores[i, b], total[best] = total[best], -math.inf
            while v > 0:
                labels[i, b, length] = label[v]
                length += 1
                v = parent[v]
            labels[i, b, :length] = labels[i, b, :length][::-1].copy()


@compiled()
def _place(table, parent, label, node, k):  # type: ignore[no-untyped-def]
    """Where the child k of a node stands in the table, or would."""
    place = ((node * 0x9E3779B1) ^ (k * 0x85EBCA6B)) & (table.size - 1)
    while table[place] >= 0 and (parent[table[place]] != node or label[table[place]] != k):
        place = (place + 1) & (table.size - 1)
    return place
