"""Chunk by chunk is the same as at once, whatever the chunk; and a million steps take little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import chain_torch, long_chain
from probllm.math.chain import Chain, as_chain, log_partition


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, Chain]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e3] if dtype == torch.float32 else [1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf).to(dtype)

    own = () if not batch or draw(st.booleans()) else (batch[0], *(1,) * (len(batch) - 1))
    table = draw(st.sampled_from([(), (*own, 1), (*own, max(steps - 1, 1))]))
    given_ = [scores(*batch, steps, k), scores(*table, k, k), scores(*batch, k), scores(k)]
    lengths = torch.randint(1, steps + 1, batch, generator=generator)
    return given_, lengths, as_chain(*given_, lengths)


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    total = torch.where(value > -torch.inf, value, 0.0).sum() + 0 * sum(x[x > -torch.inf].sum() for x in leaves)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@given(chains(), st.integers(1, 9))
def test_value_gradient_and_expected_parts_are_those_of_the_whole(
    case: tuple[list[Tensor], Tensor, Chain], chunk: int
) -> None:
    scores, lengths, chain = case
    rtol, atol = (1e-4, 2e-4) if scores[0].dtype == torch.float32 else (1e-8, 1e-8)
    leaves = [x.clone().requires_grad_() for x in scores]
    value = long_chain.log_partition(*leaves, lengths, chunk=chunk)
    wide = [x.double().requires_grad_() for x in scores]
    expected = chain_torch.log_partition(*as_chain(*wide, lengths)[:5]).view(chain.batch_shape)
    assert value.dtype == scores[0].dtype
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
    derived = gradients(expected, wide)
    for ours, theirs in zip(gradients(value, leaves), derived, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)

    steps = scores[0].shape[-2]
    tags = torch.zeros_like(scores[0])
    pairs = torch.zeros_like(chain.transitions)
    seen = 0
    for part in long_chain.expected_parts(*scores, lengths, chunk=chunk):
        n = part.tags.shape[-2]
        assert n <= chunk + 1
        tags[..., part.first : part.first + n, :] = part.tags
        if chain.transitions.shape[1] == 1:
            pairs += part.transitions
        else:
            pairs[:, max(part.first, 1) - 1 : max(part.first, 1) - 1 + part.transitions.shape[1]] = part.transitions
        seen += n
    assert seen == steps
    torch.testing.assert_close(tags.double(), derived[0], rtol=rtol, atol=atol)
    table = chain.transitions.double().requires_grad_()
    wide_scores = [x.double() for x in chain[:4]]
    wide_scores[1] = table
    by_chain = chain_torch.log_partition(*wide_scores, chain.lengths)
    torch.testing.assert_close(pairs.double(), gradients(by_chain, [table])[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_step", [False, True])
def test_default_chunks_of_a_long_chain_agree_with_the_compiled_recursion(dtype: torch.dtype, per_step: bool) -> None:
    torch.manual_seed(0)
    steps = 60_000
    scores = [torch.randn(2, steps, 8, dtype=dtype), torch.randn(*([steps - 1] if per_step else []), 8, 8, dtype=dtype)]
    leaves = [[x.clone().requires_grad_() for x in scores] for _ in range(2)]
    ours, theirs = long_chain.log_partition(*leaves[0]), log_partition(*leaves[1])
    torch.testing.assert_close(ours, theirs)
    lengths = torch.tensor([steps, 777])
    ours, theirs = long_chain.log_partition(*leaves[0], lengths=lengths), log_partition(*leaves[1], lengths=lengths)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(x.sum(), y) for x, y in zip((ours, theirs), leaves, strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_state_hidden_for_whole_chunks_comes_back() -> None:
    """State 1 sinks to a thousand nats below state 0, across many chunks, and returns to carry all."""
    emissions = torch.zeros(60, 2)
    emissions[:30, 1], emissions[30:, 0] = -40.0, -80.0
    table = torch.full((2, 2), -torch.inf).fill_diagonal_(0.0)
    for part in long_chain.expected_parts(emissions, table, chunk=7):
        torch.testing.assert_close(part.tags[:, 1], torch.ones(len(part.tags)))
    torch.testing.assert_close(long_chain.log_partition(emissions, table, chunk=7), torch.tensor(-1200.0))


MEASURED = """
import resource, torch
from probllm.math import long_chain
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
table = torch.randn(32, 32)
for part in long_chain.expected_parts(torch.randn(100, 32), table, chunk=10): pass
emissions = torch.empty(200_000, 32).normal_()
before = peak()
for part in long_chain.expected_parts(emissions, table): pass
assert part.first == 0
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_length() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150, f"{done.stdout} MB beyond the scores"


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        long_chain.log_partition(torch.zeros(3, 2), torch.zeros(2, 2), chunk=0)
    with pytest.raises(ValueError, match="NaN"):
        long_chain.log_partition(torch.full((3, 2), torch.nan), torch.zeros(2, 2))
    leaf = torch.zeros(3, 2, requires_grad=True)
    value = long_chain.log_partition(leaf, torch.zeros(2, 2))
    with pytest.raises(NotImplementedError, match="first derivatives alone"):
        torch.autograd.grad(value, leaf, create_graph=True)
