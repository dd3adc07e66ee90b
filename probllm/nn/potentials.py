"""Potentials: layers from states to the scores that a law over structures takes.

A linear chain scores a tag sequence y of states h by ``start[y_1] + Σ_t emission(h_t)[y_t] + Σ_t transition[y_{t-1},
y_t] + end[y_T]`` (Lafferty, McCallum and Pereira, 2001). Usable alone, on any network's states:
``LinearChainCRF(*potentials(states), lengths=n)``.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from probllm.nn.config import Configurable
from probllm.nn.encoder import check_positive, check_states


class ChainPotentials(Configurable, nn.Module):
    """Emissions, transitions ``[from, to]``, start and end scores of a linear chain.

    Args:
        dim: size of the states.
        num_tags: number of tags K.
        transitions: ``"shared"``, one learned table for all steps; ``"input"``, a table at each step, a linear function
            of the state it leads to, on top of the shared one; ``"none"``, zeros, so that the tags are independent.
        start_end: whether to score the first and the last tag; None stands in their place otherwise.
        project: make the emissions by a linear layer; False takes the states themselves, ``dim`` = ``num_tags``.
    """

    def __init__(
        self,
        dim: int,
        num_tags: int,
        transitions: Literal["shared", "input", "none"] = "shared",
        start_end: bool = True,
        project: bool = True,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_tags=num_tags)
        if transitions not in ("shared", "input", "none"):
            raise ValueError(f"transitions is {transitions!r}; expected 'shared', 'input' or 'none'")
        if not project and dim != num_tags:
            raise ValueError(f"project is False with dim {dim} and num_tags {num_tags}; expected them to be equal")
        self.dim, self.num_tags = dim, num_tags
        self.emit = nn.Linear(dim, num_tags) if project else nn.Identity()
        table = torch.zeros(num_tags, num_tags)
        self.transitions: Tensor
        if transitions == "none":
            self.register_buffer("transitions", table, persistent=False)
        else:
            self.transitions = nn.Parameter(table)
        self.transit = nn.Linear(dim, num_tags * num_tags, bias=False) if transitions == "input" else None
        self.start = nn.Parameter(torch.zeros(num_tags)) if start_end else None
        self.end = nn.Parameter(torch.zeros(num_tags)) if start_end else None

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Scores of the states ``[B, L, dim]``.

        Returns:
            Emissions ``[B, L, K]``, transitions ``[K, K]`` (``[B, L-1, K, K]`` when they depend on the input), start
            ``[K]`` and end ``[K]`` (or None).
        """
        check_states("states", states, self.dim)
        transitions = self.transitions
        if self.transit is not None:
            transitions = transitions + self.transit(states[:, 1:]).unflatten(-1, (self.num_tags, self.num_tags))
        return self.emit(states), transitions, self.start, self.end


class TransitionScores(Configurable, nn.Module):
    """Transitions ``[from, to]`` at each step, from inputs: a linear function of the state that a step leads to.

    As logits of a ``HiddenMarkovModel`` they make an input-output hidden Markov model, whose states move as the inputs
    say: p(z_t | z_{t-1}, u_t) = softmax_k(table[z_{t-1}, k] + (W u_t)[z_{t-1}, k]). Source: Bengio and Frasconi (1995).

    Args:
        dim: size of the inputs.
        num_states: number of states K.
    """

    def __init__(self, dim: int, num_states: int) -> None:
        super().__init__()
        check_positive(dim=dim, num_states=num_states)
        self.dim, self.num_states = dim, num_states
        self.table = nn.Parameter(torch.zeros(num_states, num_states))
        self.transit = nn.Linear(dim, num_states * num_states, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores ``[B, L - 1, K, K]`` of inputs ``[B, L, dim]``; the first input leads to no transition."""
        check_states("inputs", inputs, self.dim)
        own: Tensor = self.transit(inputs[:, 1:]).unflatten(-1, (self.num_states, self.num_states))
        return self.table + own
