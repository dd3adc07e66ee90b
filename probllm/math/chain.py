"""Exact sums over the tag sequences of a linear chain.

    score(x) = start(x_1) + sum_t e_t(x_t) + sum_t A_t(x_{t-1}, x_t) + end(x_n),     log Z = log sum_x exp score(x)

``log_partition`` and ``expectations`` run the compiled recursions of ``kernels``: scaled in float32 where that is
certified, else scaled in float64, else log space; the answer is the same. The derivative of log Z in each score is the
expectation of that part (Lafferty, McCallum and Pereira 2001). Second derivatives, and everything on a GPU, go through
the torch twin in ``chain_torch``. Scores are ``[..., T, K]``; ``-inf`` forbids; a row in which nothing is allowed has
log Z = -inf and expectations 0.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probllm.math import chain_passes as passes
from probllm.math import chain_torch
from probllm.math.untraced import untraced


class Chain(NamedTuple):
    """The scores of a batch of chains, brought to one shape: B = G R rows, of which R in a row share transitions."""

    emissions: Tensor  # [B, T, K]
    transitions: Tensor  # [G, S, K, K], S = 1 (shared by all steps) or T - 1
    start: Tensor  # [B, K]
    end: Tensor  # [B, K]
    lengths: Tensor  # [B] long, on the CPU for kernels
    batch_shape: torch.Size


def as_chain(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Chain:
    """Checks the shapes and dtypes of a chain's scores and broadcasts them.

    Args:
        emissions: ``[..., T, K]`` score of each tag at each step.
        transitions: ``[K, K]``, ``[from, to]``, for all steps, or ``[..., T - 1, K, K]`` (or ``[..., 1, K, K]``).
        start, end: ``[..., K]`` scores of the first and the last tag; 0 where missing.
        lengths: ``[...]`` from 1 to T; T where missing.
    Raises:
        TypeError: for what is no tensor, scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not agree, or lengths out of range.
    """
    named = [("emissions", emissions), ("transitions", transitions)]
    named += [(name, score) for name, score in (("start", start), ("end", end)) if score is not None]
    for name, score in named:
        if not isinstance(score, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(score).__name__}")
        if not score.is_floating_point():
            raise TypeError(f"{name}: expected floating-point scores, got {score.dtype}")
        if score.device != emissions.device:
            raise ValueError(f"{name}: expected device {emissions.device} as emissions, got {score.device}")
    shape, moves = emissions.shape, transitions.shape
    if len(shape) < 2:
        raise ValueError(f"emissions: expected shape [..., T, K], got {list(shape)}")
    steps, k = shape[-2], shape[-1]
    if steps < 1 or k < 1:
        raise ValueError(f"emissions: expected T >= 1 and K >= 1, got shape {list(shape)}")
    if len(moves) < 2 or moves[-2] != k or moves[-1] != k:
        raise ValueError(f"transitions: expected shape [{k}, {k}] or [..., {steps - 1}, {k}, {k}], got {list(moves)}")
    shared = len(moves) == 2
    if not shared and moves[-3] not in (1, steps - 1):
        raise ValueError(
            f"transitions: expected {steps - 1} steps (or 1 for all) at dimension -3, got shape {list(moves)}"
        )
    for name, score in named[2:]:
        if score.dim() < 1 or score.shape[-1] != k:
            raise ValueError(f"{name}: expected shape [..., {k}], got {list(score.shape)}")
    shapes = [shape[:-2], moves[:0] if shared else moves[:-3], *(score.shape[:-1] for _, score in named[2:])]
    if lengths is not None:
        check_lengths(lengths, steps)
        shapes.append(lengths.shape)
    if all(not shape or shape == shapes[0] for shape in shapes[1:]):
        batch_shape = shapes[0]
    else:
        try:
            batch_shape = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise ValueError(
                "batch shapes do not broadcast: "
                + ", ".join(
                    f"{name} {list(score.shape)}"
                    for name, score in zip(
                        ("emissions", "transitions", "start", "end", "lengths"),
                        (emissions, transitions, start, end, lengths),
                        strict=True,
                    )
                    if score is not None
                )
            ) from None
    rows = math.prod(batch_shape)
    dtype = emissions.dtype if emissions.dtype == torch.float64 else torch.float32
    flat = emissions if emissions.dtype == dtype else emissions.to(dtype)
    if flat.dim() != 3 or flat.shape[0] != rows:
        flat = flat.expand(*batch_shape, steps, k).reshape(rows, steps, k)
    if shared:
        table = (transitions if transitions.dtype == dtype else transitions.to(dtype)).view(1, 1, k, k)
    else:
        own = (1,) * (len(batch_shape) + 3 - transitions.dim()) + tuple(transitions.shape[:-3])
        kept = len(own)  # trailing batch dimensions along which the transitions do not vary are rows of one group
        while kept and own[kept - 1] == 1:
            kept -= 1
        full = transitions.to(dtype).reshape(*own, *transitions.shape[-3:])
        full = full.expand(*batch_shape[:kept], *own[kept:], *transitions.shape[-3:])
        table = full.reshape(math.prod(batch_shape[:kept]), *transitions.shape[-3:])
    zero = flat.new_zeros(rows, k) if start is None or end is None else flat
    starts = zero if start is None else start.to(dtype).expand(*batch_shape, k).reshape(rows, k)
    ends = zero if end is None else end.to(dtype).expand(*batch_shape, k).reshape(rows, k)
    if lengths is None:
        flat_lengths = torch.full((rows,), steps, dtype=torch.long, device=emissions.device)
    else:
        flat_lengths = lengths.to(emissions.device, torch.long).expand(batch_shape).reshape(rows)
    return Chain(flat, table, starts, ends, flat_lengths, batch_shape)


def check_lengths(lengths: Tensor, greatest: int | None) -> None:
    """Raises for lengths that are not integers or not from 1 to ``greatest`` (None: no bound)."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a tensor of integers, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if is_wrapped(lengths) or not lengths.numel():
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 1 or (greatest is not None and high > greatest):
        raise ValueError(
            f"lengths: expected values from 1 to {'T' if greatest is None else greatest}, "
            f"got values from {low} to {high}"
        )


def is_wrapped(x: Tensor) -> bool:
    """Whether a torch.func transform hides the values of ``x``."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Log of the sum of exp(score) over all tag sequences, in nats.

    Args:
        emissions, transitions, start, end, lengths: as in ``as_chain``.
    Returns:
        ``[...]``; -inf where no sequence is allowed. Differentiable, twice and under ``torch.func``.
    Raises:
        TypeError, ValueError: as in ``as_chain``, and for scores that are NaN or +inf.
    Source: Lafferty, McCallum and Pereira (2001); scaled recursion as in Rabiner (1989), section V.A.
    """
    chain = as_chain(emissions, transitions, start, end, lengths)
    log_z = chain_log_partition(chain, emissions.dtype)
    return log_z if log_z.shape == chain.batch_shape else log_z.view(chain.batch_shape)


def marginals(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Probability of each tag at each step, ``[..., T, K]``: the gradient of ``log_partition``; 0 on padding."""
    chain = as_chain(emissions, transitions, start, end, lengths)
    tags = chain_expectations(chain)[0]
    return tags.reshape(*chain.batch_shape, *tags.shape[1:]).to(emissions.dtype)


@untraced
def chain_log_partition(chain: Chain, dtype: torch.dtype = torch.float64) -> Tensor:
    """``log_partition`` of scores already in shape: ``[B]``, in float64 so that log probabilities are rounded last."""
    if chain.emissions.device.type != "cpu":
        return chain_torch.log_partition(*chain[:5]).to(dtype)
    if not chain.emissions.shape[0]:  # an empty batch: nothing, with gradients
        nothing = chain.emissions.sum((-1, -2)) + (chain.start + chain.end).sum(-1) + chain.transitions.sum()
        return nothing.to(dtype)
    if torch._C._are_functorch_transforms_active():
        result: Tensor = _LogPartition.apply(*chain[:5], dtype, None)  # type: ignore[no-untyped-call]
        return result
    emissions, transitions, start, end, lengths, _ = chain
    needed = emissions.requires_grad or transitions.requires_grad or start.requires_grad or end.requires_grad
    box: list[tuple[Tensor, Tensor]] | None = [] if needed and torch.is_grad_enabled() else None
    result = _PlainLogPartition.apply(  # type: ignore[no-untyped-call]
        emissions, transitions, start, end, lengths, dtype, box
    )
    return result


@untraced
def chain_expectations(chain: Chain, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Expected parts of scores already in shape, each row times its weight (1 where missing); twice differentiable.

    Returns:
        Tags ``[B, T, K]``, and transitions ``[G, S, K, K]`` summed over the rows of a group (over the steps if S = 1).
    """
    if not chain.emissions.shape[0]:
        return chain.emissions * 1.0, torch.zeros_like(chain.transitions)
    if weights is None:
        weights = chain.emissions.new_ones(chain.emissions.shape[0])
    if chain.emissions.device.type != "cpu":
        tags, pairs, _, _ = chain_torch.expectations(weights, *chain[:5])
    else:
        tags, pairs, _, _ = _expectations(weights, *chain[:5])
    return tags, pairs


def _at_ends(tags: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The expected first and last tag, ``[B, K]`` each."""
    last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, tags.shape[-1])
    return tags[:, 0], tags.gather(1, last).squeeze(1)


def _log_z(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    lengths: Tensor,
    dtype: torch.dtype,
    box: list[tuple[Tensor, Tensor]] | None,
) -> Tensor:
    scores = emissions, transitions, start, end, lengths
    if box is None:
        log_z = passes.forward(*scores, keep=False).log_z
    else:
        log_z, tags, pairs = passes.expectations(*scores)
        box.append((tags, pairs))
    result = torch.from_numpy(log_z.astype(np.float32 if dtype == torch.float32 else np.float64, copy=False))
    return result if result.dtype == dtype else result.to(dtype)


class _LogPartitionRules(torch.autograd.Function):
    """The derivatives of log Z. ``ctx.box`` holds them for weights of 1 where they were found on the way forward: a row
    is done both ways while it is in the cache."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        emissions, transitions, start, end, lengths = ctx.saved_tensors
        grad = grad.to(emissions.dtype)
        if torch.is_grad_enabled() or not ctx.box:  # someone will differentiate what this returns
            tags, pairs, first, last = _expectations(grad, emissions, transitions, start, end, lengths)
            return tags, pairs, first, last, None, None, None
        tags, pairs = ctx.box.pop()  # they become the gradients, so they are given once
        weights = grad.numpy()
        weight = weights.item(0)
        if weights.strides[0] == 0 or (weights == weight).all():  # of a sum or a mean over the batch
            if weight != 1:
                tags, pairs = tags.mul_(weight), pairs.mul_(weight)
        else:
            tags, pairs = passes.expectations(emissions, transitions, start, end, lengths, grad)[1:]
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return tags, pairs, None, None, None, None, None
        first, last = _at_ends(tags, lengths)
        return tags, pairs, first.clone(), last, None, None, None  # no gradient is a view of another

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        emissions, transitions, start, end, lengths = (x.contiguous() for x in ctx.saved_tensors)
        ones = emissions.new_ones(emissions.shape[0])
        tags, _, first, last = _expectations(ones, emissions, transitions, start, end, lengths)
        change = emissions.new_zeros(emissions.shape[0])
        if tangents[0] is not None:
            change = change + (tags * tangents[0]).sum((-1, -2))
        if tangents[1] is not None:
            change = change + chain_torch.directional(emissions, transitions, start, end, lengths, tangents[1])
        for part, tangent in ((first, tangents[2]), (last, tangents[3])):
            if tangent is not None:
                change = change + (part * tangent).sum(-1)
        widened: Tensor = change.to(ctx.dtype)
        return widened


class _PlainLogPartition(_LogPartitionRules):
    """log Z of scores in the shape of ``Chain``, outside of ``torch.func``: without the binding of every call's
    arguments to a signature, which costs as much as the recursion of a small chain."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.dtype, ctx.box = inputs[5:]
        return _log_z(*inputs)


class _LogPartition(_LogPartitionRules):
    """The same for ``torch.func``."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _log_z(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.dtype, ctx.box = inputs[5:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        scores = fold(info.batch_size, in_dims[:5], inputs[:5])
        result = _LogPartition.apply(*scores, *inputs[5:])  # type: ignore[no-untyped-call]
        return result.view(info.batch_size, -1), 0


class _Expectations(torch.autograd.Function):
    """weights * gradient of log Z: the derivative of ``_LogPartition`` as a function that has derivatives itself."""

    @staticmethod
    def forward(
        weights: Tensor, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor
    ) -> tuple[Tensor, ...]:
        _, tags, pairs = passes.expectations(emissions, transitions, start, end, lengths, weights)
        first, last = _at_ends(tags, lengths)
        return tags, pairs, first.clone(), last

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *scores, lengths = ctx.saved_tensors
        pull = torch.func.vjp(partial(chain_torch.expectations, lengths=lengths), *scores)[1]
        return (*pull(grads), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        *saved, lengths = ctx.saved_tensors
        scores = [x.contiguous() for x in saved]  # forward mode takes no tensor that repeats its memory
        along = tuple(torch.zeros_like(x) if d is None else d for x, d in zip(scores, tangents[:5], strict=True))
        changes: tuple[Tensor, ...] = torch.func.jvp(
            partial(chain_torch.expectations, lengths=lengths), tuple(scores), along
        )[1]
        return changes

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        n = info.batch_size
        weights = fold_one(n, in_dims[0], inputs[0])
        emissions, transitions, start, end, lengths = inputs[1:]
        own = in_dims[2] is not None
        if not own:  # each sample wants the expected transitions of its own rows
            transitions, in_dims = transitions.expand(n, *transitions.shape), (*in_dims[:2], 0, *in_dims[3:])
        scores = fold(n, in_dims[1:], (emissions, transitions, start, end, lengths))
        outputs = _expectations(weights, *scores)
        return tuple(x.view(n, -1, *x.shape[1:]) for x in outputs), (0, 0, 0, 0)


def _expectations(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _Expectations.apply(*arguments)  # type: ignore[no-untyped-call]
    return outputs


def fold_one(n: int, dim: int | None, x: Tensor) -> Tensor:
    """[b, ...] of each of n samples -> [n b, ...]."""
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(-1, *x.shape[2:])


def fold(n: int, dims: tuple[int | None, ...], scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Turns the dimension that ``vmap`` adds into rows of the batch; shared transitions stay shared."""
    emissions, transitions, start, end, lengths = scores
    if dims[1] is None and transitions.shape[0] == 1:
        table = transitions
    else:
        table = fold_one(n, dims[1], transitions)
    others = [fold_one(n, d, x) for d, x in zip((dims[0], *dims[2:]), (emissions, start, end, lengths), strict=True)]
    return others[0], table, *others[1:]


# torch binds the arguments of every call to the signature; kept here so that it is not derived anew each time
for _function in (_LogPartition, _Expectations):
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010
