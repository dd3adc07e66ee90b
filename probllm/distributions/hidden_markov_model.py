"""The hidden Markov model: a law over observation sequences in which the chain of states is summed out exactly.

    z_1 ~ initial,   z_t ~ transition(z_{t-1}),   x_t ~ observation(z_t),      p(x) = sum_z p(z, x)      (Rabiner 1989)

There are T - 1 transitions: the first state comes from ``initial`` itself. (Pyro's ``DiscreteHMM`` makes a transition
before its first observation.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.distributions.summed_out import SummedOutDistribution
from probllm.math.chain import as_chain, chain_log_partition, check_lengths, is_wrapped
from probllm.math.hmm import log_likelihood
from probllm.math.masks import mask_from_lengths
from probllm.math.shapes import broadcast_shapes
from probllm.math.streaming import Filter


class HiddenMarkovModel(SummedOutDistribution):
    """Law over observations ``[T, *observation]`` of a Markov chain with K hidden states.

    Args:
        initial_logits: ``[..., K]`` logits of the first state.
        transition_logits: ``[K, K]``, ``[from, to]``, or ``[..., T - 1, K, K]`` (or ``[..., 1, K, K]``); normalised
            over the last dimension.
        observation_dist: law of an observation given the state, batch shape ``[K]`` or one that broadcasts to
            ``[*batch, T, K]``; any distribution of Pyro or torch.
        lengths: ``[*batch]`` from 1 to T.
        duration: T, where nothing else tells it; a homogeneous model needs it to be sampled.
    Raises:
        TypeError: for logits that are no floating-point tensors, an observation law that is no distribution, or
            lengths that are no integers.
        ValueError: for shapes that do not agree or lengths out of range.
    Source: Rabiner (1989).
    """

    _of_what = "an HMM's observations"
    _because = "every observation sequence sums over all state sequences; posterior(x) has it for the states"

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
        if initial_logits.dim() < 1 or initial_logits.shape[-1] < 1:
            raise ValueError(f"initial_logits: expected shape [..., K], got {list(initial_logits.shape)}")
        k = initial_logits.shape[-1]
        if transition_logits.dim() < 2 or transition_logits.shape[-2:] != (k, k):
            raise ValueError(f"transition_logits: expected [..., {k}, {k}], got {list(transition_logits.shape)}")
        if not isinstance(observation_dist, torch.distributions.Distribution):
            raise TypeError(f"observation_dist: expected a distribution, got {type(observation_dist).__name__}")
        over = observation_dist.batch_shape
        if not over or over[-1] not in (1, k):
            raise ValueError(f"observation_dist: expected batch shape [..., {k}] (states last), got {list(over)}")
        steps = {over[-2]} if len(over) > 1 and over[-2] > 1 else set()
        if transition_logits.dim() > 2 and transition_logits.shape[-3] > 1:
            steps.add(transition_logits.shape[-3] + 1)
        if duration is not None:
            if duration < 1:
                raise ValueError(f"duration: expected at least 1, got {duration}")
            steps.add(duration)
        if len(steps) > 1:
            raise ValueError(
                f"observation_dist, transition_logits and duration disagree on the number of steps: {sorted(steps)}"
            )
        self.duration = (
            steps.pop() if steps else (1 if transition_logits.dim() > 2 and transition_logits.shape[-3] == 0 else None)
        )
        self.initial = normalised(initial_logits)
        self.transition = normalised(transition_logits)
        self.observation_dist = observation_dist
        self.lengths = lengths
        if lengths is not None:
            check_lengths(lengths, self.duration)
        batches = {
            "initial_logits": initial_logits.shape[:-1],
            "transition_logits": transition_logits.shape[:-3],
            "observation_dist": over[:-2],
            "lengths": () if lengths is None else lengths.shape,
        }
        try:
            batch = broadcast_shapes(*batches.values())
        except RuntimeError:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in batches.items())
            raise ValueError(f"batch shapes do not broadcast: {found}") from None
        event = torch.Size((self.duration or 1, *observation_dist.event_shape))
        self._own_shape = torch.Size(batch)
        super().__init__(self._own_shape, event, validate_args=False)

    @property
    def num_states(self) -> int:
        """K."""
        return int(self.initial.shape[-1])

    @property
    def support(self) -> constraints.Constraint:
        inner = self.observation_dist.support
        return constraints.independent(inner, 1)

    def emissions(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x_t | z_t = k) as ``[..., T, K]``; 0 where ``observed`` is False, and on padding.

        Args:
            value: ``[..., T, *observation]``.
            observed: ``[..., T]`` bool; False where a step's observation is missing (its value is ignored).
        """
        inner = len(self.observation_dist.event_shape)
        if value.dim() < 1 + inner:
            raise ValueError(
                f"value: expected shape [..., T, *{list(self.observation_dist.event_shape)}], got {list(value.shape)}"
            )
        at = value.dim() - 1 - inner
        steps = value.shape[at]
        if self.duration is not None and steps != self.duration:
            raise ValueError(f"value: expected {self.duration} steps, got shape {list(value.shape)}")
        if value.shape[at + 1 :] != self.observation_dist.event_shape:
            raise ValueError(
                f"value: expected observations of shape {list(self.observation_dist.event_shape)}, "
                f"got {list(value.shape)}"
            )
        real = None if self.lengths is None else mask_from_lengths(self.lengths, steps)
        if observed is not None:
            if observed.dtype != torch.bool:
                raise TypeError(f"observed: expected dtype torch.bool, got {observed.dtype}")
            if observed.dim() < 1 or observed.shape[-1] != steps:
                raise ValueError(f"observed: expected shape [..., {steps}], got {list(observed.shape)}")
            real = observed if real is None else real & observed
        if real is not None:
            real = real.expand(broadcast_shapes(real.shape, value.shape[: at + 1]))
            value = value.expand(*real.shape, *value.shape[at + 1 :])
            legal = self._legal(value, real)
            value = torch.where(real.reshape(*real.shape, *(1,) * inner), value, legal)
        found = self._score(value)
        return found if real is None else torch.where(real.unsqueeze(-1), found, torch.zeros_like(found))

    @property
    def _table(self) -> Tensor | None:
        """log p(symbol | state) ``[K, V]`` where states emit symbols, at all steps alike."""
        law: Any = self.observation_dist
        shared = isinstance(law, torch.distributions.Categorical) and law.batch_shape == (self.num_states,)
        return law.logits if shared else None

    def _score(self, value: Tensor) -> Tensor:
        """log p(x | z = k) of observations ``[..., *observation]`` as ``[..., K]``."""
        law, table = self.observation_dist, self._table
        if table is not None:
            # its rows; the law itself would write out a copy of it for each observation
            if law._validate_args:
                law._validate_sample(value.unsqueeze(-1))
            return table.t()[value.long()]
        found: Tensor = law.log_prob(value.unsqueeze(value.dim() - len(law.event_shape)))
        return found.expand(*found.shape[:-1], self.num_states)

    def _legal(self, value: Tensor, real: Tensor) -> Tensor:
        """One observation in the support, to stand at missing and padded steps while they are scored."""
        if not is_wrapped(value) and not is_wrapped(real) and bool(real.any()):
            seen: Tensor = value[real][0].detach()
            return seen
        with torch.no_grad(), torch.random.fork_rng():
            one = self.observation_dist.sample()
        inner = len(self.observation_dist.event_shape)
        legal: Tensor = one.reshape(-1, *one.shape[one.dim() - inner :])[0].to(value.dtype)
        return legal

    def _emission_rows(self, value: Tensor, observed: Tensor | None) -> Tensor:
        """``emissions`` over the whole batch."""
        emissions = self.emissions(value, observed)
        return emissions.expand(*self._with_batch(emissions.shape[:-2]), *emissions.shape[-2:])

    def _with_batch(self, shape: torch.Size) -> torch.Size:
        """The batch shape of a value, broadcast with that of the law."""
        try:
            return torch.Size(broadcast_shapes(shape, self.batch_shape))
        except RuntimeError:
            raise ValueError(
                f"value: batch shape {list(shape)} does not broadcast with {list(self.batch_shape)}, that of the law"
            ) from None

    def log_prob(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x) ``[...]``, in nats, summed over all state sequences, and over steps where ``observed`` is False."""
        table = self._table if observed is None else None
        if table is not None and self._is_plain(table, value):
            return self._log_prob_of_symbols(table, value)
        emissions = self._emission_rows(value, observed)
        chain = as_chain(emissions, self.transition, self.initial, None, self.lengths)
        return chain_log_partition(chain).view(chain.batch_shape).to(emissions.dtype)

    def _is_plain(self, table: Tensor, value: Tensor) -> bool:
        """Whether all steps and rows share their scores, outside of transforms, so that counts are the derivatives."""
        scores = self.initial, self.transition, table
        plain = value.device.type == "cpu" and value.dtype == torch.long and value.numel() and value.dim() > 0
        return (
            bool(plain)
            and self.initial.dim() == 1
            and self.transition.dim() == 2
            and all(x.dtype == scores[0].dtype and x.device == value.device for x in scores)
            and scores[0].dtype in (torch.float32, torch.float64)
            and not torch._C._are_functorch_transforms_active()
            and not torch.compiler.is_compiling()
        )

    def _log_prob_of_symbols(self, table: Tensor, value: Tensor) -> Tensor:
        steps = value.shape[-1]
        if self.duration is not None and steps != self.duration:
            raise ValueError(f"value: expected {self.duration} steps, got shape {list(value.shape)}")
        if self.lengths is None and not self.batch_shape and value.dim() == 2:
            return log_likelihood(value, self.initial, self.transition, table)
        shape, lengths = self._with_batch(value.shape[:-1]), self.lengths
        if lengths is not None:
            lengths = lengths.expand(shape)
            value = torch.where(mask_from_lengths(lengths, steps), value, 0)
            lengths = lengths.reshape(-1)
        value = value.expand(*shape, steps).reshape(-1, steps)
        return log_likelihood(value, self.initial, self.transition, table, lengths).view(shape)

    def posterior(self, value: Tensor, observed: Tensor | None = None) -> LinearChainCRF:
        """p(z | x), a law over state sequences; its ``log_partition`` is log p(x)."""
        emissions = self._emission_rows(value, observed)
        return LinearChainCRF(emissions, self.transition, self.initial, None, self.lengths)

    def log_prob_joint(self, states: Tensor, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(z, x) ``[...]``, in nats."""
        return self.posterior(value, observed).score(states)

    def start(self, lag: int = 0) -> Filter:
        """What is known of the states before the first observation; pass it along with ``step``.

        Args:
            lag: how many steps ``Filter.smoothed`` can look back.
        """
        table = self.transition
        if table.dim() > 2:  # a step brings its own
            table = table[..., 0, :, :] if table.shape[-3] else table.new_zeros(self.num_states, self.num_states)
        return Filter.start(self.initial.expand(*self.batch_shape, self.num_states), table, lag)

    def step(self, state: Filter, value: Tensor, observed: Tensor | None = None) -> tuple[Filter, Tensor]:
        """Takes the next observation in: ``state.filtered`` is p(z_t | x_1..t), whatever the duration.

        Args:
            value: ``[..., *observation]``.
            observed: ``[...]`` bool; False where the observation is missing (its value is ignored).
        Returns:
            The next state, and log p(x_t | x_1..t-1) ``[...]`` in nats.
        Raises:
            ValueError: beyond the last step, where transitions or observation laws are given step by step.
        """
        over, t = self.observation_dist.batch_shape, state.steps
        own = self.transition.dim() > 2 and self.transition.shape[-3] > 1
        by_step = len(over) > 1 and over[-2] > 1
        if self.duration is not None and (own or by_step) and t >= self.duration:
            raise ValueError(f"state: expected fewer than {self.duration} steps, got {t}")
        at = value.dim() - len(self.observation_dist.event_shape)
        value = value.unsqueeze(at)
        if observed is not None:
            legal = self._legal(value, observed.unsqueeze(-1))
            shape = (*observed.shape, *(1,) * (value.dim() - at))
            value = torch.where(observed.reshape(shape), value, legal)
        if by_step:
            # one law for all steps scores the observation at each of them, of which one counts
            found = self.observation_dist.log_prob(value.unsqueeze(at))[..., t, :]
        else:
            found = self.observation_dist.log_prob(value.unsqueeze(at)).squeeze(-2)
        if observed is not None:
            found = torch.where(observed.unsqueeze(-1), found, torch.zeros_like(found))
        table = self.transition[..., t - 1, :, :] if own and t else None
        return state.step(found.expand(*found.shape[:-1], self.num_states), table)

    def _prior(self) -> LinearChainCRF:
        if self.duration is None:
            raise ValueError("duration: a homogeneous model is sampled only when duration is given")
        emissions = self.initial.new_zeros(*self.batch_shape, self.duration, self.num_states)
        return LinearChainCRF(emissions, self.transition, self.initial, None, self.lengths)

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Exact samples: states ``[*sample, *batch, T]``, observations ``[*sample, *batch, T, *observation]``."""
        with torch.no_grad():
            structure = self._draw_states(sample_shape)
            states = self._state_of_each_step(structure)
            full = (*states.shape, self.num_states)
            drawn = self.observation_dist.expand(full).sample()
            inner = len(self.observation_dist.event_shape)
            ones = (1,) * inner
            at = states.clamp_min(0).reshape(*states.shape, 1, *ones)
            at = at.expand(*states.shape, 1, *self.observation_dist.event_shape)
            observations = drawn.gather(states.dim(), at).squeeze(states.dim())
            if self.lengths is not None:
                real = mask_from_lengths(self.lengths, states.shape[-1]).expand(states.shape)
                observations = torch.where(real.reshape(*states.shape, *ones), observations, 0)
            return structure, observations

    def _draw_states(self, sample_shape: Any) -> Tensor:
        return self._prior().sample(sample_shape)

    def _state_of_each_step(self, structure: Tensor) -> Tensor:
        return structure

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Observations ``[*sample_shape, *batch, T, *observation]``; 0 on padding."""
        return self.sample_joint(sample_shape)[1]


def check_logits(**named: Any) -> None:
    """Raises TypeError for what is no floating-point tensor."""
    for name, logits in named.items():
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(logits).__name__}")
        if not logits.is_floating_point():
            raise TypeError(f"{name}: expected floating-point logits, got {logits.dtype}")


def normalised(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension that is -inf, with gradient 0, where all entries are -inf."""
    if not is_wrapped(logits) and math.isfinite(logits.detach().sum()):  # so that nothing is -inf
        return torch.log_softmax(logits, -1)
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    log = torch.log_softmax(torch.where(nothing, torch.zeros_like(logits), logits), -1)
    return torch.where(nothing, torch.full_like(log, -math.inf), log)
