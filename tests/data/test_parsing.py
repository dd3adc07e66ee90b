"""Parsed sentences become heads and labels and come back; what is no tree is refused with its sentence."""

import pytest
import torch

from probllm.data import ParsingVocabulary, TreebankSentence

ONE = TreebankSentence(["She", "sees", "him"], heads=[2, 0, 2], relations=["nsubj", "root", "obj"])
CROSSING = TreebankSentence(["a", "b", "c", "d"], heads=[3, 4, 0, 3], relations=["obj", "amod", "root", "obl"])
VOCABULARY = ParsingVocabulary.build([ONE, CROSSING], min_count=1, bits=10)


def test_heads_and_labels_stand_beside_the_inputs():
    data = VOCABULARY.dataset([ONE, CROSSING])
    batch = data.collate([data[0], data[1]])
    assert batch["heads"].tolist() == [[2, 0, 2, 0], [3, 4, 0, 3]]
    assert set(batch["inputs"]) == {"words", "characters", "features"}
    assert [VOCABULARY.decode(row[:size]) for row, size in zip(batch["labels"], (3, 4), strict=True)] == [
        ONE.relations,
        CROSSING.relations,
    ]
    assert batch["mask"].tolist() == [[True] * 3 + [False], [True] * 4]


def test_crossing_arcs_are_lifted_where_asked_and_labels_stay():
    (kept,), (lifted,) = (VOCABULARY.dataset([CROSSING], ["words"], projective=p) for p in (False, True))
    assert kept["heads"].tolist() == CROSSING.heads
    assert lifted["heads"].tolist() == [3, 3, 0, 3]
    assert torch.equal(kept["labels"], lifted["labels"])


@pytest.mark.parametrize("heads", [[], [-1, -1, -1]])
def test_sentences_without_heads_give_inputs_alone(heads):
    data = VOCABULARY.dataset([TreebankSentence(["She", "is", "new"], heads=heads)], ["words"])
    assert set(data[0]) == {"inputs"}
    assert data[0]["inputs"]["words"][1] == 1


@pytest.mark.parametrize(
    ("heads", "relations", "message"),
    [
        ([2, 1], ["obj", "obj"], "file: sentence 2 of 2 words has no tree"),
        ([0, -1], ["root", "obj"], "has no tree"),
        ([0, 3], ["root", "obj"], "has no tree"),
        ([0], ["root", "obj"], "has no tree"),
        ([0, 1], ["root", "vocative"], "the tag 'vocative'"),
    ],
)
def test_what_is_no_tree_is_refused_with_its_sentence(heads, relations, message):
    with pytest.raises(ValueError, match=message):
        VOCABULARY.dataset([ONE, TreebankSentence(["a", "b"], heads=heads, relations=relations)], source="file")


def test_saved_and_loaded_it_gives_the_same_data(tmp_path):
    VOCABULARY.save(tmp_path / "v.json")
    loaded = ParsingVocabulary.load(tmp_path / "v.json")
    assert loaded.relations == VOCABULARY.relations == sorted({*ONE.relations, *CROSSING.relations})
    assert loaded.num_labels == 5
    one, other = (each.dataset([CROSSING])[0] for each in (VOCABULARY, loaded))
    assert all(torch.equal(one["inputs"][name], other["inputs"][name]) for name in one["inputs"])
    VOCABULARY.words.save(tmp_path / "w.json")
    with pytest.raises(ValueError, match="expected a saved ParsingVocabulary"):
        ParsingVocabulary.load(tmp_path / "w.json")
