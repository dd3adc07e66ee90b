"""The algebras that one recursion runs over: what "sum" and "product" mean decides what it computes.

A structure writes its recursion once over a ``Semiring``: products join the parts of a structure, sums run over the
structures (Goodman 1999, "Semiring parsing"). ``LOG`` gives log Z, whose gradient is the expected parts; ``MAX`` the
best score, whose gradient is one best structure; ``KMax`` the k best; ``Sampling`` log Z whose gradient is a random
structure; ``Expectation`` log Z beside a mean; ``COUNT`` plain numbers. A user's own is a subclass.

Values are tensors ``[width, ...]``: the semiring's own dimension leads, so that a recursion indexes its own dimensions
from the right and never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probllm.math.chain_torch import safe_logsumexp


class Semiring:
    """Sum, product and their neutral elements over tensors ``[width, ...]``."""

    width: int = 1

    def lift(self, scores: Tensor) -> Tensor:
        """Log scores ``[...]`` as values ``[width, ...]``; -inf becomes zero."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in lift")

    def sum(self, values: Tensor, dim: int) -> Tensor:
        """The semiring's sum over a dimension, counted from the right (negative)."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in sum")

    def times(self, *values: Tensor) -> Tensor:
        """The semiring's product, elementwise, with broadcasting."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in times")

    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The neutral element of the sum ``[width, *shape]``."""
        return self.lift(like.new_full(tuple(shape), -math.inf))

    def ones(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The neutral element of the product ``[width, *shape]``."""
        return self.lift(like.new_zeros(tuple(shape)))

    def plus(self, *values: Tensor) -> Tensor:
        """The sum of several values, elementwise, with broadcasting."""
        return self.sum(torch.stack(torch.broadcast_tensors(*values), -1), -1)

    def dot(self, left: Tensor, right: Tensor, dim: int) -> Tensor:
        """The sum over a dimension of elementwise products."""
        return self.sum(self.times(left, right), dim)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of matrices, ``[..., I, J]`` and ``[..., J, K]`` -> ``[..., I, K]``."""
        return self.dot(left.unsqueeze(-1), right.unsqueeze(-3), -2)


class Log(Semiring):
    """(logsumexp, +): sums of probabilities in log space. The gradient of a sum is the expected parts."""

    def lift(self, scores: Tensor) -> Tensor:
        return scores.unsqueeze(0)

    def sum(self, values: Tensor, dim: int) -> Tensor:
        return safe_logsumexp(values, dim)

    def times(self, *values: Tensor) -> Tensor:
        return sum(values[1:], values[0])


class Max(Log):
    """(max, +): the best score. Its gradient is the indicator of one best structure, ties included."""

    def sum(self, values: Tensor, dim: int) -> Tensor:
        return values.max(dim).values  # max over a dimension sends its gradient to one index, amax to all ties


class Sampling(Log):
    """(logsumexp, +) whose backward pass draws: the gradient of log Z indicates a structure ~ exp(score) / Z."""

    def sum(self, values: Tensor, dim: int) -> Tensor:
        drawn: Tensor = _DrawnSum.apply(values, dim)  # type: ignore[no-untyped-call]
        return drawn


class _DrawnSum(torch.autograd.Function):
    """logsumexp; backward sends the gradient to one index, drawn from the softmax."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, dim: int) -> Tensor:
        return safe_logsumexp(values, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        # exponentials raced against each other: the least of e / w is at an index drawn by the weights w
        race = values - torch.empty_like(values).exponential_().clamp_min_(1e-300).log_()
        index = race.argmax(ctx.dim, keepdim=True)
        return torch.zeros_like(values).scatter(ctx.dim, index, grad.unsqueeze(ctx.dim)), None


class KMax(Semiring):
    """The k best scores, best first, -inf where there are fewer; the gradient of the j-th is the j-th structure."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        self.width = k
        # the j-th best product is made of the i-th and the l-th best with i l <= j
        pairs = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
        self._left, self._right = (list(side) for side in zip(*pairs, strict=True))

    def lift(self, scores: Tensor) -> Tensor:
        rest = scores.new_full((self.width - 1, *scores.shape), -math.inf)
        return torch.cat([scores.unsqueeze(0), rest])

    def sum(self, values: Tensor, dim: int) -> Tensor:
        moved = values.movedim(dim, 0).flatten(0, 1)
        if moved.shape[0] < self.width:
            rest = moved.new_full((self.width - moved.shape[0], *moved.shape[1:]), -math.inf)
            moved = torch.cat([moved, rest])
        return moved.topk(self.width, 0).values

    def times(self, *values: Tensor) -> Tensor:
        total = values[0]
        for value in values[1:]:
            products = total[self._left] + value[self._right]
            total = products.topk(self.width, 0).values
        return total


class Expectation(Semiring):
    """(log mass, mean): log Z beside E[f] of an additive f (Eisner 2002). Lift scores with ``lift_with(scores, f)``."""

    width = 2

    def lift(self, scores: Tensor) -> Tensor:
        return torch.stack([scores, torch.zeros_like(scores)])

    def lift_with(self, scores: Tensor, values: Tensor) -> Tensor:
        """Scores and the value of f of each part, ``[...]`` each; a forbidden part's value does not count."""
        return torch.stack([scores, torch.where(scores == -math.inf, 0.0, values)])

    def sum(self, values: Tensor, dim: int) -> Tensor:
        total = safe_logsumexp(values[0], dim)
        shift = torch.where(total == -math.inf, torch.zeros_like(total), total).unsqueeze(dim)
        share = torch.where(values[0] == -math.inf, 0.0, (values[0] - shift).clamp_max(0.0).exp())
        return torch.stack([total, (share * values[1]).sum(dim)])

    def times(self, *values: Tensor) -> Tensor:
        return sum(values[1:], values[0])


class Count(Semiring):
    """(+, x) on plain numbers: exp of scores that are 0 or -inf counts structures, exactly up to 2^53 in float64."""

    def lift(self, scores: Tensor) -> Tensor:
        return scores.exp().unsqueeze(0)

    def sum(self, values: Tensor, dim: int) -> Tensor:
        return values.sum(dim)

    def times(self, *values: Tensor) -> Tensor:
        return math.prod(values[1:], start=values[0])


LOG, MAX, SAMPLING, COUNT, EXPECTATION = Log(), Max(), Sampling(), Count(), Expectation()
