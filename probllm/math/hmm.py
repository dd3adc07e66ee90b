"""Expected counts of a hidden Markov model with categorical observations: the E-step of Baum-Welch.

    gamma_t(k) = P(z_t = k | x),   xi_t(i, j) = P(z_{t-1} = i, z_t = j | x)
    initial(k) = sum gamma_1(k),   transition(i, j) = sum_t xi_t(i, j),   emission(k, v) = sum_{t: x_t = v} gamma_t(k)

Source: Baum et al. (1970); Rabiner (1989), equations 40a to 40c. They are the derivatives of the log likelihood, too
(Fisher's identity), so that ``log_likelihood`` never writes down the emissions of the steps as something to be derived.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import chain_passes as passes
from probllm.math.chain import Chain, as_chain, chain_log_partition, check_lengths
from probllm.math.kernels import categorical_hmm, chain_scaled
from probllm.math.kernels.threads import run_shares, shares_of
from probllm.math.kernels.vectors import padded
from probllm.math.untraced import untraced


class Counts(NamedTuple):
    """Expected counts of a categorical HMM, and the log likelihood that they belong to."""

    log_likelihood: Tensor  # [B] in nats
    initial: Tensor  # [K]
    transition: Tensor  # [K, K], [from, to]
    emission: Tensor  # [K, V]


@untraced
def expected_steps(chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
    """The E step of any HMM, from its scores: log Z ``[B]``, P(z_t = k) ``[B, T, K]``, expected transitions ``[K, K]``.

    The transitions are those that all rows and steps share, summed over both. No gradients.
    """
    if chain.emissions.device.type == "cpu":
        found, gamma, pairs = passes.expectations(*chain[:5])
        log_z = torch.from_numpy(found)
    else:
        parts = [x.detach().requires_grad_() for x in chain[:2]]
        log_z = chain_log_partition(chain._replace(emissions=parts[0], transitions=parts[1]))
        gamma, pairs = torch.autograd.grad(torch.where(torch.isfinite(log_z), log_z, 0.0).sum(), parts)
    moves = pairs[0, 0] if chain.emissions.shape[1] > 1 else torch.zeros_like(chain.transitions[0, 0])
    return log_z.detach(), gamma, moves


def log_likelihood(
    value: Tensor, initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """log p(x) ``[B]`` of an HMM with categorical observations, in nats; differentiable in the log probabilities.

    Args:
        value: symbols, ``[B, T]`` long, from 0 to V - 1, on padding too.
        initial: ``[K]``, transition: ``[K, K]``, emission: ``[K, V]``: log probabilities of one dtype, on the CPU.
        lengths: ``[B]`` long.
    Raises:
        ValueError: for symbols out of range.
    """
    found: Tensor = _LogLikelihood.apply(value, initial, transition, emission, lengths)  # type: ignore[no-untyped-call]
    return found


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, symbols: Tensor, initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(symbols, initial, transition, emission, lengths)
        ctx.counts = None
        if not any(ctx.needs_input_grad[1:4]):
            _check_range(symbols, emission.shape[1])
            chain = _chain_of(symbols, initial, transition, emission, lengths)
            return torch.from_numpy(passes.forward(*chain[:5], keep=False).log_z).to(emission.dtype)
        log_z, ctx.counts = _with_counts(symbols, (initial, transition, emission), lengths, None)
        return torch.from_numpy(log_z).to(emission.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        symbols, initial, transition, emission, lengths = ctx.saved_tensors
        weights = grads[0]
        if torch.is_grad_enabled():  # someone will differentiate what this returns
            log_z = chain_log_partition(_chain_of(symbols, initial, transition, emission, lengths), emission.dtype)
            scores = [x for x in (initial, transition, emission) if x.requires_grad]
            slopes = iter(torch.autograd.grad(log_z, scores, weights, create_graph=True))
            return None, *(next(slopes) if x.requires_grad else None for x in (initial, transition, emission)), None
        weight = weights[0]
        if weights.stride(0) == 0 or bool((weights == weight).all()):  # of a sum or a mean over the batch
            return None, *(x * weight for x in ctx.counts), None
        return None, *_with_counts(symbols, (initial, transition, emission), lengths, weights)[1], None


def _with_counts(
    symbols: Tensor, scores: tuple[Tensor, Tensor, Tensor], lengths: Tensor | None, weights: Tensor | None
) -> tuple[np.ndarray, list[Tensor]]:
    """log p(x) ``[B]``, and the expected counts in the shapes of the scores, times the weights ``[B]`` of the rows."""
    initial, transition, emission = (x.detach().contiguous().numpy() for x in scores)
    rows, steps = symbols.shape
    (k, size), dtype = emission.shape, emission.dtype
    tables = passes.make_tables(transition.reshape(1, 1, k, k), dtype.type)
    if not tables.forbids:
        n = np.full(rows, steps) if lengths is None else lengths.contiguous().numpy()
        by = np.ones(rows, dtype) if weights is None else weights.contiguous().numpy()
        log_z, flags = np.empty(rows), np.empty(rows, np.int64)
        pieces, cost = (rows + 3) // 4, 0.05 * rows * steps * k * (k + 32)
        shares = shares_of(pieces, cost)
        sums = [np.empty((shares, *x.shape), dtype) for x in (initial, transition, emission)]
        span = passes.apart(steps, tables.both.shape[4] * dtype.itemsize)
        arguments = (
            symbols.contiguous().numpy(), n, by, initial, emission, tables.both, tables.numbers, span, log_z, flags,
            *sums,
        )  # fmt: skip
        run_shares(categorical_hmm.differentiate, arguments, pieces, cost)
        if not flags.any():
            return log_z, [torch.from_numpy(x[0] if shares == 1 else x.sum(0)) for x in sums]
    _check_range(symbols, size)
    chain = _chain_of(symbols, scores[0].detach(), scores[1].detach(), scores[2].detach(), lengths)
    log_z, tags, pairs = passes.expectations(*chain[:5], None if weights is None else weights.contiguous())
    return log_z, [tags[:, 0].sum(0), pairs[0, 0], _sum_by_symbol(symbols, tags, size)]


def _check_range(symbols: Tensor, size: int) -> None:
    low, high = symbols.aminmax()
    if int(low) < 0 or int(high) >= size:
        raise ValueError(f"value: expected symbols from 0 to {size - 1}, got {int(low)} to {int(high)}")


def _chain_of(symbols: Tensor, initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Chain:
    if torch.is_grad_enabled():
        rows = emission.t()[symbols]
    else:  # torch would wake its threads for it
        rows = torch.from_numpy(emission.detach().t().contiguous().numpy().take(symbols.numpy(), 0))
    return as_chain(rows, transition, initial, None, lengths)


def _sum_by_symbol(symbols: Tensor, tags: Tensor, size: int) -> Tensor:
    """tags ``[B, T, K]`` summed over the steps with each symbol, ``[K, V]``; 0 on padding."""
    found = tags.new_zeros(size, tags.shape[2])
    return found.index_add_(0, symbols.reshape(-1), tags.reshape(-1, tags.shape[2])).t()


@untraced
def expected_counts(
    symbols: Tensor,
    initial_logits: Tensor,
    transition_logits: Tensor,
    emission_logits: Tensor,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Counts:
    """Expected counts over a batch of sequences, without gradients.

    Args:
        symbols: ``[B, T]`` long, from 0 to V - 1; anything on padding.
        initial_logits: ``[K]``, transition_logits: ``[K, K]``, emission_logits: ``[K, V]``: log probabilities.
        lengths: ``[B]``.
        allowed: ``[B, T, K]`` bool: states that each step may take (a partly labelled sequence); all where missing.
    Raises:
        ValueError: for shapes that do not agree, lengths out of range, or symbols out of range at a real position.
    """
    if symbols.dim() != 2 or symbols.is_floating_point():
        raise ValueError(f"symbols: expected integers of shape [B, T], got {symbols.dtype} of {list(symbols.shape)}")
    if emission_logits.dim() != 2:
        raise ValueError(f"emission_logits: expected shape [K, V], got {list(emission_logits.shape)}")
    k, size = emission_logits.shape
    for name, logits, shape in (
        ("initial_logits", initial_logits, [k]),
        ("transition_logits", transition_logits, [k, k]),
    ):
        if list(logits.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(logits.shape)}")
    real = symbols
    if lengths is not None:
        check_lengths(lengths, symbols.shape[1])
        if lengths.shape != symbols.shape[:1]:
            raise ValueError(f"lengths: expected shape {list(symbols.shape[:1])}, got {list(lengths.shape)}")
        real = symbols.masked_fill(torch.arange(symbols.shape[1], device=symbols.device) >= lengths.unsqueeze(1), 0)
    if real.numel():
        low, high = real.aminmax()
        if int(low) < 0 or int(high) >= size:
            raise ValueError(
                f"symbols: expected values from 0 to {size - 1}, got values from {int(low)} to {int(high)}"
            )
    scores = [x.detach() for x in (initial_logits, transition_logits, emission_logits)]
    if allowed is not None or symbols.device.type != "cpu" or not symbols.numel():
        return _counts_of_chain(real, scores, lengths, allowed)
    n = torch.full((symbols.shape[0],), symbols.shape[1]) if lengths is None else lengths.long()
    found, hard = _counts_of_table(real.long(), scores, n)
    if hard is None:
        return found
    if not hard.numel():
        return _counts_of_chain(real, scores, lengths, None)
    rest = _counts_of_chain(real[hard], scores, n[hard], None)
    found.log_likelihood[hard] = rest.log_likelihood
    return Counts(found.log_likelihood, *(a + b for a, b in zip(found[1:], rest[1:], strict=True)))


def _counts_of_table(symbols: Tensor, scores: list[Tensor], lengths: Tensor) -> tuple[Counts, Tensor | None]:
    """The counts by the fused kernel, and the rows that it could not certify: None, some (not counted), or empty
    for all."""
    initial, transition, emission = scores
    k, size = emission.shape
    forbids = any(bool((x == -torch.inf).any()) for x in scores)
    dtype = torch.float64 if forbids or emission.dtype == torch.float64 else torch.float32
    first_table, first_offset, first_span = _probabilities(initial.unsqueeze(0), dtype)
    forth, offsets, spread = _probabilities(transition.reshape(1, k * k), dtype)
    table, symbol_offsets, spans = _probabilities(emission.t(), dtype)
    span = float(spans.max() + first_span.max() + 2 * spread.max()) + math.log(k)
    if not span <= (chain_scaled.SPAN64 if forbids or dtype == torch.float64 else chain_scaled.SPAN32):
        return Counts(*(initial.new_empty(0),) * 4), torch.empty(0, dtype=torch.long)
    forth = forth.view(k, k)
    width = padded(k)

    def wide(x: Tensor) -> np.ndarray:
        return torch.nn.functional.pad(x, (0, width - k)).contiguous().numpy()

    rows, steps = symbols.shape
    log_z, flags = np.empty(rows), np.empty(rows, np.int64)
    shares = torch.get_num_threads()
    kind = np.float64 if dtype == torch.float64 else np.float32
    sums = [np.zeros((shares, *shape), kind) for shape in ((width,), (k, width), (size, width))]
    arguments = (
        symbols.contiguous().numpy(), lengths.contiguous().numpy(), torch.argsort(lengths, descending=True).numpy(),
        wide(first_table)[0], wide(forth), wide(forth.t()), wide(table), float(offsets[0]), symbol_offsets.numpy(),
        dtype == torch.float64, log_z, flags, *sums,
    )  # fmt: skip
    run_shares(categorical_hmm.count, arguments, (rows + 3) // 4, 0.09 * rows * steps * k * (k + 32))
    bad = torch.from_numpy(np.flatnonzero(flags))
    if (flags == categorical_hmm.SPOILED).any():
        bad = bad[:0]
    totals = [torch.from_numpy(x).double().sum(0)[..., :k].to(emission.dtype) for x in sums]
    log_likelihood = (torch.from_numpy(log_z) + float(first_offset[0])).to(emission.dtype)
    counts = Counts(log_likelihood, totals[0], totals[1] * forth.to(emission.dtype), totals[2].t())
    return counts, bad if flags.any() else None


def _probabilities(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """exp of each row around its maximum, the maxima, and the range in nats of what is allowed."""
    logits = logits.double()
    high = logits.amax(-1, keepdim=True)
    high = torch.where(high == -torch.inf, torch.zeros_like(high), high)
    low = torch.where(logits == -torch.inf, high, logits).amin(-1)
    return (logits - high).exp().to(dtype), high.squeeze(-1), high.squeeze(-1) - low


def _counts_of_chain(symbols: Tensor, scores: list[Tensor], lengths: Tensor | None, allowed: Tensor | None) -> Counts:
    """The counts by way of a chain with its emissions written out."""
    initial, transition, emission = scores
    k, size = emission.shape
    emissions = emission.t().contiguous().index_select(0, symbols.reshape(-1)).view(*symbols.shape, k)
    if allowed is not None:
        emissions = emissions.masked_fill(~allowed, -torch.inf)
    log_z, gamma, moves = expected_steps(as_chain(emissions, transition, initial, None, lengths))
    counted = _sum_by_symbol(symbols, gamma, size)
    return Counts(log_z.to(emissions.dtype), gamma[:, 0].sum(0), moves, counted)
