"""Interpolated Kneser-Ney whose counts are raised after every token read, compiled.

Trained counts are a tree that no one writes to: the children of node v are ``children[v]`` to ``children[v + 1] - 1``,
sorted by token. What was read since is a list of entries of ``WIDTH`` numbers: nodes that changed, with all that is now
true of them, and new ones. ``table`` finds them, by open addressing: a trained node under its own number, a new one
under its parent's entry and its token. A history is a pair, (trained node, entry), -1 where there is none.
"""

from __future__ import annotations

import numpy as np

from probllm.math.kernels.compiled import compiled

NODE, TOKEN, COUNT, TOTAL, ONES, TWOS, MORE, CHILD, NEXT = range(9)
WIDTH = 9
UNLINKED = -2  # NEXT of an entry that is not in its parent's list, as its count has not changed


@compiled()
def place(table, key):  # type: ignore[no-untyped-def]
    """Where a key stands in a table [slots, 2] of keys and entries, or would stand."""
    mask = len(table) - 1
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64(mixed >> np.uint64(20)) & mask
    while table[slot, 0] != key and table[slot, 0] >= 0:
        slot = (slot + 1) & mask
    return slot


@compiled()
def rehash(old, table):  # type: ignore[no-untyped-def]
    """Fills an empty table (keys -1) with what another holds."""
    for slot in range(len(old)):
        if old[slot, 0] >= 0:
            to = place(table, old[slot, 0])
            table[to, 0], table[to, 1] = old[slot, 0], old[slot, 1]


@compiled()
def child_of(node, entry, token, size, children, tokens, entries, table):  # type: ignore[no-untyped-def]
    """The (node, entry) that a token leads to; (-1, -1) where it was never seen there."""
    if node >= 0:
        low, high = children[node], children[node + 1]
        end = high
        while low < high:
            middle = (low + high) >> 1
            if tokens[middle] < token:
                low = middle + 1
            else:
                high = middle
        if low < end and tokens[low] == token:
            slot = place(table, low)
            return low, table[slot, 1] if table[slot, 0] == low else -1
    if entry < 0:
        return -1, -1
    key = len(tokens) + entry * size + token
    slot = place(table, key)
    return -1, table[slot, 1] if table[slot, 0] == key else -1


@compiled()
def written(node, key, counts, stats, entries, table, used):  # type: ignore[no-untyped-def]
    """The entry of a trained node, or of a new one (node -1), made where there is none."""
    slot = place(table, key)
    if table[slot, 0] == key:
        return table[slot, 1]
    entry = used[0]
    used[0] += 1
    table[slot, 0], table[slot, 1] = key, entry
    entries[entry, NODE], entries[entry, TOKEN] = node, 0
    entries[entry, COUNT] = counts[node] if node >= 0 else 0
    for k in range(4):
        entries[entry, TOTAL + k] = stats[node, k] if 0 <= node < len(stats) else 0
    entries[entry, CHILD], entries[entry, NEXT] = -1, UNLINKED
    return entry


@compiled()
def learn(token, size, path, children, tokens, counts, stats, entries, table, used, found):  # type: ignore[no-untyped-def]
    """Reads a token: raises its counts, and moves the histories on.

    path [order, 2]: the histories, from the empty one; used: [entries, histories]. found [order, 2]: room.
    """
    order = len(path)
    depth = used[1]
    for k in range(depth):
        found[k, 0], found[k, 1] = child_of(path[k, 0], path[k, 1], token, size, children, tokens, entries, table)
    for k in range(depth - 1, -1, -1):
        history = path[k, 1]
        if history < 0:  # the empty one, or trained and never changed
            history = path[k, 1] = written(path[k, 0], path[k, 0], counts, stats, entries, table, used)
        node, entry = found[k, 0], found[k, 1]
        if entry < 0:
            key = node if node >= 0 else len(tokens) + history * size + token
            entry = found[k, 1] = written(node, key, counts, stats, entries, table, used)
        if entries[entry, NEXT] == UNLINKED:
            entries[entry, TOKEN] = token
            entries[entry, NEXT], entries[history, CHILD] = entries[history, CHILD], entry
        before = entries[entry, COUNT]
        entries[entry, COUNT] += 1
        entries[history, TOTAL] += 1
        if before < 3:
            entries[history, TOTAL + before + 1] += 1
            if before > 0:
                entries[history, TOTAL + before] -= 1
        if before > 0:
            break
    depth = min(depth + 1, order)
    for k in range(1, depth):
        path[k] = found[k - 1]
        if path[k, 1] < 0:  # in a run of one token a history is its own child, and may have been written just now
            slot = place(table, path[k, 0])
            if table[slot, 0] == path[k, 0]:
                path[k, 1] = table[slot, 1]
    used[1] = depth


@compiled()
def weigh(node, entry, discounts, stats, entries):  # type: ignore[no-untyped-def]
    """(c(h), what is left for the shorter history) of a history; c(h) is 0 where nothing came after it."""
    if entry >= 0:
        total = entries[entry, TOTAL]
        if total == 0:
            return 0, 1.0
        ones, twos, more = entries[entry, ONES], entries[entry, TWOS], entries[entry, MORE]
    elif 0 <= node < len(stats):
        total, ones, twos, more = stats[node, 0], stats[node, 1], stats[node, 2], stats[node, 3]
    else:
        return 0, 1.0
    if total == 0:
        return 0, 1.0
    return total, (discounts[1] * ones + discounts[2] * twos + discounts[3] * more) / total


@compiled()
def probability(token, size, path, depth, discounts, children, tokens, counts, stats, entries, table):  # type: ignore[no-untyped-def]
    """p(token | the longest history)."""
    found = 1.0 / size
    for k in range(depth):
        node, entry = path[k, 0], path[k, 1]
        total, left = weigh(node, entry, discounts[k], stats, entries)
        if total == 0:
            continue
        after, raised = child_of(node, entry, token, size, children, tokens, entries, table)
        count = entries[raised, COUNT] if raised >= 0 else counts[after] if after >= 0 else 0
        found = (count - discounts[k, min(count, 3)]) / total + left * found
    return found


@compiled()
def law(path, depth, discounts, children, tokens, counts, stats, entries, room, found):  # type: ignore[no-untyped-def]
    """found [size]: p of every token after the longest history. room [size + 2]: zeros."""
    size = len(found)
    found[:] = 1.0 / size
    for k in range(depth):
        node, entry = path[k, 0], path[k, 1]
        total, left = weigh(node, entry, discounts[k], stats, entries)
        if total == 0:
            continue
        for w in range(size):
            found[w] *= left
        if node >= 0:
            for child in range(children[node], children[node + 1]):
                room[tokens[child]] = counts[child]
        if entry >= 0:
            child = entries[entry, CHILD]
            while child >= 0:
                w, count = entries[child, TOKEN], entries[child, COUNT]
                found[w] += (count - discounts[k, min(count, 3)]) / total
                room[w] = 0
                child = entries[child, NEXT]
        if node >= 0:
            for child in range(children[node], children[node + 1]):
                w = tokens[child]
                count = room[w]
                if count > 0 and w < size:
                    found[w] += (count - discounts[k, min(count, 3)]) / total
                room[w] = 0


@compiled()
def score(text, size, path, discounts, children, tokens, counts, stats, entries, table, used, found):  # type: ignore[no-untyped-def]
    """found [L]: log p of each token, which is then learned."""
    space = np.empty_like(path)
    for t in range(len(text)):
        found[t] = np.log(
            probability(text[t], size, path, used[1], discounts, children, tokens, counts, stats, entries, table)
        )
        learn(text[t], size, path, children, tokens, counts, stats, entries, table, used, space)


@compiled()
def laws(text, path, discounts, children, tokens, counts, stats, entries, table, used, found):  # type: ignore[no-untyped-def]
    """found [L, size]: after each token is learned, log p of every next one."""
    size = found.shape[1]
    space, room = np.empty_like(path), np.zeros(size + 2, np.int64)
    for t in range(len(text)):
        learn(text[t], size, path, children, tokens, counts, stats, entries, table, used, space)
        law(path, used[1], discounts, children, tokens, counts, stats, entries, room, found[t])
        found[t] = np.log(found[t])
