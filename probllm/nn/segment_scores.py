"""Segment scores: a layer from states to the scores of all segments, what a semi-Markov CRF takes.

    segments[t, d, k] = begin_k(h_t) + sum_{s=t}^{t+d} inside_k(h_s) + finish_k(h_{t+d}) + length[d, k]

Each of the three is linear in a state, so that a segment costs an addition and no network runs over it (as the
semi-Markov models of Sarawagi and Cohen 2004, whose features are sums over the segment, its ends and its length).
Usable alone: ``SemiMarkovCRF(*scores(states), lengths=n)``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.encoder import check_positive, check_states


class SegmentScores(Configurable, nn.Module):
    """Scores of segments, transitions ``[from, to]``, and of the first and the last segment's label.

    Args:
        dim: size of the states.
        num_labels: number of labels K.
        max_duration: the most steps D of a segment; or one number a label, longer segments of which are forbidden.
        project: make the 3 K scores of a step (begin, inside, finish, K each) by a linear layer; False takes the states
            themselves, ``dim`` = 3 K.
    """

    def __init__(self, dim: int, num_labels: int, max_duration: int | Sequence[int], project: bool = True) -> None:
        super().__init__()
        check_positive(dim=dim, num_labels=num_labels)
        each = [max_duration] * num_labels if isinstance(max_duration, int) else list(max_duration)
        if len(each) != num_labels:
            raise ValueError(f"max_duration has {len(each)} numbers; expected one, or one for each of {num_labels}")
        for number in each:
            check_positive(max_duration=number)
        if not project and dim != 3 * num_labels:
            raise ValueError(
                f"project is False with dim {dim} and num_labels {num_labels}; expected dim {3 * num_labels}"
            )
        self.dim, self.num_labels, self.max_duration = dim, num_labels, max(each)
        self.emit = nn.Linear(dim, 3 * num_labels) if project else nn.Identity()
        self.length = nn.Parameter(torch.zeros(self.max_duration, num_labels))
        self.too_long: Tensor | None
        too_long = torch.arange(1, self.max_duration + 1).unsqueeze(-1) > torch.tensor(each)
        self.register_buffer("too_long", too_long if bool(too_long.any()) else None, persistent=False)
        self.transitions = nn.Parameter(torch.zeros(num_labels, num_labels))
        self.start = nn.Parameter(torch.zeros(num_labels))
        self.end = nn.Parameter(torch.zeros(num_labels))

    def forward(self, states: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of the states ``[B, L, dim]``.

        Args:
            states: ``[B, L, dim]``.
            added: ``[B, L, 3 K]``, added to the scores of the steps.
        Returns:
            Segments ``[B, L, D, K]`` (anything where they go beyond L), transitions ``[K, K]``, start ``[K]`` and end
            ``[K]``.
        """
        check_states("states", states, self.dim)
        steps = self.emit(states)
        if added is not None:
            check_states("added", added, 3 * self.num_labels)
            steps = steps + added
        begin, inside, finish = steps.unflatten(-1, (3, self.num_labels)).unbind(-2)
        length: Tensor = self.length
        if self.too_long is not None:
            length = length.masked_fill(self.too_long, -math.inf)
        total, found = begin, []
        for d in range(self.max_duration):  # sums and no differences of running sums, which would round
            total = total + inside.roll(-d, 1)
            found.append(total + (finish.roll(-d, 1) + length[d]))
        return torch.stack(found, 2), self.transitions, self.start, self.end
