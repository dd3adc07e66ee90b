"""Every structure beside its peers: log partition with gradients, best structures, samples, EM, memory.

    python benchmarks/structured.py [--threads 1 2] [--rounds 9] [--only chain ctc ...]

Peers where they are installed (``pip install 'probllm[peers]'``; those that would drag another torch in, with
``--no-deps``): torch-struct, pytorch-crf, hmmlearn, pomegranate, Pyro's hidden Markov models, torch's CTC, dynamax.
Contenders of a row run in turn, round after round, in one process; figures are medians in milliseconds, the ratio is
the peer's median over ours. A peer that does not fit into memory, or fails, is shown with its reason. Memory is the
growth of the resident set over one call, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from chain import in_turn

Call = Callable[[], Any]


class Row(NamedTuple):
    """Contenders of one question, ours first; a call is made when the row runs."""

    what: str
    size: str
    contenders: dict[str, Callable[[], Call]]


def gradients(log_z: Callable[..., Any], *leaves: Any) -> Call:
    """A call that sums log Z and takes its gradient in the leaves."""
    import torch

    return lambda: torch.autograd.grad(log_z(*leaves).sum(), leaves)


def leaf(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, requires_grad=True)


def chain_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import LinearChainCRF

    for b, t, k in [(16, 40, 8), (32, 128, 32)]:

        def ours(b: int = b, t: int = t, k: int = k) -> Call:
            return gradients(lambda e, a: LinearChainCRF(e, a).log_partition, leaf(b, t, k), leaf(k, k))

        def struct(b: int = b, t: int = t, k: int = k) -> Call:
            from torch_struct import LinearChainCRF as Peer

            return gradients(lambda p: Peer(p).partition, leaf(b, t - 1, k, k))

        def pytorch_crf(b: int = b, t: int = t, k: int = k) -> Call:
            from torchcrf import CRF

            crf, tags = CRF(k, batch_first=True), torch.zeros(b, t, dtype=torch.long)
            return gradients(lambda e, a: crf(e, tags), leaf(b, t, k), crf.transitions)

        peers = {"ours": ours, "torch-struct": struct, "pytorch-crf": pytorch_crf}
        yield Row("linear chain: log Z + gradients", f"B{b} T{t} K{k}", peers)

    b, t, k = 32, 128, 32

    def ours_mode() -> Call:
        e, a = torch.randn(b, t, k), torch.randn(k, k)
        return lambda: LinearChainCRF(e, a).mode

    def struct_mode() -> Call:
        from torch_struct import LinearChainCRF as Peer

        p = torch.randn(b, t - 1, k, k)
        return lambda: Peer(p).argmax

    yield Row("linear chain: mode", f"B{b} T{t} K{k}", {"ours": ours_mode, "torch-struct": struct_mode})


def semimarkov_rows() -> Iterator[Row]:
    from probllm.distributions import SemiMarkovCRF

    for b, n, d, k in [(16, 40, 8, 8), (16, 200, 20, 16)]:

        def ours(b: int = b, n: int = n, d: int = d, k: int = k) -> Call:
            return gradients(lambda s, a: SemiMarkovCRF(s, a).log_partition, leaf(b, n, d, k), leaf(k, k))

        def struct(b: int = b, n: int = n, d: int = d, k: int = k) -> Call:
            from torch_struct import SemiMarkovCRF as Peer

            if n > 40:
                raise MemoryError("not run: gigabytes")
            return gradients(lambda p: Peer(p).partition, leaf(b, n, d, k, k))

        yield Row("semi-Markov: log Z + gradients", f"B{b} T{n} D{d} K{k}", {"ours": ours, "torch-struct": struct})


def tree_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import ProjectiveDependencyTree, SpanningTree, SpanTree

    b, n, k = 16, 40, 8

    def spans() -> Call:
        return gradients(lambda s: SpanTree(s).log_partition, leaf(b, n, n, k))

    def struct_spans() -> Call:
        from torch_struct import TreeCRF

        return gradients(lambda s: TreeCRF(s).partition, leaf(b, n, n, k))

    yield Row("span trees (CKY): log Z + gradients", f"B{b} N{n} K{k}", {"ours": spans, "torch-struct": struct_spans})

    for law, peer, name in (
        (ProjectiveDependencyTree, "DependencyCRF", "projective dependencies (Eisner)"),
        (SpanningTree, "NonProjectiveDependencyCRF", "dependencies (matrix-tree)"),
    ):

        def ours(law: Any = law) -> Call:
            return gradients(lambda a, r: law(a, r, single_root=False).log_partition, leaf(b, n, n), leaf(b, n))

        def struct(peer: str = peer) -> Call:
            import torch_struct

            return gradients(lambda a: getattr(torch_struct, peer)(a).partition, leaf(b, n, n))

        yield Row(f"{name}: log Z + gradients", f"B{b} N{n}", {"ours": ours, "torch-struct": struct})

        def ours_mode(law: Any = law) -> Call:
            a, r = torch.randn(b, n, n), torch.randn(b, n)
            return lambda: law(a, r, single_root=False).mode

        def struct_mode(peer: str = peer) -> Call:
            import torch_struct

            a = torch.randn(b, n, n)
            return lambda: getattr(torch_struct, peer)(a).argmax

        # torch-struct has no best tree with crossing arcs
        peers = {"ours": ours_mode} | ({"torch-struct": struct_mode} if peer == "DependencyCRF" else {})
        yield Row(f"{name}: mode", f"B{b} N{n}", peers)


def grammar_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import GrammarTree, PairAlignment

    for b, t, n in [(16, 40, 10), (4, 20, 30)]:  # as many preterminals as nonterminals

        def rules(b: int = b, t: int = t, n: int = n) -> Call:
            def log_z(words: Any, table: Any, root: Any) -> Any:
                scores = torch.diag_embed(words.transpose(-1, -2)).movedim(-3, -1)  # one preterminal a word
                return GrammarTree(torch.cat([torch.zeros(b, t, t, n), scores], -1), table, root).log_partition

            return gradients(log_z, leaf(b, t, n), leaf(n, 2 * n, 2 * n), leaf(n))

        def struct_rules(b: int = b, t: int = t, n: int = n) -> Call:
            from torch_struct import SentCFG

            def log_z(words: Any, table: Any, root: Any) -> Any:
                return SentCFG((words, table.expand(b, n, 2 * n, 2 * n), root.expand(b, n))).partition

            return gradients(log_z, leaf(b, t, n), leaf(n, 2 * n, 2 * n), leaf(n))

        size = f"B{b} T{t} N{n} P{n}"
        yield Row("grammar (CKY): log Z + gradients", size, {"ours": rules, "torch-struct": struct_rules})

    b, u, w = 16, 40, 40

    def pairs() -> Call:
        return gradients(lambda s: PairAlignment(s).log_partition, leaf(b, u + 1, w + 1, 3))

    def struct_pairs() -> Call:
        from torch_struct import AlignmentCRF

        return gradients(lambda s: AlignmentCRF(s).partition, leaf(b, u, w, 3))

    yield Row("pair alignment: log Z + gradients", f"B{b} {u} by {w}", {"ours": pairs, "torch-struct": struct_pairs})


def hmm_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import HiddenMarkovModel, LinearChainCRF

    b, t, v = 32, 128, 50
    symbols = torch.randint(0, v, (b, t))
    for k in (8, 32, 64):

        def ours(k: int = k) -> Call:
            def log_z(i: Any, a: Any, o: Any) -> Any:
                return HiddenMarkovModel(i, a, torch.distributions.Categorical(logits=o)).log_prob(symbols)

            return gradients(log_z, leaf(k), leaf(k, k), leaf(k, v))

        def pyro_hmm(k: int = k) -> Call:
            import pyro.distributions as dist

            def log_z(i: Any, a: Any, o: Any) -> Any:
                return dist.DiscreteHMM(i, a, dist.Categorical(logits=o), duration=t).log_prob(symbols)

            return gradients(log_z, leaf(k), leaf(k, k), leaf(k, v))

        def struct(k: int = k) -> Call:
            from torch_struct import HMM

            if k > 32:
                raise MemoryError("not run: gigabytes")

            def log_z(i: Any, a: Any, o: Any) -> Any:
                rows = (a.log_softmax(-1).T, o.log_softmax(-1).T, i.log_softmax(-1))
                return HMM(*rows, symbols).partition

            return gradients(log_z, leaf(k), leaf(k, k), leaf(k, v))

        def dynamax_hmm(k: int = k) -> Call:
            jax = dynamax_ready()
            from dynamax.hidden_markov_model import hmm_filter

            seen = jax.numpy.array(symbols.numpy())

            def log_z(i: Any, a: Any, o: Any) -> Any:
                scores = jax.nn.log_softmax(o, -1).T[seen]  # [B, T, K]
                first, moves = jax.nn.softmax(i), jax.nn.softmax(a, -1)
                return jax.vmap(lambda e: hmm_filter(first, moves, e).marginal_loglik)(scores).sum()

            run = jax.jit(jax.value_and_grad(log_z, (0, 1, 2)))
            keys = jax.random.split(jax.random.PRNGKey(0), 3)
            leaves = [jax.random.normal(key, x) for key, x in zip(keys, ((k,), (k, k), (k, v)), strict=True)]
            return lambda: jax.block_until_ready(run(*leaves))

        peers = {"ours": ours, "Pyro": pyro_hmm, "torch-struct": struct, "dynamax": dynamax_hmm}
        yield Row("HMM: log p(x) + gradients", f"B{b} T{t} K{k} V{v}", peers)

        def given(k: int = k) -> Call:
            return gradients(lambda e, a: LinearChainCRF(e, a).log_partition, leaf(b, t, k), leaf(k, k))

        def dynamax_given(k: int = k) -> Call:
            jax = dynamax_ready()
            from dynamax.hidden_markov_model import hmm_filter

            def log_z(e: Any, a: Any) -> Any:
                first, moves = jax.numpy.full(k, 1 / k), jax.nn.softmax(a, -1)
                return jax.vmap(lambda x: hmm_filter(first, moves, x).marginal_loglik)(e).sum()

            run = jax.jit(jax.value_and_grad(log_z, (0, 1)))
            keys = jax.random.split(jax.random.PRNGKey(0), 2)
            leaves = [jax.random.normal(key, x) for key, x in zip(keys, ((b, t, k), (k, k)), strict=True)]
            return lambda: jax.block_until_ready(run(*leaves))

        peers = {"ours": given, "dynamax": dynamax_given}
        yield Row("HMM: log Z of log likelihoods + gradients", f"B{b} T{t} K{k}", peers)

    k = 32

    def ours_paths() -> Call:
        law = HiddenMarkovModel(
            torch.randn(k), torch.randn(k, k), torch.distributions.Categorical(logits=torch.randn(k, v))
        )
        return lambda: law.posterior(symbols).sample((16,))

    def dynamax_paths() -> Call:
        jax = dynamax_ready()
        from dynamax.hidden_markov_model import hmm_posterior_sample

        i, a = (jax.nn.softmax(jax.random.normal(jax.random.PRNGKey(s), x), -1) for s, x in ((0, (k,)), (1, (k, k))))
        log_likelihoods = jax.random.normal(jax.random.PRNGKey(2), (b, t, k))
        one = jax.vmap(lambda key, e: hmm_posterior_sample(key, i, a, e), (0, None))
        draw = jax.jit(jax.vmap(one, (1, 0)))
        keys = jax.random.split(jax.random.PRNGKey(3), (16, b))
        return lambda: jax.block_until_ready(draw(keys, log_likelihoods))

    yield Row("HMM: 16 posterior paths a row", f"B{b} T{t} K{k}", {"ours": ours_paths, "dynamax": dynamax_paths})


def em_rows() -> Iterator[Row]:
    import numpy as np
    import torch

    from probllm.math.hmm import expected_counts

    b, t, k, v = 64, 1000, 16, 50
    symbols = torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(0))
    start = [torch.randn(s, generator=torch.Generator().manual_seed(1)).softmax(-1) for s in ((k,), (k, k), (k, v))]

    def ours() -> Call:
        logs = [x.log() for x in start]

        def iteration() -> None:
            for counts in expected_counts(symbols, *logs)[1:]:
                (counts / counts.sum(-1, keepdim=True)).log()

        return iteration

    def hmmlearn(implementation: str) -> Call:
        from hmmlearn.hmm import CategoricalHMM

        model = CategoricalHMM(k, n_iter=1, tol=-1e30, implementation=implementation, init_params="", n_features=v)
        flat = np.ascontiguousarray(symbols.reshape(-1, 1).numpy())

        def fit() -> None:
            first, moves, emits = (x.double().numpy() for x in start)
            model.startprob_, model.transmat_, model.emissionprob_ = (
                x / x.sum(-1, keepdims=True) for x in (first, moves, emits)
            )
            model.fit(flat, [t] * b)

        return fit

    def dynamax() -> Call:
        jax = dynamax_ready()
        from dynamax.hidden_markov_model import CategoricalHMM

        model = CategoricalHMM(k, 1, v)
        parameters, properties = model.initialize(jax.random.PRNGKey(0))
        data = jax.numpy.array(symbols.numpy())[..., None]

        @jax.jit
        def step(parameters: Any) -> Any:
            stats, log = jax.vmap(lambda x: model.e_step(parameters, x))(data)
            state = model.initialize_m_step_state(parameters, properties)
            return model.m_step(parameters, properties, stats, state)[0], log.sum()

        return lambda: jax.block_until_ready(step(parameters))

    def pomegranate() -> Call:
        from pomegranate.distributions import Categorical
        from pomegranate.hmm import DenseHMM

        first, moves, emits = start
        model = DenseHMM([Categorical(p[None].tolist()) for p in emits], edges=moves.tolist(), starts=first.tolist())
        data = symbols.unsqueeze(-1)

        def iteration() -> None:
            model.summarize(data)
            model._reset_cache()

        return iteration

    yield Row("HMM: EM iteration", f"B{b} T{t} K{k} V{v}", {
        "ours": ours, "hmmlearn": lambda: hmmlearn("log"), "hmmlearn (scaling)": lambda: hmmlearn("scaling"),
        "dynamax": dynamax, "pomegranate": pomegranate,
    })  # fmt: skip


def ctc_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import MonotonicAlignment

    for b, t, v, u in [(32, 200, 50, 30), (16, 1000, 100, 100)]:
        targets = torch.randint(1, v, (b, u), generator=torch.Generator().manual_seed(0))

        def ours(b: int = b, t: int = t, v: int = v, targets: Any = targets) -> Call:
            def log_z(logits: Any) -> Any:
                return MonotonicAlignment.ctc(logits.log_softmax(-1), targets).log_partition

            return gradients(log_z, leaf(b, t, v))

        def native(b: int = b, t: int = t, v: int = v, u: int = u, targets: Any = targets) -> Call:
            lengths, sizes = torch.full((b,), t), torch.full((b,), u)

            def loss(logits: Any) -> Any:
                return torch.nn.functional.ctc_loss(
                    logits.log_softmax(-1).transpose(0, 1), targets, lengths, sizes, reduction="sum"
                )

            return gradients(loss, leaf(b, t, v))

        yield Row("CTC: loss + gradients", f"B{b} T{t} V{v} U{u}", {"ours": ours, "torch": native})


def kalman_rows() -> Iterator[Row]:
    import torch

    from probllm.distributions import LinearGaussianSSM

    for b, t, d in [(32, 128, 4), (1, 1000, 4), (32, 128, 8)]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(b, t, d, generator=generator)

        def parts(d: int = d) -> list[Any]:
            return [0.5 * torch.eye(d) + 0.1 * torch.randn(d, d), torch.eye(d) + 0.1 * torch.randn(d, d)]

        def with_law(law: Any, x: Any = x, d: int = d) -> Call:
            import pyro.distributions as dist

            def log_z(a: Any, c: Any) -> Any:
                normal = dist.Normal(torch.zeros(d), torch.ones(d)).to_event(1)
                return law(normal, a, normal, c, normal, duration=x.shape[1]).log_prob(x)

            return gradients(log_z, *(y.requires_grad_() for y in parts(d)))

        def pyro_ssm(with_law: Any = with_law) -> Call:
            import pyro.distributions as dist

            call: Call = with_law(dist.GaussianHMM)
            return call

        def dynamax(x: Any = x, d: int = d) -> Call:
            jax = dynamax_ready()
            from dynamax.linear_gaussian_ssm import LinearGaussianSSM as Peer
            from dynamax.linear_gaussian_ssm import lgssm_filter

            jnp = jax.numpy
            parameters, _ = Peer(d, d).initialize(jax.random.PRNGKey(0))
            data = jnp.array(x.numpy())

            def total(a: Any, c: Any) -> Any:
                dynamics = parameters.dynamics._replace(weights=a, cov=jnp.eye(d))
                emissions = parameters.emissions._replace(weights=c, cov=jnp.eye(d))
                given = parameters._replace(dynamics=dynamics, emissions=emissions)
                return jax.vmap(lambda y: lgssm_filter(given, y).marginal_loglik)(data).sum()

            run = jax.jit(jax.value_and_grad(total, (0, 1)))
            given = [jnp.array(y.numpy()) for y in parts(d)]
            return lambda: jax.block_until_ready(run(*given))

        ours = lambda with_law=with_law: with_law(LinearGaussianSSM)  # noqa: E731
        yield Row("Kalman: log p(x) + gradients", f"B{b} T{t} D{d}", {
            "ours": ours, "Pyro": pyro_ssm, "dynamax": dynamax,
        })  # fmt: skip

    b, t, d, o = 32, 128, 4, 2
    f, h = 0.5 * torch.eye(d) + 0.1 * torch.randn(d, d), torch.randn(d, o)
    y = torch.randn(b, t, o)

    def ours_law() -> Any:
        import pyro.distributions as dist

        states, errors = (dist.Normal(torch.zeros(n), torch.ones(n)).to_event(1) for n in (d, o))
        return LinearGaussianSSM(states, f, states, h, errors)

    def ours_means() -> Call:
        law = ours_law()
        return lambda: law.posterior(y).mean

    def ours_paths() -> Call:
        law = ours_law()
        return lambda: law.posterior(y).sample((16,))

    def dynamax_law() -> tuple[Any, Any]:
        """The parameters, and the observations."""
        jnp = dynamax_ready().numpy
        from dynamax.linear_gaussian_ssm import LinearGaussianSSM as Peer

        parameters, _ = Peer(d, o).initialize(
            dynamics_weights=jnp.array(f.numpy().T), dynamics_covariance=jnp.eye(d),
            emission_weights=jnp.array(h.numpy().T), emission_covariance=jnp.eye(o),
        )  # fmt: skip
        return parameters, jnp.array(y.numpy())

    def dynamax_means() -> Call:
        jax = dynamax_ready()
        from dynamax.linear_gaussian_ssm import lgssm_smoother

        parameters, data = dynamax_law()
        smooth = jax.jit(jax.vmap(lambda x: lgssm_smoother(parameters, x).smoothed_means))
        return lambda: jax.block_until_ready(smooth(data))

    def dynamax_paths() -> Call:
        jax = dynamax_ready()
        from dynamax.linear_gaussian_ssm import lgssm_posterior_sample

        parameters, data = dynamax_law()
        one = jax.vmap(lambda key, x: lgssm_posterior_sample(key, parameters, x))
        draw = jax.jit(jax.vmap(one, (0, None)))  # twice as fast as with the draws inside
        keys = jax.random.split(jax.random.PRNGKey(3), (16, b))
        return lambda: jax.block_until_ready(draw(keys, data))

    size = f"B{b} T{t} D{d} O{o}"
    yield Row("Kalman: smoothed means", size, {"ours": ours_means, "dynamax": dynamax_means})
    yield Row("Kalman: 16 posterior paths a row", size, {"ours": ours_paths, "dynamax": dynamax_paths})


def dynamax_ready() -> Any:
    """jax, with a name that tensorflow-probability still looks for and new versions of jax have moved."""
    import jax
    import jax._src.core
    import jax.interpreters.xla

    if not hasattr(jax.interpreters.xla, "pytype_aval_mappings"):
        jax.interpreters.xla.pytype_aval_mappings = jax._src.core.pytype_aval_mappings  # type: ignore[attr-defined]
    import dynamax  # noqa: F401

    return jax


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "chain": chain_rows, "semimarkov": semimarkov_rows, "trees": tree_rows, "grammar": grammar_rows,
    "hmm": hmm_rows, "em": em_rows,
    "ctc": ctc_rows, "kalman": kalman_rows,
}  # fmt: skip


def measure(threads: int, rounds: int, only: list[str]) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(threads)
    found = []
    for name in only:
        for row in ROWS[name]():
            calls, failed = {}, {}
            for contender, make in row.contenders.items():
                torch.manual_seed(0)
                try:
                    call = make()
                    call()
                    calls[contender] = call
                except Exception as error:
                    failed[contender] = f"{type(error).__name__}: {error}"[:60]
            if "ours" in failed:
                raise RuntimeError(f"{row.what}: {failed['ours']}")
            print(row.what, row.size, file=sys.stderr)
            found.append({"what": row.what, "size": row.size, "ms": in_turn(calls, rounds), "failed": failed})
    return found


def peak(name: str, index: int, contender: str) -> float:
    """MiB by which the resident set grew at most over one call, in this process."""
    import resource
    import threading
    import time

    row = list(ROWS[name]())[index]
    call = row.contenders[contender]()
    with open("/proc/self/statm", encoding="ascii") as file:
        before = int(file.read().split()[1])
    highest, done = before, False

    def watch() -> None:
        nonlocal highest
        while not done:
            with open("/proc/self/statm", encoding="ascii") as file:
                highest = max(highest, int(file.read().split()[1]))
            time.sleep(0.0005)

    if contender == "ours":  # compiling is not what is asked about, and what the call keeps to use again counts
        from probllm.math import room

        call()
        room.forget()
        with open("/proc/self/statm", encoding="ascii") as file:
            highest = before = int(file.read().split()[1])
    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done = True
    watcher.join()
    return (highest - before) * resource.getpagesize() / 2**20


MEMORY = [("chain", 1), ("semimarkov", 0), ("trees", 0), ("trees", 1)]


def show(rows: list[dict[str, Any]], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}: milliseconds (times ours)")
    for column in ("what", "size", "ours", "peers"):
        table.add_column(column, justify="right" if column == "ours" else "left")
    for row in rows:
        ours = row["ms"]["ours"]
        peers = [f"{p} {ms:.2f} ({ms / ours:.1f}x)" for p, ms in row["ms"].items() if p != "ours"]
        peers += [f"{p}: {why}" for p, why in row["failed"].items()]
        table.add_row(row["what"], row["size"], f"{ours:.3f}", "\n".join(peers))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.rounds, arguments.only)))
        return
    if arguments.peak:
        name, index, contender = arguments.peak
        print(peak(name, int(index), contender))
        return

    def child(threads: int, *more: str) -> Any:
        flags = "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, *more]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(printed.splitlines()[-1])

    results: dict[str, Any] = {}
    for threads in arguments.threads:
        rows = child(threads, "--child", str(threads), "--rounds", str(arguments.rounds), "--only", *arguments.only)
        results[str(threads)] = rows
        show(rows, threads)
    print("memory of one call, MiB: ours, torch-struct")
    for name, index in MEMORY:
        if name in arguments.only:
            row = list(ROWS[name]())[index]
            found = [child(1, "--peak", name, str(index), who) for who in ("ours", "torch-struct")]
            results.setdefault("memory", []).append({"what": row.what, "size": row.size, "MiB": found})
            print(f"  {row.what}, {row.size}: {found[0]:.1f}, {found[1]:.1f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
