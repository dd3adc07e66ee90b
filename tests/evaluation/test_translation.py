"""BLEU with intervals: equal to sacreBLEU's, and what the interval is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import bleu, bleu_counts, paired_bleu

sacrebleu = pytest.importorskip("sacrebleu")
words = st.sampled_from(["a", "b", "c", "The", "man", ",", "is", "."])
sentences = st.lists(st.lists(words, max_size=9).map(" ".join), min_size=1)


@given(sentences, st.randoms(use_true_random=False))
def test_bleu_is_that_of_sacrebleu(references: list[str], random: object) -> None:
    outputs = []
    for reference in references:
        words = reference.split()
        if random.random() < 0.3:  # type: ignore[attr-defined]
            random.shuffle(words)  # type: ignore[attr-defined]
        outputs.append(" ".join(w for w in words if random.random() < 0.8))  # type: ignore[attr-defined]
    found = bleu(bleu_counts(outputs, references), resamples=5)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score, abs=1e-9)


def test_the_interval_is_that_of_sentences_drawn_anew() -> None:
    random = np.random.default_rng(0)
    words = ["the", "man", "is", "on", "a", "horse", "in", "red"]
    references = [" ".join(random.choice(words, 9)) for _ in range(60)]
    outputs = [" ".join(w if random.random() < 0.7 else "x" for w in line.split()) for line in references]
    counts = bleu_counts(outputs, references)
    found = bleu(counts)
    draws = []
    for _ in range(300):
        rows = random.integers(0, 60, 60)
        draws.append(sacrebleu.corpus_bleu([outputs[i] for i in rows], [[references[i] for i in rows]]).score)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))
    same = paired_bleu(counts, counts)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    worse = bleu_counts(["x"] * 20 + outputs[20:], references)
    assert paired_bleu(counts, worse).value == pytest.approx(found.value - bleu(worse).value)
    assert paired_bleu(counts, worse).low > 0
    assert bleu(counts[:1]).low == -math.inf


def test_nothing_right_and_bad_input() -> None:
    assert bleu(bleu_counts(["", "x"], ["a b", "c"])).value == 0.0
    with pytest.raises(ValueError, match="references: expected 1"):
        bleu_counts(["a"], [])
    with pytest.raises(ValueError, match="empty"):
        bleu_counts([], [])
    with pytest.raises(ValueError, match="same sentences"):
        paired_bleu(np.ones((2, 10)), np.ones((3, 10)))
