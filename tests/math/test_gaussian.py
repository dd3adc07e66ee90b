"""Kalman kernels against their torch twins, the twins against a dense normal, and the scan against the loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probllm.math import gaussian, gaussian_passes, gaussian_scan
from probllm.math.gaussian import KALMAN, flatten, log_prob, smoothed
from probllm.math.gaussian_paths import filter_moments, paths, recurrence, smooth, smooth_means
from probllm.math.gaussian_steps import EVENT_DIMS, Chain, apply, root, seen_entries
from probllm.math.recursion import expected_parts

Case = tuple[Chain, Tensor | None, Tensor | None]  # chain of 3 rows or of none, lengths, observed


def spread(generator: torch.Generator, *shape: int, rank: int | None = None) -> Tensor:
    """Covariances ``[*shape, shape[-1]]``, of less than full rank where asked."""
    n = shape[-1]
    a = torch.randn(*shape, n if rank is None else rank, generator=generator, dtype=torch.float64)
    return a @ a.mT + (0.3 * torch.eye(n) if rank is None else 0)


def chain_of(
    generator: torch.Generator,
    lead: tuple[int, ...],
    own: bool,
    by_step: bool,
    steps: int,
    d: int,
    o: int,
    rank: int | None,
) -> Chain:
    def shape(n: int, *event: int) -> tuple[int, ...]:
        return (*(lead if own else ()), *((n,) if by_step else (1,)), *event)

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator, dtype=torch.float64)

    start = lead if own else ()
    return Chain(
        normal(*lead, steps, o), normal(*start, d), spread(generator, *start, d, rank=rank),
        0.7 * normal(*shape(steps - 1, d, d)), normal(*shape(steps - 1, d)),
        spread(generator, *shape(steps - 1, d), rank=rank),
        normal(*shape(steps, d, o)), normal(*shape(steps, o)), spread(generator, *shape(steps, o)),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, longest: int = 5) -> Case:
    """Shared and own parameters, by step and not, rows that repeat, singular noise, lengths, missing entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, d, o = draw(st.integers(1, longest)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    lead = draw(st.sampled_from([(), (3,), (1,), (2, 2)]))
    rank = draw(st.sampled_from([None, None, 1]))
    own = draw(st.booleans())
    chain = chain_of(generator, lead, own, draw(st.booleans()), steps, d, o, rank)
    if own and lead == (3,) and draw(st.booleans()):  # two rows with the same parameters
        chain = Chain(chain.value, *(x[torch.tensor([0, 1, 0])] for x in chain[1:]))
    lengths = torch.randint(1, steps + 1, lead, generator=generator) if draw(st.booleans()) else None
    observed = torch.rand(*lead, steps, o, generator=generator) < 0.6 if draw(st.booleans()) else None
    return chain, lengths, observed


def dense_log_prob(case: Case) -> Tensor:
    """The joint normal of all observations of each row, what is missing cut out."""
    chain, lengths, observed = case
    steps, o = chain.value.shape[-2:]
    d = chain.mean.shape[-1]
    batch = chain.value.shape[:-2]
    rows = math.prod(batch)
    parts = []
    for x, n in zip(chain, EVENT_DIMS, strict=True):
        event = x.shape[x.dim() - n :]
        parts.append(x.expand(*batch, *event).reshape(rows, *event))
    total = []
    for b in range(len(parts[0])):
        value, mean, covariance, f, drift, noise, h, offset, error = (x[b] for x in parts)
        n = steps if lengths is None else int(lengths.reshape(-1)[b])
        # the states are a linear map of all noises
        maps, means, noises = [torch.eye(d, d * n, dtype=value.dtype)], [mean], [covariance]
        for t in range(1, n):
            move = f[min(t - 1, len(f) - 1)]
            entering = torch.zeros(d, d * n, dtype=value.dtype)
            entering[:, t * d : (t + 1) * d] = torch.eye(d)
            maps.append(move.T @ maps[-1] + entering)
            means.append(means[-1] @ move + drift[min(t - 1, len(drift) - 1)])
            noises.append(noise[min(t - 1, len(noise) - 1)])
        seen = [h[min(t, len(h) - 1)] for t in range(n)]
        to_values = torch.cat([s.T @ m for s, m in zip(seen, maps, strict=True)])
        joint = to_values @ torch.block_diag(*noises) @ to_values.T
        joint = joint + torch.block_diag(*(error[min(t, len(error) - 1)] for t in range(n)))
        center = torch.cat(
            [m @ s + offset[min(t, len(offset) - 1)] for t, (m, s) in enumerate(zip(means, seen, strict=True))]
        )
        keep = (
            torch.ones(n * o, dtype=torch.bool) if observed is None else observed.reshape(-1, steps, o)[b, :n].flatten()
        )
        if not bool(keep.any()):
            total.append(value.new_zeros(()))
            continue
        law = torch.distributions.MultivariateNormal(center[keep], joint[keep][:, keep], validate_args=False)
        total.append(law.log_prob(value[:n].flatten()[keep]))
    return torch.stack(total).view(batch)


def twin(case: Case) -> Tensor:
    flat, sizes, shape = flatten(*case)
    return KALMAN.twin(flat, sizes).view(shape)


def leaves(chain: Chain) -> Chain:
    return Chain(*(x.detach().clone().requires_grad_() for x in chain))


def gradients(total: Tensor, chain: Chain) -> list[Tensor]:
    found = torch.autograd.grad(total, chain, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, chain, strict=True)]


def symmetric(found: list[Tensor]) -> list[Tensor]:
    return [0.5 * (x + x.mT) if i in (2, 5, 8) else x for i, x in enumerate(found)]


@given(cases())
def test_log_prob_is_that_of_the_dense_normal_with_its_gradient(case: Case) -> None:
    chain = leaves(case[0])
    case = (chain, *case[1:])
    found, expected = log_prob(*case), dense_log_prob(case)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    expected_gradients = symmetric(gradients((expected * weights).sum(), chain)) if expected.requires_grad else None
    if expected_gradients is not None:
        torch.testing.assert_close(gradients((found * weights).sum(), chain), expected_gradients, rtol=1e-6, atol=1e-8)


@given(cases())
def test_kernels_are_their_twins(case: Case) -> None:
    chain = leaves(case[0])
    case = (chain, *case[1:])
    found, expected = log_prob(*case), twin(case)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    torch.testing.assert_close(
        gradients((found * weights).sum(), chain), gradients((expected * weights).sum(), chain), rtol=1e-8, atol=1e-9
    )
    with torch.no_grad():
        flat, sizes, shape = flatten(*case)
        seen = seen_entries(sizes, *chain.value.shape[-2:])
        moments = smooth(*case)
        for a, b in zip(moments, smoothed(flat, seen, sizes[:, 0]), strict=True):
            torch.testing.assert_close(
                a, b.expand(math.prod(shape), *b.shape[1:]).reshape(a.shape), rtol=1e-7, atol=1e-9
            )
        torch.testing.assert_close(smooth_means(*case), moments.mean)
        mean, covariance, log_p = filter_moments(*case)
        torch.testing.assert_close(log_p.sum(-1), found.detach())
        rows, last = torch.arange(len(sizes)), sizes[:, 0] - 1
        for a, b in ((mean, moments.mean), (covariance, moments.covariance)):  # the last state has seen all
            a, b = (x.reshape(len(sizes), -1, *x.shape[len(shape) + 1 :])[rows, last] for x in (a, b))
            torch.testing.assert_close(a, b)


@settings(max_examples=8)
@given(cases(longest=3))
def test_derivatives_agree_with_differences_twice(case: Case) -> None:
    lengths, observed = case[1:]
    chain = leaves(case[0])
    if sum(x.numel() for x in chain) > 120:
        return

    def value(*parts: Tensor) -> Tensor:
        return log_prob(Chain(*parts), lengths, observed)

    assert torch.autograd.gradcheck(value, tuple(chain), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, tuple(chain), fast_mode=True)


@settings(max_examples=10)
@given(cases(longest=3))
def test_moments_have_derivatives_that_agree_with_differences(case: Case) -> None:
    lengths, observed = case[1:]
    chain = leaves(case[0])

    def moments(*parts: Tensor) -> tuple[Tensor, ...]:
        found = smooth(Chain(*parts), lengths, observed)
        return (*found, *filter_moments(Chain(*parts), lengths, observed)[:2])

    assert torch.autograd.gradcheck(moments, tuple(chain), fast_mode=True)


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_scan_is_the_loop(by_step: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    for steps in (2, 3, 7, 64, 101):
        chain = leaves(chain_of(generator, (2,), True, by_step, steps, 3, 2, None))
        observed = torch.rand(2, steps, 2, generator=generator) < 0.6 if masked else None
        results = []
        for threshold in (1, 10**9):
            monkeypatch.setattr(gaussian, "SCAN_FROM", threshold)
            total = twin((chain, None, observed))
            flat, sizes, _ = flatten(chain, None, observed)
            moments = smoothed(flat, seen_entries(sizes, steps, 2), sizes[:, 0])
            results.append((total, *moments, *gradients(total.sum() + moments.mean.sum(), chain)))
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)


def test_scan_gives_every_prefix() -> None:
    for steps in range(1, 12):
        items = torch.randn(steps, 2, 2, dtype=torch.float64)
        (found,) = gaussian_scan.scan(lambda one, two: (one[0] @ two[0],), (items,), (2,))
        expected = torch.eye(2, dtype=torch.float64)
        for t in range(steps):
            expected = expected @ items[t]
            torch.testing.assert_close(found[t], expected)


def test_scan_is_not_taken_where_its_spans_are_ill_conditioned() -> None:
    chain = chain_of(torch.Generator().manual_seed(0), (1,), False, False, 60, 2, 2, None)
    assert gaussian_scan.is_regular(chain, None)
    assert not gaussian_scan.is_regular(chain._replace(noise=0 * chain.noise, error=1e-13 * chain.error), None)


@given(cases())
def test_vmap_and_grad_transform_the_kernels(case: Case) -> None:
    chain, lengths, observed = case
    if chain.value.dim() != 3 or lengths is not None or observed is not None:
        return
    own = len(chain.mean.shape) == 2
    dims = (0, *(0 if own else None for _ in chain[1:]))

    def one(*parts: Tensor) -> Tensor:
        return log_prob(Chain(*parts))

    torch.testing.assert_close(torch.func.vmap(one, dims)(*chain), log_prob(chain))
    found = torch.func.vmap(torch.func.grad(one, argnums=(0, 2, 3, 8)), dims)(*chain)
    copies = leaves(
        Chain(
            chain.value, *(x.expand(3, *x.shape[x.dim() - n :]) for x, n in zip(chain[1:], EVENT_DIMS[1:], strict=True))
        )
    )
    if len(chain.value) == 3:
        expected = gradients(log_prob(copies).sum(), copies)
        torch.testing.assert_close(list(found), [expected[i] for i in (0, 2, 3, 8)])
    tangents = tuple(torch.randn_like(x) for x in chain)
    _, along = torch.func.jvp(one, tuple(chain), tangents)
    full = leaves(chain)
    slopes = gradients(log_prob(full).sum(), full)
    torch.testing.assert_close(
        along.sum(), sum((a * b).sum() for a, b in zip(slopes, tangents, strict=True)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(("own", "by_step"), [(False, False), (False, True), (True, True)])
def test_recurrence_is_the_loop_with_its_derivatives(own: bool, by_step: bool) -> None:
    f = torch.randn(*((3,) if own else ()), 4 if by_step else 1, 2, 2, dtype=torch.float64, requires_grad=True)
    pushes = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    state, states = pushes[:, 0], [pushes[:, 0]]
    for t in range(1, 5):
        state = (state.unsqueeze(-2) @ f[..., t - 1 if by_step else 0, :, :]).squeeze(-2) + pushes[:, t]
        states.append(state)
    torch.testing.assert_close(recurrence(f, pushes), torch.stack(states, 1))
    assert torch.autograd.gradcheck(recurrence, (f, pushes))
    assert torch.autograd.gradgradcheck(recurrence, (f, pushes))
    _, along = torch.func.jvp(recurrence, (f, pushes), (torch.ones_like(f), torch.ones_like(pushes)))
    slopes = torch.autograd.grad(recurrence(f, pushes).sum(), (f, pushes))
    torch.testing.assert_close(along.sum(), slopes[0].sum() + slopes[1].sum())
    mapped = torch.func.vmap(recurrence, (None, 0))(f[0] if own else f, pushes)
    torch.testing.assert_close(mapped, recurrence(f[0] if own else f, pushes))


def drawn(case: Case, samples: int, spare: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Paths by the kernel, and the same by the story: z* + E[z | x] - E[z | x*], from the same noise."""
    chain, lengths, observed = case
    generator = torch.Generator().manual_seed(5)
    lead, steps = torch.Size((samples, *flatten(*case)[2])), chain.value.shape[-2]
    roots = root(chain.noise), root(chain.error)

    def white(*event: int) -> Tensor:
        return torch.randn(*lead, *event, generator=generator, dtype=dtype)

    first = white(chain.mean.shape[-1])
    w, v = white(steps if spare else steps - 1, first.shape[-1]), white(steps, chain.value.shape[-1])
    start = apply(first.double(), root(chain.covariance))
    later = roots[0]
    if spare and later.shape[-3] > 1:  # the first move stands before the steps that are seen
        later = torch.cat((later[..., :1, :, :], later), -3)
    found = paths(chain, lengths, observed, start, (w, later), (v, roots[1]))
    pushes = chain.drift + apply(w[..., 1:, :].double() if spare else w.double(), roots[0])
    states = recurrence(chain.transition, torch.cat(((chain.mean + start).unsqueeze(-2), pushes), -2))
    values = apply(states, chain.emission) + chain.offset + apply(v.double(), roots[1])
    states = states + smooth_means(*case) - smooth_means(chain._replace(value=values), lengths, observed)
    if lengths is not None:
        states = torch.where((torch.arange(steps) < lengths.unsqueeze(-1)).unsqueeze(-1), states, 0.0)
    return found, states


@given(cases(longest=20), st.integers(1, 7), st.booleans())
def test_paths_are_the_story_less_its_smoothed_mean(case: Case, samples: int, spare: bool) -> None:
    found, expected = drawn(case, samples, spare, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    differentiable = case[0]._replace(mean=case[0].mean.clone().requires_grad_())
    found, _ = drawn((differentiable, *case[1:]), samples, spare, torch.float64)
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_paths_from_narrow_noise_are_narrow() -> None:
    chain = chain_of(torch.Generator().manual_seed(2), (3,), True, True, 20, 3, 2, None)
    found, expected = drawn((chain, torch.tensor([20, 1, 9]), None), 5, True, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("own", [False, True])
def test_threads_draw_the_paths_that_one_thread_draws(own: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    chain = chain_of(generator, (7,), own, False, 200, 4, 2, None)
    chain = chain._replace(transition=0.4 * chain.transition)  # else states grow beyond what their differences can show
    lengths = torch.randint(1, 201, (7,), generator=generator)
    observed = torch.rand(7, 200, 2, generator=generator) < 0.7
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(drawn((chain, lengths, observed if own else None), 45, False, torch.float64))
    torch.set_num_threads(before)
    for found, expected in results:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found, results[0][0])


def test_threads_give_what_one_thread_gives() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    for own in (False, True):
        chain = leaves(chain_of(generator, (40,), own, False, 150, 4, 3, None))
        observed = torch.rand(40, 150, 3, generator=generator) < 0.7
        lengths = torch.randint(1, 151, (40,), generator=generator)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total = log_prob(chain, lengths, observed)
            results.append((total, *gradients(total.sum(), chain)))
        torch.set_num_threads(before)
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


def test_rows_with_the_same_parameters_share_the_covariances() -> None:
    chain = chain_of(torch.Generator().manual_seed(1), (4,), True, False, 5, 2, 2, None)
    chain = Chain(chain.value, *(x[torch.tensor([0, 1, 0, 0])] for x in chain[1:]))
    flat, sizes, _ = flatten(chain, None, None)
    assert len(gaussian_passes.filter_rows(flat, sizes).covariance) == 2
    flat, sizes, _ = flatten(Chain(chain.value, *(x[0] for x in chain[1:])), None, None)
    assert len(gaussian_passes.filter_rows(flat, sizes).covariance) == 1


def scalar_chain(**change: float) -> Chain:
    names = Chain._fields
    numbers = dict(zip(names, (0.5, 0.0, 1.0, 0.9, 0.0, 0.5, 1.0, 0.0, 0.3), strict=True)) | change
    steps = {"value": (1, 6, 1), "mean": (1,), "covariance": (1, 1)}
    shapes: dict[str, Any] = {
        n: (1, 1, 1) if dims == 3 else (1, 1) for n, dims in zip(numbers, EVENT_DIMS, strict=True)
    } | steps
    return Chain(**{n: torch.full(shapes[n], x, dtype=torch.float64) for n, x in numbers.items()})


@pytest.mark.parametrize(
    "change",
    [
        {"covariance": 1e12}, {"covariance": 1e-300}, {"covariance": 0.0}, {"noise": 0.0},
        {"covariance": 0.0, "noise": 0.0},
        {"error": 1e-12}, {"error": 0.0}, {"transition": 30.0}, {"transition": 0.0}, {"value": 1e9}, {"error": 1e12},
        {"covariance": 1e12, "error": 1e-9}, {"emission": 1e-9}, {"emission": 0.0},
    ],
)  # fmt: skip
def test_extreme_scales_are_right_and_have_finite_derivatives(change: dict[str, float]) -> None:
    chain = leaves(scalar_chain(**change))
    found = log_prob(chain)
    # the law of one number after another, by hand
    mean, var, total = change.get("mean", 0.0), change.get("covariance", 1.0), 0.0
    numbers = {n: float(x.detach().flatten()[0]) for n, x in chain._asdict().items()}
    for t in range(6):
        if t:
            mean, var = mean * numbers["transition"], var * numbers["transition"] ** 2 + numbers["noise"]
        s = numbers["emission"] ** 2 * var + numbers["error"]
        e = numbers["value"] - mean * numbers["emission"]
        total -= 0.5 * (e * e / s + math.log(s) + math.log(2 * math.pi))
        mean += numbers["emission"] * var * e / s
        var = var * numbers["error"] / s
    torch.testing.assert_close(found.detach(), torch.tensor([total], dtype=torch.float64), rtol=1e-6, atol=1e-8)
    both = gradients(found.sum(), chain), gradients(twin((chain, None, None)).sum(), chain)
    for a, b in zip(*both, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8 * (1 + float(b.abs().max())))
    for x in smooth(chain, None, None):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("where", ["kernel", "twin"])
def test_no_density_where_an_observation_is_certain(where: str) -> None:
    chain = leaves(scalar_chain(covariance=0.0, noise=0.0, error=0.0))
    found = twin((chain, None, None)) if where == "twin" else log_prob(chain)
    assert found.item() == -math.inf
    assert all(bool((g == 0).all()) for g in gradients(found.sum(), chain))
    flat, sizes, _ = flatten(chain, None, None)
    assert all(bool((g == 0).all()) for g in expected_parts(KALMAN, flat, sizes))


def test_root_of_a_singular_covariance() -> None:
    a = torch.randn(5, 4, 2, dtype=torch.float64)
    for covariance in (
        a @ a.mT,
        torch.zeros(3, 3, dtype=torch.float64),
        torch.diag(torch.tensor([0.0, 2.0, 0.0]).double()),
    ):
        x = covariance.clone().requires_grad_()
        found = root(x)
        torch.testing.assert_close(found.mT @ found, covariance, rtol=1e-7, atol=1e-9)
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert torch.isfinite(slope).all()


def test_singular_noise_in_many_dimensions_gives_no_nan() -> None:
    generator = torch.Generator().manual_seed(5)
    chain = leaves(chain_of(generator, (2,), False, False, 80, 5, 2, 1))
    chain = leaves(chain._replace(covariance=torch.zeros_like(chain.covariance), error=1e-9 * chain.error))
    total = log_prob(chain)
    assert all(torch.isfinite(x).all() for x in (total, *gradients(total.sum(), chain), *smooth(chain, None, None)))
    torch.testing.assert_close(total, twin((chain, None, None)), rtol=1e-4, atol=1e-4)


def test_padding_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = leaves(chain_of(torch.Generator().manual_seed(2), (3,), False, False, 6, 2, 2, None))
    lengths = torch.tensor([2, 4, 1])
    expected = (log_prob(chain, lengths), *smooth(chain, lengths, None), *filter_moments(chain, lengths, None))
    slopes = gradients(expected[0].sum(), chain)
    monkeypatch.setattr(gaussian_passes.np, "empty", lambda shape: gaussian_passes.np.full(shape, math.nan))
    found = (log_prob(chain, lengths), *smooth(chain, lengths, None), *filter_moments(chain, lengths, None))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(smooth_means(chain, lengths, None), expected[1])
    torch.testing.assert_close(gradients(found[0].sum(), chain), slopes)


def test_narrow_numbers_are_summed_wide() -> None:
    chain = chain_of(torch.Generator().manual_seed(2), (3,), False, False, 5, 2, 2, None)
    narrow = Chain(*(x.float() for x in chain))
    assert log_prob(narrow).dtype == torch.float64
    torch.testing.assert_close(log_prob(narrow), log_prob(Chain(*(x.double() for x in narrow))))
