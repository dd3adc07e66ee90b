"""The law over monotone alignments, and CTC as a case of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.nn.functional import ctc_loss

from probllm.distributions import MonotonicAlignment
from tests.distributions import battery
from tests.distributions.battery import Case, Parts
from tests.distributions.sequences import all_sequences, draw_lengths


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    frames, states = draw(st.sampled_from([(4, 3), (3, 4), (5, 2), (2, 3), (1, 3), (3, 1), (1, 1)]))
    moves = draw(st.sampled_from([1, 2, 3, 5]))
    batch = draw(st.sampled_from([(), (2,), (2, 2), (0,)]))
    scale = draw(st.sampled_from([1.0, 30.0, 1e4, 1e6]))
    share = draw(st.sampled_from([0.0, 0.3]))

    def scores(*shape: int) -> Tensor:
        value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf)

    parts = {
        "emissions": scores(*draw(st.sampled_from([batch, ()])), frames, states),
        "steps": scores(*draw(st.sampled_from([batch, ()])), moves, states),
        "start": scores(*draw(st.sampled_from([batch, ()])), states),
        "end": scores(*draw(st.sampled_from([batch, ()])), states),
    }
    lengths = draw_lengths(draw, batch, frames, generator)

    def build(**given: Any) -> MonotonicAlignment:
        return MonotonicAlignment(**given, lengths=lengths)

    law = build(**parts)
    structures, every, listed = all_sequences(frames, states, law.lengths, law.batch_shape)
    by = every[..., 1:] - every[..., :-1]
    within = torch.arange(1, frames) < law.lengths.unsqueeze(-1)
    listed = listed & (~within | ((by >= 0) & (by < moves))).all(-1)

    def score(given: Parts) -> Tensor:
        z = structures.T
        emissions = given["emissions"].expand(*law.batch_shape, frames, states)
        table = given["steps"].expand(*law.batch_shape, moves, states)
        start, end = (given[name].expand(*law.batch_shape, states) for name in ("start", "end"))
        total = emissions[..., 0, z[0]] + start[..., z[0]]
        for t in range(1, frames):
            d = (z[t] - z[t - 1]).clamp(0, moves - 1)
            step = emissions[..., t, z[t]] + table[..., d, z[t]]
            total = total + torch.where((t < law.lengths).unsqueeze(-1), step, 0.0)
        last = z[law.lengths - 1]
        return (total + end.gather(-1, last)).movedim(-1, 0)

    return Case(law, build, every, listed, score, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=cases())
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def random_ctc(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Logits in float64 and labels of every sort: repeated, none, too many for the frames, padded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, frames, size, count = (draw(st.integers(*ends)) for ends in ((1, 4), (1, 12), (2, 5), (0, 5)))
    blank = draw(st.integers(0, size - 1))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 300.0]))
    logits = scale * torch.randn(rows, frames, size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, size - 1, (rows, count), generator=generator)
    targets = targets + (targets >= blank)
    lengths = torch.randint(1, frames + 1, (rows,), generator=generator)
    target_lengths = torch.randint(0, count + 1, (rows,), generator=generator)
    return logits, targets, lengths, target_lengths, blank


ctc_cases = st.composite(random_ctc)()


@given(ctc_cases)
def test_ctc_is_torchs_in_value_and_in_gradient_below_a_log_softmax(case: tuple[Any, ...]) -> None:
    logits, targets, lengths, target_lengths, blank = case
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = MonotonicAlignment.ctc(ours.log_softmax(-1), targets, lengths, target_lengths, blank).log_partition
    log_probs = theirs.log_softmax(-1).transpose(0, 1)
    expected = -ctc_loss(log_probs, targets, lengths, target_lengths, blank, reduction="none", zero_infinity=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    possible = expected > -torch.inf
    found.sum().backward()
    expected[possible].sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad[possible], theirs.grad[possible], rtol=1e-7, atol=1e-9)  # type: ignore[index]
    assert bool((ours.grad[~possible] == 0).all()), "labels that do not fit have gradient 0"


@given(ctc_cases)
def test_ctc_sums_the_frames_that_collapse_to_the_labels(case: tuple[Any, ...]) -> None:
    """Every sequence of labels and blanks of the row's frames, collapsed by hand."""
    logits, targets, lengths, target_lengths, blank = case
    logits, lengths = logits[:, :4], lengths.clamp_max(4)
    law = MonotonicAlignment.ctc(logits.log_softmax(-1), targets, lengths, target_lengths, blank)
    for row, log_probs in enumerate(logits.log_softmax(-1)):
        n, wanted = int(lengths[row]), targets[row, : target_lengths[row]].tolist()
        scores = [
            sum(log_probs[t, k] for t, k in enumerate(path))
            for path in itertools.product(range(logits.shape[-1]), repeat=n)
            if [k for k, _ in itertools.groupby(path) if k != blank] == wanted
        ]
        expected = torch.stack(scores).logsumexp(0) if scores else torch.tensor(-torch.inf).double()
        torch.testing.assert_close(law.log_partition[row], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(law.log_count[row].exp(), torch.tensor(float(len(scores))).double())
        if scores:
            path = [int(targets[row, s // 2]) if s % 2 else blank for s in law.mode[row, :n].tolist()]
            assert [k for k, _ in itertools.groupby(path) if k != blank] == wanted
            torch.testing.assert_close(sum(log_probs[t, k] for t, k in enumerate(path)), max(scores))


@given(ctc_cases)
def test_ctc_is_the_law_of_its_parts(case: tuple[Any, ...]) -> None:
    logits, targets, lengths, target_lengths, blank = case
    law = MonotonicAlignment.ctc(logits, targets, lengths, target_lengths, blank)
    same = MonotonicAlignment(**law.parts, lengths=lengths)
    torch.testing.assert_close(law.log_partition, same.log_partition)
    torch.testing.assert_close(law.entropy(), same.entropy())
    assert torch.equal(law.mode, same.mode)


def test_ctc_passes_gradcheck_of_first_and_second_order_in_the_log_probabilities() -> None:
    torch.manual_seed(3)
    log_probs = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    targets, lengths, counts = torch.tensor([[1, 1, 2], [3, 2, 0]]), torch.tensor([5, 4]), torch.tensor([3, 2])

    def value(x: Tensor) -> Tensor:
        return MonotonicAlignment.ctc(x, targets, lengths, counts).log_partition

    assert torch.autograd.gradcheck(value, log_probs)
    assert torch.autograd.gradgradcheck(value, log_probs)
    theirs = lambda x: ctc_loss(x.transpose(0, 1), targets, lengths, counts, reduction="none")  # noqa: E731
    assert not torch.autograd.gradcheck(theirs, log_probs, raise_exception=False), "torch is right now: say so"


def test_ctc_under_torch_func_is_each_row_by_itself() -> None:
    logits, targets = torch.randn(3, 6, 4, dtype=torch.float64), torch.tensor([[1, 2], [3, 3], [1, 0]])
    counts = torch.tensor([2, 2, 1])

    def value(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
        return MonotonicAlignment.ctc(x.log_softmax(-1), y, target_lengths=n).log_partition

    together = value(logits, targets, counts)
    torch.testing.assert_close(torch.func.vmap(value)(logits, targets, counts), together)
    gradients = torch.func.vmap(torch.func.grad(value))(logits, targets, counts)
    leaf = logits.clone().requires_grad_()
    value(leaf, targets, counts).sum().backward()
    torch.testing.assert_close(gradients, leaf.grad)


def test_ctc_of_float32_and_bfloat16_stays_in_their_dtype_and_near_float64() -> None:
    logits, targets = torch.randn(4, 300, 20), torch.randint(1, 20, (4, 40))
    wide = MonotonicAlignment.ctc(logits.double().log_softmax(-1), targets)
    for dtype, digits in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        leaf = logits.log_softmax(-1).to(dtype).requires_grad_()
        found = MonotonicAlignment.ctc(leaf, targets).log_partition
        found.sum().backward()
        assert found.dtype == leaf.grad.dtype == dtype  # type: ignore[union-attr]
        torch.testing.assert_close(found.double(), wide.log_partition, rtol=digits, atol=0)


def test_ctc_of_one_set_of_labels_for_all_rows_and_of_one_row_for_many_labels() -> None:
    log_probs, targets = torch.randn(3, 5, 4).log_softmax(-1), torch.tensor([[1, 2], [2, 2], [3, 1]])
    many = MonotonicAlignment.ctc(log_probs[0], targets)
    one = MonotonicAlignment.ctc(log_probs, targets[0])
    assert many.batch_shape == one.batch_shape == (3,)
    for row in range(3):
        torch.testing.assert_close(
            many.log_partition[row], MonotonicAlignment.ctc(log_probs[0], targets[row]).log_partition
        )
        torch.testing.assert_close(
            one.log_partition[row], MonotonicAlignment.ctc(log_probs[row], targets[0]).log_partition
        )
    leaf = log_probs[0].clone().requires_grad_()
    MonotonicAlignment.ctc(leaf, targets).log_partition.sum().backward()
    torch.testing.assert_close(leaf.grad.sum(-1), torch.full((5,), 3.0))  # type: ignore[union-attr]


@pytest.mark.parametrize(("frames", "states"), [(1, 1), (5, 1), (5, 3), (7, 7), (3, 5)])
def test_count_of_plain_alignments_is_a_binomial(frames: int, states: int) -> None:
    law = MonotonicAlignment(torch.zeros(frames, states))
    expected = math.comb(frames - 1, states - 1)
    torch.testing.assert_close(law.log_count.exp(), torch.tensor(float(expected)).double())


def test_rows_have_their_own_numbers_of_states() -> None:
    scores = torch.randn(2, 6, 4)
    law = MonotonicAlignment(scores, lengths=torch.tensor([6, 4]), state_lengths=torch.tensor([4, 2]))
    torch.testing.assert_close(law.log_partition[1], MonotonicAlignment(scores[1, :4, :2]).log_partition)
    assert law.mode[:, 0].tolist() == [0, 0]
    assert law.mode[0, -1] == 3
    assert law.mode[1].tolist()[3:] == [1, 0, 0]


def test_reversal_of_time_and_states_gives_the_same_sum() -> None:
    scores, steps = torch.randn(6, 4), torch.zeros(3, 4)
    law = MonotonicAlignment(scores, steps, torch.zeros(4), torch.zeros(4))
    back = MonotonicAlignment(scores.flip(0, 1), steps, torch.zeros(4), torch.zeros(4))
    torch.testing.assert_close(law.log_partition, back.log_partition)
    torch.testing.assert_close(law.marginals, back.marginals.flip(0, 1))


def test_expected_steps_are_the_steps_of_samples() -> None:
    law = MonotonicAlignment(torch.randn(5, 3), torch.randn(3, 3), torch.randn(3), torch.randn(3))
    steps = torch.randn(3, 3)
    zeros = {name: torch.zeros_like(x) for name, x in law.parts.items()}
    drawn = law.sample((20000,))
    by = drawn[:, 1:] - drawn[:, :-1]
    torch.testing.assert_close(
        law.expectation({**zeros, "steps": steps}), steps[by, drawn[:, 1:]].sum(-1).mean(), atol=0.1, rtol=0
    )


BAD = {
    "emissions: expected shape": lambda: MonotonicAlignment(torch.zeros(3)),
    "steps: expected shape": lambda: MonotonicAlignment(torch.zeros(3, 2), torch.zeros(2, 3)),
    "start: expected shape": lambda: MonotonicAlignment(torch.zeros(3, 2), start=torch.zeros(3)),
    "lengths: expected values from 1 to 3": lambda: MonotonicAlignment(torch.zeros(3, 2), lengths=torch.tensor(4)),
    "state_lengths: expected None": lambda: MonotonicAlignment(
        torch.zeros(3, 2), end=torch.zeros(2), state_lengths=torch.tensor(1)
    ),
    "emissions: scores must not be NaN": lambda: MonotonicAlignment(torch.full((3, 2), torch.nan)).log_partition,
    "emissions: expected floating-point": lambda: MonotonicAlignment(torch.zeros(3, 2, dtype=torch.long)),
    "log_probs: expected shape": lambda: MonotonicAlignment.ctc(torch.zeros(3), torch.tensor([1])),
    "log_probs: scores must not be NaN": lambda: (
        MonotonicAlignment.ctc(torch.full((3, 2), torch.nan), torch.tensor([1])).log_partition
    ),
    "blank: expected from 0 to 1": lambda: MonotonicAlignment.ctc(torch.zeros(3, 2), torch.tensor([1]), blank=2),
    "targets: expected labels from 0 to 1": lambda: MonotonicAlignment.ctc(torch.zeros(3, 2), torch.tensor([2])),
    "other than the blank": lambda: MonotonicAlignment.ctc(torch.zeros(3, 2), torch.tensor([0])),
    "targets: expected integers": lambda: MonotonicAlignment.ctc(torch.zeros(3, 2), torch.tensor([1.0])),
    "target_lengths: expected values from 0 to 1": lambda: MonotonicAlignment.ctc(
        torch.zeros(3, 2), torch.tensor([1]), target_lengths=torch.tensor(2)
    ),
    "batch shapes do not broadcast": lambda: MonotonicAlignment.ctc(torch.zeros(3, 4, 2), torch.ones(2, 1).long()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_alignment_as_a_pyro_site_is_sampled_observed_and_learned() -> None:
    scores = torch.randn(4, 5, 3)

    def model(observed: Tensor | None = None) -> Tensor:
        weight = pyro.param("weight", torch.ones(()))
        with pyro.plate("rows", 4):
            found: Tensor = pyro.sample("path", MonotonicAlignment(weight * scores), obs=observed)
        return found

    trace = pyro.poutine.trace(model).get_trace()
    drawn = trace.nodes["path"]["value"]
    assert drawn.shape == (4, 5)
    expected = MonotonicAlignment(scores).log_prob(drawn)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["path"]["log_prob"], expected)
    svi = SVI(model, lambda observed=None: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    assert svi.step(drawn) == pytest.approx(-float(expected.sum()), rel=1e-5)
    assert pyro.param("weight") != 1
    assert Predictive(model, num_samples=3)()["path"].shape == (3, 4, 5)


def test_mixed_with_a_categorical_in_a_plate() -> None:
    with pyro.plate("rows", 2):
        which = pyro.sample("which", dist.Categorical(logits=torch.zeros(2)))
        scores = torch.randn(2, 4, 2)[which]
        assert pyro.sample("path", MonotonicAlignment(scores)).shape == (2, 4)
