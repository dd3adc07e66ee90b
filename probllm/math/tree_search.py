"""Single dependency trees of a table of scores, found by compiled code: no derivative, but rows for ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probllm.math.kernels.lawler import k_best
from probllm.math.kernels.threads import run_shares
from probllm.math.untraced import untraced

# (scores [B, T, T] float64, lengths [B], extra [N, B]) -> heads [N, B, T]; on the CPU
Search = Callable[[Tensor, Tensor, Tensor], Tensor]


@untraced
def search_trees(search: Search, scores: Tensor, lengths: Tensor, extra: Tensor) -> Tensor:
    """Heads ``[N, B, T]`` long.

    Args:
        search: what is compiled.
        scores: ``[B, T, T]`` of head and dependent, the roots' on the diagonal.
        lengths: ``[B]`` long.
        extra: ``[N, B]``: random numbers, or nothing in that shape.
    """
    found: Tensor = _Search.apply(search, scores, lengths, extra)  # type: ignore[no-untyped-call]
    return found


def best_trees(scores: Tensor, lengths: Tensor, extra: Tensor, *, single_root: bool, projective: bool) -> Tensor:
    """A ``Search`` for the k best trees, best first: 0 at padding, -1 where there are fewer.

    Args:
        scores, lengths: as for ``search_trees``, on the CPU.
        extra: ``[k, B]``, whose size alone counts.
    """
    k, rows, words = len(extra), len(lengths), scores.shape[-1]
    heads = torch.full((k, rows, words), -1)
    arguments = (scores.numpy(), lengths.numpy(), single_root, projective, heads.numpy())
    work = (0.3 * words**3 if projective else 10.0 * words**2) * rows * (1 + (k - 1) * words)
    run_shares(k_best, arguments, rows, work)
    return heads


class _Search(torch.autograd.Function):
    @staticmethod
    def forward(search: Search, scores: Tensor, lengths: Tensor, extra: Tensor) -> Tensor:
        plain = scores.detach().double().cpu().contiguous()
        return search(plain, lengths.long().cpu().contiguous(), extra.cpu().contiguous()).to(scores.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        n, (search, scores, lengths, extra) = info.batch_size, inputs
        scores, lengths = (
            (x.expand(n, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)
            for x, at in zip((scores, lengths), in_dims[1:3], strict=True)
        )
        at = in_dims[3]
        extra = extra.unsqueeze(1).expand(-1, n, -1) if at is None else extra.movedim(at, 1)
        found = search_trees(search, scores, lengths, extra.flatten(1, 2))
        return found.unflatten(1, (n, -1)), 1
