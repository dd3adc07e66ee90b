"""Kneser-Ney n-grams against the formula written out over dictionaries, and as probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.math import ngrams
from probllm.math.kernels import ngrams as kernels
from probllm.math.kernels.selection import kth_greatest
from probllm.math.ngrams import kneser_ney, smoothed

SIZE = 4
BEGIN, END = SIZE, SIZE + 1
corpora = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=6), min_size=1, max_size=12)


def by_hand(strings: list[list[int]], order: int) -> dict[tuple[int, ...], float]:
    """p(w | h) of every n-gram (*h, w) that was seen, and of all tokens after nothing, as in the module's text."""
    text = [(BEGIN, *x, END) for x in strings]
    grams = [defaultdict(int) for _ in range(order + 1)]
    for line in text:
        for k in range(1, order + 1):
            for i in range(len(line) - k + 1):
                grams[k][line[i : i + k]] += 1
    counts = [dict(g) for g in grams]
    for k in range(1, order):
        before = defaultdict(set)
        for gram in grams[k + 1]:
            before[gram[1:]].add(gram[0])
        counts[k] = {g: c if g[0] == BEGIN else len(before[g]) for g, c in grams[k].items()}
    for w in range(SIZE + 2):
        counts[1].setdefault((w,), 0)
    p: dict[tuple[int, ...], float] = {}
    for k in range(1, order + 1):
        predicted = {g: c for g, c in counts[k].items() if g[-1] != BEGIN}
        discounts = ngrams.discounts_of(np.array(list(predicted.values()), dtype=float))
        for gram, c in predicted.items():
            same = {g: n for g, n in predicted.items() if g[:-1] == gram[:-1]}
            total = sum(same.values())
            left = sum(discounts[min(n, 3)] for n in same.values()) / total if total else 1.0
            own = (c - discounts[min(c, 3)]) / total if total else 0.0
            p[gram] = own + left * (p[gram[1:]] if k > 1 else 1 / (SIZE + 1))
    return p


@given(corpora, st.integers(1, 4))
def test_logs_are_the_formula_over_dictionaries(strings: list[list[int]], order: int) -> None:
    model = kneser_ney(strings, SIZE, order)
    parent = np.repeat(np.arange(len(model.tokens)), np.diff(model.children))
    parent = np.concatenate([[0], parent])
    expected = by_hand(strings, order)
    seen = set()
    for node in range(1, len(model.tokens)):
        gram, v = [], node
        while v:
            gram.append(int(model.tokens[v]))
            v = int(parent[v])
        if gram[0] != BEGIN:
            seen.add(tuple(gram[::-1]))
            assert math.exp(model.logs[node]) == pytest.approx(expected[tuple(gram[::-1])])
    assert seen == set(expected)


@given(corpora, st.integers(1, 4))
def test_probabilities_after_every_history_sum_to_one(strings: list[list[int]], order: int) -> None:
    model = kneser_ney(strings, SIZE, order)
    for node in range(len(model.tokens)):
        if int(model.tokens[node]) != END:
            logs = [kernels.follow(node, w, *model.arrays())[0] for w in (*range(SIZE), END)]
            assert np.exp(logs).sum() == pytest.approx(1.0)


@given(corpora, st.lists(st.integers(0, SIZE - 1), max_size=5), st.integers(1, 4))
def test_strings_are_scored_by_the_longest_known_histories(
    strings: list[list[int]], query: list[int], order: int
) -> None:
    model, p = kneser_ney(strings, SIZE, order), by_hand(strings, order)

    def log_p(history: tuple[int, ...], w: int) -> float:
        """By all back-off weights; those of unknown histories are 1."""
        if (*history, w) in p:
            return math.log(p[(*history, w)])
        known = [g for g in p if g[:-1] == history]
        rest = log_p(history[1:], w)
        if not known:
            return rest
        mass = sum(p[g] for g in known)
        shorter = sum(math.exp(log_p(history[1:], g[-1])) for g in known)
        return rest + math.log((1 - mass) / (1 - shorter)) if 1 - shorter > 1e-9 else rest

    line = (BEGIN, *query, END)
    expected = sum(log_p(line[max(0, i - order + 1) : i], line[i]) for i in range(1, len(line)))
    assert model.log_probs([query, query]) == pytest.approx([expected, expected], rel=1e-6)


def test_longer_histories_are_no_worse_on_the_text_itself() -> None:
    strings = [[0, 1, 2, 3], [0, 1, 2, 0], [3, 2, 1]] * 5
    totals = [kneser_ney(strings, SIZE, order).log_probs(strings).sum() for order in (1, 2, 3, 4)]
    assert all(a < b for a, b in pairwise(totals))


@given(st.lists(st.floats(-5, 5) | st.just(-math.inf), min_size=1, max_size=30), st.data())
def test_kth_greatest_is_that_of_the_sorted_numbers(numbers: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    assert kth_greatest(np.array(numbers), len(numbers), k) == sorted(numbers, reverse=True)[k - 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0]], 1, 0), "order: expected at least 1"),
        (([], 1, 2), "strings: expected at least one"),
        (([[0, 2]], 2, 2), "strings: expected tokens from 0 to 1"),
        (([[-1]], 2, 2), "strings: expected tokens from 0 to 1"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: tuple[list[list[int]], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kneser_ney(*arguments)


def seen_before(strings: list[list[int]], history: tuple[int, ...]) -> list[int]:
    """The tokens that follow a history, each as often as it does."""
    text = [(BEGIN, *x) for x in strings]
    n = len(history)
    return [line[i + n] for line in text for i in range(len(line) - n) if line[i : i + n] == history and i + n > 0]


def witten_bell(strings: list[list[int]], history: tuple[int, ...], w: int) -> float:
    after = seen_before(strings, history)
    shorter = witten_bell(strings, history[1:], w) if history else 1 / SIZE
    kinds = len(set(after))
    return (after.count(w) + kinds * shorter) / (len(after) + kinds) if after else shorter


def additive(strings: list[list[int]], history: tuple[int, ...], w: int, k: float) -> float:
    after = seen_before(strings, history)
    return (after.count(w) + k) / (len(after) + k * SIZE)


histories = st.lists(st.integers(0, SIZE - 1), max_size=6)


@given(corpora, histories, st.integers(1, 4))
def test_witten_bell_is_its_formula_after_every_history(strings: list[list[int]], read: list[int], order: int) -> None:
    model = smoothed(strings, SIZE, order, "witten-bell")
    text = [*read, 0]
    for w in range(SIZE):
        text[-1] = w
        found = model.token_log_probs(np.array(text), np.array([len(text)]))[-1]
        history = (BEGIN, *read)[max(0, len(read) + 2 - order) :]
        assert math.exp(found) == pytest.approx(witten_bell(strings, history, w))


@given(corpora, histories, st.integers(1, 4), st.sampled_from([0.01, 0.5, 1.0, 7.0]))
def test_additive_is_its_formula_after_every_history(
    strings: list[list[int]], read: list[int], order: int, k: float
) -> None:
    model = smoothed(strings, SIZE, order, "additive", k)
    text = [*read, 0]
    for w in range(SIZE):
        text[-1] = w
        found = model.token_log_probs(np.array(text), np.array([len(text)]))[-1]
        assert math.exp(found) == pytest.approx(
            additive(strings, (BEGIN, *read)[max(0, len(read) + 2 - order) :], w, k)
        )


@pytest.mark.parametrize("smoothing", ["kneser-ney", "witten-bell", "additive"])
@given(corpora, histories, st.integers(1, 4))
def test_what_comes_next_sums_to_one_after_every_history_and_is_the_score(
    smoothing: ngrams.Smoothing, strings: list[list[int]], read: list[int], order: int
) -> None:
    model = smoothed(strings, SIZE, order, smoothing)
    nodes = np.array([model.begin])
    for w in read:
        nodes = model.follow(nodes, np.array([w]))
    found = model.next_log_probs(nodes)[0]
    assert np.exp(found).sum() == pytest.approx(1.0)
    for w in range(SIZE):
        text = np.array([*read, w])
        assert model.token_log_probs(text, np.array([len(text)]))[-1] == pytest.approx(found[w])


def test_additive_smoothing_wants_a_positive_number() -> None:
    with pytest.raises(ValueError, match="k: expected a number above 0"):
        smoothed([[0]], 1, 2, "additive", 0.0)
    with pytest.raises(ValueError, match="smoothing: expected"):
        smoothed([[0]], 1, 2, "laplace")  # type: ignore[arg-type]
