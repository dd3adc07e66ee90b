"""How fast are the Transformer's training step and generation beside others of the same shape, and beside the floor?

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/backbone.py

A language model of d=256, 4 layers, 4 heads, 256 positions, 8,192 tokens, tied output layer. The floor is the bare
matrix products: of every linear layer, of attention and of the output layer, forward and (for the training step)
backward. Contenders run in turn; medians, and ratios to the floor. ``--compile``: the training step under
``torch.compile`` as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from nanogpt import NanoGPT
from torch import Tensor, nn

from probllm.nn import TransformerDecoder
from probllm.nn.linear import linear

V, T, D, LAYERS, HEADS = 8192, 256, 256, 4, 4
PROMPT, NEW = 32, 128


# Ours.


class Ours(nn.Module):
    """Our decoder with its tied output layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.decoder = TransformerDecoder(
            V, dim=D, layers=LAYERS, heads=HEADS, dropout=0.0, max_length=T, **{"positions": "learned", **options}
        )

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.decoder(words), self.decoder.token_weight)
        return F.cross_entropy(logits.view(-1, V), targets.view(-1))

    def generate(self, words: Tensor, count: int) -> Tensor:
        weight, cache = self.decoder.token_weight, self.decoder.new_cache(len(words), PROMPT + count)
        result = [words]
        for _ in range(count):
            words = linear(self.decoder(words, cache=cache)[:, -1:], weight).argmax(-1)
            result.append(words)
        return torch.cat(result, 1)


# Peers.


class HuggingFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(words, use_cache=False).logits.view(-1, V), targets.view(-1))

    def generate(self, words: Tensor, count: int) -> Tensor:
        mask = torch.ones_like(words)
        return self.model.generate(words, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]


class XTransformers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        layers = Decoder(dim=D, depth=LAYERS, heads=HEADS, attn_dim_head=D // HEADS, attn_flash=True)
        self.model = TransformerWrapper(num_tokens=V, max_seq_len=T, tie_embedding=True, attn_layers=layers)
        self.wrapper = AutoregressiveWrapper(self.model)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(words).view(-1, V), targets.view(-1))

    def generate(self, words: Tensor, count: int) -> Tensor:
        return self.wrapper.generate(words, count, temperature=0.0, cache_kv=True)  # type: ignore[no-any-return]


# The floor.

_LINEAR = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)] * LAYERS + [(D, V)]


def bare_step(batch: int) -> Callable[[], None]:
    """The products of a training step: of each linear layer three, of attention two forward and four back."""
    n, size = batch * T, D // HEADS
    inputs = {(i, o): (torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for i, o in set(_LINEAR)}
    q, p = torch.randn(batch * HEADS, T, size), torch.randn(batch * HEADS, T, T)

    def run() -> None:
        for shape in _LINEAR:
            x, w, g = inputs[shape]
            _ = x @ w.t(), g @ w, g.t() @ x
        for _ in range(LAYERS):
            for _ in range(2):
                q @ q.transpose(1, 2), p @ q, p.transpose(1, 2) @ q

    return run


def bare_generation(batch: int) -> Callable[[], None]:
    """The products of the prompt and of each new token: linear layers, attention to what was read, output layer."""
    size = D // HEADS
    weights = [torch.randn(o, i) for i, o in _LINEAR]
    prompt, token = ({i: torch.randn(n * batch, i) for i, _ in _LINEAR} for n in (PROMPT, 1))
    keys = torch.randn(batch * HEADS, PROMPT + NEW, size)

    def run() -> None:
        for t in range(NEW):
            inputs, n = (prompt, PROMPT) if t == 0 else (token, 1)
            for weight in weights[:-1]:
                _ = inputs[weight.shape[1]] @ weight.t()
            _ = inputs[D][:batch] @ weights[-1].t()
            seen = keys[:, : PROMPT + t]
            for _ in range(LAYERS):
                scores = seen[:, :n] @ seen.transpose(1, 2)
                _ = scores @ seen

    return run


def measure(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all running in turn in every round, each behind an untimed call in the first."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def contenders() -> dict[str, Any]:
    found: dict[str, Any] = {
        "ours": Ours(),
        "ours, rotary": Ours(positions="rope"),
        "nanoGPT's design": NanoGPT(V, T, D, LAYERS, HEADS),
    }
    for name, peer in (("Hugging Face GPT-2", HuggingFace), ("x-transformers", XTransformers)):
        try:
            found[name] = peer()
        except ImportError as error:
            print(f"{name} could not run: {error}")
    return found


def training_step(model: nn.Module, words: Tensor, targets: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(words, targets).backward()

    return run


def train(models: dict[str, Any], batch: int, rounds: int, compiling: bool) -> None:
    words, targets = torch.randint(0, V, (2, batch, T))
    runs: dict[str, Callable[[], Any]] = {"bare products": bare_step(batch)}
    runs |= {name: training_step(model, words, targets) for name, model in models.items()}
    if compiling:
        for name, model in models.items():
            runs[f"{name}, compiled"] = training_step(torch.compile(model), words, targets)
    report(f"training step, batch {batch}, length {T}", measure(runs, rounds), batch * T)


def packed(model: Ours, batch: int, rounds: int) -> None:
    """Training steps on as many real tokens without padding, packed into one row, and padded; real tokens a second."""
    total = batch * T
    lengths = torch.randint(T // 4, T + 1, (4 * batch,))
    lengths = lengths[lengths.cumsum(0) <= total]
    lengths[-1] += min(total - int(lengths.sum()), T - int(lengths[-1]))
    real = int(lengths.sum())
    words, targets = torch.randint(0, V, (2, total))
    mask = torch.arange(T) < lengths.unsqueeze(1)
    padded, padded_targets = torch.zeros(2, *mask.shape, dtype=torch.long)
    padded[mask], padded_targets[mask] = words[:real], targets[:real]
    decoder = model.decoder

    def step(states: Callable[[], Tensor], targets: Tensor) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(F.linear(states(), decoder.token_weight), targets).backward()

        return run

    runs = {
        f"{batch} rows of {T}": step(lambda: decoder(words.view(batch, T)).flatten(0, 1), targets),
        f"{len(lengths)} rows of {T // 4} to {T}, packed": step(
            lambda: decoder(words[None, :real], segments=lengths)[0], targets[:real]
        ),
        "the same, padded": step(lambda: decoder(padded, mask=mask).flatten(0, 1), padded_targets.flatten()),
    }
    seconds = measure(runs, rounds)
    print("\n**training step, packed rows**\n\n| | ms | real tokens/s | of the unpadded |\n|---|---|---|---|")
    counts = (total, real, real)
    rates = [count / value for count, value in zip(counts, seconds.values(), strict=True)]
    for (name, value), rate in zip(seconds.items(), rates, strict=True):
        print(f"| {name} | {1e3 * value:.1f} | {rate:,.0f} | {rate / rates[0]:.2f} |")


def generate(models: dict[str, Any], batch: int, rounds: int) -> None:
    words = torch.randint(1, V, (batch, PROMPT))
    runs: dict[str, Callable[[], Any]] = {"bare products": bare_generation(batch)}
    for name, model in models.items():
        runs[name.replace("nanoGPT's design", "plain loop with a cache")] = partial(model.eval().generate, words, NEW)
    with torch.no_grad():
        report(f"{NEW} tokens after {PROMPT}, batch {batch}, greedy", measure(runs, rounds), batch * NEW)


def report(title: str, seconds: dict[str, float], tokens: int) -> None:
    print(f"\n**{title}**\n\n| | ms | tokens/s | times the floor | ours to it |\n|---|---|---|---|---|")
    floor, ours = seconds["bare products"], seconds["ours"]
    for name, value in seconds.items():
        print(f"| {name} | {1e3 * value:.1f} | {tokens / value:,.0f} | {value / floor:.2f} | {ours / value:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=["train", "generate"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {version('transformers')}, threads {arguments.threads}")
    models = contenders()
    if arguments.only != "generate":
        train(models, 8, arguments.rounds, arguments.compile)
        packed(models["ours"], 8, arguments.rounds)
    if arguments.only != "train":
        for batch in (1, 8):
            generate(models, batch, arguments.rounds)


if __name__ == "__main__":
    main()
