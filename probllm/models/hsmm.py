"""A hidden semi-Markov model of series: states that say how long they last.

    z_1 ~ initial,  d_i ~ durations[z_i] in 1 .. D,  z_{i+1} ~ transition[z_i] (another state),  x_t ~ emissions[state]

An HMM's state lasts a geometric time, whatever the data says; here each state has a law of its own over 1 .. D steps.
The last segment is cut off by the end of the series (Guedon 2003). ``estimate`` is that of ``HMM``: the E step takes
the durations' expected counts too, those of the last segment spread over the durations that it may still reach.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.distributions.hidden_semi_markov_model import HiddenSemiMarkovModel
from probllm.distributions.semi_markov_crf import SemiMarkovCRF
from probllm.math import recursion, semimarkov
from probllm.models.hmm import HMM
from probllm.models.hmm_emissions import Emissions, above_zero, at_least_one
from probllm.models.hmm_learning import Estimate, Rows
from probllm.models.model import Batch


class HSMM(HMM):
    """A hidden semi-Markov model with K states; batches as for ``HMM``.

    Args:
        emissions: what the states emit; at least two states.
        max_duration: D, in steps.
        initial_concentration, transition_concentration, duration_concentration: of the symmetric Dirichlet priors.
    """

    def __init__(
        self,
        emissions: Emissions,
        max_duration: int,
        initial_concentration: float = 0.1,
        transition_concentration: float = 0.1,
        duration_concentration: float = 0.1,
    ) -> None:
        super().__init__(emissions, initial_concentration, transition_concentration)
        if emissions.num_states < 2:
            raise ValueError(f"emissions: expected at least 2 states, got {emissions.num_states}")
        at_least_one(max_duration=max_duration)
        above_zero(duration_concentration=duration_concentration)
        self.max_duration, self.duration_concentration = max_duration, duration_concentration
        self.durations = nn.Parameter(torch.zeros(emissions.num_states, max_duration))

    def _to_others(self) -> Tensor:
        """Transition logits without those from a state to itself."""
        k = self.num_states
        return self.transition.masked_fill(torch.eye(k, dtype=torch.bool, device=self.transition.device), -torch.inf)

    def law(self, batch: Batch) -> HiddenSemiMarkovModel:
        """The law of a batch's observations."""
        lengths, steps = self._lengths(batch)
        emission = self.emissions.law()
        return HiddenSemiMarkovModel(self.initial, self._to_others(), self.durations, emission, lengths, steps)

    def joint(self, batch: Batch) -> None:
        """The program with priors on all parameters, states summed out: for NUTS, or SVI with an automatic guide."""
        k, d = self.num_states, self.max_duration
        ones = self.initial.new_ones(k)
        initial = pyro.sample("initial", dist.Dirichlet(self.initial_concentration * ones))
        with pyro.plate("states", k):
            others = pyro.sample("transition", dist.Dirichlet(self.transition_concentration * ones[1:]))
            durations = pyro.sample("durations", dist.Dirichlet(self.duration_concentration * ones.new_ones(d)))
        tiny = torch.finfo(ones.dtype).tiny
        off = ~torch.eye(k, dtype=torch.bool, device=ones.device)
        rows = torch.full((k, k), -torch.inf, dtype=ones.dtype, device=ones.device)
        rows = rows.masked_scatter(off, others.clamp_min(tiny).log())
        lengths, steps = self._lengths(batch)
        first, lasting = initial.clamp_min(tiny).log(), durations.clamp_min(tiny).log()
        law = HiddenSemiMarkovModel(first, rows, lasting, self.emissions.sites(), lengths, steps)
        with self.plate(batch):
            pyro.factor("inputs", law.log_prob(batch["inputs"], batch.get("observed")))

    def posterior(self, batch: Batch) -> SemiMarkovCRF:
        """The exact law of the segmentation given what was observed; it holds T D K scores a row."""
        return self.law(batch).posterior(self._inputs(batch), batch.get("observed"))

    def predict(self, batch: Batch) -> Tensor:
        """The state at each step of the best segmentation, ``[B, T]``; 0 at padding."""
        law = self.law(batch)
        return semimarkov.step_labels(law.viterbi(self._inputs(batch), batch.get("observed")), law.lengths)

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each state at each step, ``[B, T, K]``; 0 at padding."""
        return self.law(batch).state_marginals(self._inputs(batch), batch.get("observed"))

    def num_free(self) -> int:
        k = self.num_states
        return (k - 1) + k * (k - 2) + k * (self.max_duration - 1) + self.emissions.num_free

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        super().permute(order)
        self.durations.copy_(self.durations[order].clone())

    def _rows(self) -> tuple[Tensor, ...]:
        return self.initial, self.transition, self.durations

    def _concentrations(self) -> tuple[Tensor, ...]:
        each = (self.initial_concentration, self.transition_concentration, self.duration_concentration)
        found = [torch.full(x.shape, c, dtype=torch.float64) for x, c in zip(self._rows(), each, strict=True)]
        found[1].fill_diagonal_(0.0)
        return tuple(found)

    def _run(self) -> Estimate:
        run = super()._run()
        rows = self._to_others().detach().double().cpu().log_softmax(-1)
        run.rows = (run.rows[0], rows, run.rows[2])
        return run

    @staticmethod
    def _expect(rows: Rows, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Rows]:
        """The E step (``hmm_learning.Expect``); rows may sum to less than one, as in variational Bayes."""
        initial, transition, durations = rows
        lasting = durations.T  # [D, K]
        at_least = lasting.flip(0).logcumsumexp(0).flip(0)
        parts = tuple(x.unsqueeze(0) for x in (lasting, at_least, transition, initial))
        with torch.enable_grad():
            leaves = tuple(x.detach().clone().requires_grad_() for x in (scores, *parts))
            log_z = recursion.log_partition(semimarkov.ADDITIVE, leaves, lengths)
            gamma, whole, last, moves, first = torch.autograd.grad(log_z.sum(), leaves)
        # what was seen of the last segment may go on: its duration is spread over those it may still reach
        share = torch.where(at_least > -torch.inf, last[0] * (-at_least).exp(), 0.0).cumsum(0)
        counts = whole[0] + share * lasting.exp()
        return log_z.detach(), gamma, (first[0], moves[0], counts.T)

    @staticmethod
    def _start(run: Estimate, seed: int) -> None:
        """Durations of every length alike, and rows that do not know each other."""
        k, d = run.rows[2].shape
        HMM._start(run, seed)
        rows = run.rows[1].masked_fill(torch.eye(k, dtype=torch.bool), -torch.inf).log_softmax(-1)
        run.rows = (run.rows[0], rows, torch.zeros(k, d, dtype=torch.float64).log_softmax(-1))


def mean_durations(model: HSMM) -> Tensor:
    """The mean duration of each state, in steps, ``[K]``."""
    steps: Any = torch.arange(1.0, model.max_duration + 1, device=model.durations.device)
    mean: Tensor = (model.durations.softmax(-1) * steps).sum(-1)
    return mean
