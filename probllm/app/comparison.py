"""A comparison: one question, several models on the same data, one table with uncertainty.

Each comparison is a module of this folder, named in ``COMPARISONS``, with a function ``run(settings, say) ->
Outcome``; the command line, the report and scripts know no more of it. A new comparison is a new module and one line
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probllm.evaluation import Difference, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISONS = {
    "tagging": "Does a law over whole tag sequences tag better than a decision at each word?",
    "parsing": "Does a law over whole trees parse better than a head chosen for each word?",
    "alignment": "Do letters find their phonemes better if they are aligned first, or if all alignments are summed?",
    "translation": "Do attention alone and a beam write better than recurrence and the best symbol at each step?",
    "language": "Does a network or a table of counts predict a small text better, and what do they do together?",
}

Value = Estimate | float | None


class InputError(ValueError):
    """What the user gave cannot be used; the message says what and where, in one line."""


@dataclass(frozen=True)
class Settings:
    """What a comparison may be told; each uses what applies to it."""

    small: bool = True
    """A few minutes on two cores, or else the setting that the documentation reports."""
    epochs: int | None = None
    """Passes over the training data; None: what the setting says."""
    seeds: int | None = None
    """How many times each model is trained; None: what the setting says."""
    models: tuple[str, ...] = ()
    """Which models take part; empty: all that the setting names."""
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    column: str | None = None
    """Which column of the files holds the tags."""
    target: str | None = None
    """What the names of the files with translations end with."""
    folder: Path = Path("runs")
    """Where checkpoints lie; the same settings find theirs again."""
    progress: bool = True
    """Whether training draws progress bars."""


class Training(NamedTuple):
    """How the models of a comparison are trained."""

    small: bool
    epochs: int | None
    folder: Path
    progress: bool
    seed: int


def files_of(settings: Settings) -> list[Path] | None:
    """The files to train on, to stop by and to test on; None where none is given.

    Raises:
        InputError: where some are given and others are not.
    """
    files = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    missing = [f"--{part}" for part, path in files.items() if path is None]
    if 0 < len(missing) < 3:
        raise InputError(f"train, dev and test files are needed together; missing: {', '.join(missing)}")
    return [path for path in files.values() if path is not None] or None


def check_models(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ``InputError`` for a model that is not among those of a comparison."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"there is no model {unknown[0]!r} in this comparison; there are: {', '.join(known)}")


class Measure(NamedTuple):
    """A column of the table."""

    name: str
    better: int
    """1 if more is better, -1 if less is, 0 if neither is."""
    digits: int = 2
    percent: bool = False
    compact: bool = False
    """Thousands as k, millions as M."""
    meaning: str = ""

    def show(self, value: float) -> str:
        """A value in the column's unit."""
        if not math.isfinite(value):
            return "n/a" if math.isnan(value) else "∞" if value > 0 else "−∞"
        if self.compact:
            for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
                if abs(value) >= size:
                    return f"{value / size:.3g}{letter}"
        return f"{100 * value if self.percent else value:.{self.digits}f}"


@dataclass
class Row:
    """What was measured of one model."""

    model: str
    about: str
    values: dict[str, Value]


class Contrast(NamedTuple):
    """A paired difference of one measure between two models on the same test data, ``first - second``."""

    first: str
    second: str
    measure: str
    difference: Difference


@dataclass
class Picture:
    """A figure with what it shows."""

    title: str
    caption: str
    figure: Figure
    wide: bool = False
    group: str = "Pictures"
    """The heading that it stands under."""


class Text(NamedTuple):
    """What a model wrote."""

    title: str
    caption: str
    text: str


@dataclass
class Outcome:
    """What a comparison found."""

    name: str
    question: str
    data: str
    """What the models were trained and tested on, in a sentence or two."""
    measures: list[Measure]
    rows: list[Row]
    contrasts: list[Contrast] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    """Shown side by side."""

    def best(self, measure: Measure) -> set[str]:
        """The models whose value of a measure is the best as shown (none where neither more nor less is better)."""
        values = {row.model: number(row.values.get(measure.name)) for row in self.rows}
        values = {model: measure.better * value for model, value in values.items() if not math.isnan(value)}
        if not measure.better or len(values) < 2:
            return set()
        top = measure.show(measure.better * max(values.values()))
        return {model for model, value in values.items() if measure.show(measure.better * value) == top}


def number(value: Value) -> float:
    """The number itself, of a value that may bring an interval; NaN if there is none."""
    if value is None:
        return math.nan
    return value.value if isinstance(value, Estimate) else float(value)


def compare(name: str, say: Callable[[str], None] = print, **settings: Any) -> Outcome:
    """Run a comparison.

    Args:
        name: one of ``COMPARISONS``, such as ``"tagging"``.
        say: gets a line at each step of the work.
        settings: the fields of :class:`Settings`, such as ``small=True``, ``seeds=3`` or ``train="train.conllu"``.
    Returns:
        the outcome; ``probllm.app.report`` shows it.
    Raises:
        InputError: for a name, a model, a file or a setting that cannot be used.
    """
    if name not in COMPARISONS:
        raise InputError(f"there is no comparison {name!r}; there are: {', '.join(COMPARISONS)}")
    paths = {key: Path(settings[key]) for key in ("train", "dev", "test", "folder") if settings.get(key) is not None}
    run: Callable[[Settings, Callable[[str], None]], Outcome] = import_module(f"probllm.app.{name}").run
    return run(Settings(**{**settings, **paths}), say)
