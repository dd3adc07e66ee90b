"""The comparison of transducers from files to outcome, on words small enough to learn in seconds."""

import numpy as np
import pytest

from probllm.app import comparison
from probllm.app.alignment import fingerprint, read_file, read_task
from probllm.app.comparison import InputError, Settings, number
from probllm.app.transducers import ALL, fits
from probllm.data import Pair
from probllm.evaluation import Estimate

SOUNDS = {"a": "AH", "b": "B", "t": "T", "x": "K S", "e": ""}


def lines(count, seed):
    words = np.random.default_rng(seed).choice(list(SOUNDS), (count, 4))
    return "".join(f"{''.join(w)}\t{' '.join(' '.join(SOUNDS[c] for c in w).split()) or 'AH'}\n" for w in words)


@pytest.fixture
def files(tmp_path):
    """Tab-separated files to train on, to stop by and to test on."""
    paths = {}
    for seed, (part, count) in enumerate((("train", 150), ("dev", 20), ("test", 30))):
        paths[part] = tmp_path / f"{part}.tsv"
        paths[part].write_text(lines(count, seed))
    return paths


def test_lines_become_examples_and_ways_to_write_one_source_are_joined(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("box\tB AA K S\nthe cat\tle chat\nbox\tB AO K S\nab\tcd\n")
    box, cat, short = read_file(path)
    assert box.source == ("b", "o", "x")
    assert box.targets == [("B", "AA", "K", "S"), ("B", "AO", "K", "S")]
    assert (cat.source, cat.targets) == (("the", "cat"), [("le", "chat")])
    assert short.targets == [("c", "d")]


@pytest.mark.parametrize(
    ("text", "says"),
    [("box B\n", r"words\.tsv:1: expected 'SOURCE<tab>TARGET'"), ("a\tb\n\tc\n", r"words\.tsv:2"), ("", "is empty")],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, text, says):
    path = tmp_path / "words.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_file(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": None}, "missing: --test"),
        ({"dev": "nowhere.tsv"}, "nowhere.tsv: No such file"),
        ({"column": "upos"}, "--column is for taggers"),
        ({"models": ("joint-ngram", "hmm")}, f"'hmm'.*{', '.join(ALL)}"),
    ],
)
def test_input_that_cannot_be_used_is_named(files, changes, says):
    with pytest.raises(InputError, match=says.replace("+", r"\+")):
        comparison.compare("alignment", **{**files, **changes})


def test_without_files_the_words_are_the_embedded_ones():
    task = read_task(Settings())
    assert task.about.startswith("CMU Pronouncing Dictionary, without stress: 8,000 words to train on")
    assert task.vocabulary.num_labels == 40  # 39 phonemes and what is unknown


def test_what_decides_training_decides_where_checkpoints_lie(files, tmp_path):
    def place(**changes):
        settings = Settings(**{**files, **changes})
        return fingerprint(settings, read_task(settings))

    assert place() == place(models=("joint-ngram",)) == place(folder=tmp_path)
    assert len({place(), place(epochs=3), place(small=False), place(train=files["dev"])}) == 4


def test_targets_that_the_frames_cannot_hold_are_known():
    assert fits(Pair("ab", ["A", "B", "C", "D"]))
    assert not fits(Pair("ab", ["A", "A", "B", "C"]))  # a blank must part the two
    assert not fits(Pair("a", ["A", "B", "C"]))


def test_candidates_train_and_are_judged(files, tmp_path):
    said = []
    keys = ("joint-ngram", "ctc-bilstm", "ngram+ctc")
    outcome = comparison.compare(
        "alignment", said.append, **files, models=keys, epochs=12, folder=tmp_path / "runs", progress=False
    )
    assert [row.model for row in outcome.rows] == [ALL[key].name for key in keys]
    for row in outcome.rows:
        for name in ("WER", "PER"):
            value = row.values[name]
            assert isinstance(value, Estimate)
            assert 0 <= value.low <= value.value <= value.high
    errors = {row.model: number(row.values["WER"]) for row in outcome.rows}
    assert errors["joint n-gram"] < 0.1
    assert errors["n-gram + BiLSTM-CTC"] < 0.2
    assert len(outcome.contrasts) == 3
    assert "weighed by" in outcome.notes[0]
    assert "Learning" in [picture.title for picture in outcome.pictures]
    assert len(said) == 4
