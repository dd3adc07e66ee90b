"""Beam search: the continuations of the highest log probability that a search of a given width finds.

    score = sum_t log p(x_t | before) / length^a                                     a: the length penalty

Wide enough, it is exact. In diverse beam search the beam falls into groups that choose one after another, each
with a token's score lowered by d for every time that earlier groups chose it at this step (Vijayakumar et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from probllm.decoding.reader import Reader
from probllm.decoding.stopping import Stop, Stopping


@dataclass(frozen=True)
class Beam:
    """A beam search.

    Args:
        size: hypotheses of a row that go on after each token.
        length_penalty: a; 0 ranks by log probability, 1 by its mean, more favours longer texts.
        groups: into how many groups the beam falls; ``size`` is a multiple of it.
        diversity: d, in nats.
    Raises:
        ValueError: for a number out of its range.
    """

    size: int = 4
    length_penalty: float = 0.0
    groups: int = 1
    diversity: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty: expected at least 0, got {self.length_penalty}")
        if self.groups < 1 or self.size % self.groups:
            raise ValueError(f"groups: expected a divisor of size, {self.size}, got {self.groups}")
        if self.diversity < 0:
            raise ValueError(f"diversity: expected at least 0, got {self.diversity}")


def beam_search(
    model: Reader,
    prompt: Tensor,
    max_tokens: int,
    beam: Beam,
    n: int,
    mask: Tensor | None,
    end: int | None,
    stop: Sequence[Stop],
    decode: Callable[[list[int]], str] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, n, L]``, their log probabilities, and lengths ``[B, n]``; arguments as of ``generate``.

    Where a row has fewer than n continuations the last ones have length 0.
    """
    if n > beam.size:
        raise ValueError(f"n: expected at most the beam's size, {beam.size}, got {n}")
    rows, k, device = len(prompt), beam.size, prompt.device
    log_probs, state = model.start(prompt, mask)
    places = torch.arange(rows, device=device).repeat_interleave(k)  # in the state, of each hypothesis
    log_probs, state = log_probs[places].view(rows, k, -1), state.select(places)
    stopping = Stopping(rows * k, None, stop, decode, device)
    # one hypothesis of each group is alive at first: others would be its copies
    alive = torch.full((rows, k), -math.inf, dtype=log_probs.dtype, device=device)
    alive[:, :: k // beam.groups] = 0.0
    tokens = torch.zeros(rows, k, 0, dtype=torch.long, device=device)
    found = log_probs.new_zeros(rows, k, 0)
    done: list[list[tuple[float, Tensor, Tensor]]] = [[] for _ in range(rows)]
    for t in range(1, max_tokens + 1):
        ended, going = _extend(alive, log_probs, beam, end)
        for row, (scores, parents, chosen) in enumerate(zip(*ended, strict=True)):
            for j in torch.isfinite(scores).nonzero().flatten().tolist():
                gained = log_probs[row, parents[j], chosen[j]].view(1)
                texts = torch.cat([tokens[row, parents[j]], chosen[j].view(1)])
                done[row].append((_rank(scores[j], t, beam), texts, torch.cat([found[row, parents[j]], gained])))
        alive, parents, chosen = going
        gained = log_probs.gather(1, parents.unsqueeze(-1).expand_as(log_probs)).gather(-1, chosen.unsqueeze(-1))
        before = parents.unsqueeze(-1).expand(-1, -1, t - 1)
        tokens = torch.cat([tokens.gather(1, before), chosen.unsqueeze(-1)], -1)
        found = torch.cat([found.gather(1, before), gained], -1)
        places = (torch.arange(rows, device=device).unsqueeze(-1) * k + parents).view(-1)
        stopping.select(places)
        stopped = stopping.read(chosen.view(-1)).view(rows, k) & torch.isfinite(alive)
        if t == max_tokens:
            stopped = torch.isfinite(alive)
        for row, j in stopped.nonzero().tolist():
            done[row].append((_rank(alive[row, j], t, beam), tokens[row, j], found[row, j]))
        alive = alive.masked_fill(stopped, -math.inf)
        for texts_of_row in done:
            texts_of_row.sort(key=lambda x: -x[0])
            del texts_of_row[n:]
        bounds = (alive.amax(-1) / max_tokens**beam.length_penalty).tolist()
        if all(len(best) == n and best[-1][0] >= bound for best, bound in zip(done, bounds, strict=True)):
            break
        if not bool(torch.isfinite(alive).any()):
            break
        log_probs, state = model.step(chosen.view(-1), state.select(places))
        log_probs = log_probs.view(rows, k, -1)
    longest = max((len(text) for best in done for _, text, _ in best), default=0)
    all_tokens, all_found = tokens.new_zeros(rows, n, longest), found.new_zeros(rows, n, longest)
    lengths = torch.zeros(rows, n, dtype=torch.long, device=device)
    for i, best in enumerate(done):
        for j, (_, text, gained) in enumerate(best):
            all_tokens[i, j, : len(text)], all_found[i, j, : len(text)], lengths[i, j] = text, gained, len(text)
    return all_tokens, all_found, lengths


Extension = tuple[Tensor, Tensor, Tensor]  # scores, parents and tokens, [B, candidates] each


def _extend(alive: Tensor, log_probs: Tensor, beam: Beam, end: int | None) -> tuple[Extension, Extension]:
    """The best extensions of the hypotheses: those that end, and the ``size`` best that go on; -inf for none."""
    rows, k, size = log_probs.shape
    width = k // beam.groups
    counts = log_probs.new_zeros(rows, size)
    endings, goings = [], []
    for first in range(0, k, width):
        scores = alive[:, first : first + width, None] + log_probs[:, first : first + width]
        shown = scores if beam.groups == 1 else scores - beam.diversity * counts.unsqueeze(1)
        # each hypothesis can end in one way only, so of twice as many at least half go on
        order = shown.flatten(1).topk(min(2 * width, width * size), -1)
        best = scores.flatten(1).gather(-1, order.indices)
        parents, chosen = order.indices // size + first, order.indices % size
        ends = chosen == (-1 if end is None else end)
        counted = ends & (torch.arange(ends.shape[-1], device=ends.device) < width)  # so that size 1 is greedy
        endings.append((best.masked_fill(~counted, -math.inf), parents, chosen))
        value, at = order.values.masked_fill(ends, -math.inf).topk(min(width, order.values.shape[-1]), -1)
        going = [x.gather(-1, at) for x in (best, parents, chosen)]
        going[0] = going[0].masked_fill(value == -math.inf, -math.inf)
        if at.shape[-1] < width:
            going = [
                F.pad(x, (0, width - at.shape[-1]), value=y) for x, y in zip(going, (-math.inf, first, 0), strict=True)
            ]
        counts.scatter_add_(-1, going[2], torch.isfinite(going[0]).to(counts.dtype))
        goings.append(going)
    ended, kept = (tuple(torch.cat(x, -1) for x in zip(*y, strict=True)) for y in (endings, goings))
    return ended, kept  # type: ignore[return-value]


def _rank(score: Tensor, length: int, beam: Beam) -> float:
    return float(score) / float(length**beam.length_penalty)
