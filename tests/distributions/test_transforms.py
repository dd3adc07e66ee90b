"""Structures of every law under ``torch.func.vmap``: what is found for each sample by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probllm.distributions import (
    GrammarTree,
    HigherOrderCRF,
    LinearChainCRF,
    MonotonicAlignment,
    PairAlignment,
    ProjectiveDependencyTree,
    SemiMarkovCRF,
    SpanningTree,
    SpanTree,
)
from probllm.distributions.structure import StructuredDistribution

Law = Callable[[Tensor], StructuredDistribution]
ZERO, TABLE, CUBE = torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 3, 3)
LAWS: dict[str, tuple[Law, tuple[int, ...]]] = {
    "chain": (lambda x: LinearChainCRF(x, TABLE), (5, 3)),
    "order 2": (lambda x: HigherOrderCRF(x, CUBE, [ZERO, TABLE]), (5, 3)),
    "order 3": (lambda x: HigherOrderCRF(x, CUBE.expand(3, 3, 3, 3), [ZERO, TABLE, CUBE]), (5, 3)),
    "semi-Markov": (lambda x: SemiMarkovCRF(x, TABLE[:2, :2]), (5, 3, 2)),
    "alignment": (lambda x: MonotonicAlignment(x), (6, 3)),
    "CTC": (lambda x: MonotonicAlignment.ctc(x.log_softmax(-1), torch.tensor([1, 2])), (6, 3)),
    "pairs": (lambda x: PairAlignment(x), (4, 4, 3)),
    "spans": (lambda x: SpanTree(x), (4, 4, 2)),
    "grammar": (lambda x: GrammarTree(x, CUBE[:1].expand(2, 3, 3), ZERO[:2]), (4, 4, 3)),
    "projective": (lambda x: ProjectiveDependencyTree(x, x.diagonal(dim1=-2, dim2=-1)), (4, 4)),
    "spanning": (lambda x: SpanningTree(x, x.diagonal(dim1=-2, dim2=-1)), (4, 4)),
}


@pytest.mark.parametrize("name", LAWS)
def test_modes_and_best_structures_are_those_of_each_sample(name: str) -> None:
    law, shape = LAWS[name]
    scores = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for find in (lambda x: law(x).mode, lambda x: law(x).topk(2)[1]):
        assert torch.equal(torch.func.vmap(find)(scores), torch.stack([find(x) for x in scores]))


@pytest.mark.parametrize("name", LAWS)
def test_samples_are_drawn_for_each_sample_by_itself(name: str) -> None:
    law, shape = LAWS[name]
    torch.manual_seed(0)
    one = torch.randn(shape)
    drawn = torch.func.vmap(lambda x: law(x).sample(), randomness="different")(one.expand(200, *shape))
    assert bool((law(one).log_prob(drawn) > -torch.inf).all())
    assert len(drawn.flatten(1).unique(dim=0)) > 1
    # the mean log probability is the negative entropy: 5 standard errors
    found = law(one).log_prob(drawn).double()
    assert abs(float(found.mean() + law(one).entropy())) < 5 * float(found.std()) / 200**0.5
