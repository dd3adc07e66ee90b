"""All segmentations, and what each is made of, found by walking through it; for tests of semi-Markov laws."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Listed(NamedTuple):
    """All sequences of 0 .. K, and how often each uses every part; rows by length."""

    structures: Tensor  # [N, T]
    listed: Tensor  # [T + 1, N] bool: whether it is a segmentation of so many steps
    segments: Tensor  # [T + 1, N, T, D, K]
    transitions: Tensor  # [T + 1, N, K, K]
    start: Tensor  # [T + 1, N, K]
    end: Tensor  # [T + 1, N, K]


def all_segmentations(steps: int, longest: int, k: int) -> Listed:
    every = list(itertools.product(range(k + 1), repeat=steps))
    count = len(every)
    listed = torch.zeros(steps + 1, count, dtype=torch.bool)
    segments = torch.zeros(steps + 1, count, steps, longest, k, dtype=torch.float64)
    transitions = torch.zeros(steps + 1, count, k, k, dtype=torch.float64)
    start, end = torch.zeros(2, steps + 1, count, k, dtype=torch.float64)
    for n in range(1, steps + 1):
        for i, value in enumerate(every):
            if value[0] == 0 or any(value[n:]):
                continue
            cuts = [t for t in range(n) if value[t]] + [n]
            spans = list(itertools.pairwise(cuts))
            if max(stop - begin for begin, stop in spans) > longest:
                continue
            listed[n, i] = True
            labels = [value[begin] - 1 for begin, _ in spans]
            for (begin, stop), label in zip(spans, labels, strict=True):
                segments[n, i, begin, stop - begin - 1, label] += 1
            for pair in itertools.pairwise(labels):
                transitions[n, i, pair[0], pair[1]] += 1
            start[n, i, labels[0]] += 1
            end[n, i, labels[-1]] += 1
    return Listed(torch.tensor(every), listed, segments, transitions, start, end)


def dot(counts: Tensor, scores: Tensor, dims: int) -> Tensor:
    """Sum over the last dimensions of counts * scores, where what is not used may be -inf."""
    return (torch.where(counts > 0, scores, 0.0) * counts).flatten(-dims).sum(-1)
