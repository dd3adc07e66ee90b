import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.training.schedule import SCHEDULES, rate_factor

warmups = st.floats(0, 0.9)
parts = st.floats(1e-3, 1)


@given(schedule=st.sampled_from(SCHEDULES), progress=parts, warmup=warmups)
def test_the_factor_is_between_0_and_1(schedule, progress, warmup):
    assert 0 <= rate_factor(schedule, progress, warmup, 0.1) <= 1


@given(schedule=st.sampled_from(SCHEDULES), warmup=st.floats(0.01, 0.9), part=st.floats(0.01, 1))
def test_the_warm_up_is_linear_and_ends_at_1(schedule, warmup, part):
    assert rate_factor(schedule, part * warmup, warmup, 0.1) == pytest.approx(part)


@given(warmup=warmups, one=parts, other=parts)
def test_the_cosine_falls_after_the_warm_up_and_ends_at_0(warmup, one, other):
    first, second = sorted(warmup + (1 - warmup) * each for each in (one, other))
    assert rate_factor("cosine", second, warmup, 0.1) <= rate_factor("cosine", first, warmup, 0.1) + 1e-12
    assert rate_factor("cosine", 1.0, warmup, 0.1) == pytest.approx(0, abs=1e-12)
    assert rate_factor("cosine", warmup + (1 - warmup) / 2, warmup, 0.1) == pytest.approx(0.5)
    assert rate_factor("constant", second, warmup, 0.1) == 1


@given(warmup=st.floats(0, 0.5), decay=st.floats(0.01, 0.5), part=st.floats(0, 1))
def test_wsd_is_stable_and_then_falls_to_0_as_one_minus_the_root(warmup, decay, part):
    stable = warmup + part * (1 - decay - warmup)
    assert rate_factor("wsd", max(stable, 1e-3), 0.0, decay) == pytest.approx(1, abs=1e-6)
    assert rate_factor("wsd", 1.0, warmup, decay) == pytest.approx(0, abs=1e-7)
    assert rate_factor("wsd", 1 - decay * (1 - part), warmup, decay) == pytest.approx(1 - part**0.5, abs=1e-6)
