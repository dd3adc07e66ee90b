"""The hidden semi-Markov model: an HMM whose states say how long they last; the states are summed out exactly.

    z_1 ~ initial,   d_i ~ duration(z_i) in 1 .. D,   z_{i+1} ~ transition(z_i),   x_t ~ observation(state at t)

The explicit-duration HMM of Ferguson (1980); Yu (2010), "Hidden semi-Markov models". A first segment begins where the
sequence does. Where that stops, the last segment goes on unseen (``right_censored``, as Guédon 2003): it has
P(duration >= d) for the d steps that are seen, and p(x) sums to one over the sequences of T observations. Otherwise the
last segment ends with the sequence, and p(x) is given that one does. See ``probllm.math.semimarkov``.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from probllm.distributions.hidden_markov_model import HiddenMarkovModel, check_logits, normalised
from probllm.distributions.semi_markov_crf import SemiMarkovCRF
from probllm.math import recursion, semimarkov
from probllm.math.chain import is_wrapped
from probllm.math.semirings import LOG
from probllm.math.shapes import broadcast_shapes


class HiddenSemiMarkovModel(HiddenMarkovModel):
    """Law over observations ``[T, *observation]`` of K hidden states with durations of at most D steps.

    Its structures are segmentations ``[T]``: 0 continues a segment, 1 + k starts one in state k (per step by
    ``probllm.math.semimarkov.step_labels``). A transition from a state to itself starts a new segment of it; forbid it
    by -inf on the diagonal to make durations mean what they say. ``log_prob``, its gradient, ``viterbi``,
    ``state_marginals`` and samples take memory linear in T; ``posterior`` has a score for each of its T D K segments.

    Args:
        initial_logits: ``[..., K]`` logits of the first state.
        transition_logits: ``[..., K, K]``, ``[from, to]``, normalised over the last dimension.
        duration_logits: ``[..., K, D]`` logits of the durations 1 .. D of each state; those of a distribution over
            positive integers are ``distribution.log_prob(torch.arange(1.0, D + 1))``, which truncates it at D.
        observation_dist: law of an observation given the state, as for ``HiddenMarkovModel``.
        lengths: ``[*batch]`` from 1 to T.
        duration: T, where nothing else tells it; the model needs it to be sampled.
        right_censored: whether the last segment may go on beyond the sequence.
    Raises:
        TypeError, ValueError: as ``HiddenMarkovModel``, and for duration logits whose shape does not fit.
    """

    def __init__(
        self,
        initial_logits: Tensor,
        transition_logits: Tensor,
        duration_logits: Tensor,
        observation_dist: Any,
        lengths: Tensor | None = None,
        duration: int | None = None,
        right_censored: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(transition_logits, Tensor) and transition_logits.dim() > 2:
            transition_logits = transition_logits.unsqueeze(-3)  # one table for all steps
        super().__init__(initial_logits, transition_logits, observation_dist, lengths, duration, validate_args)
        k = self.num_states
        check_logits(duration_logits=duration_logits)
        if duration_logits.dim() < 2 or duration_logits.shape[-2] != k or duration_logits.shape[-1] < 1:
            raise ValueError(f"duration_logits: expected shape [..., {k}, D], got {list(duration_logits.shape)}")
        try:
            self._own_shape = broadcast_shapes(self._own_shape, duration_logits.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"duration_logits: batch shape {list(duration_logits.shape[:-2])} does not broadcast with "
                f"{list(self._own_shape)}"
            ) from None
        self._batch_shape = self._own_shape
        self.durations = normalised(duration_logits)
        self.right_censored = right_censored

    @property
    def max_duration(self) -> int:
        """D."""
        return int(self.durations.shape[-1])

    def log_prob(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x) ``[...]``, in nats, summed over all segmentations, and over steps where ``observed`` is False."""
        emissions = self._emission_rows(value, observed)
        parts, lengths = self._rows(emissions)
        total = self._sum(parts, lengths).view(emissions.shape[:-2])
        return (total - self._log_boundary(emissions.shape[-2], emissions.device)).to(emissions.dtype)

    def posterior(self, value: Tensor, observed: Tensor | None = None) -> SemiMarkovCRF:
        """p(segmentation | x); its ``log_partition`` is log p(x). It holds T D K scores a row."""
        emissions = self._emission_rows(value, observed)
        segments, lengths = self._segments(emissions)
        start = self.initial - self._log_boundary(emissions.shape[-2], emissions.device).unsqueeze(-1)
        return SemiMarkovCRF(segments, self._transition(), start, None, lengths)

    def viterbi(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """A most probable segmentation given x, ``[..., T]``; -1 where none is possible."""
        emissions = self._emission_rows(value, observed)
        parts, lengths = self._rows(emissions)
        if any(x.device.type != "cpu" or is_wrapped(x) for x in (*parts, lengths)):
            return self.posterior(value, observed).mode
        return semimarkov.viterbi(parts, lengths)[1].view(emissions.shape[:-1])

    def state_marginals(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """Probability of each state at each step given x, ``[..., T, K]``; 0 at padding."""
        emissions = self._emission_rows(value, observed)
        parts, lengths = self._rows(emissions)
        if not lengths.numel():
            return emissions * 1.0
        return recursion.expected_parts(semimarkov.ADDITIVE, parts, lengths)[0].view(emissions.shape)

    def log_prob_joint(self, states: Tensor, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(z, x) ``[...]``, in nats, of segmentations z ``[..., T]``."""
        return self.posterior(value, observed).score(states)

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Exact samples: segmentations ``[*sample, *batch, T]``, and ``[*sample, *batch, T, *observation]``."""
        return super().sample_joint(sample_shape)

    def start(self, lag: int = 0) -> NoReturn:
        """Not offered: what is known at a step is a law over states and how long they have lasted.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError("a semi-Markov model is not filtered step by step; state_marginals(x) has its states")

    def _draw_states(self, sample_shape: Any) -> Tensor:
        if self.duration is None:
            raise ValueError("duration: the model is sampled only when duration is given")
        shape = torch.Size(sample_shape)
        emissions = self.initial.new_zeros(*self.batch_shape, self.duration, self.num_states)
        parts, lengths = self._rows(emissions)
        count = math.prod(shape)
        if emissions.device.type == "cpu":
            drawn = semimarkov.sample(parts, lengths, count)
        else:
            segments, of_rows = self._segments(emissions)
            law = SemiMarkovCRF(segments, self._transition(), self.initial, None, of_rows)
            drawn = law.sample((count,))
        return drawn.reshape(*shape, *self.batch_shape, self.duration)

    def _state_of_each_step(self, structure: Tensor) -> Tensor:
        return semimarkov.step_labels(structure, self.lengths)

    def _transition(self) -> Tensor:
        return self.transition if self.transition.dim() == 2 else self.transition.squeeze(-3)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Log probabilities of the durations, and what the last segment's length has instead, ``[..., D, K]``."""
        by_duration = self.durations.transpose(-1, -2)
        if not self.right_censored:
            return by_duration, by_duration
        return by_duration, _at_least(self.durations).transpose(-1, -2)

    def _segments(self, emissions: Tensor) -> tuple[Tensor, Tensor]:
        """A score for each segment, ``[..., T, D, K]``, and the lengths ``[...]``."""
        durations, last = (x.unsqueeze(0) for x in self._tables())
        lengths = self._lengths(emissions)
        return semimarkov.segment_scores(LOG, emissions.unsqueeze(0), durations, last, lengths).squeeze(0), lengths

    def _lengths(self, emissions: Tensor) -> Tensor:
        lengths = torch.tensor(emissions.shape[-2]) if self.lengths is None else self.lengths
        return lengths.to(emissions.device, torch.long).expand(emissions.shape[:-2])

    def _rows(self, emissions: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The additive parts ``[B, ...]``, or ``[1, ...]`` where all rows share them, and lengths ``[B]``."""
        batch = emissions.shape[:-2]
        rows = math.prod(batch)
        parts = {"observation_dist": (emissions, 2)}
        parts |= {f"duration_logits {i}": (x, 2) for i, x in enumerate(self._tables())}
        parts |= {"transition_logits": (self._transition(), 2), "initial_logits": (self.initial, 1)}
        flat = []
        for name, (x, dims) in parts.items():
            if not is_wrapped(x) and x.numel() and not bool(x.detach().amax() < math.inf):
                raise ValueError(f"{name.split()[0]}: log probabilities must not be NaN or +inf")
            lead, event = x.shape[: x.dim() - dims], x.shape[x.dim() - dims :]
            shared = math.prod(lead) == 1 and x is not emissions
            flat.append(x.reshape(1, *event) if shared else x.expand(*batch, *event).reshape(rows, *event))
        return tuple(flat), self._lengths(emissions).reshape(-1)

    def _sum(self, parts: tuple[Tensor, ...], lengths: Tensor) -> Tensor:
        if not lengths.numel():  # an empty batch: nothing, with gradients
            return sum(x.sum() for x in parts).double().expand(0)  # type: ignore[union-attr]
        return recursion.log_partition(semimarkov.ADDITIVE, parts, lengths)

    def _log_boundary(self, steps: int, device: torch.device) -> Tensor:
        """Log probability, ``[*batch]`` or a number, that a segment ends with the sequence, where that is given."""
        if self.right_censored:
            return torch.zeros((), device=device, dtype=torch.float64)
        emissions = self.initial.new_zeros(*self.batch_shape, steps, self.num_states)
        total = self._sum(*self._rows(emissions)).view(self.batch_shape)
        return torch.where(total == -math.inf, 0.0, total)


def _at_least(log_probs: Tensor) -> Tensor:
    """log P(duration >= d) ``[..., D]``; -inf, with gradient 0, where no such duration is allowed."""
    low = torch.finfo(log_probs.dtype).min / 4  # logcumsumexp has NaN for the gradient at -inf
    finite = torch.where(log_probs == -math.inf, low, log_probs)
    total = finite.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(total <= low / 2, -math.inf, total)
