"""All dependency trees: the battery against all trees, their number, symmetries, bad input, and Pyro."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given

from probllm.distributions.spanning_tree import SpanningTree
from tests.distributions import battery
from tests.distributions.battery import Case
from tests.distributions.dependencies import tree_cases


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@given(case=tree_cases(SpanningTree))
def test_battery(check: Callable[[Case], None], case: Case) -> None:
    check(case)
