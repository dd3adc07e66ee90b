"""Linear chains beside their peers and the floor: log partition with gradients, Viterbi, sampling, k best, Baum-Welch.

    python benchmarks/chain.py [--threads 1 2] [--rounds 15]          (peers: pip install 'probllm[peers]')

Every contender of a row runs in turn, round after round, in one process; the figures are medians in milliseconds, and
the ratio is the peer's median over ours (above 1: ours is faster). The floor is the bare matrix products that the
recursion needs, in torch: T - 1 forward, T - 1 backward, and one for the expected transitions. Each number of threads
gets a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SIZES = [(32, 128, 8), (32, 128, 17), (32, 128, 32), (8, 1024, 32), (1, 512, 32), (32, 128, 64), (32, 128, 128)]


def in_turn(contenders: dict[str, Callable[[], Any]], rounds: int, budget: float = 20.0) -> dict[str, float]:
    """Median milliseconds of each contender; a slow one takes part in fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            if times[name] and sum(times[name]) > budget / len(contenders):
                continue
            # a short call is repeated, behind one that is not timed: the contender before it left its data in the
            # cache, and the pages of its freed memory may have to be had anew
            typical = min(times[name]) if times[name] else 1.0
            repeat = max(3, min(20, int(0.03 / typical))) if typical < 0.1 else 1
            if repeat > 1:
                run()
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            times[name].append((time.perf_counter() - begin) / repeat)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def jax_partition(b: int, t: int, k: int) -> Callable[[], Any] | None:
    """Value and gradients of log Z by a jitted scan in JAX: the faster of probability space (scaled) and log space."""
    try:
        import jax
        import jax.numpy as jnp
        import numpy as np
    except ImportError:
        return None

    def scaled(e: Any, a: Any) -> Any:
        high, m = e.max(-1), a.max()
        table, q = jnp.exp(a - m), jnp.moveaxis(jnp.exp(e - high[..., None]), 1, 0)
        c0 = q[0].sum(-1)

        def step(x: Any, qt: Any) -> Any:
            y = (x @ table) * qt
            c = y.sum(-1)
            return y / c[:, None], jnp.log(c)

        _, logs = jax.lax.scan(step, q[0] / c0[:, None], q[1:])
        return (jnp.log(c0) + logs.sum(0) + high.sum(-1) + (t - 1) * m).sum()

    def logs(e: Any, a: Any) -> Any:
        x, _ = jax.lax.scan(
            lambda x, et: (jax.nn.logsumexp(x[:, :, None] + a, axis=1) + et, None),
            e[:, 0],
            jnp.moveaxis(e[:, 1:], 1, 0),
        )
        return jax.nn.logsumexp(x, -1).sum()

    rng = np.random.default_rng(0)
    e, a = (jnp.array(rng.normal(size=s), dtype=jnp.float32) for s in ((b, t, k), (k, k)))
    best: tuple[float, Callable[[], Any]] | None = None
    for function in (scaled, logs):
        run = jax.jit(jax.value_and_grad(function, (0, 1)))

        def call(run: Any = run) -> Any:
            return jax.block_until_ready(run(e, a))

        taken = in_turn({"jax": call}, 3)["jax"]
        if best is None or taken < best[0]:
            best = (taken, call)
    assert best is not None
    return best[1]


def partition_rows(rounds: int) -> list[dict[str, Any]]:
    import torch

    from probllm.math.chain import log_partition

    rows = []
    for b, t, k in SIZES:
        torch.manual_seed(0)
        e, a = torch.randn(b, t, k, requires_grad=True), torch.randn(k, k, requires_grad=True)
        mask = torch.ones(b, t, dtype=torch.bool)
        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda e=e, a=a: torch.autograd.grad(log_partition(e, a).sum(), (e, a))
        }

        def products(b: int = b, t: int = t, k: int = k) -> None:
            x, table, whole = torch.rand(b, k), torch.rand(k, k), torch.rand(b * t, k)
            for _ in range(2 * (t - 1)):
                x @ table
            whole.t() @ whole

        contenders["bare products"] = products
        jax_call = jax_partition(b, t, k)
        if jax_call is not None:
            contenders["JAX scan"] = jax_call
        try:
            from torchcrf import CRF

            crf = CRF(k, batch_first=True)
            tags = torch.zeros(b, t, dtype=torch.long)
            contenders["pytorch-crf"] = lambda crf=crf, e=e, tags=tags, mask=mask: torch.autograd.grad(
                crf(e, tags, mask), (e, crf.transitions)
            )
        except ImportError:
            pass
        rows.append({"what": "log Z + gradients", "size": f"B{b} T{t} K{k}", **in_turn(contenders, rounds)})
    return rows


def path_rows(rounds: int) -> list[dict[str, Any]]:
    import torch

    from probllm.math.chain_paths import sample, top_k, viterbi

    rows = []
    for b, t, k in [(32, 128, 8), (32, 128, 32), (1, 512, 32), (32, 128, 128)]:
        torch.manual_seed(0)
        e, a = torch.randn(b, t, k), torch.randn(k, k)
        contenders: dict[str, Callable[[], Any]] = {"ours": lambda e=e, a=a: viterbi(e, a)}
        try:
            from torchcrf import CRF

            crf = CRF(k, batch_first=True)
            contenders["pytorch-crf"] = lambda crf=crf, e=e: crf.decode(e)
        except ImportError:
            pass
        try:
            import numpy as np
            from hmmlearn import _hmmc

            start, table, frames = np.zeros(k), a.double().numpy(), e.double().numpy()
            contenders["hmmlearn (C++)"] = lambda start=start, table=table, frames=frames: [
                _hmmc.viterbi(start, table, f) for f in frames
            ]
        except ImportError:
            pass
        size = f"B{b} T{t} K{k}"
        rows.append({"what": "Viterbi", "size": size, **in_turn(contenders, rounds)})
        others = {"ours": lambda e=e, a=a: sample(e, a, n=1)}
        rows.append({"what": "one sample a row", "size": size, **in_turn(others, rounds)})
        others = {"ours": lambda e=e, a=a: top_k(e, a, k=5)}
        rows.append({"what": "5 best", "size": size, **in_turn(others, min(rounds, 5))})
    return rows


def baum_welch_rows(rounds: int) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from probllm.math.hmm import expected_counts

    b, t, k, v = 64, 1000, 16, 50
    torch.manual_seed(0)
    symbols = torch.randint(0, v, (b, t))
    initial, transition, emission = (torch.randn(s).log_softmax(-1) for s in ((k,), (k, k), (k, v)))

    def ours() -> None:
        counts = expected_counts(symbols, initial, transition, emission)
        for c in counts[1:]:
            (c / c.sum(-1, keepdim=True)).log()

    contenders: dict[str, Callable[[], Any]] = {"ours": ours}
    try:
        from hmmlearn.hmm import CategoricalHMM

        for implementation in ("scaling", "log"):
            model = CategoricalHMM(k, n_iter=1, tol=-1e30, implementation=implementation, init_params="", n_features=v)

            def fit(model: Any = model) -> None:
                start, moves, emits = (x.double().exp().numpy() for x in (initial, transition, emission))
                model.startprob_, model.transmat_, model.emissionprob_ = (
                    x / x.sum(-1, keepdims=True) for x in (start, moves, emits)
                )
                model.fit(np.ascontiguousarray(symbols.reshape(-1, 1).numpy()), [t] * b)

            contenders[f"hmmlearn ({implementation})"] = fit
    except ImportError:
        pass
    return [{"what": "Baum-Welch iteration", "size": f"B{b} T{t} K{k} V{v}", **in_turn(contenders, min(rounds, 7))}]


def measure(threads: int, rounds: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(threads)
    return partition_rows(rounds) + path_rows(rounds) + baum_welch_rows(rounds)


def show(rows: list[dict[str, Any]], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    peers = ["bare products", "JAX scan", "pytorch-crf", "hmmlearn (C++)", "hmmlearn (scaling)", "hmmlearn (log)"]
    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}: milliseconds (times ours)")
    for column in ("what", "size", "ours", *peers):
        table.add_column(column, justify="left" if column in ("what", "size") else "right")
    for row in rows:
        cells = [f"{row[p]:.2f} ({row[p] / row['ours']:.1f}x)" if p in row else "" for p in peers]
        table.add_row(row["what"], row["size"], f"{row['ours']:.3f}", *cells)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.rounds)))
        return
    from importlib.metadata import PackageNotFoundError, version

    for name in ("torch", "numba", "jax", "pytorch-crf", "hmmlearn"):
        try:
            print(f"{name} {version(name)}", end="  ")
        except PackageNotFoundError:
            print(f"{name} is not installed", end="  ")
    print()
    results = {}
    for threads in arguments.threads:
        flags = "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--child", str(threads), "--rounds", str(arguments.rounds)]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[threads] = json.loads(printed.splitlines()[-1])
        show(results[threads], threads)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
