"""Several sequences in one row, one after another, without padding: each attends within itself and counts from 0.

All that works on single positions (projections, perceptrons, norms, the output layer) sees the real tokens alone.
Attention goes sequence by sequence: those of equal or like lengths form a group, which is one call of the fused
kernel; where lengths in a group differ, its rows are filled up for this call only. Causal attention needs no mask for
that: what fills a row up stands in the future. Under ``torch.compile`` and ``torch.func`` a mask of blocks does the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probllm.nn.attention import mix
from probllm.nn.encoder import in_transform
from probllm.nn.visibility import Visible, visible_keys

# A group may cost this many times its sequences' own products, and a little more, which saves calls.
_WASTE, _SLACK = 1.3, 2048


class _Group(NamedTuple):
    rows: int
    queries: int  # of each row, filled up
    keys: int
    mask: Tensor | None  # [rows, keys]; None where all are equally long


class _Plan(NamedTuple):
    groups: list[_Group]
    queries: Tensor | None  # [slots]: the token that stands in each place of the groups; None where in order already
    keys: Tensor | None
    query_places: Tensor  # [total]: the place of each token
    key_places: Tensor


class Packing:
    """How the sequences lie in the row, and attention over them.

    Args:
        lengths: ``[n]`` whole numbers of at least 1, the lengths of the sequences in their order.
        total: number of positions in the row; the lengths' sum.
        memory_lengths: for attention to another packed row, its sequences' lengths: sequence i attends to memory i.
        memory_total: number of positions in that row.
        name, memory_name: what errors call the lengths.
    Raises:
        ValueError: if the lengths do not add up to the row, or the memory has another number of sequences.
    """

    def __init__(
        self,
        lengths: Tensor,
        total: int,
        memory_lengths: Tensor | None = None,
        memory_total: int = 0,
        name: str = "segments",
        memory_name: str = "memory_segments",
    ) -> None:
        _check_lengths(lengths, total, name)
        self.lengths, self.total = lengths, total
        self.memory_lengths = lengths if memory_lengths is None else memory_lengths
        self.memory_total = total if memory_lengths is None else memory_total
        if memory_lengths is not None:
            _check_lengths(memory_lengths, memory_total, memory_name)
            if len(memory_lengths) != len(lengths):
                raise ValueError(f"{memory_name} has {len(memory_lengths)} sequences; expected {len(lengths)}")
        self._plan: _Plan | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Each token's number within its sequence, ``[total]``."""
        return _numbers(self.lengths, self.total, device)[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attention within each sequence, or of each to its memory.

        Args:
            q: ``[1, total, heads, E]``.
            k, v: ``[1, total, kv_heads, E]``, of a memory ``[1, memory_total, kv_heads, E]``.
            causal, window, dropout: as in ``nn.attention.attend``.
        Returns:
            ``[1, total, heads, E]``.
        """
        if torch.compiler.is_compiling() or in_transform(q, k, v):
            return self._attend_in_blocks(q, k, v, causal, window, dropout)
        if self._plan is None:
            self._plan = _lay_out(self.lengths.tolist(), self.memory_lengths.tolist(), q.device)
        plan, parts = self._plan, []
        queries = _gather(q[0], plan.queries, plan.query_places).split([g.rows * g.queries for g in plan.groups])
        sizes = [g.rows * g.keys for g in plan.groups]
        keys = _gather(k[0], plan.keys, plan.key_places).split(sizes)
        values = _gather(v[0], plan.keys, plan.key_places).split(sizes)
        for group, *rows in zip(plan.groups, queries, keys, values, strict=True):
            q1, k1, v1 = (part.unflatten(0, (group.rows, -1)).transpose(1, 2) for part in rows)
            # Causal attention and its windows look backwards, where no row has been filled up.
            mask = None if causal else group.mask
            visible = visible_keys(group.queries, group.keys, mask, causal, window, q.device)
            visible = visible._replace(idle=None)  # every row has a key
            parts.append(mix(q1, k1, v1, visible, dropout)[0].transpose(1, 2).flatten(0, 1))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if plan.queries is not None:
            mixed = _Scatter.apply(mixed, plan.query_places, plan.queries)  # type: ignore[no-untyped-call]
        return mixed.unsqueeze(0)

    def _attend_in_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, dropout: float
    ) -> Tensor:
        which, number = _numbers(self.lengths, self.total, q.device)
        which_memory, memory_number = _numbers(self.memory_lengths, self.memory_total, q.device)
        allowed = which.unsqueeze(1) == which_memory
        distance = number.unsqueeze(1) - memory_number
        if causal:
            allowed = allowed & (distance >= 0)
        if window is not None:
            allowed = allowed & (distance.abs() < window)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return mix(q, k, v, Visible(allowed=allowed[None, None]), dropout)[0].transpose(1, 2)


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One row ``[1, total, ...]`` of the sequences ``[length, ...]``, and their lengths ``[n]``."""
    if not sequences:
        raise ValueError("sequences is empty; expected at least one")
    return torch.cat(list(sequences)).unsqueeze(0), torch.tensor([len(sequence) for sequence in sequences])


def unpack(row: Tensor, lengths: Tensor) -> list[Tensor]:
    """The sequences ``[length, ...]`` of a packed row ``[1, total, ...]``."""
    return list(row[0].split(lengths.tolist()))


def segment_lengths(documents: Tensor) -> Tensor:
    """Lengths of the runs of equal numbers in ``[B, L]``; each row starts a new run.

    What lies in rows of a fixed length with the number of its document beside each token goes into a stack as
    ``decoder(words.reshape(1, -1), segments=segment_lengths(documents))``.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.diff(first, append=first.new_tensor([documents.numel()]))


def _check_lengths(lengths: Tensor, total: int, name: str) -> None:
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.dtype not in (torch.long, torch.int):
        what = (
            f"shape {list(lengths.shape)}, {lengths.dtype}" if isinstance(lengths, Tensor) else type(lengths).__name__
        )
        raise ValueError(f"{name} is {what}; expected the sequences' lengths, a long tensor [n]")
    if torch.compiler.is_compiling() or in_transform(lengths):
        return
    if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != total:
        raise ValueError(f"{name} is {lengths.tolist()}; expected lengths of at least 1 that add up to {total}")


def _numbers(lengths: Tensor, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token its sequence and its number in it, ``[total]`` each; in shapes that a compiler knows."""
    lengths = lengths.to(device)
    ends = lengths.cumsum(0)
    tokens = torch.arange(total, device=device)
    which = torch.searchsorted(ends, tokens, right=True)
    return which, tokens - (ends - lengths)[which]


def _lay_out(lengths: list[int], memory_lengths: list[int], device: torch.device) -> _Plan:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i] + memory_lengths[i], memory_lengths[i]))
    chunks: list[list[int]] = []
    cost = longest = longest_memory = 0
    for i in order:
        longest, longest_memory = max(longest, lengths[i]), max(longest_memory, memory_lengths[i])
        cost += lengths[i] * memory_lengths[i]
        if not chunks or (len(chunks[-1]) + 1) * longest * longest_memory > _WASTE * cost + _SLACK:
            chunks.append([])
            cost, longest, longest_memory = lengths[i] * memory_lengths[i], lengths[i], memory_lengths[i]
        chunks[-1].append(i)
    chunks = [sorted(chunk) for chunk in chunks]
    sizes, memory_sizes = torch.tensor(lengths), torch.tensor(memory_lengths)
    queries, query_places, _ = _places(sizes, chunks)
    keys, key_places, masks = _places(memory_sizes, chunks)
    groups = [
        _Group(len(c), max(lengths[i] for i in c), max(memory_lengths[i] for i in c), None if m.all() else m.to(device))
        for c, m in zip(chunks, masks, strict=True)
    ]
    return _Plan(
        groups,
        _unless_in_order(queries, device),
        _unless_in_order(keys, device),
        query_places.to(device),
        key_places.to(device),
    )


def _places(lengths: Tensor, chunks: list[list[int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The token of each place of the groups, the place of each token, and which places of a group are real."""
    starts = lengths.cumsum(0) - lengths
    tokens, masks = [], []
    for chunk in chunks:
        own, start = lengths[chunk].unsqueeze(1), starts[chunk].unsqueeze(1)
        steps = torch.arange(int(own.max()))
        tokens.append((start + torch.minimum(steps, own - 1)).flatten())
        masks.append(steps < own)
    flat = torch.cat(tokens)
    real = torch.cat([mask.flatten() for mask in masks]).nonzero().flatten()
    places = torch.empty(int(lengths.sum()), dtype=torch.long)
    places[flat[real]] = real
    return flat, places, masks


def _unless_in_order(tokens: Tensor, device: torch.device) -> Tensor | None:
    return None if torch.equal(tokens, torch.arange(len(tokens))) else tokens.to(device)


def _gather(rows: Tensor, tokens: Tensor | None, places: Tensor) -> Tensor:
    if tokens is None:
        return rows
    gathered: Tensor = _Gather.apply(rows, tokens, places)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """``rows[tokens]``. What fills groups up gets no gradient, so that each row's comes from its own place alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, places)
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        tokens, places = ctx.saved_tensors
        return _Scatter.apply(slopes[0], places, tokens), None, None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """``rows[places]``, which leaves out what fills groups up: that gets the gradient 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(places, tokens)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        places, tokens = ctx.saved_tensors
        back = slopes[0].new_zeros(len(tokens), *slopes[0].shape[1:])
        return back.index_copy(0, places, slopes[0]), None, None
