"""The compiled recursions among threads, processes and loaders, within bounded memory, and equal to their twin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probllm.math import chain_torch
from probllm.math.chain import as_chain, log_partition
from probllm.math.chain_paths import sample, viterbi
from probllm.math.kernels import exponentials
from probllm.math.kernels import threads as kernel_threads
from probllm.math.kernels.compiled import compiled
from probllm.math.kernels.vectors import padded


def scores_of(
    seed: int, rows: int = 16, steps: int = 60, k: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Enough work that the kernels share it among threads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=dtype) for s in ((rows, steps, k), (k, k), (k,), (k,))]


def all_of(seed: int) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in scores_of(seed)]
    value = log_partition(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves), viterbi(*leaves)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_python_threads_at_once_give_what_one_gives(threads: int) -> None:
    torch.set_num_threads(threads)
    expected = [all_of(seed) for seed in range(6)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, want in zip(pool.map(all_of, range(6)), expected, strict=True):
                for x, y in zip(found, want, strict=True):
                    torch.testing.assert_close(x, y)


def test_shares_whose_thread_does_not_wake_up_are_done_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    release, seen = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)  # the only thread is taken
        monkeypatch.setattr(kernel_threads, "_pool", pool)
        kernel_threads.run_shares(lambda *share: seen.append((*share, threading.get_ident())), ("work",), 8, 1e9)
        release.set()
    me = threading.get_ident()
    assert seen == [("work", 0, 2, me), ("work", 1, 2, me)]


def test_one_and_two_torch_threads_give_the_same() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(all_of(0))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_computes_too() -> None:
    torch.set_num_threads(2)
    expected = all_of(0)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            torch.set_num_threads(2)
            code = 0 if equal([x.detach() for x in forked()], [expected[0], expected[-1]]) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert equal(all_of(0), expected)


def forked() -> list[Tensor]:
    scores = scores_of(0)
    return [log_partition(*scores), viterbi(*scores)]


class Partitions(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return log_partition(*scores_of(index, rows=2))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader_compute_too() -> None:
    data = Partitions()
    expected = torch.stack([data[i] for i in range(6)])
    found = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2)))
    torch.testing.assert_close(found, expected)


def test_no_tensor_of_the_size_of_all_pairs_of_tags_is_made() -> None:
    """[8, 2000, 128, 128] floats would take a gigabyte; forward and backward stay below 300 MB."""
    program = """
import resource, torch
from probllm.math.chain import log_partition
def run(steps):
    e, a = torch.randn(8, steps, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    log_partition(e, a).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(10)
print((run(2000) - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    """Sizes on and off whole vectors and blocks of rows; every kind of transitions; forbidden scores; both dtypes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, steps, k = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 4, 7, 8, 16, 17, 40])),
    )
    lead = draw(st.sampled_from([(), (rows, 1), (steps - 1,), (rows, steps - 1)]))
    scale, share = draw(st.sampled_from([0.3, 3.0, 40.0])), draw(st.sampled_from([0.0, 0.0, 0.2]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scores = []
    for shape in ((rows, steps, k), (*lead, k, k), (k,), (rows, k)):
        x = scale * torch.randn(*shape, generator=generator)
        scores.append(x.masked_fill(torch.rand(*shape, generator=generator) < share, -torch.inf).to(dtype))
    return scores, torch.randint(1, steps + 1, (rows,), generator=generator)


@given(cases())
def test_value_and_gradient_are_those_of_the_torch_twin(case: tuple[list[Tensor], Tensor]) -> None:
    scores, lengths = case
    leaves = [x.requires_grad_() for x in scores]
    wide = [x.detach().double().requires_grad_() for x in scores]
    weights = torch.linspace(-1.0, 2.0, len(lengths), dtype=torch.float64)
    value, twin = log_partition(*leaves, lengths), chain_torch.log_partition(*as_chain(*wide, lengths)[:5])
    exact = scores[0].dtype == torch.float64
    close = {"rtol": 1e-9 if exact else 1e-4, "atol": 1e-9 if exact else 1e-5}
    torch.testing.assert_close(value.double(), twin, **close)
    possible = twin > -torch.inf
    found = torch.autograd.grad((value.double() * weights)[possible].sum(), leaves)
    expected = torch.autograd.grad((twin * weights)[possible].sum(), wide, allow_unused=True)
    for x, y in zip(found, expected, strict=True):
        y = torch.zeros_like(x, dtype=torch.float64) if y is None else y  # no transitions in one step
        torch.testing.assert_close(x.double(), y, **{**close, "atol": 1e-9 if exact else 1e-4})


@given(cases())
def test_samples_and_modes_are_allowed_sequences(case: tuple[list[Tensor], Tensor]) -> None:
    scores, lengths = case
    steps = scores[0].shape[1]
    log_z = log_partition(*scores, lengths)
    for paths in (sample(*scores, lengths, n=3), viterbi(*scores, lengths).unsqueeze(0)):
        assert bool((paths[:, log_z == -torch.inf] == -1).all())
        there = paths[:, log_z > -torch.inf]
        assert bool(((there >= 0) & (there < scores[0].shape[-1])).all())
        padding = torch.arange(steps) >= lengths[log_z > -torch.inf].unsqueeze(-1)
        assert not bool(there[:, padding].any())


@compiled()
def rounded(x, by):  # type: ignore[no-untyped-def]
    return (x + by) - by


@compiled(fastmath={"reassoc", "nsz"})
def by_a_fast_caller(x, by):  # type: ignore[no-untyped-def]
    return rounded(x, by)


def test_a_strict_kernel_stays_strict_when_a_fast_one_compiles_it_first() -> None:
    assert by_a_fast_caller(0.3, 1e16) == 0.0
    assert rounded(0.3, 1e16) == 0.0


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-7), (np.float64, 3e-16)])
def test_vector_exponential_is_exact_to_the_last_bits(dtype: type, within: float) -> None:
    x = np.linspace(-80, 80, 4096).astype(dtype)
    found = x.copy()
    exponentials.exp_less(found, dtype(0), x.size)
    assert np.abs(found / np.exp(x.astype(np.longdouble)) - 1).max() < within


@given(cases(), st.sampled_from([np.float32, np.float64]))
def test_exponentials_of_a_row_are_certified_or_refused(case: tuple[list[Tensor], Tensor], dtype: type) -> None:
    """Both precisions, with and without forbidden scores: what is not refused is exact, padding is 1."""
    scores, lengths = case
    emissions, start, end = scores[0][0].numpy(), scores[2].numpy(), scores[3][0].numpy()
    if emissions.itemsize == 8 and dtype is np.float32:
        return
    n, k = int(lengths[0]), emissions.shape[1]
    width, zeros, most = padded(k), dtype is np.float64, 80.0
    q = np.empty(emissions.shape[0] * width, dtype)
    offset, flag = exponentials.exponentials(emissions, start, end, n, most, zeros, width, q, np.empty(4))
    whole = emissions[:n].astype(np.float64)
    whole[0] += start
    whole[-1] += end
    finite = np.isfinite(whole)
    base = np.array([row[ok][0] if ok.any() else -np.inf for row, ok in zip(whole, finite, strict=True)])
    with np.errstate(invalid="ignore"):
        left = np.where(finite, whole - base[:, None], np.nan)
    certain = bool(finite.any(1).all()) and (zeros or bool(finite.all()))
    if not certain:
        assert flag == exponentials.WIDE
        return
    span = np.nanmax(left) - np.nanmin(left)
    if abs(span - most) > 0.01:  # else rounding decides
        assert flag == (exponentials.WIDE if span > most else 0)
    if flag == 0:
        found = q[: n * width].reshape(n, width)
        np.testing.assert_allclose(found[:, :k], np.exp(np.where(finite, left, -np.inf)), rtol=1e-4)
        assert bool((found[finite.all(1), k:] == 1).all())
        np.testing.assert_allclose(offset, base.sum(), rtol=1e-5, atol=1e-4)
