"""Time of log Z with gradients against length and number of labels: straight lines in a doubly logarithmic picture.

    python benchmarks/scaling.py [--out docs/scaling.svg] [--threads 1]

Each point is the least of several calls of one row (B = 1). The slope of a line is fitted over its upper half, where
fixed cost no longer shows; the recursion's cost says what it should be.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BUDGET = 1.5  # seconds a point


def least(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, the first not counted."""
    call()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < BUDGET:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def lines() -> dict[str, dict[str, tuple[list[int], Callable[[int], Callable[[], Any]], int]]]:
    """By the quantity that grows: for each law its sizes, what makes a call, and the slope expected."""
    import torch

    from probllm.distributions import (
        LinearChainCRF,
        LinearGaussianSSM,
        MonotonicAlignment,
        ProjectiveDependencyTree,
        SemiMarkovCRF,
        SpanningTree,
        SpanTree,
    )

    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, requires_grad=True)

    def gradients(log_z: Callable[..., Any], *leaves: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(log_z(*leaves).sum(), leaves)

    def chain(t: int, k: int) -> Callable[[], Any]:
        return gradients(lambda e, a: LinearChainCRF(e, a).log_partition, leaf(1, t, k), leaf(k, k))

    def semimarkov(t: int) -> Callable[[], Any]:
        return gradients(lambda s, a: SemiMarkovCRF(s, a).log_partition, leaf(1, t, 8, 8), leaf(8, 8))

    def ctc(t: int) -> Callable[[], Any]:
        targets = torch.randint(1, 30, (1, 20))
        return gradients(lambda e: MonotonicAlignment.ctc(e.log_softmax(-1), targets).log_partition, leaf(1, t, 30))

    def kalman(t: int) -> Callable[[], Any]:
        import pyro.distributions as dist

        x, normal = torch.randn(1, t, 4), dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1)
        a, c = (0.5 * torch.eye(4)).requires_grad_(), torch.eye(4).requires_grad_()
        return gradients(lambda a, c: LinearGaussianSSM(normal, a, normal, c, normal, duration=t).log_prob(x), a, c)

    def spans(n: int) -> Callable[[], Any]:
        return gradients(lambda s: SpanTree(s).log_partition, leaf(1, n, n, 2))

    def dependencies(law: Any) -> Callable[[int], Callable[[], Any]]:
        return lambda n: gradients(lambda a, r: law(a, r).log_partition, leaf(1, n, n), leaf(1, n))

    long, short = [100, 316, 1000, 3162, 10000, 31623, 100000], [10, 20, 40, 80, 160]
    return {
        "length T": {
            "linear chain, K = 16": (long, lambda t: chain(t, 16), 1),
            "semi-Markov, D = K = 8": (long, semimarkov, 1),
            "CTC, V = 30, U = 20": (long, ctc, 1),
            "Kalman, D = 4": (long, kalman, 1),
        },
        "labels K": {"linear chain, T = 100": ([4, 8, 16, 32, 64, 128, 256, 512], lambda k: chain(100, k), 2)},
        "words N": {
            "span trees (CKY), K = 2": (short, spans, 3),
            "projective dependencies": (short, dependencies(ProjectiveDependencyTree), 3),
            "dependencies (matrix-tree)": (short, dependencies(SpanningTree), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling.svg")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(arguments.threads)
    table = Table("law", "against", "milliseconds", "slope", "expected")
    groups = lines()
    figure, axes = plt.subplots(1, len(groups), figsize=(12, 4), layout="constrained")
    for axis, (what, laws) in zip(axes, groups.items(), strict=True):
        for name, (sizes, make, expected) in laws.items():
            torch.manual_seed(0)
            seconds = np.array([least(make(size)) for size in sizes])
            half = len(sizes) // 2
            slope = np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)[0]
            axis.loglog(sizes, 1e3 * seconds, marker="o", ms=4, label=f"{name}: slope {slope:.2f}")
            shown = "  ".join(f"{1e3 * s:.3g}" for s in seconds)
            table.add_row(name, f"{what}: {sizes[0]} to {sizes[-1]}", shown, f"{slope:.2f}", f"<= {expected}")
        axis.set(xlabel=what, ylabel="milliseconds")
        axis.grid(alpha=0.3, which="both", lw=0.4)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle("log Z with gradients, one row, fastest call")
    figure.savefig(arguments.out)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
