"""The shape of a comparison: what a cell shows, which value is the best of its column, what cannot be asked for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import probllm.app.comparison as comparison
from probllm.app.comparison import COMPARISONS, InputError, Measure, Outcome, Row, number
from probllm.evaluation import Estimate


@pytest.mark.parametrize(
    ("measure", "value", "shown"),
    [
        (Measure("accuracy", 1, 2, percent=True), 0.95678, "95.68"),
        (Measure("NLL", -1, 3), 0.12345, "0.123"),
        (Measure("NLL", -1, 3), math.inf, "∞"),
        (Measure("NLL", -1, 3), -math.inf, "−∞"),
        (Measure("NLL", -1, 3), math.nan, "n/a"),
        (Measure("params", 0, 0, compact=True), 312, "312"),
        (Measure("params", 0, 0, compact=True), 16_865_000, "16.9M"),
        (Measure("tokens/s", 0, 0, compact=True), 58_494, "58.5k"),
    ],
)
def test_a_value_is_shown_in_its_columns_unit(measure, value, shown):
    assert measure.show(value) == shown


@given(st.lists(st.none() | st.floats(0, 1) | st.just(math.inf), min_size=2, max_size=5), st.sampled_from([-1, 1]))
def test_best_is_what_no_other_value_beats_as_shown(values, better):
    measure = Measure("score", better, 2)
    outcome = Outcome("x", "?", "", [measure], [Row(str(i), "", {"score": v}) for i, v in enumerate(values)])
    best = outcome.best(measure)
    known = {str(i): v for i, v in enumerate(values) if v is not None}
    if len(known) < 2:
        assert not best
        return
    assert best
    assert all(better * known[a] >= better * known[b] - 0.01 for a in best for b in known if known[a] != known[b])
    assert len({measure.show(known[model]) for model in best}) == 1


def test_a_column_where_neither_more_nor_less_is_better_has_no_best():
    measure = Measure("params", 0)
    rows = [Row("a", "", {"params": 1.0}), Row("b", "", {"params": 2.0})]
    assert Outcome("x", "?", "", [measure], rows).best(measure) == set()


def test_number_of_an_estimate_is_its_value():
    assert number(Estimate(0.5, 0.4, 0.6)) == number(0.5) == 0.5
    assert math.isnan(number(None))


def test_an_unknown_comparison_is_refused_with_those_that_exist():
    with pytest.raises(InputError, match=f"'nonsense'; there are: {', '.join(COMPARISONS)}"):
        comparison.compare("nonsense")
