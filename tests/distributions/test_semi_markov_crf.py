"""Semi-Markov CRFs: the battery against all segmentations, their number, symmetries, bad input, and Pyro."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive
from torch import Tensor

from probllm.distributions import LinearChainCRF, SemiMarkovCRF
from probllm.math import semimarkov
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.segmentations import all_segmentations, dot
from tests.distributions.sequences import draw_lengths

DIMS = {"segments": 3, "transitions": 2, "start": 1, "end": 1}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, k = draw(st.sampled_from([(4, 2), (3, 3), (2, 3), (1, 3), (4, 1), (1, 1)]))
    longest = draw(st.integers(1, steps + 1))
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share, ties = draw(st.sampled_from([0.0, 0.3])), draw(st.booleans())

    def scores(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        value = scale * (value.round() if ties else value)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    def part(*event: int) -> Tensor:
        return scores(*draw(st.sampled_from([batch, ()])), *event)

    parts = {
        "segments": part(steps, longest, k),
        "transitions": part(k, k),
        "start": part(k),
        "end": part(k),
    }
    lengths = draw_lengths(draw, batch, steps, generator)

    def build(**given: Any) -> SemiMarkovCRF:
        return SemiMarkovCRF(**given, lengths=lengths)

    law = build(**parts)
    every = all_segmentations(steps, longest, k)
    rows = law.lengths  # [*batch]
    count = len(every.structures)

    def score(given: Parts) -> Tensor:
        total = torch.zeros(*law.batch_shape, count, dtype=torch.float64)
        for name, dims in DIMS.items():
            scores = given[name].unsqueeze(-1 - dims)
            total = total + dot(getattr(every, name)[rows], scores, dims)
        return total.movedim(-1, 0)

    structures = every.structures.reshape(count, *(1,) * len(law.batch_shape), steps).expand(
        count, *law.batch_shape, steps
    )
    return Case(law, build, structures, every.listed[rows].movedim(-1, 0), score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_segmentations_number_k_times_k_plus_one_to_the_steps_less_one(steps: int, k: int) -> None:
    law = SemiMarkovCRF(torch.randn(steps, steps, k))
    expected = math.log(k) + (steps - 1) * math.log(k + 1)
    assert float(law.log_count) == pytest.approx(expected, rel=1e-12)


def example(batch: tuple[int, ...] = (3,), steps: int = 6, longest: int = 4, k: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "segments": torch.randn(*batch, steps, longest, k, dtype=torch.float64),
        "transitions": torch.randn(k, k, dtype=torch.float64),
        "start": torch.randn(k, dtype=torch.float64),
        "end": torch.randn(k, dtype=torch.float64),
    }


def test_a_sequence_read_backwards_has_the_same_sum() -> None:
    parts = example()
    steps, longest = 6, 4
    backwards = torch.zeros_like(parts["segments"])
    for t in range(steps):
        for d in range(min(longest, steps - t)):
            backwards[:, steps - 1 - t - d, d] = parts["segments"][:, t, d]
    law = SemiMarkovCRF(**parts)
    other = SemiMarkovCRF(backwards, parts["transitions"].T, parts["end"], parts["start"])
    torch.testing.assert_close(other.log_partition, law.log_partition)
    torch.testing.assert_close(other.entropy(), law.entropy())
    torch.testing.assert_close(other.score(turned(law.mode)), law.score(law.mode))


def turned(z: Tensor) -> Tensor:
    """Segmentations without padding, read backwards."""
    rows = []
    for row in z.tolist():
        cuts = [t for t in range(len(row)) if row[t]] + [len(row)]
        back = [0] * len(row)
        for begin, stop in itertools.pairwise(cuts):
            back[len(row) - stop] = row[begin]
        rows.append(back)
    return torch.tensor(rows)


def test_relabelling_permutes_the_marginals() -> None:
    parts, order = example(), torch.tensor([2, 0, 1])
    law = SemiMarkovCRF(**parts)
    other = SemiMarkovCRF(
        parts["segments"][..., order], parts["transitions"][order][:, order], parts["start"][order], parts["end"][order]
    )
    torch.testing.assert_close(other.log_partition, law.log_partition)
    torch.testing.assert_close(other.marginals, law.marginals[..., order])


def test_padding_and_segments_that_do_not_fit_are_irrelevant() -> None:
    parts, lengths = example(), torch.tensor([6, 2, 4])
    law = SemiMarkovCRF(**parts, lengths=lengths)
    first = torch.arange(6).unsqueeze(-1)
    outside = (first + torch.arange(1, 5) > lengths[:, None, None]).unsqueeze(-1)
    for spoilt in (1e6, -math.inf):
        other = SemiMarkovCRF(**{**parts, "segments": parts["segments"].masked_fill(outside, spoilt)}, lengths=lengths)
        assert torch.equal(other.log_partition, law.log_partition)
        assert torch.equal(other.marginals, law.marginals)
        assert torch.equal(other.mode, law.mode)
    assert not bool(law.marginals[outside.expand_as(law.marginals)].any())
    for row, n in enumerate(lengths.tolist()):
        short = SemiMarkovCRF(**{**parts, "segments": parts["segments"][row, :n]})
        torch.testing.assert_close(short.log_partition, law.log_partition[row])


def test_segments_of_one_step_are_a_chain() -> None:
    parts = example(longest=1)
    chain = LinearChainCRF(parts["segments"].squeeze(-2), parts["transitions"], parts["start"], parts["end"])
    law = SemiMarkovCRF(**parts)
    torch.testing.assert_close(law.log_partition, chain.log_partition)
    torch.testing.assert_close(law.marginals.squeeze(-2), chain.marginals)
    assert torch.equal(law.mode, chain.mode + 1)


def test_what_is_no_segmentation_has_probability_zero() -> None:
    law = SemiMarkovCRF(**example((), longest=2))
    for z in ([0, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]):
        assert float(law.log_prob(torch.tensor(z))) == -math.inf
    assert float(law.log_prob(torch.tensor([1, 0, 3, 1, 2, 0]))) > -math.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"segments": torch.zeros(3, 2)}, ValueError, r"segments: expected shape \[..., T, D, K\]"),
        ({"segments": torch.zeros(3, 0, 2)}, ValueError, r"segments: expected shape \[..., T, D, K\]"),
        ({"segments": torch.zeros(3, 2, 2, dtype=torch.long)}, TypeError, "segments: expected floating-point"),
        ({"segments": [[0.0]]}, TypeError, "segments: expected a tensor, got list"),
        ({"transitions": torch.zeros(3, 2)}, ValueError, r"transitions: expected shape \[..., 2, 2\], got \[3, 2\]"),
        ({"transitions": torch.zeros(2)}, ValueError, "transitions"),
        ({"transitions": 0.0}, TypeError, "transitions: expected a tensor, got float"),
        ({"start": torch.zeros(3)}, ValueError, r"start: expected shape \[..., 2\]"),
        ({"end": torch.zeros(2, dtype=torch.int)}, TypeError, "end: expected floating-point"),
        ({"end": torch.zeros(5, 2), "start": torch.zeros(4, 2)}, ValueError, "batch shapes do not broadcast"),
        ({"lengths": torch.tensor([0])}, ValueError, "lengths"),
        ({"lengths": torch.tensor([4])}, ValueError, "lengths"),
        ({"lengths": torch.tensor([1.0])}, TypeError, "lengths"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SemiMarkovCRF(**{"segments": torch.zeros(3, 2, 2), **change})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["segments", "transitions", "start", "end"])
def test_nan_and_infinite_scores_are_refused(name: str, bad: float) -> None:
    parts = example(())
    parts[name] = torch.full_like(parts[name], bad)
    for ask in ("log_partition", "mode", "marginals"):
        with pytest.raises(ValueError, match=f"{name}: scores must not be NaN"):
            getattr(SemiMarkovCRF(**parts), ask)


def test_laws_of_other_durations_have_no_divergence() -> None:
    with pytest.raises(ValueError, match="maximal duration of 4, got 2"):
        SemiMarkovCRF(**example()).cross_entropy(SemiMarkovCRF(**example(longest=2)))


def test_score_function_gradient_of_an_expectation_is_the_exact_one() -> None:
    parts = {name: x.requires_grad_() for name, x in example((), 3, 3, 2).items()}
    law = SemiMarkovCRF(**parts)
    every = all_segmentations(3, 3, 2)
    z = every.structures[every.listed[3]]
    reward = torch.randn(len(z), dtype=torch.float64)
    log_p = law.log_prob(z)
    exact = torch.autograd.grad((log_p.exp() * reward).sum(), list(parts.values()), retain_graph=True)
    surrogate = torch.autograd.grad((log_p.exp().detach() * reward * log_p).sum(), list(parts.values()))
    for a, b in zip(surrogate, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_pyro_program_traces_predicts_and_learns() -> None:
    lengths = torch.tensor([5, 2, 4])
    observed = torch.tensor([[1, 0, 2, 0, 0], [2, 1, 0, 0, 0], [1, 0, 0, 2, 0]])

    def model(given: Tensor | None = None) -> Tensor:
        segments = pyro.param("segments", lambda: torch.zeros(5, 3, 2))
        transitions = pyro.param("transitions", lambda: torch.zeros(2, 2))
        with pyro.plate("data", 3):
            found: Tensor = pyro.sample("x", SemiMarkovCRF(segments, transitions, lengths=lengths), obs=given)
            return found

    with pyro.validation_enabled(True):
        trace = pyro.poutine.trace(model).get_trace(observed)
        law = trace.nodes["x"]["fn"]
        torch.testing.assert_close(trace.log_prob_sum(), law.log_prob(observed).sum())
        svi = SVI(model, lambda given: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        losses = [svi.step(observed) for _ in range(20)]
        assert losses[-1] < losses[0]
        drawn = Predictive(model, num_samples=7)()["x"]
    assert drawn.shape == (7, 3, 5)


def test_parts_of_narrow_dtypes_keep_the_memory_of_the_caller() -> None:
    """Scores in float32 are not copied to float64, and their gradient comes in float32."""
    segments = torch.randn(2, 50, 6, 4, requires_grad=True)
    taken = semimarkov._arrays((segments, *(torch.zeros(1, *s) for s in ((4, 4), (4,), (4,)))))[0][0]
    assert taken.__array_interface__["data"][0] == segments.data_ptr()
    (gradient,) = torch.autograd.grad(SemiMarkovCRF(segments).log_partition.sum(), segments)
    torch.testing.assert_close(gradient.sum(), segments.new_tensor(float(law_size(segments))), rtol=1e-4, atol=1e-4)


def law_size(segments: Tensor) -> Tensor:
    """The expected number of segments, by differences of temperature."""
    shift = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    log_z = SemiMarkovCRF(segments.detach().double() + shift).log_partition.sum()
    return torch.autograd.grad(log_z, shift)[0]
