"""Joint multigrams: a pair of sequences is a sequence of paired chunks, whose probabilities are learned by EM.

    p(x, y) = sum over the ways to cut both into pairs of chunks (u_1, v_1), (u_2, v_2), ... of prod_k p(u_k, v_k)

Expectation counts each pair by forward-backward over all cuts (the law ``PairAlignment``), maximisation divides by the
total. The best cut of each pair is a string of pairs on which an n-gram model is built (Bisani and Ney 2008,
"Joint-sequence models for grapheme-to-phoneme conversion"; Jiampojamarn et al. 2007, many-to-many alignment).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from probllm.math.kernels import chunk_pairs as kernels
from probllm.math.kernels.threads import run_shares

MOST_CODES = 1 << 27  # pairs of chunks that symbols could form; a table of that many integers is made once
# one letter by none to two phonemes: longer chunks of letters were no better on English
CHUNKS = ((1, 0), (1, 1), (1, 2))


class ChunkAlignment(NamedTuple):
    """What EM found: pairs that the best cuts use, their probabilities, and the cuts themselves."""

    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
    probabilities: np.ndarray[Any, Any]  # [pairs]; of the model that made the cuts, so that they sum to less than 1
    cuts: list[np.ndarray[Any, Any]]  # a number of a pair for each chunk; empty where a word cannot be cut
    log_likelihoods: list[float]  # nats a word, before each step of EM


def align_chunks(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    sizes: tuple[int, int],
    chunks: Sequence[tuple[int, int]] = CHUNKS,
    steps: int = 12,
) -> ChunkAlignment:
    """Learns the probabilities of pairs of chunks from pairs of sequences, and cuts each at its best.

    Args:
        sources, targets: symbols, numbered from 0.
        sizes: how many symbols of the source and of the target there are.
        chunks: how many symbols of the source and of the target a pair may hold, not both 0.
        steps: of EM, from uniform probabilities. A word that cannot be cut does not count.
    Raises:
        ValueError: if the sequences are not as many, or the chunks are so long that pairs cannot be numbered.
    """
    if len(sources) != len(targets):
        raise ValueError(f"targets: expected as many as sources, {len(sources)}, got {len(targets)}")
    moves = np.array(chunks, dtype=np.int64).reshape(-1, 2)
    longest = moves.max(0)
    bases = [n + 1 for n in sizes]
    if bases[0] ** longest[0] * bases[1] ** longest[1] > MOST_CODES:
        raise ValueError(f"chunks: pairs of up to {tuple(longest)} of {sizes} symbols are too many to number")
    (source, x_ends), (target, y_ends) = _joined(sources), _joined(targets)
    nodes = (np.diff(x_ends) + 1) * (np.diff(y_ends) + 1)
    offsets = np.concatenate([[0], np.cumsum(nodes * len(moves))])
    codes = np.empty(offsets[-1], dtype=np.int32)
    ground = np.array([*sizes, bases[1] ** longest[1]])
    words = len(nodes)
    run_shares(kernels.keys, (source, x_ends, target, y_ends, moves, ground, codes, offsets), words, 5.0 * codes.size)
    used = np.zeros(bases[0] ** longest[0] * bases[1] ** longest[1], dtype=bool)
    used[codes[codes >= 0]] = True
    number = np.cumsum(used, dtype=np.int32) - 1
    arcs = np.where(codes >= 0, number[codes], -1).astype(np.int32)
    code_of = np.flatnonzero(used)
    pairs = [
        (tuple(_digits(int(code) // int(ground[2]), bases[0])), tuple(_digits(int(code) % int(ground[2]), bases[1])))
        for code in code_of
    ]
    held = np.array([(len(u), len(v)) for u, v in pairs], dtype=float).reshape(-1, 2)
    against_uniform = (np.array(sizes, dtype=float) ** held).prod(1)
    shares = max(1, torch.get_num_threads())
    room = [np.empty((shares, int(nodes.max(initial=1)))) for _ in range(2)]
    probabilities = np.full(len(pairs), 1.0 / max(1, len(pairs)))
    likelihoods = []
    for _ in range(steps):
        counts, totals = np.zeros((shares, len(pairs))), np.zeros((shares, 2))
        weights = probabilities * against_uniform
        arguments = (x_ends, y_ends, moves, arcs, offsets, weights, *room, counts, totals)
        run_shares(kernels.expect, arguments, words, 8.0 * arcs.size)
        expected, (log_total, counted) = counts.sum(0), totals.sum(0)
        symbols = np.log(sizes) @ np.array([len(source), len(target)])
        likelihoods.append(float((log_total - symbols) / max(1.0, counted)))
        probabilities = expected / max(expected.sum(), 1e-300)
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)
    most = int((np.diff(x_ends) + np.diff(y_ends)).max(initial=1))
    paths, lengths = np.empty((words, most), dtype=np.int32), np.zeros(words, dtype=np.int64)
    back = np.empty(room[0].shape, dtype=np.int16)
    arguments = (x_ends, y_ends, moves, arcs, offsets, logs, room[0], back, paths, lengths)
    run_shares(kernels.align, arguments, words, 4.0 * arcs.size)
    taken = np.concatenate([paths[n, : lengths[n]] for n in range(words)]) if words else np.zeros(0, np.int32)
    kept, renamed = np.unique(taken, return_inverse=True)
    cuts = np.split(renamed, np.cumsum(lengths)[:-1]) if words else []
    return ChunkAlignment([pairs[i] for i in kept], probabilities[kept], cuts, likelihoods)


def _joined(sequences: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """The sequences end to end, and where each begins and the last ends."""
    ends = np.concatenate([[0], np.cumsum([len(x) for x in sequences], dtype=np.int64)])
    return np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=int(ends[-1])), ends.astype(np.int64)


def _digits(code: int, base: int) -> list[int]:
    """The symbols of a chunk from its code, whose digits are the symbols plus one."""
    found: list[int] = []
    while code:
        found.append(code % base - 1)
        code //= base
    return found[::-1]


__all__ = ["CHUNKS", "ChunkAlignment", "align_chunks"]
