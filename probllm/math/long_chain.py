"""Exact sums over a chain of millions of steps in little memory, chunk by chunk.

    forward:  keep alpha at the first step of each chunk;     backward: from the last chunk to the first, expected parts
    of the chunk between its alpha and its beta, then beta at its first step

All that lasts beside the scores is alpha at T / chunk steps (checkpoints; Chen et al. 2016, "Training deep nets with
sublinear memory cost", on a chain Grice, Hughey and Speck 1997). Within a chunk the compiled recursions run, with alpha
as the scores of its first tag and beta as those of its last. On the CPU; first derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math.chain import Chain, as_chain
from probllm.math.chain_passes import expectations
from probllm.math.chain_passes import forward as forward_pass
from probllm.math.chain_torch import safe_logsumexp

ENTRIES = 1 << 19  # scores of a chunk of the default size: some megabytes each, and some ten of them
WIDEST = 60.0  # nats between states at a chunk's ends that float32 holds to its digits


class Part(NamedTuple):
    """The expected parts of the steps from ``first`` on: tags ``[..., n, K]``, transitions ``[G, S, K, K]``.

    Transitions are those that lead to these tags, summed over the rows of a group; over the steps too where S = 1.
    """

    first: int
    tags: Tensor
    transitions: Tensor


def log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``chain.log_partition`` ``[...]`` in nats, differentiable once, in the memory of a chunk beside the gradients'.

    Args:
        emissions, transitions, start, end, lengths: as in ``chain.as_chain``, on the CPU.
        chunk: steps at once; some ten megabytes of scores and sums where missing.
    Raises:
        TypeError, ValueError: as ``chain.log_partition``; for a chunk below 1, or scores that are not on the CPU.
    """
    chain = as_chain(emissions, transitions, start, end, lengths)
    found: Tensor = _LogPartition.apply(*chain[:5], _size(chain, chunk))  # type: ignore[no-untyped-call]
    return found.view(chain.batch_shape).to(emissions.dtype)


@torch.no_grad()
def expected_parts(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[Part]:
    """The gradient of log Z in emissions and transitions, chunk by chunk from the last to the first.

    Arguments as for ``log_partition``. Tags are the marginals ``[..., n, K]``; 0 on padding and where nothing is
    allowed.
    """
    chain = as_chain(emissions, transitions, start, end, lengths)
    size = _size(chain, chunk)
    for part in _backward(chain, size, *_forward(chain, size), torch.ones(chain.emissions.shape[0])):
        tags = part.tags.reshape(*chain.batch_shape, *part.tags.shape[1:]).to(emissions.dtype)
        yield part._replace(tags=tags)


def _size(chain: Chain, chunk: int | None) -> int:
    """Transitions in a chunk."""
    if chain.emissions.device.type != "cpu":
        raise ValueError(f"emissions: expected scores on the CPU, got {chain.emissions.device}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    rows, steps, k = chain.emissions.shape
    a_step = rows * k + (chain.transitions.shape[0] * k * k if chain.transitions.shape[1] > 1 else 0)
    return chunk or max(math.isqrt(steps), ENTRIES // max(1, a_step), 1)


class _LogPartition(torch.autograd.Function):
    """log Z ``[B]``, float64."""

    @staticmethod
    def forward(
        ctx: Any, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, size: int
    ) -> Tensor:
        log_z, alphas = _forward(Chain(emissions, transitions, start, end, lengths, emissions.shape[:1]), size)
        ctx.save_for_backward(emissions, transitions, start, end, lengths, log_z, *alphas)
        ctx.size = size
        return log_z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("a chain in chunks has first derivatives alone; chain.log_partition has all")
        emissions, transitions, start, end, lengths, log_z, *alphas = ctx.saved_tensors
        chain = Chain(emissions, transitions, start, end, lengths, emissions.shape[:1])
        tags = torch.empty_like(emissions)
        pairs = torch.zeros_like(transitions)
        shared = torch.zeros_like(transitions, dtype=torch.float64) if transitions.shape[1] == 1 else None
        for part in _backward(chain, ctx.size, log_z, list(alphas), grad):
            tags[:, part.first : part.first + part.tags.shape[1]] = part.tags
            if shared is not None:
                shared += part.transitions
            elif part.transitions.shape[1]:
                to = max(part.first, 1)
                pairs[:, to - 1 : to - 1 + part.transitions.shape[1]] = part.transitions
        last = tags.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, tags.shape[-1])).squeeze(1)
        return tags, pairs if shared is None else shared.to(pairs.dtype), tags[:, 0].clone(), last, None, None


def _chunk(chain: Chain, a: int, size: int, alpha: Tensor, beta: Tensor) -> Chain:
    """Steps a to a + size as a chain between the scores alpha of its first tag and beta of its last, ``[B, K]`` each.

    The first emission is in alpha, but at the start of all. A row that ends before keeps one step.
    """
    b = min(a + size, chain.emissions.shape[1] - 1)
    both = torch.cat([alpha, beta])
    spread = torch.where(both == -math.inf, 0.0, both).abs().amax() if both.numel() else 0.0
    dtype = torch.float64 if spread > WIDEST else chain.emissions.dtype
    emissions = chain.emissions[:, a : b + 1].to(dtype, copy=True)
    if a:
        emissions[:, 0] = 0.0
    transitions = (chain.transitions[:, a:b] if chain.transitions.shape[1] > 1 else chain.transitions).to(dtype)
    lengths = (chain.lengths - a).clamp(1, b - a + 1)
    return Chain(emissions, transitions, alpha.to(dtype), beta.to(dtype), lengths, chain.batch_shape)


def _forward(chain: Chain, size: int) -> tuple[Tensor, list[Tensor]]:
    """log Z ``[B]``, and alpha ``[B, K]`` at the first step of each chunk, less its greatest."""
    rows, steps, k = chain.emissions.shape
    alpha, offset = chain.start.double(), torch.zeros(rows, dtype=torch.float64)
    zero = torch.zeros(rows, k, dtype=torch.float64)
    alphas = []
    for a in range(0, max(steps - 1, 1), size):
        alphas.append(alpha)
        alpha = _last_alpha(_chunk(chain, a, size, alpha, zero))
        high = alpha.amax(-1)
        high = torch.where(high == -math.inf, 0.0, high)
        offset, alpha = offset + high, alpha - high.unsqueeze(-1)
    return offset + safe_logsumexp(alpha + chain.end.double(), -1), alphas


def _backward(chain: Chain, size: int, log_z: Tensor, alphas: list[Tensor], weights: Tensor) -> Iterator[Part]:
    """The expected parts of each chunk, each row times its weight, from the last chunk to the first."""
    beta = chain.end.double()
    weights = torch.where(log_z > -math.inf, weights, 0.0)
    for i in range(len(alphas) - 1, -1, -1):
        part = _chunk(chain, i * size, size, alphas[i], beta)
        _, tags, pairs = expectations(*part[:5], weights.to(part.emissions.dtype))
        skip = 1 if i else 0  # what two chunks share belongs to the earlier one
        yield Part(i * size + skip, tags[:, skip:], pairs)
        if i:
            beta = _last_alpha(_reversed(part))
            high = beta.amax(-1, keepdim=True)
            beta = beta - torch.where(high == -math.inf, 0.0, high)


def _last_alpha(chain: Chain) -> Tensor:
    """log sum of exp(score) over the sequences that end in each tag, ``[B, K]`` float64; end scores do not count."""
    rows, _, k = chain.emissions.shape
    done = forward_pass(*chain[:3], torch.zeros_like(chain.end), chain.lengths)
    lengths = chain.lengths.numpy()
    result = torch.full((rows, k), -math.inf, dtype=torch.float64)
    found = [(part.rows, part.flags == 0, part.alpha, False) for part in done.scaled]
    if done.left is not None:
        found.append((done.left, np.ones(len(done.left), bool), done.in_log_space(done.left, 1).alpha, True))
    for which, good, alphas, logarithms in found:
        chosen = good.nonzero()[0]
        index = chosen if which is None else which[chosen]
        alpha = torch.from_numpy(alphas[chosen, lengths[index] - 1, :k]).double()
        alpha = alpha if logarithms else alpha.log()
        total = safe_logsumexp(alpha, -1)
        scale = torch.from_numpy(done.log_z[index]) - torch.where(total == -math.inf, 0.0, total)
        result[index] = alpha + scale.unsqueeze(-1)
    return result


def _reversed(chain: Chain) -> Chain:
    """The chain read from the last tag to the first: its alpha is this one's beta."""
    emissions, transitions, lengths = chain.emissions, chain.transitions, chain.lengths
    rows, steps, k = emissions.shape
    at = (lengths.unsqueeze(-1) - 1 - torch.arange(steps)).clamp_min(0)  # [B, T]: the last first, padding anything
    flipped = emissions.gather(1, at.unsqueeze(-1).expand(-1, -1, k))
    table = transitions.mT
    if transitions.shape[1] > 1:
        if bool((lengths != lengths[:1]).any()):  # rows of a group turn at steps of their own
            table = table.repeat_interleave(rows // table.shape[0], 0)
        own = at[:: rows // table.shape[0], 1:]  # transition s leads from step s to s + 1
        table = table.gather(1, own.view(*own.shape, 1, 1).expand(-1, -1, k, k))
    return Chain(flipped, table.contiguous(), chain.end, chain.start, lengths, chain.batch_shape)
