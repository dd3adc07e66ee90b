"""Sentences become tensors and come back; what is saved makes the same tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import Subwords, TaggingVocabulary, read_tagged, stress_tagging
from probllm.data.tagging import FIELDS

token = st.tuples(st.text("abAB1-é.", min_size=1, max_size=40), st.sampled_from(["NOUN", "VERB", "X"]))
sentences_strategy = st.lists(
    st.lists(token, min_size=1, max_size=6).map(lambda s: tuple(zip(*s, strict=True))), min_size=1, max_size=6
)


@given(sentences_strategy, sentences_strategy)
def test_tensors_say_what_the_sentence_says(train, other):
    vocabulary = TaggingVocabulary.build(train, tags=["NOUN", "VERB", "X"], bits=12)
    data = vocabulary.dataset(train + other)
    for (words, tags), example in zip(train + other, data, strict=True):
        inputs = example["inputs"]
        assert list(inputs) == list(FIELDS)
        assert vocabulary.decode(example["tags"]) == list(tags)
        assert inputs["words"].tolist() == vocabulary.words.encode(words)
        assert inputs["symbols"].tolist() == vocabulary.classes.encode(words)
        for row, word in zip(inputs["characters"], words, strict=True):
            kept = word if len(word) <= 32 else word[:16] + word[-16:]
            assert row.tolist() == vocabulary.characters.encode(kept) + [0] * (
                inputs["characters"].shape[1] - len(kept)
            )
        assert inputs["features"].shape == (len(words), len(vocabulary.features.templates))
        assert all(value.dtype == torch.long for value in (*inputs.values(), example["tags"]))
        assert inputs["words"].min() > 0
        assert inputs["symbols"].min() > 0


@given(sentences_strategy)
def test_padding_never_leaks_into_what_is_real(train):
    data = TaggingVocabulary.build(train, bits=12).dataset(train)
    batch = data.collate(data.examples)
    for row, example in enumerate(data):
        length = len(example["tags"])
        for field, value in example["inputs"].items():
            padded = batch["inputs"][field][row]
            real = padded[:length, : value.shape[1]] if value.ndim == 2 else padded[:length]
            assert torch.equal(real, value)
            assert padded.count_nonzero() == value.count_nonzero()


@given(sentences_strategy)
def test_a_saved_vocabulary_makes_the_same_tensors(tmp_path_factory, train):
    path = tmp_path_factory.getbasetemp() / "tagging.json"
    vocabulary = TaggingVocabulary.build(train, min_count=1, bits=10, templates=["word[0]", "lower[1]"])
    vocabulary.save(path)
    again = TaggingVocabulary.load(path)
    assert again.to_json() == vocabulary.to_json()
    torch.testing.assert_close(again.dataset(train).examples, vocabulary.dataset(train).examples)


def test_words_rarer_than_min_count_are_unknown_but_known_to_the_classes():
    vocabulary = TaggingVocabulary.build([(["a", "a", "b"], ["X", "X", "Y"])])
    assert vocabulary.words.encode(["a", "b"]) == [2, 1]
    assert vocabulary.classes.encode(["a", "b"]) == [1, 2]
    assert (vocabulary.tags, vocabulary.num_tags) == (["X", "Y"], 2)


@pytest.mark.parametrize("tagged", [True, False])
def test_subwords_come_with_the_word_of_each_and_padding_belongs_to_none(tagged, tmp_path):
    sentences = [(["walking", "on", "ice"], ["V", "P", "N"]), (["ice"], ["N"])]
    subwords = Subwords.train(["walk on ice"] * 3, "bpe", 270)
    vocabulary = TaggingVocabulary.build(sentences, subwords=subwords)
    vocabulary.save(tmp_path / "vocabulary.json")
    vocabulary = TaggingVocabulary.load(tmp_path / "vocabulary.json")
    data = vocabulary.dataset([(words, tags if tagged else None) for words, tags in sentences], ["subwords"])
    assert data.lengths == [3, 1]
    batch = data.collate(data.examples)
    assert batch["mask"].tolist() == [[True] * 3, [True, False, False]]
    units, owner = batch["inputs"]["subwords"], batch["inputs"]["word_index"]
    assert units.shape == owner.shape
    for row, (words, _) in enumerate(sentences):
        ids, expected = subwords.encode_words(words)
        assert owner[row].tolist() == expected + [-1] * (owner.shape[1] - len(expected))
        assert units[row].tolist() == ids + [0] * (owner.shape[1] - len(ids))


def test_sentences_without_tags_make_examples_without_tags():
    vocabulary = TaggingVocabulary.build([(["a"], ["X"])])
    data = vocabulary.dataset([(["a", "b"], None)], fields=["words"])
    assert set(data[0]) == {"inputs"}
    assert list(data[0]["inputs"]) == ["words"]
    assert data.collate(data.examples)["mask"].tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda v: v.dataset([(["a"], ["X"]), (["b"], ["Z"])], source="dev.conllu"),
            "dev.conllu: sentence 2 gives 'b' the tag 'Z'",
        ),
        (lambda v: v.dataset([(["a", "b"], ["X"])]), "sentence 1 has 2 words but 1 tags"),
        (lambda v: v.dataset([([], [])]), "sentence 1 has no words"),
        (lambda v: v.dataset([], fields=["word"]), "fields must be some of words, characters, features, symbols"),
        (lambda v: v.dataset([], fields=["subwords"]), "fields must be some of words, characters, features, symbols"),
        (lambda v: v.dataset([], fields=[]), "fields must be some of"),
        (lambda v: v.decode([1]), "tags must lie from 0 to 0, got 1"),
        (lambda v: v.decode(torch.tensor([-1])), "tags must lie from 0 to 0, got -1"),
        (lambda v: v.build([]), "sentences is empty"),
        (
            lambda v: TaggingVocabulary(["X", "X"], v.words, v.characters, v.classes, v.features),
            "tags must be distinct",
        ),
        (
            lambda v: TaggingVocabulary(["X"], v.words, v.characters, v.classes, v.features, None, 1),
            "max_characters must be",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(TaggingVocabulary.build([(["a"], ["X"])]))


def test_stress_of_real_pronunciations_as_tensors():
    train, dev, _ = stress_tagging()
    vocabulary = TaggingVocabulary.build(train[:5000])
    assert vocabulary.tags == ["-", "0", "1", "2"]
    assert len(vocabulary.words) == 39 + 2
    data = vocabulary.dataset(dev[:50])
    assert vocabulary.decode(data[7]["tags"]) == dev[7].tags
    assert all((example["inputs"]["words"] > 1).all() for example in data)


@pytest.mark.corpus
def test_english_web_treebank_as_tensors(corpora):
    dev, test = (read_tagged(corpora / "ud_english_ewt" / f"{part}.conllu.gz") for part in ("dev", "test"))
    vocabulary = TaggingVocabulary.build(dev)
    data = vocabulary.dataset(test, source="test")
    assert sum(data.lengths) == 25094
    assert vocabulary.decode(data[0]["tags"]) == test[0].tags
    unknown = sum(int((example["inputs"]["words"] == 1).sum()) for example in data) / 25094
    assert 0.15 < unknown < 0.3
