"""log Z of a grammar whose rules have low rank, by matrix products in probability space, scaled span by span.

    beta(i, j, A) = exp(m_ij) b_ij[A],   max over A of b = 1
    S_ij[r] = sum_k exp(m_ik + m_{k+1,j} - top) (L b_ik)[r] (G b_{k+1,j})[r],   b_ij = s_ij * (H S_ij) / its maximum

with the factors H, L, G of the rules. The scales are constants to the gradient, which they leave as it is. Sources:
Yang, Zhao and Tu (2021), "PCFGs can do better"; Yang, Liu and Tu (2022). See ``probllm.math.cfg``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probllm.math.cfg_scaled import SAFE_RANGE, finite, log_leaves, within
from probllm.math.cfg_torch import HardRow, add_hard, hard_rows, low_rank_inside
from probllm.math.recursion import Recursion

LITTLE = -90.0  # products of seven factors whose logarithms are no less do not underflow


class _Kept(NamedTuple):
    leaves: tuple[Tensor, ...]  # the scores, leaves of a graph
    log_z: Tensor  # [B], of that graph
    hard: list[HardRow]


def forward(scores: tuple[Tensor, ...], lengths: Tensor, keep: bool) -> tuple[Tensor, _Kept | None]:
    """log Z ``[B]`` of scores as ``low_rank_inside`` has them; rows in doubt by that one."""
    leaves = tuple(x.detach().double().requires_grad_(keep) for x in scores)
    with torch.set_grad_enabled(keep):
        log_z, doubt = _scaled(leaves, lengths)
    found = log_z.detach().clone()
    hard = hard_rows(low_rank_inside, scores, lengths, doubt.nonzero().flatten().tolist(), keep)
    for each in hard:
        found[each.row] = each.log_z.detach()
    return found, _Kept(leaves, log_z, hard) if keep else None


def backward(kept: _Kept, weights: Tensor) -> tuple[Tensor, ...]:
    """weights * the gradient of log Z in the scores, summed over rows that share them."""
    weights = weights.detach().double()
    easy = torch.where(kept.log_z > -torch.inf, weights, 0.0)
    for each in kept.hard:
        easy[each.row] = 0.0
    found = list(torch.autograd.grad(kept.log_z, kept.leaves, easy, retain_graph=True, allow_unused=True))
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, kept.leaves, strict=True)]
    add_hard(found, kept.hard, weights)
    return tuple(found)


def _scaled(parts: tuple[Tensor, ...], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """log Z ``[B]``, and which rows may have lost something, ``[B]`` bool."""
    spans, head, left, right, root, unary = parts
    size, n = spans.shape[1], root.shape[-1]
    tables, offsets = [], []
    little = torch.zeros(spans.shape[0], dtype=torch.bool, device=spans.device)
    for x in (head, left, right, root):
        high = finite(x.detach().flatten(1).amax(-1))
        shifted = x - high.reshape(-1, *(1,) * (x.dim() - 1))
        tables.append(shifted.exp())
        offsets.append(high)
        little = little | (finite(shifted.detach()) < LITTLE).flatten(1).any(-1)
    careful = not all(within(x.detach(), SAFE_RANGE / 3) for x in (head, left, right, root))
    h, lefts, rights, r = tables
    rule = offsets[0] + offsets[1] + offsets[2]

    def scaled(mass: Tensor, before: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """b and m ``[B, S]`` of mass ``[B, S, X]`` at scale ``before`` and the scores of its symbols."""
        nonlocal little
        high = scores.detach().amax(-1)
        factor = (scores - finite(high).unsqueeze(-1)).exp()
        made = mass * factor
        peak = made.detach().amax(-1)
        dead = (peak == 0) | (before == -torch.inf) | (high == -torch.inf)
        b = torch.where(dead.unsqueeze(-1), 0.0, made / torch.where(dead, 1.0, peak).unsqueeze(-1))
        m = torch.where(dead, -torch.inf, before + high + torch.where(dead, 1.0, peak).log())
        if careful:
            lost = ((scores.detach() - finite(high).unsqueeze(-1)) < LITTLE) & (scores.detach() > -torch.inf)
            lost = lost | ((b.detach() > 0) & (b.detach().log() < LITTLE))
            little = little | lost.flatten(1).any(-1)
        return b, m

    words = log_leaves(spans.diagonal(dim1=1, dim2=2).transpose(1, 2), unary, n)
    b, m = scaled(torch.ones_like(words), torch.zeros_like(words[..., 0]), words)
    top_b, top_m = b[:, 0, :n], m[:, 0]
    first, last = (b @ lefts.mT).unsqueeze(2), (b @ rights.mT).unsqueeze(2)  # [B, S, splits, R]
    first_m = last_m = m.unsqueeze(2)
    for width in range(2, size + 1):
        pairs = first_m[:, :-1] + last_m[:, 1:]
        top = pairs.amax(-1)
        shares = (pairs - finite(top).unsqueeze(-1)).exp()
        if careful:
            little = little | ((pairs > -torch.inf) & (shares.log() < LITTLE)).flatten(1).any(-1)
        ranks = (shares.unsqueeze(-1) * first[:, :-1] * last[:, 1:]).sum(2)
        scores = spans.diagonal(width - 1, dim1=1, dim2=2).transpose(1, 2)[..., :n]
        b, m = scaled(ranks @ h.mT, top + rule.unsqueeze(-1), scores)
        here = lengths == width
        top_b, top_m = torch.where(here.unsqueeze(-1), b[:, 0], top_b), torch.where(here, m[:, 0], top_m)
        first = torch.cat([first[:, :-1], (b @ lefts[..., :n].mT).unsqueeze(2)], 2)
        last = torch.cat([(b @ rights[..., :n].mT).unsqueeze(2), last[:, 1:]], 2)
        first_m = torch.cat([first_m[:, :-1], m.unsqueeze(2)], 2)
        last_m = torch.cat([m.unsqueeze(2), last_m[:, 1:]], 2)
    total = (r * top_b).sum(-1)
    empty = (total == 0) | (top_m == -torch.inf)
    log_z = torch.where(empty, 1.0, total).log() + finite(top_m) + offsets[3]
    return torch.where(empty, -torch.inf, log_z), little if careful else torch.zeros_like(little)


LOW_RANK = Recursion(low_rank_inside, forward, backward)
