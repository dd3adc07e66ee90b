"""The comparison of language models from a file to an outcome, on a text small enough to learn in seconds."""

import math

import numpy as np
import pytest
import torch

from probllm.app import comparison, language_models
from probllm.app.comparison import InputError, Settings, number
from probllm.app.language import read_task
from probllm.app.language_models import CANDIDATES, Learned, Size, Task, judging, token_nats
from probllm.data import Dataset
from probllm.evaluation import Estimate
from probllm.models import NGramModel

TINY = Size(16, 8, 2, 16, 1, 16, 0.0)


def text(count, seed=0):
    words = np.random.default_rng(seed).choice(["the", "cat", "sat", "on", "mat", "and"], count)
    return " ".join(words) + ".\n"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(language_models, "SMALL", TINY)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text(1500))
    return path


def test_one_table_for_counts_networks_and_their_mixture(tiny, tmp_path, file):
    said = []
    outcome = comparison.compare("language", said.append, train=file, folder=tmp_path / "runs", progress=False)
    assert [row.model for row in outcome.rows] == [each.name for each in CANDIDATES.values()]
    nats = {row.model: number(row.values["nats/char"]) for row in outcome.rows}
    # each word is drawn from six: log 6 nats for four or five characters
    assert all(x > 0.3 for x in nats.values())
    assert nats["5-gram"] < 0.7
    assert nats["n-gram + Transformer"] <= min(nats["n-gram"], nats["Transformer"]) + 0.005
    assert nats["n-grams + Transformer that learn"] <= nats["n-grams that learn"] + 0.005
    for row in outcome.rows:
        assert isinstance(row.values["nats/char"], Estimate)
        assert number(row.values["bits/char"]) == pytest.approx(nats[row.model] / math.log(2))
        assert number(row.values["word perplexity"]) > 1
    assert len(outcome.texts) == len(CANDIDATES)
    assert all(len(each.text) == 300 for each in outcome.texts)
    assert len(outcome.contrasts) == len(CANDIDATES) - 1
    assert len(said) == 1 + len(CANDIDATES)
    assert not list((tmp_path / "runs").iterdir())


def test_models_that_are_asked_for_bring_those_that_they_need(tiny, tmp_path, file):
    outcome = comparison.compare(
        "language", lambda _: None, train=file, models=("mixture",), folder=tmp_path, progress=False
    )
    assert [row.model for row in outcome.rows] == ["n-gram + Transformer"]


def test_files_or_a_split_of_one(tmp_path, file):
    for part, count in (("dev", 300), ("test", 400)):
        (tmp_path / part).write_text(text(count, seed=1) + "é")
    whole = read_task(Settings(train=file))
    size = len(file.read_text())
    assert len(whole.train) + len(whole.dev) == int(0.9 * size)
    assert len(whole.test) == size - int(0.9 * size)
    shown = "".join(whole.vocabulary[i] for i in [*whole.dev, *whole.train, *whole.test])
    assert shown == file.read_text().replace(".\n", "��")  # the end of the text is like nothing before
    given = read_task(Settings(train=file, dev=tmp_path / "dev", test=tmp_path / "test"))
    assert (len(given.train), given.test[-1], given.vocabulary[0]) == (size, 0, "�")


@pytest.mark.parametrize("count", [40, 41, 47, 8, 3])
def test_every_token_of_the_test_text_is_scored_once_behind_what_was_before(count):
    before, test = torch.arange(100) % 7, torch.arange(count) % 5
    whole = torch.cat([before, test])
    seen = []
    for batch in judging(test, before, TINY).batches(shuffle=False):
        joined = torch.cat([batch["prefix"], batch["text"]], 1)
        for row, target in zip(joined, batch["text"], strict=True):
            starts = [i for i in range(len(whole) - len(row) + 1) if torch.equal(whole[i : i + len(row)], row)]
            assert starts
            seen += target.tolist()
    assert seen[-count:] == test.tolist()
    assert len(seen) < count + TINY.window // 2
    model = NGramModel(7, 3)
    model.estimate(Dataset([{"text": before}]))
    task = Task("", [""] * 7, before[:60], before[60:], test)
    expected = -model.token_log_probs({"text": whole.unsqueeze(0)})[0, 100:]
    torch.testing.assert_close(torch.from_numpy(token_nats(Learned(model, 0.0, 0), task, TINY)), expected)
    expected = -model.token_log_probs({"text": whole[60:].unsqueeze(0)})[0, 40:]
    torch.testing.assert_close(torch.from_numpy(token_nats(Learned(model, 0.0, 0, learns=True), task, TINY)), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": None, "test": "x"}, "missing: --train"),
        ({"train": "nowhere.txt"}, "nowhere.txt: No such file"),
        ({"column": "upos"}, "--column is for taggers"),
        ({"models": ("hmm",)}, f"'hmm'.*{', '.join(CANDIDATES)}"),
        ({"dev": "short.txt"}, "the text to dev has 5 characters; at least 256 are needed"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, file, changes, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("words")
    with pytest.raises(InputError, match=says):
        comparison.compare("language", lambda _: None, **{"train": file, "folder": tmp_path, **changes})
