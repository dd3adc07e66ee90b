"""Pairs of sequences as ids, there and back."""

import pytest
import torch

from probllm.data import Dataset
from probllm.data.transduction import Pair, TransductionVocabulary

PAIRS = [Pair("box", ["B", "AA", "K", "S"]), Pair("ox", ("AA", "K", "S")), Pair("b", [])]


def test_targets_come_back_from_their_ids_and_from_disk(tmp_path):
    vocabulary = TransductionVocabulary.build(PAIRS)
    data = vocabulary.dataset(PAIRS)
    batch = Dataset.collate(data.examples)
    assert batch["inputs"].shape == (3, 3)
    assert batch["mask"].sum(-1).tolist() == [3, 2, 1]
    assert batch["target"].shape == (3, 4)
    assert int(batch["target"].max()) == vocabulary.num_labels
    for pair, target in zip(PAIRS, batch["target"], strict=True):
        assert vocabulary.decode(target) == list(pair.target)
    vocabulary.save(tmp_path / "vocabulary.json")
    again = TransductionVocabulary.load(tmp_path / "vocabulary.json")
    assert torch.equal(again.dataset(PAIRS)[0]["target"], data[0]["target"])


def test_unknown_symbols_have_id_one_and_a_pair_without_source_is_refused():
    vocabulary = TransductionVocabulary.build(PAIRS)
    assert vocabulary.dataset([Pair("q", ["Q"])])[0]["target"].tolist() == [1]
    with pytest.raises(ValueError, match="no tokens"):
        vocabulary.dataset([Pair("", ["Q"])])
