"""The comparison of encoder-decoders from files to an outcome, on languages small enough to learn in seconds."""

import gzip

import numpy as np
import pytest

from probllm.app import comparison, translation, translators
from probllm.app.comparison import InputError, Settings, number
from probllm.app.translation import read_parallel, read_task
from probllm.app.translators import CANDIDATES, Size
from probllm.evaluation import Estimate

WORDS = {"the": "der", "man": "mann", "sees": "sieht", "a": "ein", "dog": "hund", "red": "rot", "house": "haus"}
TINY = Size(24, 1, 24, 0.0, 8, 3, 0.1)


def write(folder, part, count, seed):
    random = np.random.default_rng(seed)
    english = [" ".join(random.choice(list(WORDS), random.integers(2, 5))) for _ in range(count)]
    german = [" ".join(WORDS[word] for word in reversed(line.split())) for line in english]
    (folder / f"{part}.en").write_text("\n".join(english) + "\n")
    (folder / f"{part}.de").write_text("\n".join(german) + "\n")
    return folder / f"{part}.en"


@pytest.fixture
def files(tmp_path):
    return {part: write(tmp_path, part, count, seed) for seed, (part, count) in
            enumerate((("train", 300), ("dev", 20), ("test", 25)))}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(translators, "size_of", lambda task, small: TINY)
    monkeypatch.setattr(translation, "SUBWORDS", {True: 300, False: 300})


def test_sentences_are_translated_and_counted(tiny, tmp_path, files):
    said = []
    outcome = comparison.compare(
        "translation", said.append, **files, target="de", folder=tmp_path / "runs", epochs=8, progress=False
    )
    assert [row.model for row in outcome.rows] == [each.name for each in CANDIDATES.values()]
    for row in outcome.rows:
        assert isinstance(row.values["BLEU"], Estimate)
        assert 0 < number(row.values["nats/token"]) < 5
    assert max(number(row.values["BLEU"]) for row in outcome.rows) > 20
    assert len(outcome.contrasts) == 6
    assert len(said) == 5
    assert [text.title for text in outcome.texts] == ["Source and target", *(c.name for c in CANDIDATES.values())]
    assert not list((tmp_path / "runs").iterdir())


def test_a_model_that_answers_twice_is_trained_once(tiny, tmp_path, files, monkeypatch):
    trained = []
    monkeypatch.setattr(translation, "learn", lambda task, training, candidate: (
        trained.append(candidate.trained_as), translators.learn(task, training, candidate))[1])  # fmt: skip
    outcome = comparison.compare(
        "translation", lambda _: None, **files, target="de", models=("lstm", "lstm-beam"), folder=tmp_path,
        epochs=1, progress=False,
    )  # fmt: skip
    assert trained == ["lstm"]
    train, nats = ({number(row.values[name]) for row in outcome.rows} for name in ("train s", "nats/token"))
    assert len(train) == len(nats) == 1


def test_letters_are_written_as_phonemes_without_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "SMALL_SIZES", (200, 20, 30))
    outcome = comparison.compare(
        "translation", lambda _: None, models=("transformer",), folder=tmp_path, epochs=1, progress=False
    )
    (row,) = outcome.rows
    assert 0 < number(row.values["PER"]) <= 2
    assert 0 < number(row.values["WER"]) <= 1
    assert "nearest of several" in outcome.data


def test_translations_lie_beside_their_sources(files, tmp_path):
    for language in ("en", "de"):
        (tmp_path / f"packed.{language}.gz").write_bytes(gzip.compress((tmp_path / f"dev.{language}").read_bytes()))
    assert read_parallel(tmp_path / "packed.en.gz", "de") == read_parallel(files["dev"], "de")
    task = read_task(Settings(**files, target="de"))
    assert (len(task.train), len(task.dev), len(task.test)) == (300, 20, 25)
    example = task.codec.dataset(task.dev)[0]
    assert task.codec.decode(example["target"].tolist()) == task.dev[0][1]
    assert example["target"][-1] == example["inputs"][-1] == task.codec.end


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": None}, "--target is needed"),
        ({"target": "en"}, "would be translated into itself"),
        ({"target": "fr"}, "train.fr: No such file"),
        ({"column": "upos"}, "--column is for taggers"),
        ({"models": ("hmm",)}, f"'hmm'.*{', '.join(CANDIDATES)}"),
        ({"dev": None}, "missing: --dev"),
        ({"train": None, "dev": None, "test": None}, "--target is for files"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, files, changes, says):
    with pytest.raises(InputError, match=says):
        comparison.compare("translation", lambda _: None, **{**files, "target": "de", "folder": tmp_path, **changes})


def test_a_line_without_a_translation_is_named(tmp_path, files):
    with (tmp_path / "dev.en").open("a") as file:
        file.write("the man\n")
    with pytest.raises(InputError, match=r"dev.en:21: no line of the other file answers it"):
        read_task(Settings(**files, target="de"))
