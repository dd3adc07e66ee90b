"""Filter, fixed lag, streaming and forecasts of the linear-Gaussian law against its smoother, which is tested apart."""

from __future__ import annotations

import torch
from hypothesis import given

from tests.distributions.dense_gaussian import Case, cases


@given(cases())
def test_filter_steps_and_lags_are_conditionals(case: Case) -> None:
    law, steps = case.law, case.value.shape[-2]
    found = law.filter(case.value, case.observed)
    torch.testing.assert_close(found.log_prob.sum(-1), law.log_prob(case.value, case.observed))
    for lag in range(3):
        mean, covariance = law.fixed_lag(case.value, lag, case.observed)
        for t in range(steps):
            cut = torch.arange(steps).unsqueeze(-1) <= t + lag
            row = case._replace(observed=case.seen & cut)
            inside = case.present[..., t, :]
            smooth = law.posterior(row.value, row.observed)
            torch.testing.assert_close(mean[..., t, :], torch.where(inside, smooth.mean[..., t, :], 0.0))
            torch.testing.assert_close(
                covariance[..., t, :, :], torch.where(inside.unsqueeze(-1), smooth.covariance[..., t, :, :], 0.0)
            )
            if lag == 0:
                torch.testing.assert_close(found.mean[..., t, :], mean[..., t, :])
                torch.testing.assert_close(found.covariance[..., t, :, :], covariance[..., t, :, :])


@given(cases())
def test_streaming_is_the_batch(case: Case) -> None:
    if case.law.lengths is not None:
        return
    law, steps = case.law, case.value.shape[-2]
    found = law.filter(case.value, case.observed)
    state, total, states = law.start(case.lengths.shape), [], []
    for t in range(steps):
        seen = None if case.observed is None else case.observed[..., t, :]
        state, log_p = law.step(state, case.value[..., t, :], seen)
        total.append(log_p)
        states.append(state)
        torch.testing.assert_close(state.mean, found.mean[..., t, :])
        torch.testing.assert_close(state.covariance, found.covariance[..., t, :, :])
    torch.testing.assert_close(torch.stack(total, -1), found.log_prob)
    torch.testing.assert_close(state, found.state)
    posterior = law.posterior(case.value, case.observed)
    for t in range(steps - 1):
        later = law.look_back(
            states[t], case.value[..., t + 1 :, :], None if case.observed is None else case.observed[..., t + 1 :, :]
        )
        torch.testing.assert_close(later.mean, posterior.mean[..., t, :])
        torch.testing.assert_close(later.covariance, posterior.covariance[..., t, :, :])
        # Bayes: the whole is the beginning times what follows
        rest = law.forecast(steps - t - 1, states[t])
        after = rest.log_prob(
            case.value[..., t + 1 :, :], None if case.observed is None else case.observed[..., t + 1 :, :]
        )
        torch.testing.assert_close(
            found.log_prob[..., : t + 1].sum(-1) + after, law.log_prob(case.value, case.observed)
        )
    torch.testing.assert_close(law.forecast(steps).log_prob(case.value), law.log_prob(case.value))
