"""Contrastive search: probable tokens that do not say again what was said (Su et al. 2022, equation 5).

    x_t = argmax over the k most probable v of (1 - a) p(v | before) - a max_j cos(h_v, h_j)

h_j are the model's states of the tokens so far, and h_v that of v, read after them: so the model reads each of the k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from probllm.decoding.reader import Reader


@dataclass(frozen=True)
class Contrastive:
    """Contrastive search.

    Args:
        k: how many of the most probable tokens are weighed against each other.
        penalty: a in [0, 1]; 0 is greedy.
    Raises:
        ValueError: for a number out of its range.
    """

    k: int = 4
    penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")
        if not 0 <= self.penalty <= 1:
            raise ValueError(f"penalty: expected a number in [0, 1], got {self.penalty}")


def contrastive_steps(
    model: Reader, prompt: Tensor, method: Contrastive, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and their log probabilities, step by step. The model's state has ``hidden [B, L, dim]``: the states of the
    tokens that were read last.

    Raises:
        TypeError: for a model that has no such states, as an n-gram model.
    """
    rows, k = len(prompt), min(method.k, model.size)
    log_probs, state = model.start(prompt, mask)
    if getattr(state, "hidden", None) is None:
        raise TypeError(f"method: contrastive search compares hidden states, and {type(model).__name__} has none")
    seen, real = (
        state.hidden,
        torch.ones(prompt.shape, dtype=torch.bool, device=prompt.device) if mask is None else mask,
    )
    first = torch.arange(rows, device=prompt.device)
    while True:
        values, candidates = log_probs.topk(k, -1)
        after, states = model.step(candidates.flatten(), state.select(first.repeat_interleave(k)))
        new = states.hidden[:, -1].view(rows, k, -1)
        alike = F.cosine_similarity(new.unsqueeze(2), seen.unsqueeze(1), dim=-1)  # [B, k, L]
        alike = alike.masked_fill(~real.unsqueeze(1), -1.0)
        worst = alike.amax(-1) if alike.shape[-1] else alike.new_zeros(rows, k)
        best = ((1 - method.penalty) * values.exp() - method.penalty * worst).argmax(-1)
        yield candidates[first, best], values[first, best]
        chosen = first * k + best
        log_probs, state = after[chosen], states.select(chosen)
        seen = torch.cat([seen, new[first, best].unsqueeze(1)], 1)
        real = F.pad(real, (0, 1), value=True)
