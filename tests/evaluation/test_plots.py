"""Pictures: each draws what it was given, and refuses what does not fit."""

import io

import numpy as np
import pytest

from probllm.evaluation import plot_confusion, plot_learning, plot_marginals, plot_reliability, reliability_curve


def svg(figure):
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def test_confusion_writes_every_count_and_shades_rows_by_their_shares():
    figure = plot_confusion([[3, 1], [0, 12345]], ["NOUN", "VERB"], title="who is taken for whom")
    assert texts(figure) == ["3", "1", "12k"]
    shades = figure.axes[0].collections[0].get_array()
    assert np.allclose(shades, [[0.75, 0.25], [0, 1]])
    assert "<svg" in svg(figure)


def test_reliability_leaves_out_empty_bins():
    curve = reliability_curve([0.94, 0.95, 0.2], [True, False, True])
    figure = plot_reliability({"a": curve, "b": curve})
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 2, 2]  # the diagonal and two models with two bins each
    assert np.allclose(lines[1].get_ydata(), [1.0, 0.5])
    assert "<svg" in svg(figure)


def test_learning_curves_are_named_and_drawn_as_given():
    figure = plot_learning({"crf": ([1, 2, 3], [3.0, 2.0, 1.5]), "softmax": ([1, 2], [4.0, 3.0])}, y="nats")
    assert [line.get_label() for line in figure.axes[0].lines] == ["crf", "softmax"]
    assert figure.axes[0].get_ylabel() == "nats"
    assert "<svg" in svg(figure)


def test_marginals_show_only_the_tags_that_matter_and_mark_gold_and_predicted():
    marginals = np.array([[0.9, 0.1, 0.0, 0.0], [0.2, 0.795, 0.005, 0.0]])
    figure = plot_marginals(marginals, ["the", "dog"], ["D", "N", "V", "X"], predicted=[0, 1], gold=[0, 3])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["D", "N", "X"]
    assert np.allclose(axes.collections[0].get_array(), marginals[:, [0, 1, 3]].T)
    assert len(axes.patches) == 2
    assert len(axes.lines) == 2
    assert axes.lines[0].get_color() != axes.lines[1].get_color()  # the second prediction is wrong
    assert "<svg" in svg(figure)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_words_of_any_kind_can_be_drawn():
    tokens = ["$x^$", "$$", "http://example.org/" + "a" * 300, "<b>&", "語"]
    figure = plot_marginals(np.eye(5), tokens, ["O", "$_", "B-" + "x" * 50, "B", "I"])
    assert "<svg" in svg(figure)
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels[0] == "$x^$"
    assert max(map(len, labels)) == 20


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="one label a tag"):
        plot_confusion([[1, 2], [3, 4]], ["a"])
    with pytest.raises(ValueError, match="tokens, labels"):
        plot_marginals([[0.5, 0.5]], ["a", "b"], ["x", "y"])
