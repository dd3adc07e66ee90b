"""N-gram models of strings, by interpolated modified Kneser-Ney smoothing.

    p(w | h) = max(c(h w) - D(c(h w)), 0) / sum_w c(h w) + g(h) p(w | h'),          h' is h without its first token

with discounts D for counts of 1, 2 and 3 or more of each order, made of the counts of counts; in lower orders c counts
the different tokens before a string, not its occurrences (Chen and Goodman 1999, "An empirical study of smoothing
techniques for language modeling", section 4.2). Strings that begin at the beginning keep their occurrences, as nothing
stands before them. The lowest order falls back on uniform probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from probllm.math.kernels import ngrams as kernels
from probllm.math.kernels.threads import run_shares

Array = np.ndarray[Any, Any]


class NGrams(NamedTuple):
    """A tree of n-grams: node 0 is empty; the children of node v are ``children[v]`` to ``children[v + 1] - 1``, in
    the order of their tokens. The last two tokens are the beginning and the end of a string."""

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
        ends = np.concatenate([[0], np.cumsum([len(x) for x in ended], dtype=np.int64)]).astype(np.int64)
        joined = np.concatenate([np.asarray(x, dtype=np.int64) for x in ended]) if ended else np.zeros(0, np.int64)
        found = np.zeros(len(joined))
        run_shares(kernels.score, (joined, ends, self.begin, *self.arrays(), found), len(ended), 200.0 * len(joined))
        return np.add.reduceat(found, ends[:-1]) if len(ended) else np.zeros(0)


def kneser_ney(strings: Sequence[Sequence[int]], size: int, order: int) -> NGrams:
    """Counts the n-grams of the strings up to this order, and smooths them.

    Args:
        strings: tokens from 0 to size - 1; their beginnings and ends are added.
    Raises:
        ValueError: for an order below 1, no strings, or tokens out of range.
    """
    if order < 1:
        raise ValueError(f"order: expected at least 1, got {order}")
    if not strings:
        raise ValueError("strings: expected at least one")
    lengths = np.array([len(x) + 2 for x in strings], dtype=np.int64)
    text = np.concatenate([np.asarray([size, *x, size + 1], dtype=np.int64) for x in strings])
    position = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # within its string
    inner = text[(position > 0) & (position < np.repeat(lengths, lengths) - 1)]
    if inner.size and not 0 <= inner.min() <= inner.max() < size:
        raise ValueError(f"strings: expected tokens from 0 to {size - 1}")
    base = size + 2
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
    starts = np.zeros(levels[-1], dtype=bool)  # strings that begin at the beginning
    for k in range(1, order + 1):
        low, high = levels[k], levels[k + 1]
        starts[low:high] = (token[low:high] == size) if k == 1 else starts[parent[low:high]]
    for k in range(1, order):
        low, high = levels[k], levels[k + 1]
        different = np.bincount(suffix[levels[k + 1] : levels[k + 2]] - low, minlength=high - low)
        count[low:high] = np.where(starts[low:high], count[low:high], different)
    logs, backoffs = _smooth(parent, token, suffix, count, levels, size)
    children = np.searchsorted(parent[1:], np.arange(levels[-1] + 1)) + 1
    return NGrams(size, order, children, token, logs, backoffs, suffix)


def _smooth(
    parent: Array, token: Array, suffix: Array, count: Array, levels: list[int], size: int
) -> tuple[Array, Array]:
    """Log probabilities of the last tokens and log back-off weights, order by order."""
    probability, left = np.ones(levels[-1]), np.ones(levels[-1])
    for k in range(1, len(levels) - 1):
        low, high, before = levels[k], levels[k + 1], levels[k - 1]
        # the beginning is given, never predicted
        c = np.where(token[low:high] == size, 0, count[low:high]).astype(float)
        discount = _discounts(c)[np.minimum(c, 3).astype(int)]
        history = parent[low:high] - before
        total = np.bincount(history, c, minlength=low - before)
        taken = np.bincount(history, discount, minlength=low - before)
        with np.errstate(invalid="ignore", divide="ignore"):
            g = np.where(total > 0, taken / total, 1.0)
            own = np.where(total[history] > 0, (c - discount) / total[history], 0.0)
        left[before:low] = g
        shorter = probability[suffix[low:high]] if k > 1 else 1.0 / (size + 1)
        probability[low:high] = own + g[history] * shorter
        probability[low:high][token[low:high] == size] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(probability), np.log(left)


def _discounts(counts: Array) -> Array:
    """What is taken from counts of 0, 1, 2, and 3 or more."""
    n = [float((counts == k).sum()) for k in range(5)]
    if not n[1] or not n[2]:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    found = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.5 for k in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), 0.95 * k) for k, d in enumerate(found[1:], 1))])
