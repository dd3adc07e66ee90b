"""Kneser-Ney that goes on counting: before it reads anything it is the static model, and at each place of a text it is
a recount of all that was before, over dictionaries."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from probllm.math.adaptive_ngrams import PIECE, CountTree, Reader, count_tree
from probllm.math.ngrams import smoothed

SIZE = 3
corpora = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=8), min_size=1, max_size=5)
texts = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=14)


def recounted(strings: list[list[int]], history: list[int], order: int, discounts: np.ndarray) -> list[float]:
    """p of every token after a history, from all n-grams of the strings: the formula, with these discounts."""
    grams: list[dict[tuple[int, ...], int]] = [defaultdict(int) for _ in range(order + 1)]
    for string in strings:
        line = (SIZE, *string)  # SIZE: the beginning
        for n in range(1, order + 1):
            for i in range(len(line) - n + 1):
                grams[n][line[i : i + n]] += 1
    for n in range(1, order):
        different: dict[tuple[int, ...], int] = defaultdict(int)
        for gram in grams[n + 1]:
            different[gram[1:]] += 1
        grams[n] = {gram: k if gram[0] == SIZE else different[gram] for gram, k in grams[n].items()}
    found = [1 / SIZE] * SIZE
    for n in range(1, order + 1):
        h = (SIZE, *history)[len(history) + 1 - (n - 1) :] if n > 1 else ()
        if len(h) < n - 1:
            break
        counts = [grams[n].get((*h, w), 0) for w in range(SIZE)]
        taken = [discounts[n - 1, min(c, 3)] for c in counts]
        if total := sum(counts):
            found = [(counts[w] - taken[w] + sum(taken) * found[w]) / total for w in range(SIZE)]
    return found


@given(corpora, texts, st.integers(1, 5))
@example([[0], [1]], [0, 0, 0], 3)  # in a run of one token a history is its own child
def test_each_law_is_a_recount_of_all_that_was_before(corpus: list[list[int]], text: list[int], order: int) -> None:
    tree = count_tree(corpus, SIZE, order)
    reader = Reader(tree)
    laws = np.concatenate([reader.next()[None], reader.laws(np.array(text))])
    expected = [recounted([*corpus, text[:t]], text[:t], order, tree.discounts) for t in range(len(text) + 1)]
    np.testing.assert_allclose(np.exp(laws), expected, rtol=1e-9)
    scores = Reader(tree).score(np.array(text))
    np.testing.assert_allclose(scores, laws[np.arange(len(text)), text], rtol=1e-9)


def placed(tree: CountTree, history: list[int]) -> Reader:
    """A reader that has learned nothing, behind this history."""
    reader, depth = Reader(tree), 1
    for n in range(1, tree.order):
        node = 0
        for token in (SIZE, *history)[max(0, len(history) + 1 - n) :]:
            low, high = tree.children[node], tree.children[node + 1]
            node = next((v for v in range(low, high) if tree.tokens[v] == token), -1) if node >= 0 else -1
        if node < 0 or n > len(history) + 1:
            break
        reader.path[n], depth = (node, -1), n + 1
    reader.used[1] = depth
    return reader


@given(corpora, texts, st.integers(1, 5))
def test_before_anything_is_learned_it_is_the_static_model(
    corpus: list[list[int]], text: list[int], order: int
) -> None:
    tree, static = count_tree(corpus, SIZE, order), smoothed(corpus, SIZE, order)
    node = np.array([static.begin])
    for t, token in enumerate(text):
        expected = static.next_log_probs(node)[0]
        np.testing.assert_allclose(placed(tree, text[:t]).next(), expected, atol=1e-9)
        found = placed(tree, text[:t]).score(np.array([token]))
        np.testing.assert_allclose(found, expected[token], atol=1e-9)
        node = static.follow(node, np.array([token]))


@given(corpora, texts, texts, st.integers(1, 5))
def test_a_copy_goes_on_alone(corpus: list[list[int]], before: list[int], after: list[int], order: int) -> None:
    reader = Reader(count_tree(corpus, SIZE, order))
    reader.score(np.array(before))
    twin = reader.copy()
    expected = reader.laws(np.array(after))
    np.testing.assert_array_equal(twin.laws(np.array(after)), expected)
    np.testing.assert_array_equal(twin.next(), expected[-1])


@pytest.mark.parametrize("corpus", [[], [0, 1, 2] * 400])
def test_long_texts_are_read_in_pieces(corpus: list[int]) -> None:
    text = np.random.default_rng(0).integers(0, SIZE, 2 * PIECE + 7)
    tree = count_tree([corpus], SIZE, 9)
    whole, pieces = Reader(tree), Reader(tree)
    expected = np.concatenate([pieces.score(part) for part in np.split(text, [1, 40, PIECE + 1, 2 * PIECE])])
    np.testing.assert_array_equal(whole.score(text), expected)
    laws = Reader(tree).laws(text)
    np.testing.assert_allclose(laws[np.arange(len(text) - 1), text[1:]], expected[1:], rtol=1e-12)
    np.testing.assert_allclose(np.exp(laws).sum(1), 1.0, rtol=1e-9)
