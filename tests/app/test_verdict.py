"""Judging a tagger: the right numbers for the right sentences, whatever their order and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.app.verdict import judge
from probllm.data import Dataset

TAGS = 3


class Fixed:
    """A tagger whose probabilities are a fixed function of each word's id."""

    def __init__(self, table):
        self.table = table  # [words, TAGS] probabilities

    def marginals(self, batch):
        return self.table[batch["inputs"]["words"]]

    def predict(self, batch):
        return self.marginals(batch).argmax(-1) * batch["mask"]

    def log_prob(self, batch):
        chosen = self.marginals(batch).gather(-1, batch["tags"].unsqueeze(-1)).squeeze(-1)
        return (chosen.log() * batch["mask"]).sum(-1)


class Generative(Fixed):
    """One whose log_prob counts the words too."""

    def log_posterior(self, batch):
        return Fixed.log_prob(self, batch)

    def log_prob(self, batch):
        return Fixed.log_prob(self, batch) - 100.0


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 2**31), st.sampled_from([Fixed, Generative])
)
def test_verdict_is_what_each_sentence_gives_alone(lengths, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(20, TAGS, generator=generator, dtype=torch.float64).softmax(-1)
    sentences = [torch.randint(20, (n,), generator=generator) for n in lengths]
    tags = [torch.randint(TAGS, (n,), generator=generator) for n in lengths]
    data = Dataset({"inputs": {"words": w}, "tags": y} for w, y in zip(sentences, tags, strict=True))
    verdict = judge(kind(table), data, [y.numpy() for y in tags], batch_size=4)
    for i, (words, gold) in enumerate(zip(sentences, tags, strict=True)):
        p = table[words]
        assert np.allclose(verdict.marginals[i], p, atol=1e-6)
        assert verdict.predicted[i].tolist() == p.argmax(-1).tolist()
        assert verdict.correct[i] == (p.argmax(-1) == gold).sum()
        assert verdict.tokens[i] == len(gold)
        nll = -p[torch.arange(len(gold)), gold].log().sum().item()
        assert verdict.token_nll[i] == pytest.approx(nll, rel=1e-5)
        assert verdict.sequence_nll[i] == pytest.approx(nll, rel=1e-9)
    assert 0 <= verdict.calibration_error <= 1
    assert verdict.tokens_per_second > 0
