"""A compiled recursion as a differentiable log-partition function: first derivatives by kernel, the rest by its twin.

log Z of an exponential family has the expected parts as its gradient. A ``Recursion`` gives both by compiled kernels,
and log Z again in torch operations (the twin: reference in the tests, the GPU's path, second derivatives and forward
mode). ``log_partition`` joins them: it runs under autograd of any order, ``torch.func`` and ``vmap``, whose dimensions
become rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from probllm.math.semirings import LOG, Semiring
from probllm.math.untraced import untraced


class Recursion(NamedTuple):
    """How a structure sums. Scores are ``[B, ...]``, or ``[1, ...]`` for what all rows share.

    Without kernels (``forward`` and ``backward`` None) everything goes through the semiring recursion.
    """

    # (semiring, lifted parts [width, *lead, ...], lengths [*lead] or [*lead, n]) -> [width, *lead]; any leading
    # dimensions, no branch on a value
    inside: Callable[[Semiring, tuple[Tensor, ...], Tensor], Tensor]
    # (scores, lengths, keep) -> log Z [B] float64, and what backward needs (anything; None unless keep); never NaN
    forward: Callable[[tuple[Tensor, ...], Tensor, bool], tuple[Tensor, Any]] | None = None
    # (what forward kept, weights [B] float32 or float64) -> sum over rows of weights * gradient of log Z in each of the
    # scores, in their shapes; 0 in a row whose log Z is -inf
    backward: Callable[[Any, Tensor], tuple[Tensor, ...]] | None = None
    # whether forward itself raises ValueError where one of the scores that count is NaN or +inf
    checks: bool = False

    def compiled(self, scores: tuple[Tensor, ...]) -> bool:
        """Whether kernels do such scores."""
        return self.forward is not None and scores[0].is_cpu

    def twin(self, scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
        """log Z ``[B]`` in torch operations, float64."""
        return self.inside(LOG, tuple(LOG.lift(x.double()) for x in scores), lengths).squeeze(0)


def log_partition(recursion: Recursion, scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """log Z ``[B]`` in float64.

    Args:
        scores: ``[B, ...]`` or ``[1, ...]`` each; one at least has B rows, unless B = 1.
        lengths: ``[B]`` or ``[B, n]`` long: what else tells the rows' sizes.
    """
    return log_partitions(recursion, scores, lengths, torch.float64)[0]


@untraced
def log_partitions(
    recursion: Recursion, scores: tuple[Tensor, ...], lengths: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``log_partition`` in float64 and in ``dtype``: both from one step of the gradient, where a second would take as
    long as a kernel of a small batch."""
    if not recursion.compiled(scores):
        log_z = recursion.twin(scores, lengths)
    elif forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        log_z = _LogPartition.apply(recursion, lengths, [], *scores)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and any(x.requires_grad for x in scores):
        found: tuple[Tensor, ...] = _Direct.apply(recursion, lengths, dtype, *scores)  # type: ignore[no-untyped-call]
        return found[0], found[-1]
    else:
        assert recursion.forward is not None
        log_z = recursion.forward(tuple([x.detach() for x in scores]), lengths, False)[0]
    return log_z, log_z.to(dtype)


def in_transform(*inputs: Tensor) -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return forward_ad._current_level >= 0 or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in inputs)


@untraced
def expected_parts(recursion: Recursion, scores: tuple[Tensor, ...], lengths: Tensor) -> tuple[Tensor, ...]:
    """The gradient of log Z in each of the scores, in their shapes and dtypes; differentiable."""
    weights = torch.ones(lengths.shape[0], dtype=torch.float64, device=lengths.device)
    if not recursion.compiled(scores):
        return _twin_expected(recursion.twin, lengths, weights, *scores)
    found: tuple[Tensor, ...] = _Expected.apply(recursion, lengths, weights, *scores)  # type: ignore[no-untyped-call]
    return found


def _twin_expected(
    twin: Callable[[tuple[Tensor, ...], Tensor], Tensor], lengths: Tensor, weights: Tensor, *scores: Tensor
) -> tuple[Tensor, ...]:
    """weights * gradient of log Z by the twin, as a function of weights and scores."""

    def total(*given: Tensor) -> Tensor:
        log_z = twin(given, lengths)
        return (weights * torch.where(torch.isfinite(log_z), log_z, torch.zeros_like(log_z))).sum()

    found: tuple[Tensor, ...] = torch.func.grad(total, argnums=tuple(range(len(scores))))(*scores)
    return found


class _Direct(torch.autograd.Function):
    """log Z outside of transforms, without what they cost each call; and once more, if it is wanted in another type."""

    @staticmethod
    def forward(
        ctx: Any, recursion: Recursion, lengths: Tensor, dtype: torch.dtype, *scores: Tensor
    ) -> tuple[Tensor, ...]:
        assert recursion.forward is not None
        log_z, ctx.kept = recursion.forward(tuple([x.detach() for x in scores]), lengths, True)
        ctx.recursion = recursion
        ctx.save_for_backward(lengths, *scores)
        ctx.set_materialize_grads(False)
        # what is returned must not be what ctx holds: the graph would hold itself alive
        return (log_z.clone(),) if dtype == log_z.dtype else (log_z.detach(), log_z.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        lengths, *scores = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (3 + len(scores))
        weights = given[0] if len(given) == 1 else given[0] + given[1].double()
        weights = weights if weights.dtype in (torch.float32, torch.float64) else weights.double()
        if torch.is_grad_enabled():  # someone will differentiate what this returns
            found = _Expected.apply(  # type: ignore[no-untyped-call]
                ctx.recursion, lengths, weights.double(), *scores
            )
        else:
            found = ctx.recursion.backward(ctx.kept, weights)
        return (None, None, None, *[g.to(x.dtype) for g, x in zip(found, scores, strict=True)])


class _LogPartition(torch.autograd.Function):
    """log Z under transforms; ``box`` carries what the forward kernel kept."""

    @staticmethod
    def forward(recursion: Recursion, lengths: Tensor, box: list[Any], *scores: Tensor) -> Tensor:
        wanted = any(x.requires_grad for x in scores)
        assert recursion.forward is not None
        log_z, kept = recursion.forward(tuple(x.detach() for x in scores), lengths, wanted)
        if wanted:
            box.append(kept)
        return log_z.clone()  # what is returned must not be what the box holds: the graph would hold itself alive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.recursion, lengths, ctx.box, *scores = inputs
        ctx.save_for_backward(lengths, *scores)
        ctx.save_for_forward(lengths, *scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, *scores = ctx.saved_tensors
        if torch.is_grad_enabled() or not ctx.box:  # someone will differentiate what this returns
            found = _Expected.apply(ctx.recursion, lengths, grad, *scores)  # type: ignore[no-untyped-call]
        else:
            found = ctx.recursion.backward(ctx.box[0], grad)
        return (None, None, None, *(g.to(x.dtype) for g, x in zip(found, scores, strict=True)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        lengths, *scores = ctx.saved_tensors
        rows = lengths.shape[0]
        scores = [x.expand(rows, *x.shape[1:]).contiguous() for x in scores]  # a gradient for each row
        found = expected_parts(ctx.recursion, tuple(scores), lengths)
        change = torch.zeros(rows, dtype=torch.float64, device=lengths.device)
        for part, tangent in zip(found, tangents[3:], strict=True):
            if tangent is not None:
                change = change + (part * tangent).double().flatten(1).sum(1)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        recursion, lengths, _, *scores = inputs
        n, rows = info.batch_size, lengths.shape[0] if in_dims[1] is None else lengths.movedim(in_dims[1], 0).shape[1]
        folded = [fold(n, rows, d, x) for d, x in zip(in_dims[3:], scores, strict=True)]
        result = _LogPartition.apply(  # type: ignore[no-untyped-call]
            recursion, fold(n, rows, in_dims[1], lengths, own=True), [], *folded
        )
        return result.view(n, rows), 0


class _Expected(torch.autograd.Function):
    """weights * gradient of log Z, by the kernels; its own derivatives by the twin."""

    @staticmethod
    def forward(recursion: Recursion, lengths: Tensor, weights: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        assert recursion.forward is not None
        assert recursion.backward is not None
        kept = recursion.forward(tuple(x.detach() for x in scores), lengths, True)[1]
        found = recursion.backward(kept, weights)
        return tuple(g.to(x.dtype).clone() for g, x in zip(found, scores, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recursion = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lengths, *inputs = ctx.saved_tensors
        pull = torch.func.vjp(partial(_twin_expected, ctx.recursion.twin, lengths), *inputs)[1]
        return (None, None, *pull(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        lengths, weights, *scores = (x.contiguous() for x in ctx.saved_tensors)
        # the expected parts are linear in the weights, and their derivative in the scores is symmetric
        pull = torch.func.vjp(partial(_twin_expected, ctx.recursion.twin, lengths, weights), *scores)[1]
        along = [torch.zeros_like(x) if d is None else d for x, d in zip(scores, tangents[3:], strict=True)]
        found: tuple[Tensor, ...] = pull(tuple(along))
        if tangents[2] is not None:
            by_weights = _Expected.apply(ctx.recursion, lengths, tangents[2], *scores)  # type: ignore[no-untyped-call]
            found = tuple(a + b for a, b in zip(found, by_weights, strict=True))
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        recursion, lengths, weights, *scores = inputs
        n, rows = info.batch_size, lengths.shape[0] if in_dims[1] is None else lengths.movedim(in_dims[1], 0).shape[1]
        # what all rows share is wanted for each sample by itself: each row then has its own copy, summed afterwards
        folded = [fold(n, rows, d, x, own=True) for d, x in zip(in_dims[3:], scores, strict=True)]
        found = _Expected.apply(  # type: ignore[no-untyped-call]
            recursion,
            fold(n, rows, in_dims[1], lengths, own=True),
            fold(n, rows, in_dims[2], weights, own=True),
            *folded,
        )
        parts = []
        for part, dim, x in zip(found, in_dims[3:], scores, strict=True):
            own = (x if dim is None else x.movedim(dim, 0)[0]).shape[0]
            part = part.view(n, rows, *part.shape[1:])
            parts.append(part if own == rows else part.sum(1, keepdim=True))
        return tuple(parts), (0,) * len(parts)


def fold(n: int, rows: int, dim: int | None, x: Tensor, own: bool = False) -> Tensor:
    """The dimension that ``vmap`` adds becomes rows; what all rows share stays shared unless it differs or ``own``."""
    if dim is None:
        if x.shape[0] != rows and not own:
            return x
        x = x.expand(n, *x.shape)
    else:
        x = x.movedim(dim, 0)
    return x.expand(n, rows, *x.shape[2:]).reshape(n * rows, *x.shape[2:])
