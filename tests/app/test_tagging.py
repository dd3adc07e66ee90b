"""The tagging comparison from files to outcome, on sentences small enough to train on in seconds."""

import json

import numpy as np
import pytest

from probllm.app import comparison
from probllm.app.comparison import InputError, Settings, number
from probllm.app.taggers import CANDIDATES
from probllm.app.tagging import choose, fingerprint, read_task
from probllm.data import write_conll
from probllm.evaluation import Estimate


def test_bio_files_become_a_task_with_spans(files):
    task = read_task(Settings(**files))
    assert task.is_bio
    assert task.vocabulary.tags == ["B-PER", "I-PER", "O"]
    assert [len(part) for part in task.data] == [60, 20, 25]
    assert [tags.tolist() for tags in task.gold[:1]] == [task.data[2][0]["tags"].tolist()]
    assert "60 to train on" in task.about


def test_stress_is_no_bio_and_the_small_setting_is_small():
    task = read_task(Settings())
    assert not task.is_bio
    assert task.vocabulary.tags == ["-", "0", "1", "2"]
    assert len(task.sentences.train) < 20_000


@pytest.mark.parametrize("tags", [["O", "B-PER", "X"], ["B-PER", "I-PER"], ["O"], ["O", "B"], ["B-X", "O", "0"]])
def test_tags_that_only_resemble_bio_are_no_spans(tmp_path, tags):
    path = tmp_path / "train.txt"
    write_conll(path, [(["word"] * len(tags), tags)])
    assert not read_task(Settings(train=path, dev=path, test=path)).is_bio


def test_a_tag_that_only_the_test_file_has_is_an_error_of_the_models_not_of_the_program(files):
    write_conll(files["test"], [(["Ada"], ["B-NEW"])])
    assert "B-NEW" in read_task(Settings(**files)).vocabulary.tags


def test_what_decides_training_decides_where_checkpoints_lie(files, tmp_path):
    def place(**changes):
        settings = Settings(**{**files, **changes})
        return fingerprint(settings, read_task(settings))

    assert place() == place(seeds=3) == place(models=("hmm",)) == place(folder=tmp_path)
    assert len({place(), place(epochs=3), place(small=False), place(train=files["dev"])}) == 4


def test_the_small_setting_has_the_five_models_and_the_full_one_a_softmax_on_every_encoder_of_a_crf():
    small = [candidate.key for candidate in choose(Settings())]
    assert small == ["hmm", "feature-crf", "bilstm-crf", "transformer-softmax", "transformer-crf"]
    full = choose(Settings(small=False))
    encoders = {law: {c.encoder for c in full if c.law == law} for law in ("CRF", "softmax")}
    assert encoders["CRF"] == encoders["softmax"]
    assert [c.key for c in choose(Settings(models=("transformer-crf", "hmm", "hmm")))] == ["transformer-crf", "hmm"]


def test_an_unknown_model_is_refused_with_those_that_exist():
    with pytest.raises(InputError, match=f"'bert'.*{', '.join(CANDIDATES)}"):
        choose(Settings(models=("hmm", "bert")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": None}, "missing: --test"),
        ({"dev": "nowhere.conll"}, "nowhere.conll: No such file"),
        ({"column": "upos"}, "column"),
        ({"column": "7"}, "no column 7"),
        ({"train": None, "dev": None, "test": None, "column": "1"}, "--column"),
    ],
)
def test_input_that_cannot_be_used_is_named(files, changes, says):
    with pytest.raises(InputError, match=says):
        comparison.compare("tagging", **{**files, **changes})


def test_every_candidate_trains_and_is_judged(files, tmp_path):
    lines = []
    outcome = comparison.compare(
        "tagging", lines.append, **files, models=tuple(CANDIDATES), epochs=1, folder=tmp_path / "runs", progress=False
    )
    assert [row.model for row in outcome.rows] == [candidate.name for candidate in CANDIDATES.values()]
    names = [measure.name for measure in outcome.measures]
    for row in outcome.rows:
        assert set(row.values) == set(names)
        for name in ("accuracy", "span F1", "token NLL", "sequence NLL"):
            value = row.values[name]
            assert isinstance(value, Estimate)
            assert value.low <= value.value <= value.high
        assert 0 <= number(row.values["ECE"]) <= 1
        assert all(number(row.values[name]) > 0 for name in ("train s", "tokens/s", "params"))
    assert number(outcome.rows[0].values["accuracy"]) > 0.9  # counting is enough for these sentences
    pairs = {(contrast.first, contrast.second) for contrast in outcome.contrasts}
    assert pairs == {
        ("feature CRF", "feature softmax"),
        ("BiLSTM-CRF", "BiLSTM softmax"),
        ("Transformer-CRF", "Transformer softmax"),
    }
    accuracy = {row.model: number(row.values["accuracy"]) for row in outcome.rows}
    for contrast in outcome.contrasts:
        if contrast.measure == "accuracy":
            assert contrast.difference.value == pytest.approx(accuracy[contrast.first] - accuracy[contrast.second])
    titles = [picture.title for picture in outcome.pictures]
    assert any(title.startswith("Confusions") for title in titles)
    assert {"Reliability", "Learning"} <= set(titles)
    assert sum("on “" in title for title in titles) == 6
    assert len(lines) == 1 + len(CANDIDATES)
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left to resume


def test_several_seeds_give_one_row_whose_interval_covers_them(files, tmp_path):
    outcome = comparison.compare(
        "tagging",
        lambda line: None,
        **files,
        models=("feature-softmax",),
        epochs=1,
        seeds=2,
        folder=tmp_path,
        progress=False,
    )
    assert len(outcome.rows) == 1
    assert "trained 2 times" in " ".join(outcome.notes)


def test_the_same_seed_gives_the_same_table(files, tmp_path):
    def table():
        outcome = comparison.compare(
            "tagging", lambda line: None, **files, models=("feature-crf",), epochs=1, folder=tmp_path, progress=False
        )
        return {k: v for k, v in outcome.rows[0].values.items() if k not in ("train s", "tokens/s")}

    assert table() == table()


def test_an_interrupted_comparison_goes_on_and_ends_as_if_it_had_not_been(files, tmp_path, monkeypatch):
    import probllm.app.tagging as tagging

    options = {**files, "models": ("feature-crf", "hmm"), "epochs": 2, "progress": False}
    whole = comparison.compare("tagging", lambda line: None, **options, folder=tmp_path / "whole")

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    fits = []
    fit = tagging.fit
    with monkeypatch.context() as patch:
        patch.setattr(
            tagging,
            "fit",
            lambda model, *a, **k: fits.append(model) or (fit if len(fits) == 1 else interrupted)(model, *a, **k),
        )
        with pytest.raises(KeyboardInterrupt):
            comparison.compare("tagging", lambda line: None, **options, folder=tmp_path / "cut")
    assert len(fits) == 2
    kept = list((tmp_path / "cut").rglob("run.json"))
    assert [path.parent.parent.name for path in kept] == ["feature-crf"]
    seconds = json.loads(kept[0].read_text())["seconds"]
    again = comparison.compare("tagging", lambda line: None, **options, folder=tmp_path / "cut")
    assert number(again.rows[0].values["train s"]) == seconds  # not trained anew
    for before, after in zip(whole.rows, again.rows, strict=True):
        for name in ("accuracy", "span F1", "ECE"):
            assert np.allclose(before.values[name], after.values[name])
