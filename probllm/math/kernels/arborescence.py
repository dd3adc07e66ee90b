"""The best dependency tree, compiled; crossing arcs are allowed.

The best one by Chu and Liu (1965) and Edmonds (1967) on dense tables, in T^2: each word takes its best head; a cycle
becomes one word, an arc into which is worth what it changes. With one root, an arc is worth the pair (-1 if it is the
root's, score), compared in that order: exactly the best among the trees with the fewest roots (Gabow and Tarjan 1984).

Tables are [T, T], head and dependent, the roots' scores on the diagonal; heads [T] count words from 1, 0 is the root.
"""

from __future__ import annotations

import math

import numpy as np

from probllm.math.kernels.compiled import compiled


@compiled()
def _better(order, score, best_order, best_score):  # type: ignore[no-untyped-def]
    """Whether a pair is above the best, or the first that is not forbidden."""
    if score == -math.inf or best_score == -math.inf:
        return score > -math.inf
    return order > best_order or (order == best_order and score > best_score)


@compiled()
def best_tree(table, n, single, space, heads):  # type: ignore[no-untyped-def]
    """Writes the heads of the best tree; False if there is none."""
    score, order, source, target = space
    top = 2 * n + 1
    above, state = np.full(top, -1), np.zeros(top, np.int8)  # state: 0 no head yet, 1 on the path, 2 under the root
    alive = np.zeros(top, np.bool_)
    from_word, to_word = np.zeros(top, np.int64), np.zeros(top, np.int64)
    own_score, own_order = np.full(top, -math.inf), np.zeros(top, np.int64)
    path = np.empty(top, np.int64)
    # [dependent, head], the root being 0
    for d in range(1, n + 1):
        for h in range(n + 1):
            score[d, h] = table[d - 1 if h == 0 else h - 1, d - 1] if h != d else -math.inf
            order[d, h] = -1 if single and h == 0 else 0
            source[d, h], target[d, h] = h, d
    alive[: n + 1] = True
    state[0] = 2
    count = n + 1
    for word in range(1, n + 1):
        x = word
        while above[x] >= 0:
            x = above[x]
        size = 0
        while state[x] == 0:
            head = -1
            for h in range(count):
                if alive[h] and h != x and _better(order[x, h], score[x, h], own_order[x], own_score[x]):
                    head, own_order[x], own_score[x] = h, order[x, h], score[x, h]
            if head < 0:
                return False
            from_word[x], to_word[x] = source[x, head], target[x, head]
            state[x] = 1
            path[size] = x
            size += 1
            if state[head] != 1:
                x = head
                continue
            # a cycle: one word from now on
            new, count = count, count + 1
            first = size - 1
            while path[first] != head:
                first -= 1
            for i in range(first, size):
                y = path[i]
                above[y], alive[y] = new, False
            for z in range(count - 1):
                score[new, z] = -math.inf
                score[z, new] = -math.inf
                order[new, z] = 0
                order[z, new] = 0
                if not alive[z]:
                    continue
                for i in range(first, size):
                    y = path[i]
                    change, rank = score[y, z] - own_score[y], order[y, z] - own_order[y]
                    if _better(rank, change, order[new, z], score[new, z]):
                        score[new, z], order[new, z] = change, rank
                        source[new, z], target[new, z] = source[y, z], target[y, z]
                    if z > 0 and _better(order[z, y], score[z, y], order[z, new], score[z, new]):
                        score[z, new], order[z, new] = score[z, y], order[z, y]
                        source[z, new], target[z, new] = source[z, y], target[z, y]
            size = first
            alive[new] = True
            x = new
        for i in range(size):
            state[path[i]] = 2
    # an arc into a word that was a cycle replaces those of all that it stands for
    done = np.zeros(top, np.bool_)
    roots = 0
    for x in range(count - 1, 0, -1):
        if not done[x]:
            y = to_word[x]
            heads[y - 1] = from_word[x]
            roots += from_word[x] == 0
            while y != x:
                done[y] = True
                y = above[y]
    return roots == 1 or not single


@compiled()
def space_for(words):  # type: ignore[no-untyped-def]
    """What ``best_tree`` works in."""
    top = 2 * words + 1
    return (
        np.empty((top, top)),
        np.empty((top, top), np.int64),
        np.empty((top, top), np.int64),
        np.empty((top, top), np.int64),
    )
