"""One battery over every decoder: the future, caches, memories, padding, saving, bad inputs at the door."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap

from probllm.nn import (
    Decoder,
    DecoderCache,
    KeyValueCache,
    RecurrentDecoder,
    TransformerDecoder,
    VectorInputs,
    WordEmbedding,
    from_config,
    to_config,
)

WORDS, MEMORY = 11, 6
SMALL: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 4, "feedforward": 10, "dropout": 0.0}
WITHOUT = {
    "gpt2": lambda: TransformerDecoder(WORDS, positions="learned", max_length=30, activation="gelu_tanh", **SMALL),
    "llama": lambda: TransformerDecoder(WORDS, kv_heads=2, norm="rms", activation="swiglu", bias=False, **SMALL),
    "qwen": lambda: TransformerDecoder(
        WordEmbedding(WORDS, 5), kv_heads=1, norm="rms", qk_norm=True, bias=False, qkv_bias=True, head_dim=4, **SMALL
    ),
    "window": lambda: TransformerDecoder(WORDS, window=3, **SMALL),
    "after": lambda: TransformerDecoder(WORDS, positions="sinusoidal", norm_first=False, activation="relu", **SMALL),
    "unplaced": lambda: TransformerDecoder(WORDS, positions="none", embedding_norm=True, **SMALL),
    "lstm": lambda: RecurrentDecoder(WORDS, hidden=5, layers=2),
    "gru": lambda: RecurrentDecoder(WordEmbedding(WORDS, 3), hidden=5, cell="gru"),
}
WITH = {
    "translator": lambda: TransformerDecoder(WORDS, memory_dim=MEMORY, **SMALL),
    "original": lambda: TransformerDecoder(
        WORDS, positions="sinusoidal", norm_first=False, memory_dim=MEMORY, activation="relu", **SMALL
    ),
    "grouped": lambda: TransformerDecoder(WORDS, memory_dim=MEMORY, kv_heads=2, qk_norm=True, window=2, **SMALL),
    "luong": lambda: RecurrentDecoder(WORDS, hidden=5, layers=2, memory_dim=MEMORY),
    "luong_gru": lambda: RecurrentDecoder(WORDS, hidden=5, cell="gru", memory_dim=MEMORY),
    "bahdanau": lambda: RecurrentDecoder(WORDS, hidden=5, layers=2, memory_dim=MEMORY, attention="bahdanau"),
    "bahdanau_gru": lambda: RecurrentDecoder(WORDS, hidden=5, cell="gru", memory_dim=MEMORY, attention="bahdanau"),
}
DECODERS = {**WITHOUT, **WITH}
every_decoder = pytest.mark.parametrize("name", DECODERS)


def build(name: str) -> Decoder:
    torch.manual_seed(1)
    decoder = DECODERS[name]().double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():  # biases away from 0
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def draw(name: str, batch: int, length: int, seed: int = 0, size: int = 4) -> tuple[torch.Tensor, dict[str, Any]]:
    """Ids, and the memory with its mask for a decoder that has one; row 0 of the memory is the whole one."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (batch, length), generator=generator)
    if name in WITHOUT:
        return words, {}
    mask = torch.rand(batch, size, generator=generator) < 0.6
    mask[0] = True
    return words, {
        "memory": torch.randn(batch, size, MEMORY, dtype=torch.float64, generator=generator),
        "memory_mask": mask,
    }


def some_mask(data: st.DataObject, batch: int, length: int) -> torch.Tensor | None:
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    rows = data.draw(st.none() | st.lists(row, min_size=batch, max_size=batch))
    return None if rows is None else torch.tensor(rows)


@every_decoder
@given(data=st.data())
def test_the_future_changes_no_past(name, data):
    length = data.draw(st.integers(2, 8))
    cut, seed = data.draw(st.integers(1, length - 1)), data.draw(st.integers(0, 99))
    decoder, (words, memory) = build(name), draw(name, 2, length, seed)
    other = draw(name, 2, length, seed + 1)[0]
    before, after = decoder(words, **memory), decoder(torch.cat([words[:, :cut], other[:, cut:]], 1), **memory)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=1e-10, atol=1e-10)
    changed = words.clone()
    changed[:, 0] = (changed[:, 0] + 1) % WORDS
    assert (decoder(changed, **memory)[:, 1] - before[:, 1]).abs().max() > 1e-6  # the past does change the future


@every_decoder
@pytest.mark.parametrize("gradients", [True, False])
@given(data=st.data())
def test_in_pieces_with_a_cache_is_at_once_in_any_rows(name, gradients, data):
    decoder = build(name)
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    batch, length = data.draw(st.integers(1, 3)), sum(sizes)
    words, memory = draw(name, batch, length, data.draw(st.integers(0, 99)))
    mask = some_mask(data, batch, length)
    given_once, room = data.draw(st.booleans()), data.draw(st.sampled_from([None, length + 1]))
    cache = decoder.new_cache(batch, room, **(memory if given_once else {}))
    assert isinstance(cache, DecoderCache)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    with torch.set_grad_enabled(gradients):
        pieces = []
        for i, (w, m) in enumerate(zip(words.split(sizes, 1), masks, strict=True)):
            # Given again or not, the memory is that of the first call.
            beside = memory if not given_once and (i == 0 or i == 2) else {}
            pieces.append(decoder(w, cache=cache, mask=m, **beside))
        torch.testing.assert_close(torch.cat(pieces, 1), decoder(words, mask=mask, **memory))
        assert cache.length == length
        rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
        cache.select(rows)
        following = torch.randint(0, WORDS, (len(rows), 1))
        longer = torch.cat([words[rows], following], 1)
        whole = None if mask is None else torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=torch.bool)], 1)
        chosen = {key: value[rows] for key, value in memory.items()}
        expected = decoder(longer, mask=whole, **chosen)[:, -1:]
        torch.testing.assert_close(decoder(following, cache=cache), expected)


@every_decoder
def test_gradients_go_through_a_cache(name):
    decoder, (words, memory) = build(name), draw(name, 2, 5)
    cache = decoder.new_cache(2, **memory)
    pieces = torch.cat([decoder(piece, cache=cache) for piece in words.split([2, 1, 2], 1)], 1)
    slopes = []
    for states in (pieces, decoder(words, **memory)):
        total = (states * torch.arange(states.numel()).view_as(states)).sum()
        slopes.append(torch.autograd.grad(total, list(decoder.parameters())))
    torch.testing.assert_close(*slopes)


@every_decoder
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_padding_on_the_left_is_each_row_alone(name, lengths, seed):
    decoder, size = build(name), max(lengths)
    words, memory = draw(name, len(lengths), size, seed)
    mask = torch.arange(size) >= size - torch.tensor(lengths)[:, None]
    following = torch.randint(0, WORDS, (len(lengths), 2))
    cache = decoder.new_cache(len(lengths))
    with torch.no_grad():
        states = [decoder(words, cache=cache, mask=mask, **memory)]
        states += [decoder(word, cache=cache) for word in following.split(1, 1)]
    states = torch.cat(states, 1)
    assert not states[:, :size][~mask].any()
    whole = decoder(
        torch.cat([words, following], 1), mask=torch.cat([mask, mask.new_ones(len(lengths), 2)], 1), **memory
    )
    torch.testing.assert_close(states, whole)
    for i in range(len(lengths)):
        own = {}
        if memory:
            keep = memory["memory_mask"][i]
            own = (
                {"memory": memory["memory"][i : i + 1, keep]}
                if keep.any()
                else {k: v[i : i + 1] for k, v in memory.items()}
            )
        row = torch.cat([words[i : i + 1, mask[i]], following[i : i + 1]], 1)
        torch.testing.assert_close(states[i : i + 1, size - lengths[i] :], decoder(row, **own))


@pytest.mark.parametrize("name", WITH)
def test_a_memory_matters_and_its_padding_does_not(name):
    decoder, (words, memory) = build(name), draw(name, 3, 4)
    memory["memory_mask"][1] = torch.tensor([True, False, True, False])
    memory["memory_mask"][2] = False
    states = decoder(words, **memory)
    spoilt = memory["memory"].masked_fill(~memory["memory_mask"].unsqueeze(-1), 1e3)
    torch.testing.assert_close(decoder(words, memory=spoilt, memory_mask=memory["memory_mask"]), states)
    for row in range(3):
        other = memory["memory"].clone()
        other[row] += torch.randn(4, MEMORY)
        difference = (decoder(words, memory=other, memory_mask=memory["memory_mask"]) - states).abs().amax((1, 2))
        assert (difference > 1e-6).tolist() == [row == i and i < 2 for i in range(3)]


@every_decoder
def test_config_and_weights_give_an_equal_decoder(name):
    decoder, (words, memory) = build(name), draw(name, 2, 4)
    again = from_config(json.loads(json.dumps(to_config(decoder)))).double().eval()
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(words, **memory), decoder(words, **memory))


@every_decoder
def test_every_parameter_gets_a_gradient(name):
    decoder, (words, memory) = build(name), draw(name, 3, 6)
    (decoder(words, **memory) * torch.randn(3, 6, decoder.dim)).sum().backward()
    # A score that all keys share leaves the softmax as it is.
    idle = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in idle if not n.endswith("key.bias")]


@every_decoder
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_weights_is_a_loop(name):
    decoder, (words, memory) = build(name), draw(name, 2, 4)
    stacked = {k: torch.stack([v.detach(), v.detach() + 0.1]) for k, v in decoder.named_parameters()}

    def run(weights):
        return functional_call(decoder, weights, (words,), memory)

    loop = torch.stack([run({k: v[i] for k, v in stacked.items()}) for i in range(2)])
    torch.testing.assert_close(vmap(run)(stacked), loop)
    slopes = vmap(grad(lambda weights: run(weights).pow(2).sum()))(stacked)
    for i in range(2):
        weights = {k: v[i].clone().requires_grad_() for k, v in stacked.items()}
        expected = torch.autograd.grad(run(weights).pow(2).sum(), list(weights.values()))
        torch.testing.assert_close([slopes[k][i] for k in weights], list(expected))


@every_decoder
def test_bfloat16_and_mixed_precision_stay_near(name):
    decoder, (words, memory) = build(name).float(), draw(name, 2, 6)
    memory = {k: v if v.dtype == torch.bool else v.float() for k, v in memory.items()}
    expected = decoder(words, **memory)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decoder(words, **memory).float(), expected, rtol=0.1, atol=0.1)
        cache = decoder.new_cache(2, **memory)
        with torch.no_grad():
            pieces = torch.cat([decoder(piece, cache=cache) for piece in words.split(3, 1)], 1)
        torch.testing.assert_close(pieces.float(), expected, rtol=0.1, atol=0.1)
    decoder = decoder.bfloat16()
    memory = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in memory.items()}
    states = decoder(words, **memory)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), expected, rtol=0.2, atol=0.2)


@every_decoder
def test_dropout_acts_in_training_only_and_keeps_the_mean(name):
    decoder = build(name)
    config = to_config(decoder)
    config["arguments"]["dropout"] = 0.5
    dropping = from_config(config).double()
    dropping.load_state_dict(decoder.state_dict())
    words, memory = draw(name, 2, 4)
    assert not torch.equal(dropping(words, **memory), dropping(words, **memory))
    assert torch.equal(dropping.eval()(words, **memory), decoder(words, **memory))


def test_token_weight_is_the_embedding_s_where_it_can_be_tied():
    decoder = TransformerDecoder(WORDS, **SMALL)
    assert decoder.token_weight is decoder.embedding.weight
    assert RecurrentDecoder(WORDS, hidden=5).token_weight.shape == (WORDS, 5)
    with pytest.raises(ValueError, match="embedding has dim 5; expected 8"):
        _ = TransformerDecoder(WordEmbedding(WORDS, 5), **SMALL).token_weight
    with pytest.raises(TypeError, match="embedding is a VectorInputs"):
        _ = TransformerDecoder(VectorInputs(8), **SMALL).token_weight


@every_decoder
def test_bad_inputs_raise_by_name(name):
    decoder, (words, memory) = build(name), draw(name, 2, 4)
    wrong = [
        ((words + 50,), memory, ValueError, f"words has ids from .* expected ids from 0 to {WORDS - 1}"),
        ((words[:, :0],), memory, ValueError, "words has length 0"),
        ((words,), {**memory, "mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask has shape"),
        ((words,), {**memory, "cache": 3}, TypeError, "cache is a int"),
    ]
    if memory:
        states = memory["memory"]
        wrong += [
            ((words,), {}, ValueError, "memory is None"),
            ((words, states[..., :3]), {}, ValueError, "memory has shape"),
            ((words, states[:1]), {}, ValueError, "memory has 1 rows"),
            ((words, states), {"memory_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "memory_mask has shape"),
        ]
    else:
        states = torch.zeros(2, 3, MEMORY, dtype=torch.float64)
        wrong.append(((words, states), {}, ValueError, "without memory_dim"))
    for arguments, keywords, error, message in wrong:
        with pytest.raises(error, match=message):
            decoder(*arguments, **keywords)
    cache = decoder.new_cache(2, **memory)
    decoder(words, cache=cache)
    with pytest.raises(ValueError, match="inputs has 1 rows; the cache holds 2"):
        decoder(words[:1], cache=cache)


def test_a_prompt_longer_than_learned_positions_or_the_cache_is_refused_by_name():
    decoder = build("gpt2")
    with pytest.raises(ValueError, match="length 31; expected at most max_length = 30"):
        decoder(torch.ones(1, 31, dtype=torch.long))
    for cache in (KeyValueCache(5), decoder.new_cache(1, 5), decoder.new_cache(1, 5, static=True)):
        decoder(torch.ones(1, 4, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="inputs has length 6; the cache holds 5"):
            decoder(torch.ones(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="length is None"):
        decoder.new_cache(1, static=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecurrentDecoder(5, cell="rnn"), "cell is 'rnn'"),
        (lambda: RecurrentDecoder(5, memory_dim=3, attention="dot"), "attention is 'dot'"),
        (lambda: TransformerDecoder(5, memory_dim=0), "memory_dim is 0"),
        (lambda: TransformerDecoder(5, window=0), "window is 0"),
        (lambda: TransformerDecoder(5, head_dim=3), "even number"),
    ],
)
def test_bad_options_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
