"""Learning the parameters of a linear-Gaussian law from data: expectation maximisation with conjugate priors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probllm.distributions.gaussian_parameters import Parameters
from probllm.math.gaussian_em import RegressionPrior, Statistics, expected_statistics, maximise
from probllm.math.gaussian_steps import Chain

if TYPE_CHECKING:
    from typing import Self


class GaussianLearning:
    """What ``LinearGaussianSSM`` does to be fitted in closed form."""

    parameters: Parameters
    duration: int | None
    lengths: Tensor | None

    if TYPE_CHECKING:

        def _of(self, parameters: Parameters, duration: int | None, lengths: Tensor | None) -> Self: ...
        def _checked(self, value: Tensor, observed: Tensor | None) -> Tensor | None: ...
        def _chain(self, value: Tensor) -> Chain: ...
        def _log_prob(self, value: Tensor, entries: Tensor | None) -> Tensor: ...

    def expected_statistics(self, value: Tensor, observed: Tensor | None = None) -> Statistics:
        """What the M step of EM needs, summed over all rows: expected moments of states and observations."""
        entries = self._checked(value, observed)
        first = self.parameters.moves_first
        chain = self.parameters.chain_from_start(value) if first else self._chain(value)
        return expected_statistics(chain, self.lengths, entries, first)

    def estimate(
        self,
        value: Tensor,
        observed: Tensor | None = None,
        *,
        iterations: int = 50,
        tolerance: float = 1e-6,
        prior: dict[str, RegressionPrior] | None = None,
        diagonal: Sequence[str] = (),
    ) -> tuple[Self, list[float]]:
        """Expectation maximisation from this law's parameters, over all rows of ``value [..., T, o]``.

        Args:
            iterations: at most so many.
            tolerance: stop when an iteration gains less than this part of the objective.
            prior: conjugate priors of "initial", "transition" and "observation"; without them, maximum likelihood.
            diagonal: which of the three have a diagonal covariance.
        Returns:
            the law of the last iteration, and the objective before each: log density plus the priors' (up to their
            constants), in nats. No iteration lowers it.
        Raises:
            ValueError: for a law whose parameters change with time or differ between rows, or an unknown name.
        Source: Shumway and Stoffer (1982); Ghahramani and Hinton (1996).
        """
        names = ("initial", "transition", "observation")
        for unknown in {*(prior or {}), *diagonal} - set(names):
            raise ValueError(f"prior, diagonal: expected names among {list(names)}, got {unknown!r}")
        if any(x is not None and x.dim() > n for x, n in zip(self.parameters[:2], (1, 2), strict=True)) or any(
            getattr(self.parameters, name).shape[:-n].numel() > 1
            for name, n in (("transition", 2), ("drift", 1), ("noise", 2), ("emission", 2), ("offset", 1), ("error", 2))
        ):
            raise ValueError("estimate: expected parameters that are shared by all steps and all rows")
        law, history = self, []
        priors = [(prior or {}).get(name) for name in names]
        with torch.no_grad():
            entries = self._checked(value, observed)
            for _ in range(iterations):
                p = law.parameters
                now = ((p.mean.unsqueeze(0), p.covariance), *law._regressions())
                objective = float(law._log_prob(value, entries).sum())
                objective += sum(float(x.log_density(*y)) for x, y in zip(priors, now, strict=True) if x is not None)
                history.append(objective)
                if len(history) > 1 and history[-1] - history[-2] < tolerance * abs(history[-1]):
                    break
                found = law.expected_statistics(value, observed)
                fitted = [maximise(x, y, name in diagonal) for x, y, name in zip(found, priors, names, strict=True)]
                law = law._of(p.fitted(*fitted), self.duration, self.lengths)
        return law, history

    def _regressions(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Coefficients (the constant last) and covariances of the moves and of the observations."""
        p = self.parameters
        d, o = p.emission.shape[-2:]
        moves = torch.cat((p.transition.reshape(d, d), p.drift.reshape(1, d)))
        seen = torch.cat((p.emission.reshape(d, o), p.offset.reshape(1, o)))
        return (moves, p.noise.reshape(d, d)), (seen, p.error.reshape(o, o))
