"""Brackets: read and written back, and through charts and back; faults by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.data.brackets import (
    Constituent,
    binary_spans,
    chart_from_tree,
    chart_labels,
    parse_brackets,
    read_brackets,
    tree_from_chart,
)
from probllm.distributions import SpanTree

CAT = "(S (NP (DT the) (JJ old) (NN cat)) (VP (VBZ sits)) (. .))"

symbols = st.sampled_from(["S", "NP", "VP-SBJ", "X", "-LRB-"])
words = st.sampled_from(["cat", "-RRB-", "3.5", "né", "it's"])
preterminals = st.builds(lambda label, word: Constituent(label, (word,)), symbols, words)
trees = st.recursive(
    preterminals,
    lambda inner: st.builds(Constituent, symbols, st.lists(inner, min_size=1, max_size=4).map(tuple)),
    max_leaves=12,
)


@given(st.lists(trees, min_size=1, max_size=3))
def test_trees_written_are_read_back(given_trees: list[Constituent]) -> None:
    assert parse_brackets("\n".join(map(str, given_trees))) == given_trees
    assert parse_brackets(" ".join(f"( {tree} )" for tree in given_trees).replace(" ", "\n  ")) == given_trees


@given(trees)
def test_chart_and_words_give_the_tree_back(tree: Constituent) -> None:
    labels, n = chart_labels([tree]), len(tree.words())
    chart = chart_from_tree(tree, labels, size=n + 2)
    assert tree_from_chart(chart, tree.words(), labels) == tree
    assert len(binary_spans(tree)) == 2 * n - 1
    assert SpanTree(torch.zeros(n + 2, n + 2, len(labels)), torch.tensor(n)).log_prob(chart) > -torch.inf


@given(trees, st.integers(0, 1000))
def test_every_tree_of_the_law_is_a_tree(tree: Constituent, seed: int) -> None:
    torch.manual_seed(seed)
    labels, n = chart_labels([tree]), len(tree.words())
    drawn = SpanTree(torch.randn(n, n, len(labels))).sample()
    assert tree_from_chart(drawn, tree.words(), labels).words() == tree.words()


def test_spans_of_a_sentence_by_hand() -> None:
    (tree,) = parse_brackets(CAT)
    assert tree.words() == ["the", "old", "cat", "sits", "."]
    assert str(tree) == CAT
    assert set(binary_spans(tree)) == {
        (0, 4, "S"), (0, 2, "NP"), (3, 4, ""), (0, 0, "DT"), (1, 2, ""), (1, 1, "JJ"), (2, 2, "NN"), (3, 3, "VP VBZ"),
        (4, 4, "."),
    }  # fmt: skip
    assert chart_labels([tree]) == ["", ".", "DT", "JJ", "NN", "NP", "S", "VP VBZ"]


def test_whole_without_a_symbol_gets_one() -> None:
    chart = torch.tensor([[1, 2], [0, 1]])
    assert str(tree_from_chart(chart, ["a", "b"], ["N", ""])) == "(X (N a) (N b))"
    assert str(tree_from_chart(torch.tensor([[2]]), ["a"], ["N", ""])) == "(X a)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(S (N a))\n(S (N b)", "2: the bracket of line 2 is not closed"),
        ("(S (N a)))", "1: a bracket closes that was not opened"),
        ("(S (N a))\n\nb", "3: expected an opening bracket, got 'b'"),
        ("(S\n(N))", "2: a constituent 'N' without children"),
        ("(S (N a) b)", "1: 'S' has words beside other children"),
        ("(S (N a b))", "1: 'N' has words beside other children"),
        ("(S ((N a)))", "1: a constituent without a symbol"),
        ("((N a)\n(N b))", r"2: a constituent without a symbol \(begun on line 1\)"),
        ("()", "1: a constituent without a symbol"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trees.mrg"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"trees\.mrg:{message}"):
        read_brackets(path)
    with pytest.raises(ValueError, match=message):
        parse_brackets(text)


def test_file_of_trees_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trees.mrg"
    path.write_text(f"( (S\n  (N a)\n (V b) ) )\n{CAT}\n")
    assert [len(tree.words()) for tree in read_brackets(path)] == [2, 5]
    (tmp_path / "empty.mrg").write_text("\n")
    with pytest.raises(ValueError, match="the file is empty"):
        read_brackets(tmp_path / "empty.mrg")


def test_bad_charts_are_refused() -> None:
    labels, (tree,) = ["A"], parse_brackets("(A (A a) (A b))")
    with pytest.raises(ValueError, match="size: expected at least 2"):
        chart_from_tree(tree, labels, size=1)
    with pytest.raises(ValueError, match="labels lack 'A'"):
        chart_from_tree(tree, ["B"])
    for chart, message in (
        ([[1, 0], [0, 1]], "no binary tree"),
        ([[0, 1], [0, 1]], "not two of its spans"),
        ([[1, 2], [0, 1]], "from 0 to 1, got 2"),
        ([[1, 1], [1, 1]], "others beside them"),
        ([[1]], "expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_from_chart(torch.tensor(chart), ["a", "b"], labels)
