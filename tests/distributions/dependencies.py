"""Dependency trees listed by hand, and cases of laws over them."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from probllm.distributions.dependency_tree import DependencyTreeLaw
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import draw_lengths


def is_tree(heads: tuple[int, ...]) -> bool:
    for word in range(1, len(heads) + 1):
        steps = 0
        while word:
            word, steps = heads[word - 1], steps + 1
            if steps > len(heads):
                return False
    return True


def is_projective(heads: tuple[int, ...]) -> bool:
    """Every word between a head and its dependent descends from the head; the root stands before the first word."""
    for dependent, head in enumerate(heads, 1):
        for word in range(min(head, dependent) + 1, max(head, dependent)):
            while word not in (0, head):
                word = heads[word - 1]
            if word != head:
                return False
    return True


@functools.cache
def trees(n: int, single_root: bool, projective: bool) -> list[tuple[int, ...]]:
    return [
        heads
        for heads in itertools.product(range(n + 1), repeat=n)
        if is_tree(heads) and (not single_root or heads.count(0) == 1) and (not projective or is_projective(heads))
    ]


@functools.cache
def listed(words: int, single_root: bool, projective: bool) -> tuple[Tensor, Tensor]:
    """Trees over 1 to ``words`` words ``[N, words]``, padded by 0, and the number of words of each ``[N]``."""
    rows = [(heads, n) for n in range(words, 0, -1) for heads in trees(n, single_root, projective)]
    padded = [(*heads, *(0,) * (words - n)) for heads, n in rows]
    return torch.tensor(padded), torch.tensor([n for _, n in rows])


@st.composite
def tree_cases(draw: st.DrawFn, law_class: type[DependencyTreeLaw]) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    single_root = draw(st.booleans())
    words = draw(st.sampled_from([4, 3, 3, 2, 1]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))
    shape = (*draw(st.sampled_from([batch, ()])), words, words)
    arcs = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    arcs = arcs.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)
    lengths = draw_lengths(draw, batch, words, generator)

    def build(arcs: Tensor) -> DependencyTreeLaw:
        return law_class(arcs, arcs.diagonal(0, -2, -1), single_root, lengths)

    law = build(arcs)
    heads, sizes = listed(words, single_root, law_class._projective)
    count, own = len(heads), len(law.batch_shape)

    def score(given: Parts) -> Tensor:
        table = given["arcs"].expand(*law.batch_shape, words, words)
        total: Any = 0.0
        for d in range(words):
            row = torch.where(heads[:, d] == 0, d, heads[:, d] - 1)
            total = total + torch.where(d < sizes, table[..., row, d], 0.0)
        return total.movedim(-1, 0)

    structures = heads.reshape(count, *(1,) * own, words).expand(count, *law.batch_shape, words)
    rows = (sizes == law.lengths.unsqueeze(-1)).movedim(-1, 0)
    return Case(law, build, structures, rows, score, draw(st.integers(0, 1000)))
