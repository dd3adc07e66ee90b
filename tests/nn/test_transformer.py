"""The Transformer with its cache: reading in pieces, in any pieces, is reading at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import (
    KeyValueCache,
    SelfAttention,
    TransformerDecoder,
    TransformerEncoder,
    TransformerLayer,
    VectorInputs,
    from_config,
    to_config,
)

SMALL = {"dim": 8, "layers": 2, "heads": 4, "kv_heads": 2, "feedforward": 9, "causal": True}
POSITIONS = ["rope", "sinusoidal", "learned", "none"]


def build(positions: str) -> TransformerEncoder:
    torch.manual_seed(0)
    return TransformerEncoder(VectorInputs(5), positions=positions, max_length=20, **SMALL).double().eval()


def read_in_pieces(encoder, vectors, mask, sizes):
    cache = KeyValueCache()
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    return torch.cat([encoder(v, m, cache) for v, m in zip(vectors.split(sizes, 1), masks, strict=True)], 1), cache


@pytest.mark.parametrize("positions", POSITIONS)
@given(data=st.data())
def test_with_a_cache_is_without(positions, data):
    encoder = build(positions)
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    batch, length = data.draw(st.integers(1, 3)), sum(sizes)
    vectors = torch.randn(batch, length, 5, dtype=torch.float64)
    mask = data.draw(st.sampled_from([None, torch.rand(batch, length) < 0.7]))
    expected = encoder(vectors, mask)
    states, cache = read_in_pieces(encoder, vectors, mask, sizes)
    torch.testing.assert_close(states, expected)
    assert cache.length == length
    rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
    cache.select(rows)
    following = torch.randn(len(rows), 1, 5, dtype=torch.float64)
    longer = torch.cat([vectors[rows], following], 1)
    whole = None if mask is None else torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=torch.bool)], 1)
    torch.testing.assert_close(encoder(following, cache=cache), encoder(longer, whole)[:, -1:])


@pytest.mark.parametrize("positions", POSITIONS)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_padding_on_the_left_with_a_cache_is_each_row_alone(positions, lengths):
    encoder, size = build(positions), max(lengths)
    rows = [torch.randn(1, n, 5, dtype=torch.float64) for n in lengths]
    padded = torch.cat([torch.cat([torch.full((1, size - r.shape[1], 5), 9.0), r], 1) for r in rows]).double()
    mask = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    cache = KeyValueCache()
    encoder(padded, mask, cache)
    following = torch.randn(len(rows), 1, 5, dtype=torch.float64)
    states = encoder(following, cache=cache)
    for i, row in enumerate(rows):
        alone = encoder(torch.cat([row, following[i : i + 1]], 1))[:, -1]
        torch.testing.assert_close(states[i], alone)


def test_a_cache_needs_a_causal_encoder_and_its_own_batch():
    with pytest.raises(ValueError, match="not causal"):
        TransformerEncoder(5, dim=8)(torch.ones(1, 2, dtype=torch.long), cache=KeyValueCache())
    encoder, cache = build("rope"), KeyValueCache()
    encoder(torch.zeros(2, 3, 5).double(), cache=cache)
    with pytest.raises(ValueError, match="inputs has 3 rows"):
        encoder(torch.zeros(3, 1, 5).double(), cache=cache)
    assert cache.length == 3


def test_learned_positions_run_out_by_name():
    encoder, cache = build("learned"), KeyValueCache()
    with pytest.raises(ValueError, match="length 21; expected at most max_length = 20"):
        encoder(torch.zeros(1, 21, 5).double())
    encoder(torch.zeros(1, 20, 5).double(), cache=cache)
    with pytest.raises(ValueError, match="length 21"):
        encoder(torch.zeros(1, 1, 5).double(), cache=cache)


@pytest.mark.parametrize("positions", POSITIONS)
def test_without_positions_a_permutation_permutes_and_with_them_it_does_not(positions):
    encoder = TransformerEncoder(VectorInputs(5), dim=8, positions=positions, dropout=0.0).double()
    vectors, order = torch.randn(1, 6, 5, dtype=torch.float64), torch.tensor([3, 1, 5, 0, 2, 4])
    difference = (encoder(vectors[:, order]) - encoder(vectors)[:, order]).abs().max()
    assert (difference < 1e-9) == (positions == "none")


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu", "swiglu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_layer_is_its_formula(activation, norm):
    layer = TransformerLayer(8, 2, norm=norm, activation=activation).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)

    def normalise(v):
        v = v - v.mean(-1, keepdim=True) if norm == "layer" else v
        return v / (v.pow(2).mean(-1, keepdim=True) + (1e-5 if norm == "layer" else 1e-6)).sqrt()

    x1 = x + layer.attention(normalise(x))
    u = layer.feedforward.input(normalise(x1))
    if activation == "swiglu":
        u = u[..., :32] * torch.sigmoid(u[..., :32]) * u[..., 32:]
    elif activation == "quick_gelu":
        u = u / (1 + torch.exp(-1.702 * u))
    else:
        u = torch.nn.functional.gelu(u) if activation == "gelu" else u.clamp(min=0)
    torch.testing.assert_close(layer(x), x1 + layer.feedforward.output(u))
    again = from_config(to_config(layer))
    assert [p.shape for p in again.parameters()] == [p.shape for p in layer.parameters()]


def test_dropout_acts_in_training_only():
    encoder = TransformerEncoder(VectorInputs(5), dim=8, dropout=0.5, attention_dropout=0.5)
    vectors = torch.randn(2, 3, 5)
    assert not torch.equal(encoder(vectors), encoder(vectors))
    encoder.eval()
    assert torch.equal(encoder(vectors), encoder(vectors))


@pytest.mark.parametrize("causal", [False, True])
@given(data=st.data())
def test_a_window_is_a_masked_softmax(causal, data):
    """Only the nearest real positions count, whatever padding lies between."""
    window, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    attention = SelfAttention(8, 2, causal=causal, window=window).double()
    states = torch.randn(1, length, 8, dtype=torch.float64)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    wide = SelfAttention(8, 2, causal=causal).double()
    wide.load_state_dict(attention.state_dict())
    real = mask[0].nonzero().flatten()
    for i, position in enumerate(real):
        near = real[max(0, i - window + 1) : i + 1 if causal else i + window]
        row = torch.cat([near[near != position], position[None]])  # oneself last: its causal query sees them all
        expected = wide(states[:, row])[0, -1]
        torch.testing.assert_close(attention(states, mask)[0, position], expected)
        if mask.all():
            torch.testing.assert_close(attention(states)[0, position], expected)


def test_queries_and_keys_are_normalised_and_scaled():
    attention = SelfAttention(8, 2, kv_heads=1, qk_norm=True).double()
    attention.query_norm.weight.data.uniform_(0.5, 2)
    attention.key_norm.weight.data.uniform_(0.5, 2)
    states = torch.randn(2, 3, 8, dtype=torch.float64)
    q, k, _ = attention.project(states).split([8, 4, 4], -1)
    q = q.view(2, 3, 2, 4)

    def normalise(x, norm):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    q, k = normalise(q, attention.query_norm), normalise(k, attention.key_norm)
    expected = torch.softmax(torch.einsum("bihe,bje->bhij", q, k) / 2, -1)
    torch.testing.assert_close(attention(states, return_weights=True)[1], expected)
    torch.testing.assert_close(attention(1e3 * states, return_weights=True)[1].isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_after_the_parts_leave_normalised_states(norm):
    layer = TransformerLayer(8, 2, norm=norm, norm_first=False, activation="gelu_tanh").double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    x1 = layer.attention_norm(x + layer.attention(x))
    u = torch.nn.functional.gelu(layer.feedforward.input(x1), approximate="tanh")
    expected = layer.feedforward_norm(x1 + layer.feedforward.output(u))
    torch.testing.assert_close(layer(x), expected)
    encoder = TransformerEncoder(VectorInputs(5), dim=8, norm=norm, norm_first=False, dropout=0.0).double()
    states = encoder(torch.randn(2, 4, 5, dtype=torch.float64))
    assert encoder.norm is None
    torch.testing.assert_close(states.pow(2).mean(-1), torch.ones(2, 4).double(), rtol=1e-3, atol=1e-3)


def test_the_embeddings_norm_comes_before_the_first_layer():
    encoder = TransformerEncoder(VectorInputs(8), dim=8, positions="learned", embedding_norm=True, dropout=0.0).double()
    vectors, seen = torch.randn(1, 3, 8, dtype=torch.float64), []
    encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(vectors)
    torch.testing.assert_close(seen[0], torch.nn.functional.layer_norm(vectors + encoder.position_table[:3], (8,)))


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"norm": "rms", "activation": "swiglu"}])
def test_without_biases_there_are_none(options):
    encoder = TransformerEncoder(5, dim=8, bias=False, **options)
    assert not [name for name, _ in encoder.named_parameters() if "bias" in name]
    some = TransformerEncoder(5, dim=8, bias=False, qkv_bias=True, **options)
    assert {name.split(".", 2)[2] for name, _ in some.named_parameters() if "bias" in name} == {
        "attention.project.bias"
    }


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    saved, slopes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        decoder = TransformerDecoder(9, dim=16, layers=3, memory_dim=4, dropout=0.2, checkpointing=checkpointing)
        words, memory = torch.randint(0, 9, (2, 30)), torch.randn(2, 5, 4)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            states = decoder(words, memory)
        saved.append(sum(kept))
        states.pow(2).sum().backward()
        slopes.append([p.grad for p in decoder.parameters()])
    torch.testing.assert_close(*slopes)
    assert saved[1] < 0.3 * saved[0]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_state_depends_on_distances_or_on_places(positions):
    """With rotary positions a sequence may stand anywhere; learned places are learned one by one."""
    decoder = TransformerDecoder(VectorInputs(8), dim=8, positions=positions, dropout=0.0, window=1).double()
    vector = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8)
    states = decoder(vector)
    assert torch.allclose(states[:, 0], states[:, 5]) == (positions == "rope")
