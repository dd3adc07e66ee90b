"""The parsing comparison from files to outcome, on trees small enough to learn in seconds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.app import comparison
from probllm.app.comparison import InputError, Settings, number
from probllm.app.parse_verdict import judge, with_root_first
from probllm.app.parsers import CANDIDATES, WORDS, Setting
from probllm.app.parsing import choose, fingerprint, read_task
from probllm.data import ParsingVocabulary, TreebankSentence, write_conllu
from probllm.evaluation import Estimate
from probllm.models.parser import Parse

NAMES = ["Ada", "Bob", "Eve", "Max", "Zoe"]
VERBS = ["sees", "meets", "calls", "likes"]


def sentences(count, offset, crossing=False):
    """``Ada sees the tall Bob .`` with other words each time; every fifth has crossing arcs, if wanted."""
    made = []
    for i in range(offset, offset + count):
        words = [NAMES[i % 5], VERBS[i % 4], "the", ["tall", "old", "new"][i % 3], NAMES[(i // 2) % 5], "."]
        heads = [2, 0, 5, 5, 2, 2]
        if crossing and i % 5 == 0:
            heads = [4, 0, 2, 2, 2, 2]
        relations = ["nsubj", "root", "det", "amod", "obj:dir", "punct"]
        upos = ["PROPN", "VERB", "DET", "ADJ", "PROPN", "PUNCT"]
        made.append(TreebankSentence(words, upos=upos, heads=heads, relations=relations))
    return made


@pytest.fixture
def files(tmp_path):
    """CoNLL-U files to train on, to stop by and to test on."""
    paths = {}
    for part, count, offset in (("train", 40, 0), ("dev", 8, 100), ("test", 10, 200)):
        paths[part] = tmp_path / f"{part}.conllu"
        write_conllu(paths[part], sentences(count, offset, crossing=True))
    return paths


def test_files_become_a_task_whose_crossing_arcs_are_counted_and_lifted_where_asked(files):
    task = read_task(Settings(**files))
    assert task.single_root
    assert "Arcs cross in 8 of the training sentences" in task.about
    assert task.vocabulary.relations == ["amod", "det", "nsubj", "obj:dir", "punct", "root"]
    assert task.data("train")[0]["heads"].tolist() == [4, 0, 2, 2, 2, 2]
    assert task.data("train", lifted=True)[0]["heads"].tolist() == [2, 0, 2, 2, 2, 2]
    assert task.data("test")[1]["heads"].tolist() == [2, 0, 5, 5, 2, 2]


def test_without_files_the_trees_are_the_embedded_ones():
    task = read_task(Settings())
    assert task.about.startswith("Turkish Web Treebank: 1,200 to train on")
    assert len(task.vocabulary.relations) > 40


def test_without_the_package_and_without_files_both_are_named(monkeypatch):
    from probllm.data import turkish_treebank

    turkish_treebank.cache_clear()
    monkeypatch.setattr("probllm.data.turkish.PACKAGE", "no-such-package")
    with pytest.raises(InputError, match=r"pip install 'probllm\[data\]', or give --train"):
        read_task(Settings())


def test_what_decides_training_decides_where_checkpoints_lie(files, tmp_path):
    def place(**changes):
        settings = Settings(**{**files, **changes})
        return fingerprint(settings, read_task(settings))

    assert place() == place(seeds=3) == place(models=("bilstm-heads",)) == place(folder=tmp_path)
    assert len({place(), place(epochs=3), place(small=False), place(train=files["dev"])}) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": None}, "missing: --test"),
        ({"dev": "nowhere.conllu"}, "nowhere.conllu: No such file"),
        ({"column": "upos"}, "--column is for taggers"),
        ({"models": ("bilstm-heads", "hmm")}, f"'hmm'.*{', '.join(CANDIDATES)}"),
    ],
)
def test_input_that_cannot_be_used_is_named(files, changes, says):
    with pytest.raises(InputError, match=says):
        comparison.compare("parsing", **{**files, **changes})


def test_a_file_whose_heads_form_a_cycle_is_one_line_with_file_and_line(files):
    files["dev"].write_text(files["dev"].read_text().replace("\t0\troot", "\t1\troot", 1).replace("\t4\t", "\t2\t", 1))
    with pytest.raises(InputError, match=r"dev\.conllu:1: the heads form a cycle, 1 -> 2 -> 1"):
        comparison.compare("parsing", **files)


def test_every_encoder_meets_every_law():
    keys = [candidate.key for candidate in choose(Settings())]
    assert keys == [f"{e}-{law}" for e in ("bilstm", "transformer") for law in ("heads", "projective", "spanning")]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("key", list(CANDIDATES))
def test_every_candidate_has_a_loss(key, small):
    made = sentences(3, 0)
    vocabulary = ParsingVocabulary.build(made, min_count=1, bits=10)
    setting = Setting(vocabulary, True, small)
    data = vocabulary.dataset(made, WORDS)
    assert torch.isfinite(CANDIDATES[key].build(setting).loss(data.collate(list(data))))
    assert CANDIDATES[key].options(setting)["max_tokens"] > 0


def test_candidates_train_and_are_judged(files, tmp_path):
    lines = []
    keys = ("bilstm-heads", "bilstm-projective", "bilstm-spanning")
    outcome = comparison.compare(
        "parsing", lines.append, **files, models=keys, epochs=1, folder=tmp_path / "runs", progress=False
    )
    assert [row.model for row in outcome.rows] == [CANDIDATES[key].name for key in keys]
    names = [measure.name for measure in outcome.measures]
    for row in outcome.rows:
        assert set(row.values) == set(names)
        for name in ("UAS", "LAS", "UAS, words", "LAS, words", "exact", "tree NLL"):
            value = row.values[name]
            assert isinstance(value, Estimate)
            assert value.low <= value.value <= value.high
            assert np.isfinite(value.value)
        assert number(row.values["LAS"]) <= number(row.values["UAS"])
        assert 0 <= number(row.values["ECE"]) <= 1
        if "head selection" not in row.model:
            assert number(row.values["trees"]) == 1
    pairs = {(contrast.first, contrast.second) for contrast in outcome.contrasts}
    assert ("BiLSTM spanning", "BiLSTM head selection") in pairs
    assert ("BiLSTM projective", "BiLSTM spanning") in pairs
    assert len(pairs) == 3
    titles = [picture.title for picture in outcome.pictures]
    assert {"Reliability", "Learning"} <= set(titles)
    assert sum("on “" in title for title in titles) == 3
    assert len(lines) == 1 + len(keys)
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left to resume


def test_the_same_seed_gives_the_same_table(files, tmp_path):
    def table():
        outcome = comparison.compare(
            "parsing",
            lambda line: None,
            **files,
            models=("bilstm-spanning",),
            epochs=1,
            folder=tmp_path,
            progress=False,
        )
        return {k: v for k, v in outcome.rows[0].values.items() if k not in ("train s", "words/s")}

    assert table() == table()


class Fixed:
    """A parser that hangs each word on the one before it, the first on the root, with a certain probability."""

    def __init__(self, probability):
        self.probability = probability

    def parse(self, batch):
        mask = batch["mask"]
        return Parse(torch.arange(mask.shape[1]).expand(mask.shape) * mask, torch.zeros_like(batch["labels"]))

    def marginals(self, batch):
        length = batch["mask"].shape[1]
        arcs = torch.diag_embed(torch.full((length - 1,), self.probability), 1)
        arcs[0, 0] = self.probability
        return arcs.expand(len(batch["mask"]), length, length) * batch["mask"].unsqueeze(1)

    def log_prob(self, batch):
        return -batch["mask"].sum(1).double()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=9), st.sampled_from([0.25, 1.0]))
def test_a_verdict_is_what_each_sentence_gives_alone(lengths, probability):
    made = []
    for number_, size in enumerate(lengths):
        heads = [0, *([1] * (size - 1))] if number_ % 2 else list(range(size))
        made.append(TreebankSentence([f"w{number_}"] * size, heads=heads, relations=["dep"] * (size - 1) + ["punct"]))
    vocabulary = ParsingVocabulary.build(made, min_count=1, bits=10)
    verdict = judge(Fixed(probability), vocabulary.dataset(made, ["words"]), made, vocabulary)
    for i, sentence in enumerate(made):
        heads, relations = verdict.trees[i]
        assert heads.tolist() == list(range(len(sentence)))
        right = [head == true for head, true in zip(heads, sentence.heads, strict=True)]
        assert verdict.counts.heads[i] == sum(right)
        assert verdict.counts_of_words.words[i] == len(sentence) - 1
        assert verdict.counts_of_words.heads[i] == sum(right[:-1])
        assert relations == [vocabulary.relations[0]] * len(sentence)
        assert verdict.nll[i] == len(sentence)
        assert verdict.is_tree[i] == 1
        assert verdict.marginals[i].shape == (len(sentence) + 1, len(sentence))
    assert np.allclose(verdict.confidence, probability)
    assert len(verdict.right) == sum(lengths)


def test_the_root_comes_first_among_the_heads():
    arcs = np.arange(9.0).reshape(3, 3)
    rows = with_root_first(arcs)
    assert rows[0].tolist() == [0, 4, 8]
    assert rows[1].tolist() == [0, 1, 2]
    assert rows[2].tolist() == [3, 0, 5]
