"""How well does an encoder-decoder translate captions, after how long, and how fast does it train beside Marian?

    python benchmarks/translation.py speed [--threads 1 2] [--rounds 9]
    python benchmarks/translation.py train [--epochs N] [--folder runs/translation] [--json FILE]

``speed``: training steps on Multi30k English to German, ours and ``transformers``' Marian of the same shape (d = 256,
four layers each side, 8,000 subwords), in turn. Real tokens of both sides a second; Marian on batches of similar
lengths, as ours are, and on random ones, which a plain loop has; each in float32 and under bfloat16 autocast.

``train``: the Transformer of ``probllm compare translation --full``, then BLEU on the
test sets of 2016 and 2017, greedy and by beam. Corpora: ``../shared/data`` or ``$PROBLLM_DATA``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from probllm.app.translation import SUBWORDS, read_parallel
from probllm.app.translators import BATCH, BEAM, CANDIDATES, CLIP, Pieces, Size, Task, size_of, transformer
from probllm.app.verdict import in_batches, reorder
from probllm.data import Dataset, Subwords
from probllm.decoding import Greedy
from probllm.evaluation import bleu, bleu_counts, paired_bleu
from probllm.training import fast_bfloat16, fit

PLACE = Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
TESTS = {
    "2016": ("multi30k_en_de", "test_2016_flickr"),
    "2017": ("multi30k_2017", "test_2017_flickr"),
    "2017 mscoco": ("multi30k_2017", "test_2017_mscoco"),
}


def read() -> Task:
    """The corpus and its subwords."""
    folder = PLACE / "multi30k_en_de"
    if not folder.is_dir():
        raise SystemExit(f"no corpora at {PLACE}: set PROBLLM_DATA")
    train, dev = (read_parallel(folder / f"{part}.en.gz", "de") for part in ("train", "val"))
    subwords = Subwords.train([text for pair in train for text in pair], "bpe", SUBWORDS[False])
    return Task("Multi30k", train, dev, [], Pieces(subwords))


def marian(vocabulary: int) -> Any:
    """A Marian of our shape, tied as ours."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=vocabulary, d_model=256, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024, dropout=0.1, attention_dropout=0.0,
        activation_dropout=0.1, pad_token_id=0, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=3,
        max_position_embeddings=256, activation_function="gelu",
    )  # fmt: skip
    return MarianMTModel(config).train()


def their_loss(model: Any) -> Callable[[dict[str, Any]], torch.Tensor]:
    """The mean loss a token."""

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["target"].masked_fill(batch["target"] == 0, -100)
        found: torch.Tensor = model(batch["inputs"], attention_mask=batch["mask"].long(), labels=labels).loss
        return found

    return loss


def speed(given: argparse.Namespace) -> None:
    """Real tokens a second of training steps, in turn."""
    task = read()
    data: Dataset = task.codec.dataset(task.train)
    ours = transformer(task, Size(256, 4, 0, 0.1, 64, 1, 0.0)).train()
    theirs = marian(task.codec.sources)
    print(f"parameters: ours {count(ours):,}, Marian {count(theirs):,}")
    bucketed, order = data.batches(64, seed=1), np.random.default_rng(1).permutation(len(data))
    mixed = [Dataset.collate([data[i] for i in order[64 * k : 64 * k + 64]]) for k in range(8 * given.rounds)]
    contenders: dict[str, tuple[Any, Any, Any, bool]] = {}
    for name, bfloat16 in (("float32", False), ("bfloat16", True)):
        contenders[f"ours, {name}"] = (ours, ours.loss, bucketed, bfloat16)
        contenders[f"Marian, {name}"] = (theirs, their_loss(theirs), bucketed, bfloat16)
        contenders[f"Marian, {name}, random batches"] = (theirs, their_loss(theirs), mixed, bfloat16)
    for threads in given.threads:
        torch.set_num_threads(threads)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for index in range(given.rounds + 1):
            for name, (model, loss, batches, bfloat16) in contenders.items():
                rate = step(model, loss, [batches[(4 * index + k) % len(batches)] for k in range(4)], bfloat16)
                if index:
                    rates[name].append(rate)
        print(f"{threads} thread{'s' * (threads > 1)}: real tokens a second")
        base = float(np.median(rates["Marian, float32, random batches"]))
        for name, found in rates.items():
            print(f"  {name:34} {np.median(found):8,.0f}  {np.median(found) / base:5.2f}")


def step(model: Any, loss: Any, batches: list[Any], bfloat16: bool) -> float:
    """Tokens a second of a step on each batch."""
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    tokens, begun = 0, time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = loss(batch)
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        tokens += int(batch["mask"].sum()) + int((batch["target"] != 0).sum())
    return tokens / (time.perf_counter() - begun)


def count(model: Any) -> int:
    """Its numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(given: argparse.Namespace) -> None:
    """Train for a time, and translate."""
    torch.set_num_threads(given.threads[-1])
    task = read()
    size = size_of(task, small=False)
    torch.manual_seed(0)
    model = transformer(task, size)
    data, dev = task.codec.dataset(task.train), task.codec.dataset(task.dev)
    begun = time.perf_counter()
    run = fit(
        model, data, dev, epochs=given.epochs or size.epochs, batch_size=size.batch,
        learning_rate=CANDIDATES["transformer"].rate, folder=given.folder, resume=True, clip=CLIP,
        mixed_precision=fast_bfloat16(),
    )  # fmt: skip
    print(f"{count(model):,} parameters, {run.seconds:.0f} s, {run.seconds * torch.get_num_threads():.0f} s of cores")
    found: dict[str, Any] = {"seconds": run.seconds, "threads": torch.get_num_threads(), "epochs": len(run.history)}
    found["wall"] = time.perf_counter() - begun
    for name, (folder, part) in TESTS.items():
        pairs = read_parallel(PLACE / folder / f"{part}.en.gz", "de")
        counts = {}
        for way, method in (("greedy", Greedy()), ("beam", BEAM)):
            order, batches = in_batches(task.codec.dataset(pairs), BATCH, "cpu")
            before = time.perf_counter()
            rows = reorder(order, [row for batch in batches for row in model.predict(batch, method).tolist()])
            spent = time.perf_counter() - before
            texts = [task.codec.decode(row[: row.index(0)] if 0 in row else row) for row in rows]
            counts[way] = bleu_counts(texts, [target for _, target in pairs])
            score = bleu(counts[way])
            found[f"{name}, {way}"] = {"bleu": score, "seconds": spent}
            print(f"{name:12} {way:7} BLEU {score.value:.2f} [{score.low:.2f}, {score.high:.2f}], {spent:.1f} s")
        gap = paired_bleu(counts["beam"], counts["greedy"])
        print(f"{name:12} beam less greedy {gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]")
    if given.json is not None:
        given.json.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "train"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, help="in place of the setting's own")
    parser.add_argument("--folder", type=Path, default=Path("runs/translation-benchmark"), help="of the checkpoints")
    parser.add_argument("--json", type=Path, help="write what train found there")
    given = parser.parse_args()
    {"speed": speed, "train": train}[given.what](given)


if __name__ == "__main__":
    main()
