"""One battery over every encoder of a sequence: padding, causality, transforms, saving, bad inputs at the door."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from probllm.nn import (
    CharacterCNN,
    ConvolutionEncoder,
    Encoder,
    FeatureEmbedding,
    FeedForwardEncoder,
    RecurrentEncoder,
    TransformerEncoder,
    VectorInputs,
    WordEmbedding,
    WordRepresentation,
    from_config,
    to_config,
)

WORDS, CHARACTERS, FEATURES = 11, 7, 13


def representation() -> WordRepresentation:
    parts = [WordEmbedding(WORDS, 4), CharacterCNN(CHARACTERS, 3, 4, (1, 2, 3)), FeatureEmbedding(FEATURES, 3)]
    return WordRepresentation(parts)


SMALL: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 4, "feedforward": 10, "dropout": 0.0}
ENCODERS = {
    "words": lambda: WordEmbedding(WORDS, 4),
    "characters": lambda: CharacterCNN(CHARACTERS, 3, 4, (1, 2, 3)),
    "features": lambda: FeatureEmbedding(FEATURES, 3),
    "representation": representation,
    "feedforward": lambda: FeedForwardEncoder(representation(), hidden=5, layers=2, window=2),
    "convolution": lambda: ConvolutionEncoder(representation(), hidden=6),
    "convolution_causal": lambda: ConvolutionEncoder(representation(), 6, width=2, dilations=(1, 3), causal=True),
    "rnn": lambda: RecurrentEncoder(representation(), hidden=4, cell="rnn"),
    "lstm": lambda: RecurrentEncoder(representation(), hidden=3, layers=2),
    "gru": lambda: RecurrentEncoder(representation(), hidden=3, layers=2, cell="gru"),
    "lstm_forward": lambda: RecurrentEncoder(representation(), hidden=3, layers=2, bidirectional=False),
    "transformer": lambda: TransformerEncoder(representation(), **SMALL),
    "transformer_sinusoidal": lambda: TransformerEncoder(representation(), positions="sinusoidal", norm="rms", **SMALL),
    "transformer_learned": lambda: TransformerEncoder(
        WORDS, positions="learned", max_length=20, activation="relu", **SMALL
    ),
    "transformer_causal": lambda: TransformerEncoder(
        representation(), causal=True, kv_heads=2, activation="swiglu", **SMALL
    ),
}
CAUSAL = ["convolution_causal", "lstm_forward", "transformer_causal"]
BOTH_WAYS = ["feedforward", "convolution", "rnn", "lstm", "gru", "transformer", "transformer_sinusoidal"]
SKIPS_ANY_PADDING = [name for name in ENCODERS if "convolution" not in name and name != "feedforward"]
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def build(name: str) -> Encoder:
    torch.manual_seed(1)
    encoder = ENCODERS[name]().double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases away from 0, feature vectors to a size that shows
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def draw_inputs(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int, *shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=generator)

    letters = ids(CHARACTERS - 1, batch, length, 5) + 1
    letters = letters * (torch.arange(5) <= ids(5, batch, length, 1))
    return {"words": ids(WORDS, batch, length), "characters": letters, "features": ids(FEATURES, batch, length, 4)}


def rows(inputs: dict[str, Tensor], row: int, where: Tensor) -> dict[str, Tensor]:
    """One row of the batch, with only the positions where a mask is True."""
    return {key: value[row : row + 1, where] for key, value in inputs.items()}


def value_and_gradient(encoder: Encoder, outputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    total = sum(((o * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros((), dtype=torch.float64))
    return list(torch.autograd.grad(total, list(encoder.parameters()), allow_unused=True, materialize_grads=True))


def check_masked_equals_alone(name: str, mask: Tensor, seed: int) -> None:
    """At real positions: the same states, and the same gradients, as each row has alone with the padding cut out."""
    encoder, inputs = build(name), draw_inputs(*mask.shape, seed=seed)
    states = encoder(inputs, mask)
    assert states.shape == (*mask.shape, encoder.dim)
    assert (states[~mask] == 0).all()
    alone = [encoder(rows(inputs, b, mask[b]))[0] for b in range(len(mask)) if mask[b].any()]
    torch.testing.assert_close(states[mask], torch.cat(alone), rtol=1e-9, atol=1e-9)
    weights = torch.randn(states.shape, dtype=torch.float64)
    pieces = [weights[b, mask[b]] for b in range(len(mask)) if mask[b].any()]
    padded = value_and_gradient(encoder, [states], [weights])
    apart = value_and_gradient(encoder, alone, pieces)
    torch.testing.assert_close(padded, apart, rtol=1e-8, atol=1e-8)


@every_encoder
@given(data=st.data())
def test_padding_on_either_side_changes_neither_states_nor_gradients(name, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in mask:
        start = data.draw(st.integers(0, length - 1))
        row[start : data.draw(st.integers(start + 1, length))] = True
    check_masked_equals_alone(name, mask, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", SKIPS_ANY_PADDING)
@given(data=st.data())
def test_padding_anywhere_is_as_if_it_were_not_there(name, data):
    """Rows of nothing but padding included; in a row with holes the positions are those of the real ones."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch)))
    if mask.any():
        check_masked_equals_alone(name, mask, data.draw(st.integers(0, 99)))


@every_encoder
def test_a_mask_of_ones_is_no_mask(name):
    encoder, inputs = build(name), draw_inputs(2, 5)
    torch.testing.assert_close(encoder(inputs, torch.ones(2, 5, dtype=torch.bool)), encoder(inputs))


@pytest.mark.parametrize("name", [*BOTH_WAYS, *CAUSAL])
def test_nan_at_padding_reaches_neither_states_nor_gradients(name):
    encoder = build(name)
    encoder.embedding = VectorInputs(encoder.embedding.dim)
    vectors = torch.randn(2, 5, encoder.embedding.dim, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
    spoilt = vectors.masked_fill(~mask.unsqueeze(-1), torch.nan)
    states = encoder(spoilt, mask)
    torch.testing.assert_close(states, encoder(vectors, mask))
    states.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", CAUSAL)
@given(length=st.integers(2, 7), cut=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_future_changes_no_past(name, length, cut, seed):
    cut = min(cut, length - 1)
    encoder, inputs, other = build(name), draw_inputs(2, length, seed), draw_inputs(2, length, seed + 1)
    changed = {key: torch.cat([inputs[key][:, :cut], other[key][:, cut:]], 1) for key in inputs}
    before, after = encoder(inputs), encoder(changed)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=1e-10, atol=1e-10)
    last = {key: value.clone() for key, value in inputs.items()}
    last["words"][:, 0] = (last["words"][:, 0] + 1) % WORDS
    assert (encoder(last)[:, 1] - before[:, 1]).abs().max() > 1e-6  # the past does change the future


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("distance", [1, 2])
def test_a_state_sees_both_ways(name, distance):
    encoder, inputs = build(name), draw_inputs(1, 5)
    before = encoder(inputs)
    for changed, seen in ((4, 4 - distance), (0, distance)):
        other = {key: value.clone() for key, value in inputs.items()}
        other["words"][:, changed] = (other["words"][:, changed] + 1) % WORDS
        assert (encoder(other)[:, seen] - before[:, seen]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["words", "characters", "features"])
def test_a_tensor_serves_as_the_dict_s_entry_does(name):
    encoder, inputs = build(name), draw_inputs(2, 3)
    assert torch.equal(encoder(inputs), encoder(inputs[encoder.key]))


@every_encoder
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_weights_is_a_loop(name):
    encoder, inputs = build(name), draw_inputs(2, 4)
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    stacked = {k: torch.stack([v.detach(), v.detach() + 0.1, 0.5 * v.detach()]) for k, v in encoder.named_parameters()}

    def run(weights):
        return functional_call(encoder, weights, (inputs, mask))

    loop = torch.stack([run({k: v[i] for k, v in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(vmap(run)(stacked), loop, rtol=1e-9, atol=1e-9)
    slopes = vmap(grad(lambda weights: run(weights).pow(2).sum()))(stacked)
    for i in range(3):
        weights = {k: v[i].clone().requires_grad_() for k, v in stacked.items()}
        expected = torch.autograd.grad(run(weights).pow(2).sum(), list(weights.values()))
        torch.testing.assert_close([slopes[k][i] for k in weights], list(expected), rtol=1e-8, atol=1e-8)


@every_encoder
def test_forward_derivatives_agree_with_backward_ones(name):
    encoder, inputs = build(name), draw_inputs(2, 4)
    weights = {k: v.detach() for k, v in encoder.named_parameters()}
    tangents = {k: torch.randn_like(v) for k, v in weights.items()}
    _, pushed = jvp(lambda w: functional_call(encoder, w, (inputs,)), (weights,), (tangents,))
    slopes = grad(lambda w: functional_call(encoder, w, (inputs,)).sum())(weights)
    torch.testing.assert_close(pushed.sum(), sum((slopes[k] * tangents[k]).sum() for k in weights))


@every_encoder
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_examples_is_a_batch(name):
    encoder, inputs = build(name), draw_inputs(3, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])

    def run(example, m):
        return encoder({k: v.unsqueeze(0) for k, v in example.items()}, m.unsqueeze(0))[0]

    torch.testing.assert_close(vmap(run)(inputs, mask), encoder(inputs, mask), rtol=1e-9, atol=1e-9)


@every_encoder
def test_config_and_weights_give_an_equal_encoder(name):
    encoder, inputs = build(name), draw_inputs(2, 4)
    again = from_config(json.loads(json.dumps(to_config(encoder)))).double().eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(inputs), encoder(inputs))
    assert torch.equal(copy.deepcopy(encoder)(inputs), encoder(inputs))


@every_encoder
def test_every_parameter_gets_a_gradient(name):
    encoder, inputs = build(name), draw_inputs(3, 6)
    (encoder(inputs) * torch.randn(3, 6, encoder.dim)).sum().backward()
    idle = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("name", BOTH_WAYS + CAUSAL)
def test_bfloat16_stays_bfloat16(name):
    encoder, inputs = build(name).bfloat16(), draw_inputs(2, 4)
    states = encoder(inputs, torch.tensor([[True] * 4, [True, True, False, False]]))
    assert states.dtype == torch.bfloat16
    assert states.isfinite().all()


@pytest.mark.parametrize("name", [*BOTH_WAYS, *CAUSAL])
def test_mixed_precision_gives_finite_states_and_gradients(name):
    encoder, inputs = build(name).float(), draw_inputs(2, 4)
    mask = torch.tensor([[True] * 4, [False, True, True, False]])
    with torch.autocast("cpu", torch.bfloat16):
        states = encoder(inputs, mask)
    torch.testing.assert_close(states.float(), encoder(inputs, mask), rtol=0.1, atol=0.1)
    states.float().pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", ["convolution", "transformer_causal"])
def test_an_encoder_compiles_as_one_graph(name):
    encoder, inputs = build(name), draw_inputs(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = encoder(inputs, mask)
    encoder.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(encoder(inputs, mask), expected)


@every_encoder
def test_bad_inputs_raise_at_the_door_by_name(name):
    encoder, inputs = build(name), draw_inputs(2, 4)
    key = getattr(encoder, "key", "words")
    wrong = [
        ({**inputs, key: inputs[key].double()}, None, TypeError, key),
        ({**inputs, key: inputs[key][0]}, None, ValueError, key),
        ({**inputs, key: inputs[key] + 50}, None, ValueError, f"{key} has ids from .* expected ids from 0"),
        ({**inputs, key: inputs[key] - 50}, None, ValueError, f"{key} has ids from -"),
        ({k: v[:, :0] for k, v in inputs.items()}, None, ValueError, "has length 0"),
        ({}, None, ValueError, "inputs has the keys"),
        (inputs, torch.ones(2, 4), TypeError, "mask"),
        (inputs, torch.ones(2, 5, dtype=torch.bool), ValueError, "mask"),
        (inputs, torch.ones(4, dtype=torch.bool), ValueError, "mask"),
        (None, None, TypeError, "inputs is a NoneType"),
    ]
    for bad, mask, error, message in wrong:
        with pytest.raises(error, match=message):
            encoder(bad, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordEmbedding(0, 3), "vocabulary_size is 0"),
        (lambda: WordEmbedding(5, 3, word_dropout=1.0), "word_dropout is 1"),
        (lambda: WordEmbedding(5, 3, unknown=5), "unknown is 5"),
        (lambda: CharacterCNN(5, widths=(3, 0)), "widths is 0"),
        (lambda: WordRepresentation([]), "parts is empty"),
        (lambda: FeedForwardEncoder(5, window=-1), "window is -1"),
        (lambda: FeedForwardEncoder(5, dropout=-0.1), "dropout is -0.1"),
        (lambda: ConvolutionEncoder(5, width=2), "width is 2"),
        (lambda: ConvolutionEncoder(5, dilations=(0,)), "dilations is 0"),
        (lambda: RecurrentEncoder(5, cell="mamba"), "cell is 'mamba'"),
        (lambda: RecurrentEncoder(5, layers=0), "layers is 0"),
        (lambda: TransformerEncoder(5, dim=10, heads=3), "heads is 3"),
        (lambda: TransformerEncoder(5, dim=8, heads=4, kv_heads=3), "kv_heads is 3"),
        (lambda: TransformerEncoder(5, dim=12, heads=4), "even number"),
        (lambda: TransformerEncoder(5, positions="alibi"), "positions is 'alibi'"),
        (lambda: TransformerEncoder(5, norm="batch"), "norm is 'batch'"),
        (lambda: TransformerEncoder(5, activation="tanh"), "activation is 'tanh'"),
    ],
)
def test_bad_sizes_and_options_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("embedding", [torch.nn.Embedding(3, 4), "words", True, None])
def test_an_embedding_must_be_an_encoder_or_a_size(embedding):
    with pytest.raises(TypeError, match="embedding is a"):
        RecurrentEncoder(embedding)
