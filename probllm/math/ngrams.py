"""N-gram models of strings, smoothed, as one tree in which every model is a back-off model.

    p(w | h) = own(h w) + g(h) p(w | h'),                                           h' is h without its first token

    Kneser-Ney    own = max(c(h w) - D(c(h w)), 0) / c(h),    g = sum_w D(c(h w)) / c(h)
    Witten-Bell   own = c(h w) / (c(h) + t(h)),               g = t(h) / (c(h) + t(h)),      t different tokens after h
    additive      p(w | h) = (c(h w) + k) / (c(h) + k V) for whole histories h

Modified Kneser-Ney, interpolated: discounts D for counts of 1, 2 and 3 or more of each order, made of the counts of
counts; in lower orders c counts the different tokens before a string, not its occurrences (Chen and Goodman 1999, "An
empirical study of smoothing techniques for language modeling", sections 2.1, 2.5 and 4.2). Strings that begin at the
beginning keep their occurrences, as nothing stands before them. The lowest order falls back on uniform probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from probllm.math.kernels import ngrams as kernels
from probllm.math.kernels.threads import run_shares

Array = np.ndarray[Any, Any]


class NGrams(NamedTuple):
    """A tree of n-grams: node 0 is empty; the children of node v are ``children[v]`` to ``children[v + 1] - 1``, in
    the order of their tokens. Beyond the tokens there are the beginning of a string and its end, where strings have
    ends."""

    size: int  # tokens from 0 to size - 1; size is the beginning, size + 1 the end
    order: int
    children: Array  # [nodes + 1] long
    tokens: Array  # [nodes] long: the last token of each
    logs: Array  # [nodes]: log p(last token | those before)
    backoffs: Array  # [nodes]: log g, what is left for shorter histories
    suffixes: Array  # [nodes] long: the node without its first token

    @property
    def begin(self) -> int:
        """The node of the beginning."""
        return self.size + 1

    def arrays(self) -> tuple[Array, Array, Array, Array, Array]:
        """What the kernels take."""
        return self.children, self.tokens, self.logs, self.backoffs, self.suffixes

    def log_probs(self, strings: Sequence[Sequence[int]]) -> Array:
        """Log probability of each string of tokens from 0 to size - 1, its end included."""
        ended = [[*x, self.size + 1] for x in strings]
        sizes = np.array([len(x) for x in ended], dtype=np.int64)
        joined = np.concatenate([np.asarray(x, dtype=np.int64) for x in ended]) if ended else np.zeros(0, np.int64)
        found = self.token_log_probs(joined, sizes)
        return np.add.reduceat(found, np.cumsum(sizes) - sizes) if len(ended) else np.zeros(0)

    def token_log_probs(self, joined: Array, sizes: Array) -> Array:
        """Log probability of each token of strings that stand end to end; sizes [N]: their lengths."""
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        found = np.zeros(len(joined))
        run_shares(kernels.score, (joined, ends, self.begin, *self.arrays(), found), len(sizes), 200.0 * len(joined))
        return found

    def follow(self, nodes: Array, tokens: Array) -> Array:
        """The node to go on from, ``[N]``, after each node and the token read there."""
        after = np.empty_like(nodes)
        kernels.follow_all(nodes, tokens, *self.arrays(), after)
        return after

    def next_log_probs(self, nodes: Array) -> Array:
        """Log probability of every token after each node, ``[N, size]``; the end of a string has the rest."""
        found = np.empty((len(nodes), self.size))
        run_shares(kernels.following, (nodes, *self.arrays(), found), len(nodes), 2.0 * self.order * found.size)
        return found


Smoothing = Literal["kneser-ney", "witten-bell", "additive"]


def kneser_ney(strings: Sequence[Sequence[int]], size: int, order: int) -> NGrams:
    """Modified Kneser-Ney of strings that have ends: ``smoothed(strings, size, order, ends=True)``."""
    return smoothed(strings, size, order, ends=True)


def smoothed(
    strings: Sequence[Sequence[int] | Array],
    size: int,
    order: int,
    smoothing: Smoothing = "kneser-ney",
    k: float = 1.0,
    ends: bool = False,
) -> NGrams:
    """Counts the n-grams of the strings up to this order, and smooths them.

    Args:
        strings: tokens from 0 to size - 1; their beginnings are added.
        k: what additive smoothing adds to each count.
        ends: whether the end of a string is a token of its own, beyond these.
    Raises:
        ValueError: for an order below 1, no strings, tokens out of range, another smoothing, or a k that is not above
            0.
    """
    if smoothing not in ("kneser-ney", "witten-bell", "additive"):
        raise ValueError(f"smoothing: expected 'kneser-ney', 'witten-bell' or 'additive', got {smoothing!r}")
    if not 0 < k < np.inf:
        raise ValueError(f"k: expected a number above 0, got {k}")
    counts, used = count(strings, size, order, smoothing == "kneser-ney", ends)
    levels, vocabulary = counts.levels, size + 1 if ends else size
    if smoothing == "additive":
        logs, backoffs = _additive(counts, used, size, vocabulary, k)
    else:
        logs, backoffs = _interpolated(counts, used, size, vocabulary, smoothing)
    children = np.searchsorted(counts.parent[1:], np.arange(levels[-1] + 1)) + 1
    return NGrams(size, order, children, counts.token, logs, backoffs, counts.suffix)


class Counts(NamedTuple):
    """The nodes of a tree of n-grams, level by level: those of n tokens are ``levels[n]`` to ``levels[n + 1] - 1``."""

    parent: Array
    token: Array
    suffix: Array
    occurrences: Array
    starts: Array  # bool: begins at the beginning of a string
    levels: list[int]


def count(
    strings: Sequence[Sequence[int] | Array], size: int, order: int, different: bool = True, ends: bool = False
) -> tuple[Counts, Array]:
    """The n-grams of strings, and the count of each that smoothing uses, ``[nodes]``: occurrences, or below the highest
    order, where ``different``, the different tokens before it, as Kneser-Ney wants; 0 for the beginning. Arguments and
    errors as of ``smoothed``."""
    if order < 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    counts = _count(strings, size, order, ends)
    levels, used = counts.levels, counts.occurrences.copy()
    if different:
        for n in range(1, order):
            low, high = levels[n], levels[n + 1]
            before = np.bincount(counts.suffix[levels[n + 1] : levels[n + 2]] - low, minlength=high - low)
            used[low:high] = np.where(counts.starts[low:high], used[low:high], before)
    # the beginning is given, never predicted
    used[counts.token == size] = 0
    return counts, used


def _count(strings: Sequence[Sequence[int] | Array], size: int, order: int, ends: bool) -> Counts:
    if not strings:
        raise ValueError("strings: expected at least one")
    close = [size + 1] if ends else []
    lengths = np.array([len(x) + 1 + ends for x in strings], dtype=np.int64)
    text = np.concatenate([np.concatenate([[size], np.asarray(x, dtype=np.int64), close]) for x in strings]).astype(
        np.int64
    )
    position = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # within its string
    inner = text[(position > 0) & (position < np.repeat(lengths, lengths) - ends)]
    if inner.size and not 0 <= inner.min() <= inner.max() < size:
        raise ValueError(f"strings: expected tokens from 0 to {size - 1}, got {inner.min()} to {inner.max()}")
    base = size + 1 + ends
    # level by level: the node of the k tokens that end at each position
    root = np.zeros(1, dtype=np.int64)
    nodes, levels = [np.zeros(len(text), dtype=np.int64)], [0, 1]
    parents, tokens, suffixes, counts = [root], [root - 1], [root], [root]
    for k in range(1, order + 1):
        there = np.flatnonzero(position >= k - 1)
        if k == 1:  # all tokens, those that never come too
            code, at, occurrences = np.arange(base), text, np.bincount(text, minlength=base)
            above = np.zeros(base, np.int64)
        else:
            code, first, at, occurrences = np.unique(
                nodes[k - 1][there - 1] * base + text[there], return_index=True, return_inverse=True, return_counts=True
            )
            above = nodes[k - 1][there][first]
        node = np.full(len(text), -1, dtype=np.int64)
        node[there] = at + levels[-1]
        nodes.append(node)
        parents.append(code // base)
        tokens.append(code % base)
        suffixes.append(above)
        counts.append(occurrences)
        levels.append(levels[-1] + len(code))
    parent, token, suffix, count = (np.concatenate(x) for x in (parents, tokens, suffixes, counts))
    starts = np.zeros(levels[-1], dtype=bool)
    for k in range(1, order + 1):
        low, high = levels[k], levels[k + 1]
        starts[low:high] = (token[low:high] == size) if k == 1 else starts[parent[low:high]]
    return Counts(parent, token, suffix, count, starts, levels)


def _interpolated(counts: Counts, used: Array, size: int, vocabulary: int, smoothing: Smoothing) -> tuple[Array, Array]:
    """Log probabilities of the last tokens and log back-off weights, order by order."""
    levels, token = counts.levels, counts.token
    probability, left = np.ones(levels[-1]), np.ones(levels[-1])
    for k in range(1, len(levels) - 1):
        low, high, before = levels[k], levels[k + 1], levels[k - 1]
        c = used[low:high].astype(float)
        history = counts.parent[low:high] - before
        if smoothing == "kneser-ney":
            discount = discounts_of(c)[np.minimum(c, 3).astype(int)]
            total = np.bincount(history, c, minlength=low - before)
            taken = np.bincount(history, discount, minlength=low - before)
        else:
            discount = np.zeros_like(c)
            taken = np.bincount(history, c > 0, minlength=low - before)
            total = np.bincount(history, c, minlength=low - before) + taken
        with np.errstate(invalid="ignore", divide="ignore"):
            g = np.where(total > 0, taken / total, 1.0)
            own = np.where(total[history] > 0, (c - discount) / total[history], 0.0)
        left[before:low] = g
        shorter = probability[counts.suffix[low:high]] if k > 1 else 1.0 / vocabulary
        probability[low:high] = own + g[history] * shorter
        probability[low:high][token[low:high] == size] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(probability), np.log(left)


def _additive(counts: Counts, used: Array, size: int, vocabulary: int, k: float) -> tuple[Array, Array]:
    """The same of additive smoothing: histories that are not whole, and unknown ones, give uniform probabilities."""
    levels = counts.levels
    order = len(levels) - 2
    logs, left = np.full(levels[-1], -np.log(vocabulary)), np.zeros(levels[-1])
    for n in range(1, order + 1):
        low, high, before = levels[n], levels[n + 1], levels[n - 1]
        whole = np.ones(low - before, bool) if n == order else counts.starts[before:low]
        c, history = used[low:high].astype(float), counts.parent[low:high] - before
        total = np.bincount(history, c, minlength=low - before)
        # what an unknown token has, over the uniform probability that it meets below
        left[before:low] = np.where(whole, np.log(k * vocabulary / (total + k * vocabulary)), 0.0)
        own = np.log((c + k) / (total[history] + k * vocabulary))
        logs[low:high] = np.where(whole[history], own, logs[low:high])
    logs[counts.token == size] = -np.inf
    return logs, left


def discounts_of(counts: Array) -> Array:
    """What is taken from counts of 0, 1, 2, and 3 or more."""
    n = [float((counts == k).sum()) for k in range(5)]
    if not n[1] or not n[2]:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    found = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.5 for k in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), 0.95 * k) for k, d in enumerate(found[1:], 1))])
