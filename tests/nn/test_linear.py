"""Layers and attention where a few rows are read at a time: the kernels give what torch's own operations give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from probllm.math.kernels.few_rows import gelu
from probllm.nn import SelfAttention, TransformerDecoder
from probllm.nn import attention as attention_module
from probllm.nn import linear as linear_module
from probllm.nn.attention import one_query
from probllm.nn.linear import Linear, is_plain, linear, perceptron
from probllm.nn.transformer_layer import Perceptron


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often each kernel was called."""
    calls = {"product": 0, "attention": 0}

    def counted(name, run):
        def call(*arguments):
            calls[name] += 1
            return run(*arguments)

        return call

    monkeypatch.setattr(linear_module, "run_shares", counted("product", linear_module.run_shares))
    monkeypatch.setattr(attention_module, "run_shares", counted("attention", attention_module.run_shares))
    return calls


@given(
    st.lists(st.integers(1, 3), max_size=3), st.integers(1, 130), st.integers(120, 200), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_a_few_rows_are_multiplied_as_torch_multiplies_them(lead, inner, outer, with_bias, strided, seed):
    torch.manual_seed(seed)
    x = torch.randn(*lead, 2 * inner)[..., ::2] if strided else torch.randn(*lead, inner)
    weight = torch.randn(outer + 2, inner)[1:-1]  # part of a table, as an output layer's may be
    bias = torch.randn(outer) if with_bias else None
    with torch.no_grad():
        found = linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "calls"), [(1, 1), (4, 1), (7, 1), (8, 1), (9, 0), (0, 0)])
def test_the_kernel_serves_a_few_rows(kernel_calls, rows, calls):
    layer, x = Linear(128, 130), torch.randn(rows, 128)
    with torch.no_grad():
        found = layer(x)
    assert kernel_calls["product"] == calls
    torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Linear(128, 130), torch.randn(1, 128, requires_grad=True)),
        (Linear(128, 130).double(), torch.randn(1, 128).double()),
        (Linear(10, 10), torch.randn(1, 10)),
        (Linear(256, 130), torch.randn(1, 128)),
    ],
)
def test_what_the_kernel_does_not_serve_is_torchs(kernel_calls, layer, x):
    with torch.no_grad():
        if x.shape[-1] == layer.in_features:
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        else:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(x)
    assert kernel_calls["product"] == 0


def test_gradients_autocast_and_transforms_are_torchs(kernel_calls):
    layer, x = Linear(128, 130), torch.randn(3, 128)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(layer)(x), F.linear(x, layer.weight, layer.bias))
        _, slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, layer.weight.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert kernel_calls["product"] == 0


def test_what_is_not_finite_is_passed_on():
    weight = torch.ones(200, 128)
    weight[3, 5], weight[4, 5] = math.nan, math.inf
    with torch.no_grad():
        found = linear(torch.ones(1, 128), weight)
    assert found[0, 3].isnan()
    assert found[0, 4] == math.inf
    assert found[0, 5] == 128


def test_it_is_a_linear_layer():
    layer = Linear(3, 4, bias=False)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99)
)
def test_one_query_attends_as_the_product_says(rows, kv_heads, group, many, size, seed):
    torch.manual_seed(seed)
    q = torch.randn(rows, kv_heads * group, 1, size)
    pairs = torch.randn(rows, 2 * kv_heads, many + 5, size)[:, :, 2 : many + 2]  # as a cache holds them, in a window
    k, v = pairs.split(kv_heads, 1)
    found = one_query(q, k, v)
    wide = [x.repeat_interleave(group, 1) for x in (k, v)]
    expected = (q @ wide[0].transpose(-2, -1) / size**0.5).softmax(-1) @ wide[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_keys_and_values_may_lie_in_different_ways():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 6), torch.randn(2, 9, 2, 6).transpose(1, 2)[:, :, 1:8], torch.randn(2, 2, 7, 6)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    expected = (q @ wide[0].transpose(-2, -1) / 6**0.5).softmax(-1) @ wide[1]
    torch.testing.assert_close(one_query(q, k, v), expected)


def test_extreme_scores_of_one_query():
    q = torch.tensor([1e4, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[1e4, 0.0], [1e4, 0.0], [-1e4, 0.0], [-math.inf, 0.0]]).view(1, 1, 4, 2)
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).view(1, 1, 4, 2)
    assert one_query(q, k, v).flatten().tolist() == [2.0, 3.0]


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"window": 5}, {"qk_norm": True, "positions": "rope"}])
def test_a_decoder_reads_token_by_token_what_it_reads_at_once(kernel_calls, options):
    torch.manual_seed(0)
    decoder = TransformerDecoder(50, 128, 2, 4, dropout=0.0, **options).eval()
    tokens = torch.randint(0, 50, (2, 12))
    whole = decoder(tokens).detach()
    cache = decoder.new_cache(2, 12)
    with torch.no_grad():
        pieces = [decoder(token, cache=cache) for token in tokens.split(1, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert kernel_calls["attention"] == 12 * 2
    assert kernel_calls["product"] >= 12 * 2


def test_padding_and_dropout_are_left_to_torch(kernel_calls):
    layer = SelfAttention(64, 4, causal=True)
    states = torch.randn(2, 1, 64)
    with torch.no_grad():
        layer.eval()(states, mask=torch.tensor([[True], [False]]))
        SelfAttention(64, 4, dropout=0.5).train()(states)
    assert kernel_calls["attention"] == 0


def test_plain_tensors():
    x = torch.zeros(2)
    assert is_plain(x)
    assert is_plain(x, x)
    assert not is_plain(x, x.double())
    assert not is_plain(nn.Parameter(x))
    assert not is_plain(x.clone().requires_grad_())


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_a_perceptron_of_a_few_rows(activation, bias, rows):
    torch.manual_seed(0)
    layer, x = Perceptron(128, 160, activation, bias=bias).eval(), 3 * torch.randn(rows, 1, 128)
    with torch.no_grad():
        found = layer(x)
        fused = perceptron(x, layer.input, layer.output, activation)
    assert (fused is not None) == (activation in ("gelu", "relu") and rows < 9)
    torch.testing.assert_close(found, layer(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "wrapped", "gradient", "double", "large"])
def test_a_perceptron_that_is_looked_at_or_changed_is_torchs(kind):
    size = 4000 if kind == "large" else 160
    first, second, x = Linear(128, size), Linear(size, 128), torch.randn(1, 128)
    assert kind == "large" or perceptron_without_gradient(x, first, second) is not None
    if kind == "hook":
        first.register_forward_hook(lambda module, inputs, output: None)
    elif kind == "pre-hook":
        second.register_forward_pre_hook(lambda module, inputs: None)
    elif kind == "wrapped":
        second = nn.Linear(size, 128)
    elif kind == "gradient":
        x.requires_grad_()
    elif kind == "double":
        second = second.double()
    else:
        x, first = torch.randn(8, 128), Linear(128, 10_000)
    assert perceptron_without_gradient(x, first, second) is None
    assert perceptron(x, first, second, "gelu") is None


@torch.no_grad()
def perceptron_without_gradient(x, first, second):
    return perceptron(x, first, second, "gelu")


def test_gelu_of_the_kernel_is_gelu():
    x = torch.cat([torch.linspace(-9, 9, 5000), torch.tensor([1e30, -1e30, 0.0, -0.0])])
    found = x.numpy().copy()
    gelu(found)
    torch.testing.assert_close(torch.from_numpy(found).double(), F.gelu(x.double()), rtol=1e-6, atol=1e-6)
    broken = torch.tensor([math.nan]).numpy()
    gelu(broken)
    assert math.isnan(broken[0])
    layer = Perceptron(128, 160, "relu", bias=False)
    with torch.no_grad():
        assert layer(torch.full((1, 128), math.nan)).isnan().all()


def test_the_kernels_are_compiled_once(monkeypatch):
    """Whatever the strides of what is read: a layout that a kernel has not seen would take seconds."""
    seen = []

    def note(kernel, arguments, *rest):
        seen.extend(x.flags.c_contiguous for x in arguments if hasattr(x, "flags"))
        return original(kernel, arguments, *rest)

    original = linear_module.run_shares
    for module in (linear_module, attention_module):
        monkeypatch.setattr(module, "run_shares", note)
    decoder = TransformerDecoder(50, 128, 1, 4, dropout=0.0).eval()
    cache = decoder.new_cache(3, 9)
    with torch.no_grad():
        decoder(torch.zeros(3, 8, dtype=torch.long), cache=cache)
        states = decoder(torch.zeros(3, 1, dtype=torch.long), cache=cache)
        linear(torch.randn(4, 6, 128)[:, -1:], decoder.layers[0].attention.project.weight)
        linear(torch.randn(128, 4).T, decoder.layers[0].attention.project.weight)
        linear(torch.randn(1, 128), torch.randn(128, 200).T)
    assert states.shape == (3, 1, 128)
    assert len(seen) > 15
    assert all(seen)


@pytest.mark.parametrize("where", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}])
def test_layers_of_another_precision_or_device_are_torchs(where):
    """Nothing of theirs is read as an array before that is known: a GPU's or bfloat16's cannot be."""
    layer, x = Perceptron(128, 160).eval().to(**where), torch.randn(1, 128).to(**where)
    attention = SelfAttention(128, 4, causal=True).eval().to(**where)
    with torch.no_grad():
        assert perceptron(x, layer.input, layer.output, "gelu") is None
        assert layer(x).dtype == x.dtype
        assert layer.input(x).shape == (1, 160)
        assert attention(x.view(1, 1, 128)).shape == (1, 1, 128)


def test_a_bias_of_another_precision_is_refused_as_torch_refuses_it():
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.randn(1, 128), torch.randn(160, 128), torch.randn(160).double())
