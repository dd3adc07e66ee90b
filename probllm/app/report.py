"""What comparisons found: a table in the terminal, JSON for programs, and one HTML file that needs no other."""

from __future__ import annotations

import io
import json
import math
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probllm.app.comparison import Contrast, Measure, Outcome, Picture, Value
from probllm.evaluation import Estimate

if TYPE_CHECKING:
    from rich.console import Console

INTRODUCTION = (
    "Small figures: the interval that holds 95 % of bootstrap resamples of the test sentences, and of the training "
    "runs where there are several. Blue: the best of its column. Arrows: whether more or less is better."
)

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2330; --soft: #5b6475; --page: #f7f8fa; --card: #ffffff; --line: #dfe3ea; --best: #1d5fc4; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9f0; --soft: #9aa3b5; --page: #14171d; --card: #1b1f27; --line: #323845; --best: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p, ul { margin: .3rem 0 .8rem; max-width: 52rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
tr + tr > *, tbody tr > * { border-top: 1px solid var(--line); }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child { text-align: left; }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
tbody th small { white-space: normal; min-width: 11rem; }
.best { color: var(--best); font-weight: 700; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  align-items: start; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .8rem; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; height: auto; margin: auto; }
figure:not(.wide) svg { max-width: 100%; }
figure svg text { fill: currentColor; }
figcaption { margin-top: .4rem; max-width: 52rem; }
figcaption b { color: var(--ink); }
pre { margin: 0; font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def print_table(outcome: Outcome, console: Console) -> None:
    """The table and the paired differences, in the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{outcome.name}: {outcome.question}"
    tight = console.width < 100
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 0) if tight else (0, 1)
    table.add_column(
        "model", min_width=max([len(word) for row in outcome.rows for word in row.model.split()], default=0)
    )
    for measure in outcome.measures:
        heading = _heading(measure)
        table.add_column(heading.replace(" ", "\n", 1) if tight else heading, justify="right", no_wrap=tight)
    best = {measure.name: outcome.best(measure) for measure in outcome.measures}
    for row in outcome.rows:
        cells = []
        for measure in outcome.measures:
            value, interval = _cell(measure, row.values.get(measure.name), tight)
            cell = Text(value, style="bold cyan" if row.model in best[measure.name] else "")
            cells.append(cell.append(f"\n{interval}", style="not bold dim white") if interval else cell)
        table.add_row(Text(row.model), *cells)
    console.print()
    console.print(table)
    for contrast in outcome.contrasts:
        console.print(Text(_sentence(outcome, contrast)), soft_wrap=True)
    for note in outcome.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)
    for text in outcome.texts:
        console.print(Text(f"{text.title} {text.caption}:", style="bold"), soft_wrap=True)
        console.print(Text(text.text))


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    """Everything but the pictures, as JSON.

    An estimate is ``{"value": ..., "low": ..., "high": ...}``; a number that is not finite is a string such as "inf".
    """
    documents = [
        {
            "name": outcome.name,
            "question": outcome.question,
            "data": outcome.data,
            "measures": [measure._asdict() for measure in outcome.measures],
            "rows": [asdict(row) | {"values": {k: _plain(v) for k, v in row.values.items()}} for row in outcome.rows],
            "contrasts": [c._asdict() | {"difference": _plain(c.difference)} for c in outcome.contrasts],
            "notes": outcome.notes,
            "texts": [text._asdict() for text in outcome.texts],
        }
        for outcome in outcomes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(documents, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_html(outcomes: Sequence[Outcome], path: Path) -> None:
    """One page with all tables and pictures in it; it needs no other file and no network."""
    sections = "\n".join(_section(outcome) for outcome in outcomes)
    page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>probllm: comparisons</title><style>{STYLE}</style></head>
<body><main>
<h1>probllm: comparisons</h1>
<p class="soft">{INTRODUCTION}</p>
{sections}
<p class="soft">{escape(versions())}</p>
</main></body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def versions() -> str:
    """What the numbers were made with."""
    parts = [f"{name} {version(name)}" for name in ("probllm", "torch", "pyro-ppl", "numba")]
    return ", ".join([*parts, f"Python {platform.python_version()}", platform.machine()])


def to_svg(picture: Picture, salt: str) -> str:
    """A figure as inline SVG whose black ink takes the page's own text colour, so that dark pages can show it.

    Args:
        picture: what is drawn.
        salt: makes the ids within the drawing; unlike that of every other picture in the page.
    """
    import matplotlib

    text = io.StringIO()
    # Text stays text, and its glyphs are the browser's business: none is missing.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        picture.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    label = escape(picture.title, quote=True)
    return f'<div role="img" aria-label="{label}">{drawing.replace("#000000", "currentColor")}</div>'


def _section(outcome: Outcome) -> str:
    parts = [
        f"<section>\n<h2>{escape(outcome.name.capitalize())}</h2>",
        f"<p><b>{escape(outcome.question)}</b></p>\n<p class='soft'>{escape(outcome.data)}</p>",
        _table(outcome),
    ]
    if outcome.contrasts:
        items = "".join(f"<li>{escape(_sentence(outcome, contrast))}</li>\n" for contrast in outcome.contrasts)
        parts.append(f"<h3>Differences on the same sentences</h3>\n<ul>{items}</ul>")
    parts += [f"<p class='soft'>{escape(note)}</p>" for note in outcome.notes]
    if outcome.texts:
        written = "".join(
            f"<figure><pre>{escape(text.text)}</pre><figcaption><b>{escape(text.title)}</b> "
            f"{escape(text.caption)}.</figcaption></figure>\n"
            for text in outcome.texts
        )
        parts.append(f'<h3>Written by the models</h3>\n<div class="pictures three">\n{written}</div>')
    for group in dict.fromkeys(picture.group for picture in outcome.pictures):
        # The number keeps apart the ids of two pictures in one page.
        members = [(f"{outcome.name}-{n}", p) for n, p in enumerate(outcome.pictures) if p.group == group]
        style = "pictures three" if sum(not picture.wide for _, picture in members) == 3 else "pictures"
        drawn = "".join(_picture(picture, salt) for salt, picture in members)
        parts.append(f'<h3>{escape(group)}</h3>\n<div class="{style}">\n{drawn}\n</div>')
    return "\n".join([*parts, "</section>"])


def _table(outcome: Outcome) -> str:
    head = "".join(f'<th title="{escape(m.meaning, quote=True)}">{escape(_heading(m))}</th>' for m in outcome.measures)
    best = {measure.name: outcome.best(measure) for measure in outcome.measures}
    rows = []
    for row in outcome.rows:
        cells = [f"<th>{escape(row.model)}<small>{escape(row.about)}</small></th>"]
        for measure in outcome.measures:
            value, interval = _cell(measure, row.values.get(measure.name))
            style = ' class="best"' if row.model in best[measure.name] else ""
            cells.append(f"<td{style}>{escape(value)}<small>{escape(interval)}</small></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head, body = f"<thead><tr><th>model</th>{head}</tr></thead>", "\n".join(rows)
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _heading(measure: Measure) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[measure.better]
    return f"{measure.name}{', %' if measure.percent else ''}{arrow}"


def _cell(measure: Measure, value: Value, tight: bool = False) -> tuple[str, str]:
    """A value and its interval; where there is little room, half the interval's width."""
    if value is None:
        return "–", ""
    if not isinstance(value, Estimate):
        return measure.show(value), ""
    if tight:
        return measure.show(value.value), f"±{measure.show((value.high - value.low) / 2)}"
    return measure.show(value.value), f"{measure.show(value.low)}–{measure.show(value.high)}"


def _sentence(outcome: Outcome, contrast: Contrast) -> str:
    measure = next(m for m in outcome.measures if m.name == contrast.measure)
    difference = contrast.difference
    scale, unit = (100, " points") if measure.percent else (1, "")
    value, low, high = (
        f"{scale * x:+.{measure.digits}f}".replace("-", "−").replace("inf", "∞") for x in difference[:3]
    )
    verdict = "the interval holds zero" if difference.holds_zero else f"p = {difference.p:.2g}"
    return f"{contrast.first} − {contrast.second}, {measure.name}: {value}{unit} ({low} to {high}; {verdict})"


def _picture(picture: Picture, salt: str) -> str:
    style = ' class="wide"' if picture.wide else ""
    caption = f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption>"
    return f"<figure{style}>{to_svg(picture, salt)}{caption}</figure>"


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple):
        return {name: _plain(part) for name, part in value._asdict().items()}  # type: ignore[attr-defined]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
