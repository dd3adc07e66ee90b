"""Dependency trees as heads, one a word: 0 is the root, words count from 1.

A tree is projective where every word's descendants, itself among them, stand side by side: then no two arcs cross, and
none passes over the root. Other trees are made so by lifting: the shortest arc over a word that does not descend from
its head is hung on the head's head, until none is left (Nivre and Nilsson, 2005, "Pseudo-projective dependency
parsing", without the encoding in the labels).
"""

from __future__ import annotations

from collections.abc import Sequence


def find_cycle(heads: Sequence[int]) -> list[int]:
    """The words of a cycle, each followed by its head; empty where the heads form a tree.

    Args:
        heads: which word each depends on, 0 for the root; each from 0 to the number of words.
    """
    safe = {0}  # words whose path is known to end at the root
    for start in range(1, len(heads) + 1):
        path: list[int] = []
        word = start
        while word not in safe:
            if word in path:
                return path[path.index(word) :]
            path.append(word)
            word = heads[word - 1]
        safe.update(path)
    return []


def is_projective(heads: Sequence[int]) -> bool:
    """Whether a tree is projective.

    Raises:
        ValueError: if the heads form no tree.
    """
    _check_tree(heads)
    first = list(range(len(heads) + 1))
    last = list(range(len(heads) + 1))
    size = [1] * (len(heads) + 1)
    for word in range(1, len(heads) + 1):
        above = heads[word - 1]
        while above:
            first[above], last[above] = min(first[above], word), max(last[above], word)
            size[above] += 1
            above = heads[above - 1]
    return all(last[word] - first[word] + 1 == size[word] for word in range(1, len(heads) + 1))


def projectivise(heads: Sequence[int]) -> list[int]:
    """The heads of a projective tree near this one; a projective tree stays as it is, and so do the roots.

    Raises:
        ValueError: if the heads form no tree.
    """
    lifted = list(heads)
    while not is_projective(lifted):
        _, word = min((abs(lifted[word - 1] - word), word) for word in _crossed(lifted))
        lifted[word - 1] = lifted[lifted[word - 1] - 1]
    return lifted


def _crossed(heads: Sequence[int]) -> list[int]:
    """The words whose arc passes over one that does not descend from their head."""
    ancestors: list[set[int]] = []
    for word in range(1, len(heads) + 1):
        above, found = word, {0}
        while above:
            found.add(above)
            above = heads[above - 1]
        ancestors.append(found)
    return [
        word
        for word, head in enumerate(heads, start=1)
        if any(head not in ancestors[between - 1] for between in range(min(word, head) + 1, max(word, head)))
    ]


def _check_tree(heads: Sequence[int]) -> None:
    if any(not 0 <= head <= len(heads) for head in heads):
        raise ValueError(f"heads must lie from 0 to {len(heads)}, got {list(heads)}")
    cycle = find_cycle(heads)
    if cycle:
        raise ValueError(f"heads must form a tree, but the words {cycle} form a cycle: {list(heads)}")
