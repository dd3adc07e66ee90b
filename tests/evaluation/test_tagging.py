"""Token scores against counting by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.evaluation import accuracy, confusion_matrix, correct_tokens, token_nll, unpad

TAGS = 4


@st.composite
def tagged(draw):
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    tags = st.integers(0, TAGS - 1)
    gold = [draw(st.lists(tags, min_size=n, max_size=n)) for n in lengths]
    return [draw(st.lists(tags, min_size=n, max_size=n)) for n in lengths], gold


@given(tagged())
def test_accuracy_is_the_share_of_equal_tags(case):
    predicted, gold = case
    pairs = [(p, g) for ps, gs in zip(predicted, gold, strict=True) for p, g in zip(ps, gs, strict=True)]
    assert accuracy(predicted, gold).value == pytest.approx(sum(p == g for p, g in pairs) / len(pairs))
    correct, tokens = correct_tokens(predicted, gold)
    assert correct.sum() == sum(p == g for p, g in pairs)
    assert tokens.tolist() == [len(g) for g in gold]


def test_tags_may_be_lists_arrays_or_tensors():
    gold = [[1, 2], [0]]
    for kind in (list, np.array, torch.tensor):
        assert accuracy([kind(tags) for tags in ([1, 1], [0])], [kind(tags) for tags in gold]).value == 2 / 3
    assert accuracy(np.array([[1, 2], [0, 1]]), np.array([[1, 2], [0, 0]])).value == 3 / 4


@given(tagged())
def test_confusion_matrix_counts_each_pair_once_and_its_trace_is_what_is_right(case):
    predicted, gold = case
    matrix = confusion_matrix(predicted, gold, TAGS)
    flat = [(g, p) for ps, gs in zip(predicted, gold, strict=True) for p, g in zip(ps, gs, strict=True)]
    assert all(matrix[g, p] == flat.count((g, p)) for g in range(TAGS) for p in range(TAGS))
    assert matrix.trace() == correct_tokens(predicted, gold)[0].sum()


@given(st.integers(0, 2**32 - 1))
def test_token_nll_is_minus_log_of_the_gold_tags_probability(seed):
    generator = np.random.default_rng(seed)
    marginals = [generator.dirichlet(np.ones(TAGS), size=n) for n in (1, 5)]
    gold = [generator.integers(0, TAGS, size=n) for n in (1, 5)]
    nll = token_nll(marginals, gold)
    for p, y, result in zip(marginals, gold, nll, strict=True):
        assert result.tolist() == pytest.approx([-np.log(p[t, y[t]]) for t in range(len(y))])


def test_an_impossible_gold_tag_costs_infinity_not_a_warning():
    assert token_nll([[[1.0, 0.0]]], [[1]])[0].tolist() == [np.inf]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_unpad_undoes_padding(lengths):
    sentences = [np.arange(n) + 10 * i for i, n in enumerate(lengths)]
    padded, mask = np.zeros((len(lengths), 5), dtype=int), np.zeros((len(lengths), 5), dtype=bool)
    for i, sentence in enumerate(sentences):
        padded[i, : len(sentence)], mask[i, : len(sentence)] = sentence, True
    assert all(np.array_equal(a, b) for a, b in zip(unpad(padded, mask), sentences, strict=True))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accuracy([], []), "at least one sentence"),
        (lambda: accuracy([[1]], [[1], [2]]), "1 for 2 sentences"),
        (lambda: accuracy(np.array([1, 2]), np.array([1, 2])), "sentence 0 is a single number"),
        (lambda: accuracy([[1], [1, 2]], [[1], [2]]), "sentence 1"),
        (lambda: token_nll([[[0.5, 0.5]]], [[2]]), "sentence 0"),
        (lambda: token_nll([[[0.5, 0.5]]], [[-1]]), "sentence 0"),
        (lambda: unpad(np.zeros((2, 3)), np.ones((2, 4))), "mask's shape"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
