"""Does a tagger that learned to fill in hidden words need fewer tags?

    python benchmarks/pretraining.py [--epochs 8] [--seeds 0 1 2] [--shares 0.01 0.1 1.0] [--json FILE]

A Transformer over subwords is pre-trained as a masked language model on the words of the English Web Treebank's
training part, nine tenths of tiny Shakespeare, and the reference of the Python language. A CRF tagger on it learns from
a share of the treebank's tagged sentences: from the pre-trained weights, from fresh ones, and (``joint``) from fresh
ones with the masked language model trained beside it, ``fit({"tags": ..., "words": ...})``, where each shared weight is
counted and stepped once. Where the tagger learns alone the epoch is chosen on 500 development sentences. UPOS accuracy
on the test part, with bootstrap intervals over sentences and seeds. Corpora: ``../shared/data`` or ``$PROBLLM_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyro
import torch

from probllm import CRFTagger, MaskedLM, fit
from probllm.app.verdict import in_batches, reorder
from probllm.data import (
    Dataset,
    Masked,
    Subwords,
    TaggedSentence,
    TaggingVocabulary,
    Windows,
    python_reference,
    read_tagged,
    read_text,
)
from probllm.data.subwords import MASK, SPECIAL
from probllm.evaluation import bootstrap, correct_tokens, paired_bootstrap, unpad
from probllm.nn import SubwordPooling, TransformerEncoder
from probllm.training import fast_bfloat16

PLACE = Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
SUBWORDS, DIM, LAYERS, WINDOW = 8000, 192, 4, 128


def corpus() -> tuple[dict[str, list[TaggedSentence]], str]:
    """The treebank's parts, and the text to pre-train on."""
    treebank, shakespeare = PLACE / "ud_english_ewt", PLACE / "tinyshakespeare"
    if not treebank.is_dir() or not shakespeare.is_dir():
        raise SystemExit(f"no corpora at {PLACE}: set PROBLLM_DATA")
    parts = {part: read_tagged(treebank / f"{part}.conllu.gz") for part in ("train", "dev", "test")}
    (file,) = [path for path in sorted(shakespeare.iterdir()) if path.name.split(".")[-1] in ("txt", "gz")]
    plays = read_text(file)
    own = "\n".join(" " + " ".join(sentence.words) for sentence in parts["train"])
    return parts, "\n".join([own, plays[: int(0.9 * len(plays))], python_reference().text])


class Setting:
    """Subwords, data and fresh models."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.parts, text = corpus()
        self.subwords = Subwords.train(text.split("\n"), "bpe", SUBWORDS)
        self.vocabulary = TaggingVocabulary.build(self.parts["train"], subwords=self.subwords)
        ids = torch.tensor([token for line in text.split("\n") for token in self.subwords.encode(line + "\n")])
        first = len(SPECIAL)
        self.windows = Masked(Windows(ids[: -len(ids) // 50], WINDOW), MASK, len(self.subwords), first)
        self.held_out = Masked(Windows(ids[-len(ids) // 50 :], WINDOW), MASK, len(self.subwords), first)
        self.data = {part: self.vocabulary.dataset(found, ["subwords"]) for part, found in self.parts.items()}
        self.gold = [example["tags"].numpy() for example in self.data["test"]]  # type: ignore[union-attr]
        print(f"{len(ids):,} subwords of text; {len(self.data['train']):,} tagged sentences", flush=True)

    def encoder(self, seed: int) -> TransformerEncoder:
        """Fresh weights."""
        pyro.set_rng_seed(seed)
        return TransformerEncoder(len(self.subwords), DIM, LAYERS, 4, dropout=0.1)

    def pretrained(self) -> MaskedLM:
        """The masked language model, trained once."""
        model = MaskedLM(self.encoder(0))
        begun = time.process_time()
        run = fit(
            model, self.windows, self.held_out, epochs=self.given.epochs, batch_size=16, learning_rate=1e-3,
            weight_decay=0.05, clip=20.0, folder=self.given.folder / "words", resume=True,
            mixed_precision=fast_bfloat16(), progress=False,
        )  # fmt: skip
        batch = self.held_out.batches(10_000, shuffle=False)[0]
        with torch.no_grad():
            nats = -float(model.log_prob(batch).sum()) / int(batch["hidden"].sum())
        print(
            f"pre-trained: {nats:.3f} nats a hidden token, {time.process_time() - begun:.0f} CPU s, {run.seconds:.0f} s"
        )
        return model

    def share(self, share: float, seed: int) -> Dataset:
        """Some of the tagged sentences."""
        count = max(1, round(share * len(self.data["train"])))
        order = np.random.default_rng(seed).permutation(len(self.data["train"]))
        return self.data["train"][order[:count].tolist()]

    def train(self, encoder: TransformerEncoder, share: float, seed: int, joint: MaskedLM | None) -> list[np.ndarray]:
        """Tags of the test sentences by a tagger that was trained on a share."""
        pyro.set_rng_seed(seed)
        tagger = CRFTagger(SubwordPooling(encoder), self.vocabulary.num_tags)
        data = self.share(share, seed)
        epochs = max(4, min(30, round(4 / share**0.5)))
        options: dict[str, Any] = {
            "batch_size": 16, "learning_rate": 5e-4, "weight_decay": 0.05, "seed": seed, "progress": False,
            "epochs": epochs, "mixed_precision": fast_bfloat16(),
        }  # fmt: skip
        if joint is None:
            fit(tagger, data, self.data["dev"][:500], **options)
        else:
            options["epochs"] = self.given.epochs
            fit(
                {"tags": tagger, "words": joint}, {"tags": data, "words": self.windows},
                weights={"tags": 1.0, "words": 0.3}, **options,
            )  # fmt: skip
        order, batches = in_batches(self.data["test"], 64, "cpu")
        with torch.no_grad():
            found = [t for b in batches for t in unpad(tagger.predict(b), b["mask"])]
        return reorder(order, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="of pre-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--joint", type=float, nargs="*", default=[0.1], help="shares that are trained jointly too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/pretraining-benchmark"), help="of the checkpoints")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given)
    words = setting.pretrained()
    results: list[dict[str, Any]] = []
    for share in given.shares:
        correct: dict[str, list[np.ndarray]] = {}
        for way in ("pre-trained", "fresh", *(["joint"] if share in given.joint else [])):
            begun = time.process_time()
            for seed in given.seeds:
                encoder = copy.deepcopy(words.encoder) if way == "pre-trained" else setting.encoder(seed)
                assert isinstance(encoder, TransformerEncoder)
                tags = setting.train(encoder, share, seed, MaskedLM(encoder) if way == "joint" else None)
                right, tokens = correct_tokens(tags, setting.gold)
                correct.setdefault(way, []).append(right)
            sums = np.stack(correct[way])
            score = bootstrap(sums, np.broadcast_to(tokens, sums.shape))
            seconds = (time.process_time() - begun) / len(given.seeds)
            interval = f"[{score.low:.2%}, {score.high:.2%}]"
            print(f"{share:6.0%} {way:12} {score.value:.2%} {interval} {seconds:.0f} CPU s a run", flush=True)
            results.append({"share": share, "way": way, "accuracy": score, "cpu_seconds": seconds})
            if way != "pre-trained":
                a, b = np.stack(correct["pre-trained"]), sums
                gap = paired_bootstrap(a, b, np.broadcast_to(tokens, a.shape))
                print(f"       pre-trained less {way}: {gap.value:+.2%} [{gap.low:+.2%}, {gap.high:+.2%}]", flush=True)
                results[-1]["pre-trained less this"] = gap
            if given.json is not None:
                given.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
