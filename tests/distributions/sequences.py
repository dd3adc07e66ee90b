"""What the cases of laws over tag sequences share: lengths of every sort, and the list of all sequences."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor


def draw_lengths(draw: st.DrawFn, batch: tuple[int, ...], steps: int, generator: torch.Generator) -> Tensor | None:
    """None, one for all rows, one for each, or all rows shorter than the batch is long; of either integer dtype."""
    kind = draw(st.sampled_from(["none", "each", "short", "one"]))
    if kind == "none":
        return None
    if kind == "one":
        return torch.tensor(draw(st.integers(1, steps)))
    greatest = steps if kind == "each" or steps == 1 else steps - 1
    lengths = torch.randint(1, greatest + 1, batch, generator=generator)
    return lengths.int() if draw(st.booleans()) else lengths


def all_sequences(steps: int, tags: int, lengths: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences ``[N, T]``, the same for each row ``[N, *batch, T]``, and which of them the row counts: those with
    0 at padding ``[N, *batch]``."""
    structures = torch.tensor(list(itertools.product(range(tags), repeat=steps)))
    every = structures.reshape(-1, *(1,) * len(batch), steps).expand(-1, *batch, steps)
    return structures, every, ((every == 0) | (torch.arange(steps) < lengths.unsqueeze(-1))).all(-1)
