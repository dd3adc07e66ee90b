import pytest
from hypothesis import given
from hypothesis import strategies as st

from probllm.training.schedule import rate_factor

warmups = st.floats(0, 0.9)
parts = st.floats(1e-3, 1)


@given(schedule=st.sampled_from(["constant", "cosine"]), progress=parts, warmup=warmups)
def test_the_factor_is_between_0_and_1(schedule, progress, warmup):
    assert 0 <= rate_factor(schedule, progress, warmup) <= 1


@given(schedule=st.sampled_from(["constant", "cosine"]), warmup=st.floats(0.01, 0.9), part=st.floats(0.01, 1))
def test_the_warm_up_is_linear_and_ends_at_1(schedule, warmup, part):
    assert rate_factor(schedule, part * warmup, warmup) == pytest.approx(part)


@given(warmup=warmups, one=parts, other=parts)
def test_the_cosine_falls_after_the_warm_up_and_ends_at_0(warmup, one, other):
    first, second = sorted(warmup + (1 - warmup) * each for each in (one, other))
    assert rate_factor("cosine", second, warmup) <= rate_factor("cosine", first, warmup) + 1e-12
    assert rate_factor("cosine", 1.0, warmup) == pytest.approx(0, abs=1e-12)
    assert rate_factor("cosine", warmup + (1 - warmup) / 2, warmup) == pytest.approx(0.5)
    assert rate_factor("constant", second, warmup) == 1
