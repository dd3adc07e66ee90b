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
    "target": torch.tensor([[1, 2, 1], [3, 0, 0], [0, 0, 0]]),
}
CASES = [battery.Case("lstm", lambda: CTCTransducer(RecurrentEncoder(5, 8), 3), BATCH, target="target")]
# labels are no longer than the frames, and need not be as long as what was observed
CHECKS = [check for check in battery.CHECKS if "predict_has_the_shape" not in check.__name__]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: battery.Case, check: Callable[[battery.Case], None]) -> None:
    check(case)


def test_it_learns_a_mapping_of_which_some_symbols_write_two_and_some_none() -> None:
    pyro.set_rng_seed(0)
    written = {"a": ["A"], "b": ["B", "B"], "x": ["K", "S"], "e": []}
    words = [
        "".join(w)
        for w in torch.tensor([ord(c) for c in "abxe"])[torch.randint(4, (300, 5))].tolist()
        for w in [map(chr, w)]
    ]
    pairs = [Pair(word, [y for c in word for y in written[c]]) for word in words]
    vocabulary = TransductionVocabulary.build(pairs)
    model = CTCTransducer(RecurrentEncoder(len(vocabulary.sources), 32), vocabulary.num_labels, frames=3, dropout=0.0)
    data = vocabulary.dataset(pairs)
    fit(model, data, epochs=20, batch_size=20, learning_rate=0.02, progress=False)
    right = 0
    for batch in data.batches(batch_size=50, shuffle=False):
        for predicted, target in zip(model.predict(batch), batch["target"], strict=True):
            right += vocabulary.decode(predicted) == vocabulary.decode(target)
    assert right > 290


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_labels": 0}, "num_labels: expected at least 1"),
    ({"num_labels": 2, "frames": 0}, "frames: expected at least 1"),
])  # fmt: skip
def test_bad_input(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTCTransducer(RecurrentEncoder(5, 4), **arguments)
    with pytest.raises(ValueError, match="needs inputs"):
        CTCTransducer(RecurrentEncoder(5, 4), 2).sample(1)
