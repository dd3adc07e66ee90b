"""Back-off n-gram models, compiled: scores of strings, and the best strings of paired chunks that spell a word.

A model is a tree of its n-grams: node 0 is empty, the children of a node are numbered in a row and sorted by token.
log p(w | h) is that of the child w of the longest h that has one, plus the back-off weights of what was cut from h.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.selection import kth_greatest


@compiled()
def follow(node, token, children, tokens, logs, backoffs, suffixes):  # type: ignore[no-untyped-def]
    """(log p(token | node), the node of the longest known string that ends in the token)."""
    cost = 0.0
    while True:
        low, high = children[node], children[node + 1]
        while low < high:
            middle = (low + high) >> 1
            if tokens[middle] < token:
                low = middle + 1
            else:
                high = middle
        if low < children[node + 1] and tokens[low] == token:
            # a node without children or weight has nothing to say that its suffix does not
            child = low
            while children[child] == children[child + 1] and child > 0 and backoffs[child] == 0.0:
                child = suffixes[child]
            return cost + logs[low], child
        if node == 0:
            return -math.inf, 0
        cost += backoffs[node]
        node = suffixes[node]


@compiled()
def score(strings, ends, begin, model_children, tokens, logs, backoffs, suffixes, found, first, step):  # type: ignore[no-untyped-def]
    """found: log probability of each token of strings, which stand end to end, cut at ends [N + 1]."""
    for n in range(first, len(ends) - 1, step):
        node = begin
        for k in range(ends[n], ends[n + 1]):
            found[k], node = follow(node, strings[k], model_children, tokens, logs, backoffs, suffixes)


@compiled()
def follow_all(nodes, read, children, tokens, logs, backoffs, suffixes, after):  # type: ignore[no-untyped-def]
    """after [N]: where each node leads with the token read."""
    for n in range(len(nodes)):
        _, after[n] = follow(nodes[n], read[n], children, tokens, logs, backoffs, suffixes)


@compiled()
def following(nodes, children, tokens, logs, backoffs, suffixes, found, first, step):  # type: ignore[no-untyped-def]
    """found [N, size]: log p(token | node), from the shortest history to the longest, which overwrites it."""
    for n in range(first, len(nodes), step):
        found[n] = -math.inf
        end, depth = nodes[n], 1
        while end != 0:
            end = suffixes[end]
            depth += 1
        for d in range(depth - 1, -1, -1):
            node = nodes[n]
            for _ in range(d):
                node = suffixes[node]
            for w in range(found.shape[1]):
                found[n, w] += backoffs[node]
            for child in range(children[node], children[node + 1]):
                if tokens[child] < found.shape[1]:
                    found[n, tokens[child]] = logs[child]


@compiled()
def decode(  # type: ignore[no-untyped-def]
    letters, ends, starts, candidates, base, longest, prints, begin, final, children, tokens, logs, backoffs,
    suffixes, beam, width, strings, sizes, scores, first, step
):  # fmt: skip
    """The best strings of pairs whose letters spell each word: strings [N, K, most], sizes [N, K], scores [N, K].

    starts [codes + 1] and candidates: the pairs of each chunk of letters, by its code in this base; longest: the most
    letters of a chunk. prints [pairs, 2]: by what a target's fingerprint is multiplied, and what is added, when a pair
    is appended. Strings with one target that lead to one node are one hypothesis, with the sum of their probabilities;
    at each letter the ``beam`` best of them go on, if within ``width`` nats of the best. sizes are 0 where there are
    fewer; scores start as -inf.
    """
    cap = 1 << 15
    slots = cap * 2
    room = np.empty(cap)
    lanes = longest + 1
    state, score_of = np.empty((lanes, cap), np.int64), np.empty((lanes, cap))
    print_of, way = np.empty((lanes, cap), np.int64), np.empty((lanes, cap))
    back, token_of = np.empty((lanes, cap), np.int64), np.empty((lanes, cap), np.int64)
    table, stamps = np.zeros((lanes, slots), np.int64), np.zeros((lanes, slots), np.int64)
    count, high, stamp = np.zeros(lanes, np.int64), np.empty(lanes), np.zeros(lanes, np.int64)
    most = 1
    for n in range(len(ends) - 1):
        most = max(most, ends[n + 1] - ends[n])
    pool_back, pool_token = np.empty((most + 1) * beam + 1, np.int64), np.empty((most + 1) * beam + 1, np.int64)
    for n in range(first, len(ends) - 1, step):
        length, x0 = ends[n + 1] - ends[n], ends[n]
        count[:] = 0
        stamp += 1
        high[:] = -math.inf
        state[0, 0], score_of[0, 0], back[0, 0], token_of[0, 0], count[0] = begin, 0.0, -1, -1, 1
        print_of[0, 0] = 1
        high[0] = 0.0
        pooled = 0
        for i in range(length + 1):
            lane = i % lanes
            size = count[lane]
            if size > 0:
                cut = high[lane] - width
                if size > beam:
                    room[:size] = score_of[lane, :size]
                    cut = max(cut, kth_greatest(room, size, beam))
                taken = 0
                for h in range(size):
                    if score_of[lane, h] < cut or taken == beam:
                        continue
                    taken += 1
                    pool_back[pooled], pool_token[pooled] = back[lane, h], token_of[lane, h]
                    here, node, so_far = pooled, state[lane, h], score_of[lane, h]
                    target = print_of[lane, h]
                    pooled += 1
                    if i == length:  # keep what is finished, in order, for the end
                        gain, _ = follow(node, final, children, tokens, logs, backoffs, suffixes)
                        total = so_far + gain
                        slot = scores.shape[1] - 1
                        if total <= scores[n, slot]:
                            continue
                        while slot > 0 and scores[n, slot - 1] < total:
                            scores[n, slot], sizes[n, slot] = scores[n, slot - 1], sizes[n, slot - 1]
                            slot -= 1
                        scores[n, slot], sizes[n, slot] = total, here
                        continue
                    code = 0
                    for a in range(1, min(longest, length - i) + 1):
                        code = code * base + letters[x0 + i + a - 1] + 1
                        to = (i + a) % lanes
                        for c in range(starts[code], starts[code + 1]):
                            gain, after = follow(node, candidates[c], children, tokens, logs, backoffs, suffixes)
                            total = so_far + gain
                            if total < high[to] - width:
                                continue
                            mine = target * prints[candidates[c], 0] + prints[candidates[c], 1]
                            slot = ((after * 0x9E3779B1) ^ mine ^ (mine >> 29)) & (slots - 1)
                            while stamps[to, slot] == stamp[to] and (
                                state[to, table[to, slot]] != after or print_of[to, table[to, slot]] != mine
                            ):
                                slot = (slot + 1) & (slots - 1)
                            if stamps[to, slot] != stamp[to]:
                                if count[to] == cap:
                                    continue
                                stamps[to, slot], table[to, slot] = stamp[to], count[to]
                                state[to, count[to]], print_of[to, count[to]] = after, mine
                                score_of[to, count[to]] = way[to, count[to]] = -math.inf
                                count[to] += 1
                            entry = table[to, slot]
                            if total > way[to, entry]:
                                way[to, entry], back[to, entry], token_of[to, entry] = total, here, candidates[c]
                            low, top = min(total, score_of[to, entry]), max(total, score_of[to, entry])
                            score_of[to, entry] = top + math.log1p(math.exp(low - top))
                            high[to] = max(high[to], score_of[to, entry])
            count[lane] = 0
            stamp[lane] += 1
            high[lane] = -math.inf
        for k in range(scores.shape[1]):
            if scores[n, k] == -math.inf:
                sizes[n, k] = 0
                continue
            at, taken = sizes[n, k], 0
            while at >= 0 and pool_token[at] >= 0:
                strings[n, k, taken] = pool_token[at]
                taken += 1
                at = pool_back[at]
            strings[n, k, :taken] = strings[n, k, :taken][::-1].copy()
            sizes[n, k] = taken
