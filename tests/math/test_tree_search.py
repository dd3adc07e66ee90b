"""The k best dependency trees, of either sort, against the sorted list of all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math.tree_search import best_trees
from tests.distributions.dependencies import trees


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 5))
    scale, share = draw(st.sampled_from([1.0, 1e6])), draw(st.sampled_from([0.0, 0.3, 0.6]))
    arcs = scale * torch.randn(1, n, n, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        arcs = arcs.sign()  # ties
    return arcs.masked_fill(torch.rand(arcs.shape, generator=generator) < share, -torch.inf)


@pytest.mark.parametrize("projective", [True, False])
@given(tables(), st.booleans(), st.integers(1, 40))
def test_the_k_best_are_distinct_sorted_and_none_is_missed(
    projective: bool, arcs: Tensor, single_root: bool, k: int
) -> None:
    n = arcs.shape[-1]
    extra = torch.empty(k, 1)
    found = best_trees(arcs, torch.tensor([n]), extra, single_root=single_root, projective=projective)[:, 0]
    heads = torch.tensor(trees(n, single_root, projective))
    row = torch.where(heads == 0, torch.arange(n), heads - 1)
    total = arcs[0][row, torch.arange(n)].sum(-1)
    expected = total[total > -torch.inf].sort(descending=True).values[:k]
    there = found[:, 0] >= 0
    assert int(there.sum()) == len(expected)
    assert bool(there[: len(expected)].all())
    assert set(map(tuple, found[there].tolist())) <= set(trees(n, single_root, projective))
    row = torch.where(found == 0, torch.arange(n), found - 1)[there]
    torch.testing.assert_close(arcs[0][row, torch.arange(n)].sum(-1), expected, rtol=1e-12, atol=1e-6)
    assert len(found[there].unique(dim=0)) == len(expected)
