"""The SparseMAP problem, exactly, by an active set of structures.

    max over mu in the convex hull of the structures' parts of   sum_s p_s score(s) - |mu|^2 / 2,    mu = sum_s p_s a_s

where a_s holds the parts of structure s that are regularised (Niculae, Martins, Blondel and Cardie 2018). Each round
asks for the best structure under the scores less mu, adds it, and solves the small quadratic problem over the
structures at hand (Wolfe 1976, "Finding the nearest point in a polytope"); the rounds end, few structures remain.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

import numpy as np


def sparse_map(
    best: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, list[bytes]]],
    rows: int,
    size: int,
    rounds: int = 200,
    tolerance: float = 1e-9,
) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Solves the problem of each row of a batch.

    Args:
        best: means ``[rows, size]`` -> for each row the parts ``[rows, size]`` of the structure of the greatest score
            less the sum of the mean over its parts, its score ``[rows]`` as it is, -inf where nothing is allowed, and
            a key that tells structures apart.
        size: number of regularised parts.
        tolerance: greatest gain of any structure at which a row is done, relative to the greatest score.
    Returns:
        for each row the active structures' weights ``[m]``, their parts ``[m, size]`` and the rounds in which they were
        found; nothing where nothing is allowed.
    Raises:
        RuntimeError: where ``rounds`` did not suffice.
    """
    active: list[list[np.ndarray]] = [[] for _ in range(rows)]
    scores: list[list[float]] = [[] for _ in range(rows)]
    found_in: list[list[int]] = [[] for _ in range(rows)]
    weights: list[np.ndarray] = [np.zeros(0) for _ in range(rows)]
    keys: list[set[bytes]] = [set() for _ in range(rows)]
    names: list[list[bytes]] = [[] for _ in range(rows)]
    mean = np.zeros((rows, size))
    live = np.ones(rows, bool)
    for turn in range(rounds):
        parts, score, key = best(mean)
        for r in np.flatnonzero(live):
            if score[r] == -np.inf:
                live[r] = False
                continue
            if active[r]:
                here = weights[r] @ np.array(scores[r])
                gain = (score[r] - parts[r] @ mean[r]) - (here - mean[r] @ mean[r])
                if gain <= tolerance * (1 + abs(score[r])) or key[r] in keys[r]:
                    live[r] = False
                    continue
            active[r].append(parts[r].copy())
            scores[r].append(float(score[r]))
            found_in[r].append(turn)
            names[r].append(key[r])
            weights[r] = _corrected(np.array(active[r]), np.array(scores[r]), np.append(weights[r], 0.0))
            kept = weights[r] > 0
            live[r] = kept[-1]  # the best structure gains nothing: to rounding, the row is done
            active[r] = list(compress(active[r], kept))
            scores[r] = list(compress(scores[r], kept))
            found_in[r] = list(compress(found_in[r], kept))
            names[r] = list(compress(names[r], kept))
            keys[r] = set(names[r])
            weights[r] = weights[r][kept]
            mean[r] = weights[r] @ np.array(active[r])
        if not live.any():
            return [(w, np.array(a).reshape(-1, size), f) for w, a, f in zip(weights, active, found_in, strict=True)]
    raise RuntimeError(f"SparseMAP did not end within {rounds} rounds")


def _corrected(parts: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights on the simplex that are optimal for the structures at hand, from feasible ones; the last is new."""
    weights = weights.copy()
    if len(weights) == 1:
        return np.ones(1)
    support = np.arange(len(weights))
    while len(support) > 1:
        now = weights[support]
        step, ends = _step(parts[support], scores[support], now)
        if not ends and (now + step > -1e-14).all():
            weights[support] = np.maximum(now + step, 0.0)
            break
        falling = step < 0
        reach = np.where(falling, now / np.where(falling, -step, 1.0), np.inf)
        now = now + float(reach.min()) * step
        now[int(reach.argmin())] = 0.0  # the first to reach 0 leaves, so that every turn makes the set smaller
        weights[:] = 0.0
        weights[support] = np.maximum(now, 0.0)
        support = np.flatnonzero(weights > 0)
    found: np.ndarray = weights / weights.sum()
    return found


def _step(parts: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, bool]:
    """The step that keeps the weights' sum to the optimum, or a direction without end along which the value grows."""
    m = len(weights)
    inner = parts @ parts.T
    plane = np.linalg.qr(np.column_stack([np.ones(m), np.eye(m)[:, 1:]]))[0][:, 1:]  # spans what sums to 0
    values, vectors = np.linalg.eigh(plane.T @ inner @ plane)
    slope = vectors.T @ (plane.T @ (scores - inner @ weights))
    flat = values <= 1e-10 * max(1.0, float(values[-1]))
    if (np.abs(slope[flat]) > 1e-10 * (1.0 + np.abs(scores).max())).any():
        return plane @ (vectors[:, flat] @ slope[flat]), True
    return plane @ (vectors[:, ~flat] @ (slope[~flat] / values[~flat])), False
