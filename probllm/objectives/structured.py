"""Training losses for a law over structures beside its negative log-likelihood; each is >= 0 and convex in the scores.

    structured_hinge   max over y of (score(y) + cost(y, x)) - score(x)               (Taskar 2003; Tsochantaridis 2005)
    sparsemap_loss     the Fenchel-Young loss of the quadratic regulariser, 1/2 |parts|^2                (Niculae 2018)
    perturbed_loss     the Fenchel-Young loss of perturbed modes, its gradient estimated without bias    (Berthet 2020)

The Fenchel-Young loss of the entropy is the negative log-likelihood itself, ``-law.log_prob(x)`` (Blondel, Martins and
Niculae 2020).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probllm.distributions.structure import StructuredDistribution
from probllm.math.sparse_map import sparse_map


def structured_hinge(law: StructuredDistribution, value: Tensor, cost: float | Tensor = 1.0) -> Tensor:
    """Margin loss ``[*batch]``: 0 when ``value`` beats every other structure by the cost of their difference.

    Args:
        value: ``[*batch, *event]``, the right structures.
        cost: of each main part that only one of the two structures uses: a number, or a tensor that broadcasts with the
            main scores. 0 gives the structured perceptron.
    Returns:
        0 in a row where nothing is allowed; +inf where ``value`` itself is forbidden.
    """
    if bool((torch.as_tensor(cost) < 0).any()):
        raise ValueError(f"cost: expected at least 0, got {cost}")
    main = next(iter(law.parts))
    right = law.parts_of(value)
    scores = law._expand_part(main, law.parts[main])
    weighted = torch.as_tensor(cost, dtype=right.dtype) * (1 - 2 * right)
    # a part that is used by the right structure costs when it is missing: a constant less what those who use it save
    augmented = law._with(**{main: scores + weighted})
    constant = (torch.as_tensor(cost, dtype=right.dtype) * right).flatten(len(law.batch_shape)).sum(-1)
    best = augmented.score(augmented.mode) + constant
    return _difference(law, best, law.score(value))


def sparsemap_loss(law: StructuredDistribution, value: Tensor) -> Tensor:
    """Fenchel-Young loss ``[*batch]`` of 1/2 |main parts|^2, exactly: 0 once ``value`` wins by a margin.

    Its gradient is the sparse marginals of ``sparsemap_marginals`` less the parts of ``value``.
    """
    weights, structures, mean = _sparse(law)
    score = (weights * torch.where(weights > 0, law.score(structures), 0.0)).sum(0)
    best = score - 0.5 * (mean**2).flatten(len(law.batch_shape)).sum(-1)
    right = law.score(value) - 0.5 * (law.parts_of(value) ** 2).flatten(len(law.batch_shape)).sum(-1)
    return _difference(law, best, right)


def sparsemap_marginals(law: StructuredDistribution) -> Tensor:
    """Main parts ``[*batch, *main]`` of the few structures that solve the SparseMAP problem, as a layer.

    With the structures that take part held fixed, which they are but where two solutions meet, their weights move by
    the pseudo-inverse of their parts' inner products on the simplex as their scores do (Niculae 2018, section 3.3).
    First derivatives only.
    """
    weights, structures, mean = _sparse(law)
    if not (torch.is_grad_enabled() and law._requires_grad):
        return mean
    used = weights > 0
    known = structures.clamp_min(0)
    with torch.no_grad():
        parts = law.parts_of(known).double()
        flat = (parts.flatten(1 + len(law.batch_shape)) * used.unsqueeze(-1)).movedim(0, -2)  # [*batch, m, size]
        on = used.movedim(0, -1).double()
        among = torch.diag_embed(on) - on.unsqueeze(-1) * on.unsqueeze(-2) / on.sum(-1).clamp_min(1)[..., None, None]
        slopes = torch.linalg.pinv(among @ (flat @ flat.transpose(-1, -2)) @ among, rcond=1e-10, hermitian=True)
    scores = torch.where(used, law.score(known).double(), 0.0).movedim(0, -1)
    change = (slopes @ (scores - scores.detach()).unsqueeze(-1)).squeeze(-1)  # 0, with a gradient
    moved = (change.unsqueeze(-1) * flat).sum(-2).reshape(mean.shape)
    marginals: Tensor = mean + moved.to(mean.dtype)
    return marginals


def perturbed_loss(law: StructuredDistribution, value: Tensor, samples: int = 1, scale: float = 1.0) -> Tensor:
    """Fenchel-Young loss ``[*batch]`` of modes under Gaussian noise on the main scores, estimated from ``samples``.

    Its expectation is >= 0, for noise can only raise the mean of the best score; its gradient, the mean parts of the
    perturbed modes less those of ``value``, is unbiased.

    Args:
        samples: number of perturbed modes, at least 1.
        scale: standard deviation of the noise, above 0.
    """
    if samples < 1 or not scale > 0:
        raise ValueError(f"samples, scale: expected at least 1 and above 0, got {samples} and {scale}")
    main = next(iter(law.parts))
    scores = law._expand_part(main, law.parts[main])
    noise = scale * torch.randn(samples, *scores.shape, dtype=scores.dtype, device=scores.device)
    noisy = law._with(**{main: scores + noise})
    return _difference(law, noisy.score(noisy.mode).mean(0), law.score(value))


def _difference(law: StructuredDistribution, best: Tensor, right: Tensor) -> Tensor:
    """best - right, 0 where nothing is allowed."""
    possible = law.log_partition > -torch.inf
    return torch.where(possible, torch.where(possible, best, 0.0) - torch.where(possible, right, 0.0), 0.0)


def _sparse(law: StructuredDistribution) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[m, *batch]`` and structures ``[m, *batch, *event]`` of the active sets, and the mean main parts."""
    main = next(iter(law.parts))
    with torch.no_grad():
        scores = law._expand_part(main, law.parts[main]).double()
        others = {name: x.double() for name, x in law.parts.items()}
        batch = law.batch_shape
        size = scores.shape[len(batch) :]
        seen: list[Tensor] = []

        def best(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
            shift = torch.from_numpy(mean).to(scores.device).reshape(scores.shape)
            mode = law._with(**{**others, main: scores - shift}).mode
            seen.append(mode)
            wide = law._wide()
            score = torch.where((mode < 0).flatten(len(batch)).any(-1), -torch.inf, wide.score(mode.clamp_min(0)))
            flat = mode.reshape(batch.numel(), -1).cpu().numpy()
            parts = wide.parts_of(mode).reshape(batch.numel(), -1).cpu().numpy()
            return parts, score.reshape(-1).cpu().numpy(), [row.tobytes() for row in flat]

        solved = sparse_map(best, batch.numel(), size.numel())
        most = max((len(w) for w, _, _ in solved), default=0) or 1
        weights = torch.zeros(most, batch.numel(), dtype=torch.float64)
        structures = torch.zeros(most, batch.numel(), law.event_shape.numel(), dtype=torch.long)
        mean = torch.zeros(batch.numel(), size.numel(), dtype=torch.float64)
        rounds = [mode.reshape(batch.numel(), -1).cpu() for mode in seen]
        for r, (w, parts, turns) in enumerate(solved):
            for i, turn in enumerate(turns):
                weights[i, r], structures[i, r] = float(w[i]), rounds[turn][r]
            if len(w):
                mean[r] = torch.from_numpy(w @ parts)
                structures[len(w) :, r] = structures[0, r]
            else:
                structures[:, r] = -1
    dtype, device = law.parts[main].dtype, scores.device
    return (
        weights.reshape(most, *batch).to(device, dtype),
        structures.reshape(most, *batch, *law.event_shape).to(device),
        mean.reshape(scores.shape).to(device, dtype),
    )
