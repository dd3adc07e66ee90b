"""Pictures of predictions: confusion matrix, reliability diagram, learning curves, a sentence's posterior marginals.

Each function takes arrays and returns a matplotlib ``Figure`` of its own (no global state):
``figure.savefig("picture.svg")``. Matplotlib is imported when a picture is drawn. Text and lines keep matplotlib's
colours; shades fade into the background, so that the pictures sit on a light page and on a dark one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probllm.evaluation.calibration import ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED = "#3b76d6", "#d6453b"
LINES = ("#3b76d6", "#e08a1e", "#2a9d6f", "#b565c7", "#d6453b", "#8a8a2a", "#2aa5b8", "#8c6d5a")

LONGEST_LABEL = 20


def plot_confusion(matrix: npt.ArrayLike, labels: Sequence[str], *, title: str = "") -> "Figure":
    """Confusion matrix: each gold tag's row shaded by its shares, the counts written in.

    Args:
        matrix: ``[tags, tags]`` counts, gold in the rows.
        labels: the tags' names.
        title: written above.
    Raises:
        ValueError: if the matrix is not square or the labels are too few or too many.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(
            f"matrix must be [tags, tags] with one label a tag; it is {counts.shape} with {len(labels)} labels"
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.6 + 0.42 * max(4, len(labels))
    figure, axes = _figure(side + 0.4, side)
    _shade(axes, shares, BLUE)
    size = 8 if len(labels) <= 8 else 6.5
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = {"color": "white"} if shares[row, column] > 0.5 else {}
            axes.text(column + 0.5, row + 0.5, _short(int(count)), ha="center", va="center", fontsize=size, **color)
    _ticks(axes, labels, labels, rotation=0 if max(map(len, labels)) <= 3 else 90)
    axes.set(xlabel="predicted", ylabel="gold", title=title, aspect="equal")
    return figure


def plot_reliability(
    curves: Mapping[str, ReliabilityCurve], *, title: str = "", colors: Mapping[str, str] | None = None
) -> "Figure":
    """Reliability diagram: accuracy against confidence, one line a model; on the diagonal, confidence is deserved.

    A marker's area grows with the share of predictions in its bin; bins without a prediction are left out.

    Args:
        curves: :func:`~probllm.evaluation.reliability_curve` of each model, by name.
        title: written above.
        colors: of the models by name; without, in the order of ``LINES``.
    """
    figure, axes = _figure(5.2, 4.4)
    axes.plot([0, 1], [0, 1], linestyle=":", linewidth=1, color="gray")
    for number, (name, curve) in enumerate(curves.items()):
        color = _color(name, number, colors)
        used = curve.counts > 0
        x, y = curve.confidence[used], curve.accuracy[used]
        axes.plot(x, y, linewidth=1.3, color=color, label=name, alpha=0.9)
        axes.scatter(x, y, s=6 + 90 * curve.counts[used] / curve.counts.sum(), color=color, alpha=0.75, linewidth=0)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title=title)
    _legend(axes)
    return figure


def plot_learning(
    curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    x: str = "epoch",
    y: str = "loss",
    title: str = "",
    colors: Mapping[str, str] | None = None,
) -> "Figure":
    """Learning curves, one line a model.

    Args:
        curves: for each model the steps and the values, two arrays of one length.
        x: what the steps count, for the axis.
        y: what the values measure, for the axis.
        title: written above.
        colors: of the models by name; without, in the order of ``LINES``.
    """
    figure, axes = _figure(5.2, 4.4)
    for number, (name, (steps, values)) in enumerate(curves.items()):
        color = _color(name, number, colors)
        marker = "o" if np.size(steps) < 40 else None
        axes.plot(
            np.asarray(steps), np.asarray(values), color=color, marker=marker, markersize=3, linewidth=1.3, label=name
        )
    axes.set(xlabel=x, ylabel=y, title=title)
    if all(float(step).is_integer() for steps, _ in curves.values() for step in np.ravel(np.asarray(steps))):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return figure


def plot_marginals(
    marginals: npt.ArrayLike,
    tokens: Sequence[str],
    labels: Sequence[str],
    *,
    predicted: Sequence[int] | None = None,
    gold: Sequence[int] | None = None,
    title: str = "",
) -> "Figure":
    """Posterior marginals of one sentence: each token's column shows how its probability is shared out among the tags.

    Tags that get less than 5 % everywhere, and are neither predicted nor gold, are left out.

    Args:
        marginals: ``[length, tags]`` probabilities.
        tokens: the words, ``length`` of them.
        labels: the tags' names.
        predicted: the tag chosen for each token; it gets a dot, red where it is wrong.
        gold: the right tag of each token; it gets a frame.
        title: written above.
    Raises:
        ValueError: if the numbers of tokens or labels disagree with the marginals.
    """
    p = np.asarray(marginals, dtype=np.float64)
    if p.shape != (len(tokens), len(labels)):
        raise ValueError(f"marginals must be [tokens, labels] = {(len(tokens), len(labels))}; they are {p.shape}")
    used = set(np.flatnonzero(p.max(axis=0) >= 0.05)) | set(predicted or ()) | set(gold or ())
    rows = sorted(int(tag) for tag in used)
    figure, axes = _figure(1.2 + 0.42 * len(tokens), 1.1 + 0.3 * len(rows))
    _shade(axes, p[:, rows].T, BLUE)
    for column in range(len(tokens)):
        if gold is not None:
            y = rows.index(int(gold[column]))
            axes.add_patch(_frame(column, y))
        if predicted is not None:
            y = rows.index(int(predicted[column]))
            wrong = gold is not None and int(gold[column]) != int(predicted[column])
            axes.plot(
                column + 0.5, y + 0.5, marker="o", markersize=5, color=RED if wrong else "black", markeredgewidth=0
            )
    rotation = 0 if max(map(len, tokens)) <= 3 else 60
    _ticks(axes, tokens, [labels[tag] for tag in rows], rotation=rotation)
    axes.set_title(title)
    return figure


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _shade(axes: Any, values: npt.NDArray[np.float64], color: str) -> None:
    """Cells of one colour whose opacity is the value: 0 lets the page show through."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    fading = LinearSegmentedColormap.from_list("fading", [to_rgba(color, 0.0), to_rgba(color, 1.0)])
    axes.pcolormesh(values, cmap=fading, vmin=0, vmax=1, edgecolor=to_rgba("gray", 0.25), linewidth=0.5)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _ticks(axes: Any, columns: Sequence[str], rows: Sequence[str], rotation: int) -> None:
    # Words come from data: a dollar sign in one is no formula, and a long one must not squeeze out the picture.
    style: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    slanted = {"ha": "right", "rotation_mode": "anchor"} if rotation == 60 else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_clip(c) for c in columns], rotation=rotation, **style, **slanted)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_clip(row) for row in rows], **style)


def _clip(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, fill=False, edgecolor="gray", linewidth=1.3)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _color(name: str, number: int, colors: Mapping[str, str] | None) -> str:
    return (colors or {}).get(name, LINES[number % len(LINES)])


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
