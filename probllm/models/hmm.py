"""A hidden Markov model of series: vectors, counts, symbols, or whatever a Pyro law can emit.

    z_1 ~ initial,   z_t ~ transition[z_{t-1}],   x_t ~ emissions[z_t]                                    (Rabiner 1989)

The states are summed out exactly. ``estimate`` learns by EM, variational Bayes or stochastic EM, with conjugate priors,
k-means starts and restarts; ``fit`` and SVI train the same parameters by gradient, and ``joint`` is the program with
priors, for NUTS.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.distributions.hidden_markov_model import HiddenMarkovModel
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math.masks import lengths_from_mask
from probllm.models import hmm_learning
from probllm.models.hmm_emissions import Emissions, above_zero
from probllm.models.hmm_learning import Estimate, Series, batches_of, matched
from probllm.models.model import Batch, Model

STEPS = 1 << 16  # of a batch of the E step, padding counted

Method = Literal["em", "variational", "stochastic"]


class HMM(Model):
    """A hidden Markov model with K states.

    A batch is ``{"inputs": [B, T] or [B, T, D], "mask": [B, T], "observed": [B, T]}``; ``mask`` (all real if missing)
    is padded on the right, ``observed`` is False where a step's observation is missing. Where ``inputs`` is missing
    they are sampled, for the lengths of ``mask``.

    Args:
        emissions: what the states emit; it says how many states there are.
        initial_concentration, transition_concentration: of the symmetric Dirichlet priors, in the softmax basis for
            point estimates: the mode is (counts + concentration) / sum.
    """

    def __init__(
        self, emissions: Emissions, initial_concentration: float = 0.1, transition_concentration: float = 0.1
    ) -> None:
        super().__init__()
        above_zero(initial_concentration=initial_concentration, transition_concentration=transition_concentration)
        k = emissions.num_states
        self.emissions = emissions
        self.initial_concentration, self.transition_concentration = initial_concentration, transition_concentration
        self.initial, self.transition = nn.Parameter(torch.zeros(k)), nn.Parameter(0.1 * torch.randn(k, k))
        self.restarts: list[dict[str, float]] = []

    @property
    def num_states(self) -> int:
        """K."""
        return self.emissions.num_states

    # The Pyro program.

    def law(self, batch: Batch) -> HiddenMarkovModel:
        """The law of a batch's observations."""
        lengths, steps = self._lengths(batch)
        return HiddenMarkovModel(self.initial, self.transition, self.emissions.law(), lengths, duration=steps)

    def forward(self, batch: Batch) -> Tensor | None:
        law, inputs, observed = self.law(batch), batch.get("inputs"), batch.get("observed")
        with self.plate(batch):
            if inputs is not None and observed is not None:  # the law of what was seen, the rest summed out
                pyro.factor("inputs", law.log_prob(inputs, observed))
                return None
            drawn: Tensor = pyro.sample("inputs", law, obs=inputs)
            return drawn

    def joint(self, batch: Batch) -> None:
        """The program with priors on all parameters, states summed out: for NUTS, or SVI with an automatic guide.

        Raises:
            NotImplementedError: for emissions without a prior.
        """
        k = self.num_states
        ones = self.initial.new_ones(k)
        initial = pyro.sample("initial", dist.Dirichlet(self.initial_concentration * ones))
        with pyro.plate("states", k):
            transition = pyro.sample("transition", dist.Dirichlet(self.transition_concentration * ones))
        emission = self.emissions.sites()
        lengths, steps = self._lengths(batch)
        tiny = torch.finfo(initial.dtype).tiny
        first, rows = initial.clamp_min(tiny).log(), transition.clamp_min(tiny).log()
        law = HiddenMarkovModel(first, rows, emission, lengths, duration=steps)
        with self.plate(batch):
            pyro.factor("inputs", law.log_prob(batch["inputs"], batch.get("observed")))

    # The verbs.

    def log_prob(self, batch: Batch) -> Tensor:
        """log p(x) ``[B]`` of what was observed, in nats."""
        return self.law(batch).log_prob(self._inputs(batch), batch.get("observed"))

    def posterior(self, batch: Batch) -> LinearChainCRF:
        """The exact law of the states given what was observed."""
        return self.law(batch).posterior(self._inputs(batch), batch.get("observed"))

    def predict(self, batch: Batch) -> Tensor:
        """The best sequence of states ``[B, T]``; 0 at padding."""
        return self.posterior(batch).mode

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each state at each step, ``[B, T, K]``; 0 at padding."""
        return self.posterior(batch).marginals

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, T, ...]`` series for the lengths of ``batch["mask"]``."""
        if batch is None:
            raise ValueError("batch is None: expected a mask that says how long the series are")
        lengths, steps = self._lengths(batch)
        law = HiddenMarkovModel(self.initial, self.transition, self.emissions.law(), lengths, duration=steps)
        return law.sample((n,) if law.batch_shape else (n, len(batch["mask"])))

    def num_free(self) -> int:
        """Number of free parameters: of the initial row, the transitions and the emissions."""
        k = self.num_states
        return (k - 1) + k * (k - 1) + self.emissions.num_free

    @torch.no_grad()
    def information_criteria(self, data: Any) -> dict[str, float]:
        """AIC and BIC of data (less is better): 2 p - 2 log L, and p log n - 2 log L with n the observed steps."""
        run = self._run()
        batches = batches_of(self._sequences(data), STEPS)
        log_likelihood = sum(
            float(hmm_learning.expect(run, run.rows, run.emissions.log_prob, x)[0].log_likelihood) for x in batches
        )
        steps = sum(int(x.seen.sum()) for x in batches)
        free = self.num_free()
        return {
            "log_likelihood": log_likelihood,
            "aic": 2 * free - 2 * log_likelihood,
            "bic": free * math.log(max(1, steps)) - 2 * log_likelihood,
        }

    # Estimation.

    @torch.no_grad()
    def estimate(
        self,
        data: Any,
        method: Method = "em",
        iterations: int = 100,
        tolerance: float = 1e-6,
        restarts: int = 1,
        warm: bool = False,
        step: float = 0.7,
        batch_steps: int | None = None,
        seed: int = 0,
    ) -> list[dict[str, float]]:
        """Learn from series without states.

        Args:
            data: a Dataset of examples ``{"inputs": [T] or [T, D]}``, with ``observed`` [T] where steps are missing.
            method: ``"em"`` (point estimate), ``"variational"`` (Bayes; the parameters end as the posterior's means) or
                ``"stochastic"`` (EM on minibatches).
            iterations: at most; epochs if stochastic.
            tolerance: stop when an iteration gains less than this part of the objective.
            restarts: k-means starts from ``seed``, ``seed + 1``, ...; the best is kept. ``self.restarts`` then tells of
                each its ``log_density`` (or bound) and ``agreement``: the share of steps in which its states, matched
                with those of the best, are the same.
            warm: begin with the present parameters (one start) instead of k-means.
            step: exponent of the steps of stochastic EM, above 0.5 and at most 1.
            batch_steps: steps of time in a minibatch; 1,024 if stochastic, else 65,536.
        Returns:
            of the best run one dict an iteration: ``loss`` and ``penalised_loss``, with the log prior, per sequence in
            nats; if variational both are the negative bound.
        Raises:
            ValueError: for no data, observations that are not finite or do not fit, or an argument out of range.
            NotImplementedError: for emissions that have no conjugate estimate.
        """
        if method not in ("em", "variational", "stochastic"):
            raise ValueError(f"method: expected 'em', 'variational' or 'stochastic', got {method!r}")
        if iterations < 1 or restarts < 1:
            raise ValueError(f"iterations, restarts: expected at least 1, got {iterations} and {restarts}")
        if not 0.5 < step <= 1:
            raise ValueError(f"step: expected above 0.5 and at most 1, got {step}")
        sequences = self._sequences(data)
        batches = batches_of(sequences, batch_steps or (1024 if method == "stochastic" else STEPS))
        every = torch.cat([x[seen] for x, seen in sequences])
        if not len(every):
            raise ValueError("data has no observed step")
        learn: dict[str, Callable[[Estimate], Any]] = {
            "em": lambda run: hmm_learning.maximise_expectation(run, batches, iterations, tolerance),
            "variational": lambda run: hmm_learning.variational_bayes(run, batches, iterations, tolerance),
            "stochastic": lambda run: hmm_learning.stochastic_em(run, batches, iterations, step, seed),
        }
        runs: list[tuple[float, Estimate, list[tuple[float, float]]]] = []
        for start in range(1 if warm else restarts):
            run = self._run()
            if not warm:
                run.emissions.initialise(every, seed + start)
                self._start(run, seed + start)
            history = list(learn[method](run))
            runs.append((history[-1][1], run, history))
        best = max(range(len(runs)), key=lambda i: runs[i][0])
        _, run, history = runs[best]
        states = self._states(run, batches)
        self.restarts = []
        for other_density, other, _ in runs:
            theirs = self._states(other, batches)
            order = matched(states, theirs)
            same = (states.argmax(-1) == theirs[:, order].argmax(-1)).double().mean()
            self.restarts.append({"log_density": other_density, "agreement": float(same)})
        for parameter, row in zip(self._rows(), run.rows, strict=True):
            parameter.copy_(torch.where(row == -torch.inf, 0.0, row))  # what is forbidden for good has no parameter
        self.emissions.load_state_dict(run.emissions.state_dict())
        return [{"loss": -a / len(data), "penalised_loss": -b / len(data)} for a, b in history]

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Renumbers the states: the new state i is the old ``order[i]``."""
        if sorted(order.tolist()) != list(range(self.num_states)):
            raise ValueError(f"order: expected a permutation of 0..{self.num_states - 1}, got {order.tolist()}")
        self.initial.copy_(self.initial[order].clone())
        self.transition.copy_(self.transition[order][:, order].clone())
        self.emissions.permute(order)

    def _rows(self) -> tuple[Tensor, ...]:
        """The parameters of the chain that have Dirichlet priors."""
        return self.initial, self.transition

    def _concentrations(self) -> tuple[Tensor, ...]:
        each = (self.initial_concentration, self.transition_concentration)
        return tuple(torch.full(x.shape, c, dtype=torch.float64) for x, c in zip(self._rows(), each, strict=True))

    def _run(self) -> Estimate:
        """A float64 copy that learning changes."""
        rows = tuple(x.detach().double().cpu().log_softmax(-1) for x in self._rows())
        return Estimate(rows, self._concentrations(), copy.deepcopy(self.emissions).double().cpu(), self._expect)

    _expect = staticmethod(hmm_learning.chain_steps)

    @staticmethod
    def _start(run: Estimate, seed: int) -> None:
        """Rows near uniform, somewhat sticky, as a series' states mostly are."""
        generator = torch.Generator().manual_seed(seed)
        k = run.num_states
        noise = torch.rand(k, k, generator=generator, dtype=torch.float64)
        initial = torch.zeros(k, dtype=torch.float64).log_softmax(-1)
        run.rows = (initial, (1 / k + noise / k + torch.eye(k, dtype=torch.float64)).log().log_softmax(-1))

    @staticmethod
    def _states(run: Estimate, batches: list[Series]) -> Tensor:
        """Probability of each state at each real step of the data, ``[N, K]``."""
        found = []
        for batch in batches:
            gamma = hmm_learning.expect(run, run.rows, run.emissions.log_prob, batch)[1]
            found.append(gamma[torch.arange(gamma.shape[1]) < batch.lengths.unsqueeze(-1)])
        return torch.cat(found)

    def _lengths(self, batch: Batch) -> tuple[Tensor | None, int]:
        mask = batch.get("mask")
        if mask is not None:
            return lengths_from_mask(mask), mask.shape[1]
        return None, self._inputs(batch).shape[1]

    def _inputs(self, batch: Batch) -> Tensor:
        inputs: Tensor | None = batch.get("inputs")
        if inputs is None:
            raise ValueError(f"batch has no inputs: its keys are {sorted(batch)}")
        expected = 2 + self.emissions.event_dims
        if inputs.dim() != expected:
            raise ValueError(f"inputs: expected {expected} dimensions, got shape {list(inputs.shape)}")
        return inputs

    def _sequences(self, data: Any) -> list[tuple[Tensor, Tensor]]:
        """Observations ``[T, ...]``, float64 or long, and which steps were seen ``[T]``."""
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one sequence")
        sequences = []
        for index in range(len(data)):
            example = data[index]
            if "inputs" not in example:
                raise ValueError(f"data[{index}] has no inputs: its keys are {sorted(example)}")
            x = example["inputs"].cpu()
            if x.dim() != 1 + self.emissions.event_dims:
                raise ValueError(
                    f"data[{index}]: inputs: expected {1 + self.emissions.event_dims} dimensions, got {list(x.shape)}"
                )
            seen = example["observed"].cpu() if "observed" in example else torch.ones(len(x), dtype=torch.bool)
            if "mask" in example:
                x, seen = x[example["mask"]], seen[example["mask"]]
            if x.is_floating_point():
                if not bool(torch.isfinite(x[seen]).all()):
                    raise ValueError(f"data[{index}]: inputs: expected finite numbers (missing steps: observed=False)")
                x = torch.where(seen.reshape(-1, *(1,) * (x.dim() - 1)), x.double(), 0.0)
            sequences.append((x, seen))
        return sequences
