"""The joint n-gram model: decoding against every cut and target, and what it learns."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from probllm.models.joint_ngram import JointNGram

# letters are said as they are, but "ch" is one sound, and "e" at the end is silent
WORDS = ["cat", "chat", "hat", "tache", "ace", "ache", "teach", "each", "cheat", "heat", "eat", "tea", "act", "etch"]


def said(word: str) -> tuple[str, ...]:
    ended = word.removesuffix("e") if len(word) > 1 else word
    return tuple(ended.replace("ch", "C").upper().replace("C", "tS" if "ch" in ended else "K"))


PAIRS = [(word, said(word)) for word in WORDS] * 3


@pytest.mark.parametrize(
    ("order", "chunks"), [(1, ((1, 0), (1, 1))), (2, ((1, 0), (1, 1), (1, 2))), (3, ((1, 1), (2, 1), (1, 2)))]
)
def test_wide_beam_sums_all_strings_of_pairs_that_spell_the_word_and_each_target(
    order: int, chunks: tuple[tuple[int, int], ...]
) -> None:
    model = JointNGram(PAIRS, order=order, chunks=chunks)
    for word in ("hat", "ea", "t"):
        every: list[tuple[float, tuple[str, ...]]] = []
        for length in range(1, len(word) + 1):
            fitting = [k for k, (u, _) in enumerate(model.pairs) if "".join(list(model.letters)[x] for x in u) in word]
            for string in itertools.product(fitting, repeat=length):
                letters = "".join(list(model.letters)[x] for k in string for x in model.pairs[k][0])
                if letters == word:
                    target = tuple(str(model.sounds[y]) for k in string for y in model.pairs[k][1])
                    every.append((float(model.ngrams.log_probs([string])[0]), target))
        sums: dict[tuple[str, ...], float] = {}
        for log, target in every:
            sums[target] = float(np.logaddexp(sums.get(target, -math.inf), log))
        (found,) = model.best([word], count=2000, beam=5000, width=1e9)
        assert {target: pytest.approx(log) for log, target in found} == sums
        assert [log for log, _ in found] == sorted((log for log, _ in found), reverse=True)


def test_words_that_were_learned_are_said_right() -> None:
    model = JointNGram(PAIRS, order=6)
    assert model.predict(WORDS) == [said(word) for word in WORDS]


def test_more_targets_come_best_first_and_differ() -> None:
    model = JointNGram([*PAIRS, ("cat", ("S", "A", "T")), ("act", ("E", "S", "T"))], order=2)
    for ways in model.best(["cat", "tact"], count=5):
        assert len({target for _, target in ways}) == len(ways) > 1
        assert [log for log, _ in ways] == sorted((log for log, _ in ways), reverse=True)


def test_letters_that_were_never_seen_say_nothing() -> None:
    model = JointNGram(PAIRS, order=3)
    assert model.predict(["c!at", "", "!!"])[0] == model.predict(["cat"])[0]
    (ways,) = model.best([""])
    assert ways[0][1] == ()
    assert ways[0][0] > -math.inf


def test_threads_do_not_change_the_answers() -> None:
    model = JointNGram(PAIRS, order=4)
    torch.set_num_threads(1)
    one = model.best(WORDS, count=3)
    torch.set_num_threads(3)
    assert model.best(WORDS, count=3) == one


def test_symbols_may_be_anything() -> None:
    pairs = [((1, ("a", 2)), ("x",)), ((1,), ("x",)), ((("a", 2),), ())] * 4
    assert JointNGram(pairs, order=2).predict([(1, ("a", 2))]) == [("x",)]


def test_chunks_without_source_symbols_are_refused() -> None:
    with pytest.raises(ValueError, match="chunks: expected at least one source symbol"):
        JointNGram(PAIRS, chunks=((0, 1), (1, 1)))


def test_words_without_a_cut_are_left_out_and_nothing_to_learn_from_is_refused() -> None:
    model = JointNGram([*PAIRS, ("a", tuple("TTTTTTT"))], order=2)
    assert model.predict(["cat"]) == JointNGram(PAIRS, order=2).predict(["cat"])
    with pytest.raises(ValueError, match="strings: expected at least one"):
        JointNGram([("a", tuple("TTTTTTT"))])


def test_a_saved_model_is_the_model(tmp_path: Path) -> None:
    pairs = [(word, tuple(map(ord, word))) for word in WORDS] + PAIRS  # symbols of two kinds
    model = JointNGram(pairs, order=4)
    model.save(tmp_path)
    model.save(tmp_path)
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".json", ".safetensors"]
    again = JointNGram.load(tmp_path)
    assert again.best(WORDS, count=3) == model.best(WORDS, count=3)
    assert again.ngrams.order == 4
    assert again.log_likelihoods == pytest.approx(model.log_likelihoods)


def test_what_is_no_saved_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="symbols: expected strings or whole numbers"):
        JointNGram([([("a",)], ["A"])]).save(tmp_path)
    with pytest.raises(FileNotFoundError):
        JointNGram.load(tmp_path)
    JointNGram(PAIRS, order=2).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="not a safetensors file"):
        JointNGram.load(tmp_path)
    for broken, message in (
        ({**config, "model": "Other"}, "expected a saved JointNGram"),
        ({"model": "JointNGram"}, "malformed"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            JointNGram.load(tmp_path)
