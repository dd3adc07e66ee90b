"""How the next token is chosen: the best one, or drawn from a law that is cut and sharpened first.

temperature   p^(1/T), normalised                                                   (Ackley et al. 1985)
top-k         the k most probable tokens                                            (Fan et al. 2018)
top-p         the least set of the most probable tokens that holds p of the mass    (Holtzman et al. 2020)
min-p         tokens of at least m times the probability of the best one            (Nguyen et al. 2024)
typical       the least set of mass p whose surprise is nearest to the entropy      (Meister et al. 2023)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Greedy:
    """The most probable token."""

    def __call__(self, log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[B]`` from log probabilities ``[B, V]``."""
        return log_probs.argmax(-1)


@dataclass(frozen=True)
class Sample:
    """A draw from the law, after these changes in this order; each is normalised before the next.

    Args:
        temperature: above 0; 1 leaves the law as it is.
        top_k: how many tokens are kept; None: all.
        top_p, typical: mass in (0, 1] that the kept tokens hold at least.
        min_p: in [0, 1), of the best token's probability.
    Raises:
        ValueError: for a number out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        for name in ("top_p", "typical"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: expected a number in [0, 1), got {self.min_p}")

    def log_probs(self, log_probs: Tensor) -> Tensor:
        """The law that is drawn from, ``[..., V]``: -inf for what was cut."""
        if self.temperature != 1:
            log_probs = (log_probs / self.temperature).log_softmax(-1)
        if self.top_k is not None and self.top_k < log_probs.shape[-1]:
            values, tokens = log_probs.topk(self.top_k, -1)  # exactly k, ties or not
            log_probs = torch.full_like(log_probs, -math.inf).scatter(-1, tokens, values).log_softmax(-1)
        if self.top_p < 1:
            log_probs = _least_set(log_probs, -log_probs, self.top_p)
        if self.min_p > 0:
            least = log_probs.amax(-1, keepdim=True) + math.log(self.min_p)
            log_probs = log_probs.masked_fill(log_probs < least, -math.inf).log_softmax(-1)
        if self.typical < 1:
            finite = log_probs.masked_fill(log_probs == -math.inf, 0.0)
            entropy = -(log_probs.exp() * finite).sum(-1, keepdim=True)
            log_probs = _least_set(log_probs, (-log_probs - entropy).abs(), self.typical)
        return log_probs

    def __call__(self, log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[B]`` from log probabilities ``[B, V]``."""
        return torch.multinomial(self.log_probs(log_probs).exp(), 1, generator=generator).squeeze(-1)


def _least_set(log_probs: Tensor, cost: Tensor, mass: float) -> Tensor:
    """The law on the tokens of the least cost that together hold the mass."""
    order = cost.argsort(dim=-1, stable=True)
    p = log_probs.gather(-1, order).exp()
    before = p.cumsum(-1) - p
    kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < mass)
    return log_probs.masked_fill(~kept, -math.inf).log_softmax(-1)
