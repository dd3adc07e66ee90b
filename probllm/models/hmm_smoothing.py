"""Smoothed probabilities of a hidden Markov tagger from counts of a tagged text.

Transitions: Witten and Bell's interpolation with the next lower order, down to the uniform law (Chen and Goodman 1999,
section 2.6), where N is how often a context was seen and R after how many different tags:

    P(k | i, j) = (count(i, j, k) + R P(k | j)) / (N + R)

Symbols: Brants (2000), "TnT", section 2.3, in one tree for known words and for the classes of unknown ones. A word's
parent is the class that it would take were it unknown, a class's the next more general class, and

    P(tag | s) = (count(s, tag) + strength P(tag | parent of s)) / (count(s) + strength)
    P(s | tag) = P(tag | s) P(s) / sum_s' P(tag | s') P(s')

where a class counts the rare words below it, and the symbols that the text lacks share the mass of those it has once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probllm.models.hmm_laws import Rows

RARE = 10  # unknown words are like words seen at most so often (Brants 2000)
WORD_STRENGTH, CLASS_STRENGTH = 0.1, 3.0  # chosen on the development part of UD English EWT


def count(sequences: Sequence[tuple[Tensor, Tensor]], num_tags: int, num_symbols: int, order: int) -> Rows:
    """How often each step was taken, where all of its tags are known; float64.

    Args:
        sequences: symbols and tags of each, ``[T]``; -1 where a tag is not known.
    """
    symbols = torch.cat([symbols for symbols, _ in sequences])
    tags = torch.cat([tags for _, tags in sequences])
    places = torch.cat([torch.arange(len(tags)) for _, tags in sequences])
    before, two_back = tags.roll(1), tags.roll(2)
    known = tags >= 0
    pair = known & (before >= 0) & (places >= 1)
    triple = pair & (two_back >= 0) & (places >= 2)
    initial = _count([tags], known & (places == 0), [num_tags])
    emission = _count([tags, symbols], known, [num_tags, num_symbols])
    if order == 1:
        return Rows(initial, None, _count([before, tags], pair, [num_tags] * 2), emission)
    second = _count([before, tags], pair & (places == 1), [num_tags] * 2)
    return Rows(initial, second, _count([two_back, before, tags], triple, [num_tags] * 3), emission)


def _count(columns: Sequence[Tensor], where: Tensor, shape: Sequence[int]) -> Tensor:
    cells = torch.zeros(int(where.sum()), dtype=torch.long)
    size = 1
    for column, extent in zip(columns, shape, strict=True):
        cells = cells * extent + column[where]
        size *= extent
    return torch.bincount(cells, minlength=size).reshape(list(shape)).double()


def smooth(counts: Rows, parents: Sequence[int] | None = None) -> Rows:
    """Log probabilities from the counts of a tagged text.

    Args:
        counts: see ``count``.
        parents: the parent of each symbol in the tree of words and classes; a symbol that is its own has none. None:
            nobody has.
    """
    num_tags = len(counts.initial)
    unigrams = witten_bell(counts.emission.sum(-1), torch.full((num_tags,), 1 / num_tags, dtype=torch.float64))
    emission = smooth_emissions(counts.emission, parents)
    initial = witten_bell(counts.initial, unigrams)
    if counts.second is None:
        return Rows(initial.log(), None, witten_bell(counts.transition, unigrams).log(), emission.log())
    bigrams = witten_bell(counts.second + counts.transition.sum(0), unigrams)
    second = witten_bell(counts.second, bigrams)
    return Rows(initial.log(), second.log(), witten_bell(counts.transition, bigrams).log(), emission.log())


def witten_bell(counts: Tensor, lower: Tensor) -> Tensor:
    """Rows ``[..., K]`` of counts as probabilities, interpolated with those of the next lower order (broadcast)."""
    kinds = (counts > 0).sum(-1, keepdim=True)
    total = counts.sum(-1, keepdim=True) + kinds
    return torch.where(total > 0, (counts + kinds * lower) / total.clamp_min(1), lower)


def smooth_emissions(counts: Tensor, parents: Sequence[int] | None = None) -> Tensor:
    """``P(symbol | tag)``, ``[K, S]``, rows sum to 1, from counts ``[K, S]``; see above."""
    counts = counts.T  # [S, K]: a row a symbol
    seen = counts.sum(-1)
    own = torch.arange(len(counts))
    parent = own if parents is None else torch.tensor(parents)
    is_class = torch.zeros(len(counts), dtype=torch.bool)
    is_class[parent[parent != own]] = True
    rare = torch.where(((seen <= RARE) | is_class).unsqueeze(-1), counts, 0.0)
    levels = _levels(parent)
    below = torch.zeros_like(counts)
    for level in reversed(levels[1:]):  # from the leaves up: each class counts the rare words under it
        below.index_add_(0, parent[level], below[level] + rare[level])
    as_class = torch.zeros_like(seen).index_add_(0, parent, torch.where(parent != own, rare.sum(-1), 0.0))
    tag_given = torch.empty_like(counts)
    mean = counts.sum(0) + 1
    mean = mean / mean.sum()
    for depth, level in enumerate(levels):
        total = counts[level] + below[level]
        strength = torch.where(is_class[level], CLASS_STRENGTH, WORD_STRENGTH).unsqueeze(-1)
        lower = mean if depth == 0 else tag_given[parent[level]]
        tag_given[level] = (total + strength * lower) / (total.sum(-1, keepdim=True) + strength)
    # Symbols that the text lacks: as often as the rare words that are of their class, at least half a time.
    new = torch.where(seen == 0, as_class + 0.5, 0.0)
    unseen_mass = (seen == 1).sum().clamp_min(1) / seen.sum().clamp_min(1) if bool(new.any()) else seen.new_zeros(())
    unseen_mass = unseen_mass.clamp_max(0.5) if bool(seen.any()) else seen.new_ones(())
    probability = (1 - unseen_mass) * seen / seen.sum().clamp_min(1) + unseen_mass * new / new.sum().clamp_min(1)
    joint = tag_given * probability.unsqueeze(-1)
    return (joint / joint.sum(0)).T.contiguous()


def _levels(parent: Tensor) -> list[Tensor]:
    """Symbols by depth in the tree: first those without a parent, then their children, ..."""
    node, depth = torch.arange(len(parent)), torch.zeros_like(parent)
    for _ in range(len(parent)):
        moved = parent[node] != node
        if not bool(moved.any()):
            return [(depth == level).nonzero().squeeze(-1) for level in range(int(depth.max()) + 1)]
        node, depth = parent[node], depth + moved
    raise ValueError(f"parents: symbol {int(node[moved][0])} is an ancestor of itself")
