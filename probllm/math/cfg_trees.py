"""The best parse tree of a scored grammar and exact samples, by the kernels; scores as in ``probllm.math.cfg``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probllm.math import room
from probllm.math.cfg_scaled import grouped, log_leaves, scaled_inside
from probllm.math.kernels import cfg_trees as kernels
from probllm.math.kernels.threads import run_shares
from probllm.math.untraced import untraced


@untraced
def best(scores: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
    """The best trees ``[B, T, T]`` of spans ``[B, T, T, M]``, rules, root and unary, as ``GrammarTree`` has them."""
    spans, rules, root, unary = grouped(scores)
    rows, size, _, m = spans.shape
    groups, n = root.shape
    width, n4 = -(-n // 8) * 8, -(-n // 4) * 4
    leaves = spans.diagonal(dim1=1, dim2=2).transpose(1, 2)
    single = (unary.unsqueeze(1) + leaves[..., None, n:]).amax(-1) + leaves[..., :n]
    words = torch.full((rows, -(-size // 4) * 4, m), -torch.inf, dtype=torch.float64)
    words[:, :size] = torch.cat([single, leaves[..., n:]], -1)
    turned = torch.full((groups, m, m, width), -torch.inf, dtype=torch.float64)  # [X, Z, A]
    turned[..., :n] = rules.permute(0, 2, 3, 1)
    both = torch.full((groups, n4, width, width), -torch.inf, dtype=torch.float64)
    both[:, :n, :n] = turned[:, :n, :n]
    by_last = turned[:, :n].transpose(1, 2)  # [Z, X, A]
    trees = np.zeros((rows, size, size), np.int64)
    arguments = (
        _array(spans), words.numpy(), _array(rules), both.flatten(1, 2).numpy(), turned.flatten(2).numpy(),
        _array(by_last.flatten(2)), _array(root), _array(unary), _array(lengths.long()), 1.0, trees,
    )  # fmt: skip
    run_shares(kernels.best, arguments, rows, 0.02 * rows * size**2 * (n**3 + size * n**2))
    return torch.from_numpy(trees)


@untraced
def draw(scores: tuple[Tensor, ...], lengths: Tensor, count: int) -> Tensor:
    """Exact samples ``[count, B, T, T]``."""
    spans, rules, root, unary = grouped(scores)
    rows, size, _, m = spans.shape
    n = root.shape[-1]
    logs = log_leaves(spans.diagonal(dim1=1, dim2=2).transpose(1, 2), unary, n).contiguous()
    _, flags, tables, leaves, arrays = scaled_inside(spans, rules, root, logs, lengths)
    roots, ints, starts, scales = arrays[4:8]
    picked = np.flatnonzero(flags)
    hard = np.full(rows, -1)
    hard[picked] = np.arange(len(picked))
    charts = room.empty((len(picked), size, size, n))
    words, by_parent = logs.numpy(), _array(rules)
    if len(picked):
        charts.fill(-math.inf)
        arguments: tuple[Any, ...] = (_array(spans), words, by_parent, ints, picked, charts)
        run_shares(kernels.log_inside, arguments, len(picked), 1.0 * len(picked) * size**2 * n * m**2)
    trees = np.zeros((count, rows, size, size), np.int64)
    uniforms = torch.rand(count, rows, 4 * size, dtype=torch.float64).numpy()
    arguments = (
        starts, scales, _array(leaves), _array(tables), roots, hard, charts, words, by_parent, _array(root),
        _array(unary), ints, uniforms, trees,
    )  # fmt: skip
    run_shares(kernels.draw, arguments, count * rows, 0.5 * count * rows * size * (m**2 + size * n**2 / 3))
    return torch.from_numpy(trees)


def _array(x: Tensor) -> Any:
    return x.contiguous().numpy()
