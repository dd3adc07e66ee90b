"""A law over alignments of two sequences: monotone paths through their grid, by moves that take some of each.

    p(path) = exp(sum over its moves of scores[i, j, m]) / Z,      (i, j): how much of both is taken after the move

``PairAlignment.edit`` has the moves of the edit distance, ``PairAlignment.transducer`` those of a recurrent neural
network transducer; moves of several letters by several phonemes give many-to-many alignments. See
``math.pair_alignment``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.inside import InsideDistribution
from probllm.math import pair_alignment
from probllm.math.chain import is_wrapped
from probllm.math.recursion import Recursion
from probllm.math.shapes import broadcast_shapes

EDITS = ((1, 1), (1, 0), (0, 1))  # match or substitute, delete, insert


class PairAlignment(InsideDistribution):
    """A law over the moves ``[U + W]`` of an alignment: one plus the number of each move, and 0 behind the last.

    Args:
        scores: ``[*batch, U + 1, W + 1, M]``: ``scores[i, j, m]`` scores move m if it ends where i of the source and j
            of the target are taken; ``-inf`` forbids.
        moves: M pairs, how much of the source and of the target each takes; not both 0. An alignment starts at (0, 0).
        lengths: ``[...]`` long, from 0 to U: how long each source is; all U if None.
        target_lengths: ``[...]`` long, from 0 to W. Leading dimensions broadcast to the batch.
    Raises:
        TypeError: for scores that are not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit together, moves that repeat or take nothing, lengths out of range, and
            NaN or +inf among the scores (when they are summed).
    """

    _dims: ClassVar[dict[str, int]] = {"scores": 3}

    def __init__(
        self,
        scores: Tensor,
        moves: Sequence[tuple[int, int]] = EDITS,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.moves = tuple((int(a), int(b)) for a, b in moves)
        if not self.moves or len(set(self.moves)) < len(self.moves) or any(min(m) < 0 or m == (0, 0) for m in moves):
            raise ValueError(f"moves: expected different pairs of counts, not both 0, got {self.moves}")
        if scores.dim() < 3 or 0 in scores.shape[-3:] or scores.shape[-1] != len(self.moves):
            raise ValueError(
                f"scores: expected shape [*batch, U + 1, W + 1, {len(self.moves)}], got {list(scores.shape)}"
            )
        longest = tuple(n - 1 for n in scores.shape[-3:-1])
        if longest == (0, 0):
            raise ValueError("scores: expected a source or a target of at least 1, got 0 and 0")
        given = zip(("lengths", "target_lengths"), (lengths, target_lengths), longest, strict=True)
        both = [torch.tensor(n) if x is None else _checked(name, x, n) for name, x, n in given]
        try:
            pairs = torch.stack(torch.broadcast_tensors(*both), -1)
        except RuntimeError:
            shapes = [list(x.shape) for x in both]
            raise ValueError(f"lengths and target_lengths do not broadcast: {shapes[0]} and {shapes[1]}") from None
        self._set_up({"scores": scores}, torch.ones(pairs.shape[:-1], dtype=torch.long), 1, (sum(longest),))
        self.lengths = pairs.to(scores.device, torch.long).expand(*self._own_shape, 2)
        self._validate_args = validate_args is not False

    @classmethod
    def edit(
        cls,
        match: Tensor,
        delete: Tensor,
        insert: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Self:
        """Alignments by the moves of the edit distance: 1 matches or substitutes, 2 deletes, 3 inserts.

        With scores of minus the costs, minus the score of the mode is the edit distance, and ``-log_partition`` the
        soft one.

        Args:
            match: ``[..., U, W]`` scores of each source symbol against each target symbol.
            delete: ``[..., U]`` scores of the source symbols that have none against them.
            insert: ``[..., W]`` scores of such target symbols.
            lengths, target_lengths: as for the law itself.
        """
        if match.dim() < 2:
            raise ValueError(f"match: expected shape [..., U, W], got {list(match.shape)}")
        u, w = match.shape[-2:]
        for name, x, n in (("delete", delete, u), ("insert", insert, w)):
            if x.dim() < 1 or x.shape[-1] != n:
                raise ValueError(f"{name}: expected shape [..., {n}], got {list(x.shape)}")
        batch = broadcast_shapes(match.shape[:-2], delete.shape[:-1], insert.shape[:-1])
        pad = torch.nn.functional.pad
        forbidden = -math.inf
        ways = (
            pad(match.expand(*batch, u, w), (1, 0, 1, 0), value=forbidden),
            pad(delete.unsqueeze(-1).expand(*batch, u, w + 1), (0, 0, 1, 0), value=forbidden),
            pad(insert.unsqueeze(-2).expand(*batch, u + 1, w), (1, 0), value=forbidden),
        )
        return cls(torch.stack(ways, -1), EDITS, lengths, target_lengths)

    @classmethod
    def transducer(
        cls,
        log_probs: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        blank: int = 0,
    ) -> Self:
        """The alignments of labels to frames of a recurrent neural network transducer: 1 goes on, 2 writes a label.

        ``log_partition`` is the log likelihood of the labels.

        Args:
            log_probs: ``[..., T, U + 1, V]`` log probabilities of labels and the blank at a frame, after u labels.
            targets: ``[..., U]`` integers; what stands behind ``target_lengths`` is ignored.
            lengths: ``[...]`` frames, from 1 to T; all T if None.
            target_lengths: ``[...]`` labels, from 0 to U; all U if None.
        Source: Graves (2012), "Sequence transduction with recurrent neural networks", section 2.4.
        """
        if log_probs.dim() < 3 or targets.dim() < 1 or log_probs.shape[-2] != targets.shape[-1] + 1:
            raise ValueError(
                "log_probs: expected shape [..., T, U + 1, V] for targets [..., U], got "
                f"{list(log_probs.shape)} for {list(targets.shape)}"
            )
        frames, count, size = log_probs.shape[-3], targets.shape[-1], log_probs.shape[-1]
        n = torch.tensor(frames) if lengths is None else _checked("lengths", lengths, frames)
        m = torch.tensor(count) if target_lengths is None else _checked("target_lengths", target_lengths, count)
        n, m = n.to(log_probs.device), m.to(log_probs.device)
        real = torch.arange(count, device=log_probs.device) < m.unsqueeze(-1)
        bad = real & ((targets < 0) | (targets >= size) | (targets == blank))
        if not is_wrapped(bad) and bool(bad.any()):
            raise ValueError(f"targets: expected labels from 0 to {size - 1} other than the blank, {blank}")
        batch = broadcast_shapes(log_probs.shape[:-3], targets.shape[:-1], n.shape, m.shape)
        log_probs = log_probs.expand(*batch, *log_probs.shape[-3:])
        labels = torch.where(real, targets, blank).expand(*batch, count)
        index = labels[..., None, :, None].expand(*batch, frames, count, 1)
        write = log_probs[..., :count, :].gather(-1, index).squeeze(-1)  # [..., T, U]
        # no label is written once the last frame is gone
        gone = (torch.arange(frames, device=log_probs.device) >= n.unsqueeze(-1)).unsqueeze(-1)
        write = write.masked_fill(gone, -math.inf)
        pad = torch.nn.functional.pad
        ways = (
            pad(log_probs[..., blank], (0, 0, 1, 0), value=-math.inf),
            pad(write, (1, 0, 0, 1), value=-math.inf),
        )
        return cls(torch.stack(ways, -1), ((1, 0), (0, 1)), n, m)

    @property
    def _recursion(self) -> Recursion:  # type: ignore[override]
        return pair_alignment.recursion(self.moves)

    def _with(self, **parts: Tensor) -> Self:
        scores = parts.get("scores", self.parts["scores"])
        return type(self)(scores, self.moves, self.lengths[..., 0], self.lengths[..., 1])

    def _greatest(self) -> int:
        return len(self.moves)

    def _flat_lengths(self) -> Tensor:
        return self.lengths.reshape(-1, 2)

    def _aligned(self, other: Self) -> dict[str, Tensor]:
        found = super()._aligned(other)
        if other.moves != self.moves:
            raise ValueError(f"q: expected a law with the moves {self.moves}, got {other.moves}")
        return found

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        scores = used["scores"]
        rows, columns, count = scores.shape[-3:]
        number = torch.arange(1, count + 1, device=scores.device, dtype=scores.dtype)
        at_node = (scores * number).sum(-1)  # [..., I, J]
        i, j = torch.arange(rows, device=scores.device), torch.arange(columns, device=scores.device)
        diagonal = (i.unsqueeze(-1) + j).flatten()
        found = at_node.new_zeros((*at_node.shape[:-2], rows + columns - 1))
        found = found.index_add(-1, diagonal, at_node.flatten(-2)).round().long()[..., 1:]
        # diagonals that a move jumped over are closed up
        order = (found == 0).to(torch.uint8).argsort(dim=-1, stable=True)
        return found.gather(-1, order)

    def _real(self, value: Tensor) -> Tensor:
        return value  # 0 is no move, wherever it stands: the score judges it

    def _score(self, value: Tensor) -> Tensor:
        scores = self.parts["scores"].double()
        rows, columns, count = scores.shape[-3:]
        table = torch.tensor([(0, 0), *self.moves], device=value.device)
        shape = broadcast_shapes(value.shape[:-1], self.lengths.shape[:-1])
        value = value.expand(*shape, value.shape[-1])
        i, j = table[value].cumsum(-2).unbind(-1)
        n, m = self.lengths.expand(*shape, 2).unbind(-1)
        moved = value > 0
        legal = (i[..., -1] == n) & (j[..., -1] == m) & ~((~moved[..., :-1]) & moved[..., 1:]).any(-1)
        within = (i < rows) & (j < columns)
        at = (i.clamp_max(rows - 1) * columns + j.clamp_max(columns - 1)) * count + (value - 1).clamp_min(0)
        found = scores.flatten(-3).expand(*shape, rows * columns * count).gather(-1, at)
        total = torch.where(moved & within, found, 0.0).sum(-1)
        return torch.where(legal, total, torch.full_like(total, -math.inf))

    def _plain(self) -> Tensor | None:
        """The scores as the kernels take them, or None where they cannot."""
        scores = self._flat("scores", True)
        return scores if scores.device.type == "cpu" and not is_wrapped(scores) and len(scores) else None

    def _best(self) -> Tensor:
        scores = self._plain()
        if scores is None:
            return super()._best()
        found = pair_alignment.best(self.moves, scores, self._flat_lengths())
        return found.reshape(self._own_shape + self.event_shape)

    def _draw(self, n: int) -> Tensor:
        scores = self._plain()
        if scores is None:
            return super()._draw(n)
        drawn = pair_alignment.sample(self.moves, scores, self._flat_lengths(), n)
        return drawn.reshape(n, *self._own_shape, *self.event_shape)


def _checked(name: str, lengths: Tensor, greatest: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"{name}: expected a tensor of integers, got {getattr(lengths, 'dtype', type(lengths))}")
    if not is_wrapped(lengths) and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > greatest:
            raise ValueError(f"{name}: expected values from 0 to {greatest}, got values from {low} to {high}")
    return lengths.long()
