"""Single tag sequences of a linear chain: the best, the k best, and exact samples; compiled on the CPU, torch on a GPU.

Scores as in ``chain.as_chain``. A row in which nothing is allowed gives -1 throughout; padding is 0. Sequences have no
derivative; all run under ``torch.func``, ``vmap`` too (samples with ``randomness="different"``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math import chain_torch, room
from probllm.math.chain import Chain, as_chain, fold
from probllm.math.chain_passes import forward as forward_pass
from probllm.math.kernels import chain_paths as kernels
from probllm.math.kernels.exponentials import BROKEN
from probllm.math.kernels.threads import run_shares
from probllm.math.kernels.vectors import padded
from probllm.math.untraced import untraced


def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """A tag sequence of the highest score.

    Returns:
        ``[..., T]`` long: one of the best where several tie; -1 where nothing is allowed; 0 on padding.
    Source: Viterbi (1967).
    """
    chain = as_chain(emissions, transitions, start, end, lengths)
    return best_paths(chain).reshape(*chain.batch_shape, emissions.shape[-2])


def best_paths(chain: Chain) -> Tensor:
    """``viterbi`` of scores already in shape: ``[B, T]``."""
    return _search(_best, chain, chain.emissions.new_empty(1, chain.emissions.shape[0], 0))[0][0]


def top_k(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k tag sequences of the highest scores, best first, all distinct.

    Returns:
        Scores ``[k, ...]`` (float64, without gradient) and sequences ``[k, ..., T]``; -inf and -1 where there are
        fewer than k.
    Source: the k-best recursion of Huang and Chiang (2005), algorithm 2, on a chain.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    chain = as_chain(emissions, transitions, start, end, lengths)
    paths, scores = _search(_k_best, chain, chain.emissions.new_empty(k, chain.emissions.shape[0], 0))
    shape = (k, *chain.batch_shape)
    return scores.reshape(shape), paths.reshape(*shape, emissions.shape[-2])


def sample(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    n: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent exact samples, ``[n, ..., T]`` long, from torch's random numbers.

    Source: forward filtering and backward sampling, Fruhwirth-Schnatter (1994).
    """
    chain = as_chain(emissions, transitions, start, end, lengths)
    paths = sample_paths(chain, n, generator)
    return paths.reshape(n, *chain.batch_shape, emissions.shape[-2])


def sample_paths(chain: Chain, n: int, generator: torch.Generator | None = None) -> Tensor:
    """``sample`` of scores already in shape: ``[n, B, T]``."""
    shape = (n, *chain.emissions.shape[:2])
    uniforms = torch.rand(shape, dtype=torch.float64, device=chain.emissions.device, generator=generator)
    return _search(_sample, chain, uniforms)[0]


Search = Callable[[Chain, Tensor], tuple[Tensor, Tensor]]


class _Paths(torch.autograd.Function):
    """A search for N sequences a row: without derivative; the dimension of ``vmap`` is taken as more rows.

    ``extra`` is [N, B, ...]: what the search needs beside the scores, or nothing in that shape.
    """

    @staticmethod
    def forward(
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor,
        end: Tensor,
        lengths: Tensor,
        extra: Tensor,
        search: Search,
    ) -> tuple[Tensor, Tensor]:
        plain = [x.detach() for x in (emissions, transitions, start, end)]
        return search(Chain(plain[0], plain[1], plain[2], plain[3], lengths, emissions.shape[:1]), extra)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        n, extra, at = info.batch_size, inputs[5], in_dims[5]
        extra = extra.unsqueeze(1).expand(-1, n, -1, -1) if at is None else extra.movedim(at, 1)
        extra = extra.reshape(extra.shape[0], n * extra.shape[2], extra.shape[3])
        paths, scores = _paths(*fold(n, in_dims[:5], inputs[:5]), extra, inputs[6])
        return (paths.view(paths.shape[0], n, -1, paths.shape[2]), scores.view(scores.shape[0], n, -1)), (1, 1)


def _paths(*arguments: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _Paths.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


@untraced
def _search(search: Search, chain: Chain, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences ``[N, B, T]`` and, from a search that has them, scores ``[N, B]``."""
    if torch._C._are_functorch_transforms_active():
        return _paths(*chain[:5], extra, search)
    plain = [x.detach() for x in chain[:4]]
    return search(Chain(plain[0], plain[1], plain[2], plain[3], chain.lengths, chain.batch_shape), extra)


def _best(chain: Chain, extra: Tensor) -> tuple[Tensor, Tensor]:
    no_scores = extra.new_empty(extra.shape[:2])
    if chain.emissions.device.type != "cpu":
        return chain_torch.best_paths(*chain[:5]).unsqueeze(0), no_scores
    emissions, transitions, start, end, lengths = (x.contiguous().numpy() for x in chain[:5])
    rows, steps, k = emissions.shape
    groups, times = transitions.shape[:2]
    paths = np.empty((rows, steps), np.int64)
    flags = np.full(rows, kernels.FAR)
    blocks, n = groups * -(-rows // groups // kernels.ROWS) if rows else 0, groups * times
    for dtype in (np.float32, np.float64) if emissions.dtype == np.float32 else (np.float64,):
        both, highest = room.empty((2, groups, times, k, padded(k)), dtype), np.empty(n)
        arguments = (transitions.reshape(n, k, k), *both.reshape(2, n, k, both.shape[-1]), highest)
        run_shares(kernels.tables, arguments, n, 2.0 * n * k * k)
        greatest = highest.max(initial=0.0)
        if greatest != greatest:
            raise ValueError("transitions: scores must not be NaN or +inf (-inf forbids)")
        if dtype is np.float32 and greatest > kernels.SPAN32:
            continue
        arguments = (emissions, start, end, lengths, *both, dtype(1), paths, flags)
        run_shares(kernels.best, arguments, blocks, 0.02 * rows * steps * k * (k + 32))
        if not flags.any():
            break
        if (flags == BROKEN).any():
            raise ValueError(
                f"emissions, start or end: a score of row {(flags == BROKEN).argmax()} of the batch is NaN or +inf "
                "(-inf forbids)"
            )
    return torch.from_numpy(paths).unsqueeze(0), no_scores


def _k_best(chain: Chain, extra: Tensor) -> tuple[Tensor, Tensor]:
    k, device = extra.shape[0], chain.emissions.device
    # a GPU waits for its own kernel: the list merging is done on the host
    scores, table, first, last, n = (x.cpu().contiguous().numpy() for x in chain[:5])
    rows, steps, tags = scores.shape
    if not all(np.isfinite(x[x != -np.inf]).all() for x in (scores, table, first, last)):
        raise ValueError("emissions, transitions, start or end: scores must not be NaN or +inf (-inf forbids)")
    paths, found = np.empty((k, rows, steps), np.int64), np.empty((k, rows))
    if rows:
        back = np.full((*table.shape[:3], padded(tags)), -np.inf)
        back[..., :tags] = table.swapaxes(-1, -2)
        arguments = (scores, first, last, n, back, k, paths, found)
        run_shares(kernels.k_best, arguments, rows, 4.0 * rows * steps * tags * tags)
    return torch.from_numpy(paths).to(device), torch.from_numpy(found).to(device)


def _sample(chain: Chain, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    no_scores = uniforms.new_empty(uniforms.shape[:2])
    n, rows, steps = uniforms.shape
    if chain.emissions.device.type != "cpu":
        return chain_torch.sample_paths(*chain[:5], uniforms), no_scores
    if not rows:
        return uniforms.long(), no_scores
    done = forward_pass(*chain[:5])
    paths = np.full((n, rows, steps), -1, np.int64)
    numbers, lengths = uniforms.contiguous().numpy(), chain.lengths.contiguous().numpy()
    parts = [(part.rows, part.flags == 0, part.alpha, part.tables.both[1], False) for part in done.scaled]
    if done.left is not None:
        log = done.in_log_space(done.left, 1)
        back = log.back if len(log.back) == 1 else log.back[done.left // (rows // len(log.back))]
        parts.append((done.left, log.log_z > -np.inf, log.alpha, back, True))
    for which, good, alpha, back, logarithms in parts:
        at = slice(None) if which is None else which
        here = np.ascontiguousarray(paths[:, at])
        arguments = (alpha, back, lengths[at], good, np.ascontiguousarray(numbers[:, at]), here, logarithms)
        run_shares(kernels.sample, arguments, len(good), 4.5 * n * rows * steps * chain.emissions.shape[2])
        if which is not None:
            paths[:, which[good]] = here[:, good]
    return torch.from_numpy(paths), no_scores
