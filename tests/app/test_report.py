"""The report: complete, free of other files, safe against names from data, the same numbers in all three forms."""

import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from rich.console import Console

from probllm.app.comparison import Contrast, Measure, Outcome, Picture, Row
from probllm.app.report import print_table, write_html, write_json
from probllm.evaluation import Difference, Estimate, plot_learning, plot_marginals

EVIL = "<script>alert('x')</script> & \"co\""
VOID = {"meta", "link", "br", "img", "path", "use", "rect", "input"}


@pytest.fixture
def outcome():
    measures = [Measure("accuracy", 1, 2, percent=True, meaning=EVIL), Measure("NLL", -1, 3), Measure("s", 0, 1)]
    rows = [
        Row("HMM", EVIL, {"accuracy": Estimate(0.9, 0.88, 0.92), "NLL": math.inf, "s": 1.25}),
        Row("CRF", "on features", {"accuracy": Estimate(0.95, 0.94, 0.96), "NLL": Estimate(0.2, 0.1, 0.3), "s": None}),
    ]
    contrasts = [
        Contrast("CRF", "HMM", "accuracy", Difference(0.05, 0.03, 0.07, 0.001)),
        Contrast("CRF", "HMM", "NLL", Difference(-0.1, -0.3, 0.1, 0.4)),
    ]
    pictures = [
        Picture("Learning", "epochs", plot_learning({EVIL: ([1, 2], [3.0, 2.0])})),
        Picture("Learning", "epochs", plot_learning({EVIL: ([1, 2], [3.0, 2.0])})),
        Picture(EVIL, EVIL, plot_marginals(np.eye(2), ["<script>", "b"], ["O", "B-<i>"]), wide=True, group="Sentences"),
    ]
    return Outcome("tagging", "Which?", f"from {EVIL}", measures, rows, contrasts, pictures, ["A note."])


class Balanced(HTMLParser):
    """Remembers all elements and attributes, and fails on an element that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_html_is_one_well_formed_page_that_needs_no_other_file(outcome, tmp_path):
    write_html([outcome, outcome], tmp_path / "deep" / "index.html")
    page = (tmp_path / "deep" / "index.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.tags.count("table") == 2
    assert parser.tags.count("svg") == 6
    assert "script" not in parser.tags
    assert not {"link", "img", "iframe"} & set(parser.tags)
    targets = [value for key, value in parser.attributes if key in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in targets)
    assert "@import" not in page


def test_names_from_data_reach_the_page_escaped(outcome, tmp_path):
    write_html([outcome], tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_ids_that_pictures_refer_to_are_their_own(outcome, tmp_path):
    write_html([outcome], tmp_path / "index.html")
    drawings = re.findall(r"<svg.*?</svg>", (tmp_path / "index.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    used = [set(re.findall(r"url\(#(\w+)\)|href=\"#(\w+)\"", drawing)) for drawing in drawings]
    assert all(used)
    assert len(drawings) == 3
    assert all(a.isdisjoint(b) for a, b in combinations([ids - {("", "")} for ids in used], 2))


def test_black_ink_follows_the_pages_colour(outcome, tmp_path):
    write_html([outcome], tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page
    assert "#000000" not in page
    assert "currentColor" in page


def test_json_holds_every_number_and_is_strict(outcome, tmp_path):
    write_json([outcome], tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (document,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["name"] == "tagging"
    assert document["rows"][1]["values"]["accuracy"] == {"value": 0.95, "low": 0.94, "high": 0.96}
    assert document["rows"][0]["values"]["NLL"] == "inf"
    assert document["rows"][1]["values"]["s"] is None
    assert document["contrasts"][0]["difference"] == {"value": 0.05, "low": 0.03, "high": 0.07, "p": 0.001}


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_table_shows_every_value_and_difference(outcome, width):
    text = io.StringIO()
    print_table(outcome, Console(file=text, width=width))
    shown = text.getvalue()
    for expected in ("HMM", "CRF", "90.00", "95.00", "∞", "0.200", "1.2", "–"):
        assert expected in shown
    assert ("94.00–96.00" if width == 140 else "±1.00") in shown
    assert "CRF − HMM, accuracy: +5.00 points (+3.00 to +7.00; p = 0.001)" in shown
    assert "CRF − HMM, NLL: −0.100 (−0.300 to +0.100; the interval holds zero)" in shown
    assert "A note." in shown
    assert "…" not in shown
