"""Attention against the explicit softmax, in every combination of mask, heads and causality."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import CrossAttention, KeyValueCache, SelfAttention, from_config, to_config
from probllm.nn.attention import attend
from probllm.nn.positions import rotate, sinusoids


def explicit(q, k, v, mask, causal):
    """One query at a time, as the formula says."""
    batch, heads, length, size = *q.shape[:3], k.shape[2]
    mixed, weights = torch.zeros_like(q), q.new_zeros(batch, heads, length, size)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            for i in range(length):
                seen = [
                    s for s in range(size) if (mask is None or mask[b, s]) and (not causal or s <= size - length + i)
                ]
                if seen:
                    scores = k[b, group, seen] @ q[b, h, i] / q.shape[-1] ** 0.5
                    weights[b, h, i, seen] = torch.softmax(scores, 0)
                    mixed[b, h, i] = weights[b, h, i] @ v[b, group]
    return mixed, weights


@st.composite
def cases(draw):
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 5))
    causal = draw(st.booleans())
    size = length + draw(st.integers(0, 2)) if causal else draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([1.0, 100.0]))
    q = scale * torch.randn(batch, kv_heads * groups, length, 4, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, size, 4, dtype=torch.float64)
    row = st.lists(st.booleans(), min_size=size, max_size=size)
    mask = draw(st.none() | st.lists(row, min_size=batch, max_size=batch))
    return q, k, v, None if mask is None else torch.tensor(mask), causal


@given(case=cases())
def test_attention_is_the_softmax_product_with_or_without_weights(case):
    expected, weights = explicit(*case)
    fused, nothing = attend(*case)
    plain, returned = attend(*case, return_weights=True)
    assert nothing is None
    for result, truth in ((fused, expected), (plain, expected), (returned, weights)):
        torch.testing.assert_close(result, truth, rtol=1e-7, atol=1e-9)
    sums = returned.sum(-1)
    assert ((sums - 1).abs().lt(1e-9) | sums.eq(0)).all()


@given(case=cases())
def test_gradients_of_fused_and_explicit_attention_agree_and_are_finite(case):
    tensors = [t.clone().requires_grad_() for t in case[:3]]
    slopes = []
    for return_weights in (False, True):
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, even if it is hidden afterwards
            mixed, _ = attend(*tensors, *case[3:], return_weights=return_weights)
            slopes.append(torch.autograd.grad(mixed.pow(2).sum(), tensors))
        assert all(slope.isfinite().all() for slope in slopes[-1])
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-8)


@given(shift=st.integers(-1000, 1000), p=st.integers(0, 50), q=st.integers(0, 50))
def test_rotary_products_depend_on_the_distance_alone(shift, p, q):
    x, y = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(a, b):
        return (rotate(x, torch.tensor([a])) * rotate(y, torch.tensor([b]))).sum()

    torch.testing.assert_close(product(p, q), product(p + shift, q + shift))
    torch.testing.assert_close(rotate(x, torch.tensor([p])).norm(), x.norm())
    if p != q:
        assert (product(p, q) - product(q, q)).abs() > 1e-12


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(torch.arange(40), 6, torch.float64)
    for p in (0, 1, 39):
        for i in range(3):
            angle = torch.tensor(p / 10000 ** (2 * i / 6), dtype=torch.float64)
            torch.testing.assert_close(table[p, [i, 3 + i]], torch.stack([angle.sin(), angle.cos()]))


@pytest.mark.parametrize("rotary", [False, True])
@given(data=st.data())
def test_self_attention_returns_the_weights_of_the_same_output(rotary, data):
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    attention = SelfAttention(8, 4, 2, causal=data.draw(st.booleans()), rotary=rotary).double()
    states = torch.randn(batch, length, 8, dtype=torch.float64)
    mask = torch.rand(batch, length) < 0.6
    result, weights = attention(states, mask, return_weights=True)
    torch.testing.assert_close(result, attention(states, mask))
    assert weights.shape == (batch, 4, length, length)
    assert (weights.transpose(1, 3)[~mask] == 0).all()
    real = weights.sum(-1).transpose(1, 2)[mask]
    torch.testing.assert_close(real, torch.ones_like(real))
    assert (result[~mask] == 0).all()


@given(data=st.data())
def test_cross_attention_ignores_masked_memory_and_gives_zero_without_any(data):
    attention = CrossAttention(8, memory_dim=3, heads=4, kv_heads=2).double()
    states, memory = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    row = st.lists(st.booleans(), min_size=4, max_size=4)
    keep = torch.tensor([*data.draw(st.lists(row, min_size=2, max_size=2)), [False] * 4])
    result, weights = attention(states, memory, memory_mask=keep, return_weights=True)
    torch.testing.assert_close(result, attention(states, memory, memory_mask=keep))
    assert not result[2].any()
    assert not weights[2].any()
    for b in range(3):
        if keep[b].any():
            alone = attention(states[b : b + 1], memory[b : b + 1, keep[b]])
            torch.testing.assert_close(result[b : b + 1], alone)
    hidden = torch.tensor([[True, False]] * 3)
    masked = attention(states, memory, hidden, keep)
    assert not masked[:, 1].any()
    torch.testing.assert_close(masked[:, 0], result[:, 0])


@pytest.mark.parametrize("attention", [SelfAttention(8, 2, dropout=0.25), CrossAttention(8, heads=2, dropout=0.25)])
def test_dropout_of_weights_keeps_their_mean(attention):
    attention = attention.double().train()
    states = torch.randn(1, 5, 8, dtype=torch.float64).expand(4000, -1, -1)
    inputs = (states,) if isinstance(attention, SelfAttention) else (states, states)
    results = attention(*inputs)
    expected = attention.eval()(*inputs)
    assert not torch.equal(results[0], results[1])
    assert (results.mean(0) - expected[0]).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(expected[0], expected[1])


@given(past=st.integers(1, 4), length=st.integers(1, 3))
def test_self_attention_alone_numbers_positions_on_from_its_cache(past, length):
    attention = SelfAttention(8, 2, causal=True, rotary=True).double()
    states = torch.randn(2, past + length, 8, dtype=torch.float64)
    cache = KeyValueCache()
    pieces = [attention(piece, cache=cache) for piece in states.split([past, length], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(states))


@pytest.mark.parametrize("attention", [SelfAttention(8, 2, rotary=True), CrossAttention(8, 4, 2, 1)])
def test_attention_comes_back_from_its_config(attention):
    again = from_config(to_config(attention))
    again.load_state_dict(attention.state_dict())
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 4)
    inputs = (x,) if isinstance(attention, SelfAttention) else (x, y)
    assert torch.equal(again(*inputs), attention(*inputs))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, c, x: s(x[0]), ValueError, "states has shape"),
        (lambda s, c, x: s(x.long()), TypeError, "states has dtype"),
        (lambda s, c, x: s(x, torch.ones(2, 4, dtype=torch.bool)), ValueError, "mask has shape"),
        (lambda s, c, x: s(x, cache=KeyValueCache()), ValueError, "not causal"),
        (lambda s, c, x: c(x, x), ValueError, "memory has shape"),
        (lambda s, c, x: c(x, x[:1, :, :4]), ValueError, "memory has 1 rows"),
        (lambda s, c, x: c(x, x[..., :4], memory_mask=torch.ones(2, 3)), TypeError, "memory_mask has dtype"),
    ],
)
def test_bad_inputs_raise_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(SelfAttention(8), CrossAttention(8, 4), torch.randn(2, 3, 8))
