"""The factorial hidden Markov model: independent chains of states that make each observation together.

    z^m_1 ~ initial^m,   z^m_t ~ transition^m(z^m_{t-1}),   x_t ~ observation(z^1_t, ..., z^M_t)

It is a hidden Markov model of K^M joint states, summed out chain by chain. Source: Ghahramani and Jordan (1997).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probllm.distributions.hidden_markov_model import HiddenMarkovModel, check_logits, normalised
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math import factorial
from probllm.math.shapes import broadcast_shapes

# entries of the joint table up to which, on the CPU, the compiled recursion over it is the faster one
COMPILED = 1 << 20


class FactorialHiddenMarkovModel(HiddenMarkovModel):
    """Law over observations ``[T, *observation]`` of M independent Markov chains with K states each.

    States ``[T]`` are joint states, numbers in base K whose first digit is the first chain's: ``chain_states`` reads
    them. ``log_prob``, its gradient and ``state_marginals`` cost M K^(M+1) a step, chain by chain in torch operations;
    up to 1024 joint states on a CPU the compiled recursion over the joint table, K^(2M), is faster, and is taken.
    Samples cost M K^2. ``posterior``, a law over joint states, and ``step`` cost K^(2M).

    Args:
        initial_logits: ``[..., M, K]`` logits of each chain's first state.
        transition_logits: ``[..., M, K, K]``, ``[from, to]``, for all steps; normalised over the last dimension.
        observation_dist: law of an observation given the joint state, batch shape ``[K^M]`` or one that broadcasts to
            ``[*batch, T, K^M]``. Where chains add up, ``Normal(means[arange(M), joint_states(M, K)].sum(1), 1.0)`` with
            means ``[M, K]`` (``probllm.math.factorial.joint_states``).
        lengths: ``[*batch]`` from 1 to T.
        duration: T, where nothing else tells it; the model needs it to be sampled.
    Raises:
        TypeError, ValueError: as ``HiddenMarkovModel``.
    """

    def __init__(
        self,
        initial_logits: Tensor,
        transition_logits: Tensor,
        observation_dist: Any,
        lengths: Tensor | None = None,
        duration: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_logits(initial_logits=initial_logits, transition_logits=transition_logits)
        if initial_logits.dim() < 2 or 0 in initial_logits.shape[-2:]:
            raise ValueError(f"initial_logits: expected shape [..., M, K], got {list(initial_logits.shape)}")
        chains, k = initial_logits.shape[-2:]
        if transition_logits.shape[-3:] != (chains, k, k):
            raise ValueError(
                f"transition_logits: expected shape [..., {chains}, {k}, {k}], got {list(transition_logits.shape)}"
            )
        self.chain_initial, self.chain_transition = normalised(initial_logits), normalised(transition_logits)
        self._codes = factorial.joint_states(chains, k).to(initial_logits.device)
        joint = self.chain_initial[..., torch.arange(chains), self._codes].sum(-1)
        try:
            lead = broadcast_shapes(initial_logits.shape[:-2], transition_logits.shape[:-3])
        except RuntimeError:
            raise ValueError(
                f"batch shapes do not broadcast: initial_logits {list(initial_logits.shape[:-2])}, "
                f"transition_logits {list(transition_logits.shape[:-3])}"
            ) from None
        # no steps of transitions: the joint table is made where it is asked for
        nothing = joint.new_zeros(2, joint.shape[-1], 1).expand(2, joint.shape[-1], joint.shape[-1])[:0]
        super().__init__(joint.expand(*lead, -1), nothing, observation_dist, lengths, duration, validate_args)
        self.initial = joint  # normalised chain by chain
        over = observation_dist.batch_shape
        if duration is None and not (len(over) > 1 and over[-2] > 1):
            self.duration = None

    @property
    def num_chains(self) -> int:
        """M."""
        return int(self.chain_initial.shape[-2])

    @property
    def transition(self) -> Tensor:
        """Log probabilities of the joint states' moves, ``[K^M, K^M]`` or ``[..., 1, K^M, K^M]``."""
        chains = torch.arange(self.num_chains, device=self._codes.device)
        table = self.chain_transition[..., chains, self._codes[:, None], self._codes[None]].sum(-1)
        return table if table.dim() == 2 else table.unsqueeze(-3)

    @transition.setter
    def transition(self, table: Tensor) -> None:
        """What the base would keep."""

    def chain_states(self, states: Tensor) -> Tensor:
        """The state of each chain in joint states ``[..., T]``, ``[..., T, M]`` long; -1 stays."""
        return torch.where(states.unsqueeze(-1) < 0, -1, self._codes[states.clamp_min(0)])

    def _sum(self, emissions: Tensor) -> Tensor:
        lengths = torch.tensor(emissions.shape[-2]) if self.lengths is None else self.lengths
        lengths = lengths.to(emissions.device).expand(emissions.shape[:-2])
        return factorial.log_partition(emissions, self.chain_initial, self.chain_transition, lengths)

    def log_prob(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x) ``[...]``, in nats, summed over all state sequences, and over steps where ``observed`` is False."""
        if self._is_small():
            return super().log_prob(value, observed)
        emissions = self._emission_rows(value, observed)
        return self._sum(emissions).to(emissions.dtype)

    def _is_small(self) -> bool:
        entries = self._codes.shape[0] ** 2 * self.chain_transition.shape[:-3].numel()
        return self.chain_transition.device.type == "cpu" and entries <= COMPILED

    def state_marginals(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """p(z^m_t = k | x) ``[..., T, M, K]``; 0 at padding. Without gradient."""
        with torch.no_grad():
            if self._is_small():
                joint = self.posterior(value, observed).marginals
            else:
                leaf = self._emission_rows(value, observed).clone().requires_grad_()
                with torch.enable_grad():
                    log_z = self._sum(leaf)
                    (joint,) = torch.autograd.grad(torch.where(log_z > -torch.inf, log_z, 0.0).sum(), leaf)
        k = self.chain_initial.shape[-1]
        each = torch.nn.functional.one_hot(self._codes, k).to(joint.dtype)  # [K^M, M, K]
        return torch.einsum("...s,smk->...mk", joint, each)

    def _draw_states(self, sample_shape: Any) -> Tensor:
        """Each chain by itself."""
        if self.duration is None:
            raise ValueError("duration: a homogeneous model is sampled only when duration is given")
        chains, k = self.chain_initial.shape[-2:]
        emissions = self.initial.new_zeros(*self.batch_shape, chains, self.duration, k)
        lengths = None if self.lengths is None else self.lengths.unsqueeze(-1)
        law = LinearChainCRF(emissions, self.chain_transition.unsqueeze(-3), self.chain_initial, None, lengths)
        drawn = law.sample(sample_shape)  # [*sample, *batch, M, T]
        powers = k ** torch.arange(chains - 1, -1, -1, device=drawn.device)
        joint = (drawn * powers.unsqueeze(-1)).sum(-2)
        return torch.where((drawn < 0).any(-2), -1, joint)
