"""Transducers by CTC: the battery of a model, and a mapping that is learned."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch

from probllm.data.transduction import Pair, TransductionVocabulary
from probllm.models import CTCTransducer
from probllm.nn import RecurrentEncoder
from probllm.training import fit
from tests.models import battery

BATCH = {
    "inputs": torch.tensor([[2, 3, 4, 2], [3, 2, 0, 0], [4, 0, 0, 0]]),
    "mask": torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]]),
    "target": torch.tensor([[1, 2, 1, 0, 0, 0, 0, 0], [3] + [0] * 7, [0] * 8]),
}
CASES = [battery.Case("lstm", lambda: CTCTransducer(RecurrentEncoder(5, 8), 3), BATCH, target="target")]
# what is predicted is as wide as the frames: see the test of padding below
CHECKS = [c for c in battery.CHECKS if "predict_has_the_shape" not in c.__name__ and "padding_ch" not in c.__name__]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: battery.Case, check: Callable[[battery.Case], None]) -> None:
    check(case)


def test_padding_changes_nothing() -> None:
    model, wider = CASES[0].made(), battery.with_more_padding(BATCH, 3)
    torch.testing.assert_close(model.log_prob(wider), model.log_prob(BATCH))
    narrow, wide = model.predict(BATCH), model.predict(wider)
    assert narrow.shape == (3, 8)
    assert torch.equal(wide[:, :8], narrow)
    assert not wide[:, 8:].any()


def test_it_learns_a_mapping_of_which_some_symbols_write_two_and_some_none() -> None:
    pyro.set_rng_seed(0)
    written = {"a": ["A"], "b": ["B", "B"], "x": ["K", "S"], "e": []}
    words = ["".join("abxe"[i] for i in row) for row in torch.randint(4, (300, 5)).tolist()]
    pairs = [Pair(word, [y for c in word for y in written[c]]) for word in words]
    vocabulary = TransductionVocabulary.build(pairs)
    model = CTCTransducer(RecurrentEncoder(len(vocabulary.sources), 32), vocabulary.num_labels, frames=4, dropout=0.0)
    data = vocabulary.dataset(pairs)
    fit(model, data, epochs=20, batch_size=20, learning_rate=0.02, progress=False)
    right = 0
    for batch in data.batches(batch_size=50, shuffle=False):
        for predicted, target in zip(model.predict(batch), batch["target"], strict=True):
            right += vocabulary.decode(predicted) == vocabulary.decode(target)
    assert right > 290


def test_a_beam_finds_labels_at_least_as_probable_as_those_of_the_best_path() -> None:
    pyro.set_rng_seed(0)
    model = CTCTransducer(RecurrentEncoder(5, 8), 3, frames=3).eval()
    better = 0
    for _ in range(5):
        batch = {**BATCH, "inputs": torch.randint(1, 5, BATCH["inputs"].shape)}
        law = model.law(batch)
        path, wide = (law.log_prob(model.predict(batch, beam=beam)) for beam in (1, 500))
        assert bool((wide > path - 1e-5).all())
        better += int((wide > path + 1e-3).sum())
    assert better > 0


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_labels": 0}, "num_labels: expected at least 1"),
    ({"num_labels": 2, "frames": 0}, "frames: expected at least 1"),
])  # fmt: skip
def test_bad_input(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTCTransducer(RecurrentEncoder(5, 4), **arguments)
    with pytest.raises(ValueError, match="needs inputs"):
        CTCTransducer(RecurrentEncoder(5, 4), 2).sample(1)
