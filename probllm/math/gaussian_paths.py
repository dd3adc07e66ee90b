"""Moments and paths of the states of a linear-Gaussian chain: filter, smoother, and the recurrence that samples follow.

The CPU's kernels give the values, and torch operations (``probllm.math.gaussian``) their derivatives, of any order. The
recurrence z_t = z_{t-1} F_t + push_t is its own derivative, run backward in time with F'. Paths given observations x
are drawn by simulation smoothing (Durbin and Koopman 2002): z* + E[z | x] - E[z | x*] with z* and x* drawn
from the law itself, where only means depend on the draw and no covariance is factored. That sum is E[z | x] in a law
whose means have the noise of the draw in them, from one pass each way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probllm.math import gaussian_passes as passes
from probllm.math.gaussian import filtered, flatten, smoothed
from probllm.math.gaussian_scan import scan
from probllm.math.gaussian_steps import Chain, Smoothed, blank, seen_entries
from probllm.math.recursion import fold, in_transform
from probllm.math.untraced import untraced

Scores = tuple[Tensor, ...]
Noise = tuple[Tensor, Tensor]  # standard normal numbers and their root


@untraced
def filter_moments(chain: Chain, lengths: Tensor | None, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[..., T, d]`` and covariances of z_t given x_1..x_t, and their log densities ``[..., T]``.

    Float64; 0 on padding.
    """
    flat, sizes, shape = flatten(chain, lengths, observed)
    mean, covariance, log_p = _found(_filter_kernel, _filter_twin, flat, sizes)
    return _shaped(mean, shape), _shaped(covariance, shape), _shaped(log_p, shape)


@untraced
def smooth(chain: Chain, lengths: Tensor | None, observed: Tensor | None) -> Smoothed:
    """Moments of the states given all observations, float64; 0 on padding."""
    flat, sizes, shape = flatten(chain, lengths, observed)
    return Smoothed(*(_shaped(x, shape) for x in _found(_smooth_kernel, _smooth_twin, flat, sizes)))


@untraced
def smooth_means(chain: Chain, lengths: Tensor | None, observed: Tensor | None) -> Tensor:
    """Means ``[..., T, d]`` of the states given all observations, float64; 0 on padding."""
    flat, sizes, shape = flatten(chain, lengths, observed)
    return _shaped(_found(_means_kernel, _means_twin, flat, sizes)[0], shape)


@untraced
def paths(
    chain: Chain,
    lengths: Tensor | None,
    observed: Tensor | None,
    start: Tensor,
    moves: Noise,
    errors: Noise,
) -> Tensor:
    """Paths ``[..., T, d]`` given the chain's observations, 0 on padding; in the noise's dtype, float64 if not float32.

    Differentiable to any order. Draws may have dimensions before those of the chain.

    Args:
        start: ``[..., d]``: draws of z_1 from the law itself, less its mean.
        moves: standard normal numbers ``[..., T - 1, k]`` and their root ``[..., S, k, d]``, root' root being the
            noise; with T numbers the first is not used.
        errors: the same for the observations: ``[..., T, l]``, ``[..., S, l, o]``.
    """
    inputs = (*chain, start, *moves, *errors)
    derived = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if derived or in_transform(*inputs) or start.device.type != "cpu":
        found = _paths_twin(chain, lengths, observed, start, moves, errors)
    else:
        found = _paths_kernel(chain, lengths, observed, start, moves, errors)
    return found.float() if moves[0].dtype == torch.float32 else found


def _paths_kernel(
    chain: Chain, lengths: Tensor | None, observed: Tensor | None, start: Tensor, moves: Noise, errors: Noise
) -> Tensor:
    shape, steps = start.shape[:-1], chain.value.shape[-2]
    leads = [x.shape[:-3] for x in (moves[1], errors[1])]
    value = chain.value.expand(*torch.broadcast_shapes(chain.value.shape[:-2], *leads), *chain.value.shape[-2:])
    flat, sizes, own = flatten(chain._replace(value=value), lengths, observed)
    rows = torch.arange(len(sizes)).view(own).expand(shape).reshape(-1)
    if not len(rows):
        return start.new_zeros(*shape, steps, start.shape[-1])

    def drawn(numbers: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        dtype = numbers.dtype if numbers.dtype == torch.float32 else torch.float64
        shared = root.shape[:-3].numel() == 1
        spread = root if shared else root.expand(*own, *root.shape[-3:])
        return (
            numbers.to(dtype).reshape(len(rows), *numbers.shape[-2:]),
            spread.reshape(1 if shared else len(sizes), *root.shape[-3:]),
        )

    found = passes.paths(flat, sizes, rows.numpy(), start.reshape(len(rows), -1), drawn(*moves), drawn(*errors))
    return found.view(*shape, steps, -1)


def _paths_twin(
    chain: Chain, lengths: Tensor | None, observed: Tensor | None, start: Tensor, moves: Noise, errors: Noise
) -> Tensor:
    """The smoothed means where the drift has the noise w and the values lack v; covariances depend on neither."""
    steps, width = chain.value.shape[-2:]
    seen = None if observed is None else observed.expand(*observed.shape[:-2], steps, width)
    real = None if lengths is None else (torch.arange(steps, device=start.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
    if real is not None:
        seen = real.expand(*real.shape[:-1], width) if seen is None else real & seen
    zero = torch.zeros((), dtype=torch.float64, device=start.device)
    nothing = zero.expand(steps, width), zero.expand(start.shape[-1]), zero.expand(1, start.shape[-1])
    still = chain._replace(value=nothing[0], mean=nothing[1], drift=nothing[2], offset=zero.expand(1, width))
    law = filtered(still, seen)
    numbers, spread = moves
    if numbers.shape[-2] == steps:
        numbers, spread = numbers[..., 1:, :], _later(spread)
    first = (chain.mean + start).unsqueeze(-2)
    drift = chain.drift + _times(numbers.double(), spread)
    drift = drift.expand(*start.shape[:-1], steps - 1, -1)
    value = chain.value.double() - chain.offset - _times(errors[0].double(), errors[1])
    if seen is not None:
        value = torch.where(seen, value, zero)
    f, h = chain.transition.double(), chain.emission.double()
    keep = torch.eye(h.shape[-2], dtype=h.dtype, device=h.device) - h @ law.gain  # A
    onward = f @ keep[..., 1:, :, :]
    entering = torch.cat((first, drift), -2)
    mean = recurrence(onward, _times(entering, keep) + _times(value, law.gain))
    before = entering + torch.cat((torch.zeros_like(first), _times(mean[..., :-1, :], f)), -2)
    scaled = _times(value - _times(before, h), law.inverse)  # e
    told = _times(scaled[..., 1:, :], (f @ _later(h)).mT).flip(-2)
    r = recurrence(onward.mT.flip(-3), torch.cat((torch.zeros_like(first), told), -2)).flip(-2)
    path = mean + _times(r, law.covariance)
    return path if real is None else torch.where(real, path, zero)


def _later(x: Tensor) -> Tensor:
    """The steps after the first of ``[..., S, n, m]``, where S is not 1."""
    return x if x.shape[-3] == 1 else x[..., 1:, :, :]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors ``[..., T, n]`` times matrices ``[..., T or 1, n, m]``; what x has before counts as rows of one."""
    more = x.dim() + 1 - matrix.dim()
    if more <= 0:
        return (x.unsqueeze(-2) @ matrix).squeeze(-2)
    found = torch.einsum("s...tn,...tnm->s...tm", x.flatten(0, more - 1), matrix)
    return found.reshape(*x.shape[:more], *found.shape[1:])


@untraced
def recurrence(transition: Tensor, pushes: Tensor) -> Tensor:
    """z_1 = pushes_1, z_t = z_{t-1} F_t + pushes_t as ``[..., T, d]``, float64; differentiable to any order.

    Args:
        transition: ``[..., T - 1, d, d]`` or ``[..., 1, d, d]``.
        pushes: ``[..., T, d]``.
    """
    shape = torch.broadcast_shapes(transition.shape[:-3], pushes.shape[:-2])
    rows = shape.numel()
    flat = pushes.double().expand(*shape, *pushes.shape[-2:]).reshape(rows, *pushes.shape[-2:])
    if transition.shape[:-3].numel() == 1:
        moves = transition.double().reshape(1, *transition.shape[-3:])
    else:
        moves = transition.double().expand(*shape, *transition.shape[-3:]).reshape(rows, *transition.shape[-3:])
    if flat.device.type != "cpu":
        return _recurrence_twin(moves, flat).view(*shape, *pushes.shape[-2:])
    states: Tensor = _Recurrence.apply(moves, flat)  # type: ignore[no-untyped-call]
    return states.view(*shape, *pushes.shape[-2:])


def _recurrence_twin(transition: Tensor, pushes: Tensor) -> Tensor:
    rows, steps, d = pushes.shape
    moves = transition.expand(rows, steps - 1, d, d)
    spans = (torch.cat((torch.zeros_like(pushes[:, :1]).unsqueeze(-1).expand(rows, 1, d, d), moves), 1), pushes)

    def join(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return one[0] @ two[0], (one[1].unsqueeze(-2) @ two[0]).squeeze(-2) + two[1]

    return scan(join, spans, (2, 1))[1]


class _Recurrence(torch.autograd.Function):
    """transition ``[B or 1, T - 1 or 1, d, d]``, pushes ``[B, T, d]`` -> states ``[B, T, d]``."""

    @staticmethod
    def forward(transition: Tensor, pushes: Tensor) -> Tensor:
        return passes.recurrence(transition, pushes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        transition, states = ctx.saved_tensors
        back: Tensor = _Recurrence.apply(transition.mT.flip(1), grad.flip(1)).flip(1)  # type: ignore[no-untyped-call]
        own = "b" if transition.shape[0] == states.shape[0] else ""
        moves = torch.einsum(f"btn,btm->{own}tnm", states[:, :-1], back[:, 1:])
        moves = moves if own else moves.unsqueeze(0)
        return (moves if transition.shape[1] == moves.shape[1] else moves.sum(1, keepdim=True)), back

    @staticmethod
    def jvp(ctx: Any, along: Tensor | None, pushed: Tensor | None) -> Tensor:
        transition, states = ctx.saved_tensors
        push = torch.zeros_like(states) if pushed is None else pushed
        if along is not None and states.shape[1] > 1:
            moved = (states[:, :-1].unsqueeze(-2) @ along).squeeze(-2)
            push = torch.cat((push[:, :1], push[:, 1:] + moved), 1)
        change: Tensor = _Recurrence.apply(transition, push)  # type: ignore[no-untyped-call]
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], transition: Tensor, pushes: Tensor) -> tuple[Tensor, int]:
        n, rows = info.batch_size, pushes.shape[0] if in_dims[1] is None else pushes.movedim(in_dims[1], 0).shape[1]
        folded = fold(n, rows, in_dims[0], transition), fold(n, rows, in_dims[1], pushes, own=True)
        states: Tensor = _Recurrence.apply(*folded)  # type: ignore[no-untyped-call]
        return states.unflatten(0, (n, rows)), 0


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    return x.reshape(*shape, *x.shape[1:])


def _found(kernel: Callable[..., Scores], twin: Callable[..., Scores], chain: Chain, sizes: Tensor) -> Scores:
    if chain.value.device.type != "cpu":
        return twin(sizes, *chain)
    found: Scores = _Moments.apply(kernel, twin, sizes, *chain)  # type: ignore[no-untyped-call]
    return found


class _Moments(torch.autograd.Function):
    """Values by a kernel, derivatives by its twin; both take sizes and the fields of a flat chain."""

    @staticmethod
    def forward(kernel: Callable[..., Scores], twin: Callable[..., Scores], sizes: Tensor, *scores: Tensor) -> Scores:
        return kernel(sizes, *scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Scores) -> None:
        ctx.twin = inputs[1]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes, *scores = ctx.saved_tensors
        pull = torch.func.vjp(partial(ctx.twin, sizes), *scores)[1]
        return (None, None, None, *pull(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Scores:
        sizes, *scores = ctx.saved_tensors
        scores = [x.contiguous() for x in scores]  # forward mode takes no tensor that repeats its memory
        along = tuple(torch.zeros_like(x) if d is None else d for x, d in zip(scores, tangents[3:], strict=True))
        found: Scores = torch.func.jvp(partial(ctx.twin, sizes), tuple(scores), along)[1]
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Scores, tuple[int, ...]]:
        kernel, twin, sizes, *scores = inputs
        n, rows = info.batch_size, sizes.shape[0] if in_dims[2] is None else sizes.movedim(in_dims[2], 0).shape[1]
        folded = [fold(n, rows, d, x) for d, x in zip(in_dims[3:], scores, strict=True)]
        found = _Moments.apply(  # type: ignore[no-untyped-call]
            kernel, twin, fold(n, rows, in_dims[2], sizes, own=True), *folded
        )
        return tuple(x.unflatten(0, (n, rows)) for x in found), (0,) * len(found)


def _real(sizes: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=sizes.device) < sizes[..., :1]


def _seen(sizes: Tensor, value: Tensor) -> Tensor | None:
    return seen_entries(sizes, *value.shape[-2:])


def _filter_kernel(sizes: Tensor, *scores: Tensor) -> Scores:
    mean, covariance, log_p = passes.filtered(scores, sizes)
    mean, covariance, _ = blank(_real(sizes, mean.shape[-2]), mean, covariance, covariance[..., :-1, :, :])
    return mean, covariance, log_p


def _filter_twin(sizes: Tensor, *scores: Tensor) -> Scores:
    found = filtered(Chain(*scores), _seen(sizes, scores[0]))
    real = _real(sizes, scores[0].shape[-2])
    mean, covariance, _ = blank(real, found.mean, found.covariance, found.covariance[..., :-1, :, :])
    return mean, covariance, torch.where(real, found.log_prob, torch.zeros_like(found.log_prob))


def _smooth_kernel(sizes: Tensor, *scores: Tensor) -> Scores:
    mean, covariance, cross = passes.smooth(scores, sizes, covariances=True)
    return torch.where(_real(sizes, mean.shape[-2]).unsqueeze(-1), mean, 0.0), covariance.clone(), cross.clone()


def _smooth_twin(sizes: Tensor, *scores: Tensor) -> Scores:
    return tuple(smoothed(Chain(*scores), _seen(sizes, scores[0]), sizes[..., 0]))


def _means_kernel(sizes: Tensor, *scores: Tensor) -> Scores:
    mean = passes.smooth(scores, sizes, covariances=False)[0]
    return (torch.where(_real(sizes, mean.shape[-2]).unsqueeze(-1), mean, 0.0),)


def _means_twin(sizes: Tensor, *scores: Tensor) -> Scores:
    return (_smooth_twin(sizes, *scores)[0],)
