"""The cache's storage: laid out ahead, written in place, grown by doubling, static under a compiler."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import KeyValueCache, TransformerDecoder

WORDS, MEMORY = 11, 6
SMALL: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 4, "kv_heads": 2, "feedforward": 10, "dropout": 0.0}
DECODERS = {
    "rope": lambda: TransformerDecoder(WORDS, **SMALL),
    "learned": lambda: TransformerDecoder(WORDS, positions="learned", qk_norm=True, **SMALL),
    "window": lambda: TransformerDecoder(WORDS, window=3, **SMALL),
    "translator": lambda: TransformerDecoder(WORDS, memory_dim=MEMORY, **SMALL),
}


def build(name: str) -> tuple[TransformerDecoder, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    decoder = DECODERS[name]().double()
    if name != "translator":
        return decoder, {}
    mask = torch.tensor([[True] * 4, [True, False, True, False], [True, True, False, False]])
    return decoder, {"memory": torch.randn(3, 4, MEMORY, dtype=torch.float64), "memory_mask": mask}


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
@torch.no_grad()
def test_a_static_cache_is_a_growing_one(name, data):
    decoder, memory = build(name)
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    length = sum(sizes)
    words = torch.randint(0, WORDS, (3, length))
    padding = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=3, max_size=3)))
    mask = data.draw(st.sampled_from([None, torch.arange(length) >= padding[:, None]]))
    growing = decoder.new_cache(3, **memory)
    static = decoder.new_cache(3, length + 3, static=True, **memory)
    for i, piece in enumerate(words.split(sizes, 1)):
        own = None if mask is None else mask.split(sizes, 1)[i]
        states = decoder(piece, cache=static, mask=own)
        torch.testing.assert_close(states, decoder(piece, cache=growing, mask=own))
    assert static.length == growing.length == length
    real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
    for one, other in zip(static.keys + static.values, growing.keys + growing.values, strict=True):
        torch.testing.assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real])
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
    growing.select(rows)
    static.select(rows)
    following = torch.randint(0, WORDS, (3, 2))
    torch.testing.assert_close(decoder(following, cache=static), decoder(following, cache=growing))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_once_as_one_graph(name):
    decoder, memory = build(name)
    graphs = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    words = torch.randint(0, WORDS, (3, 9))
    mask = torch.arange(4) >= torch.tensor([0, 1, 3])[:, None]
    growing, static = decoder.new_cache(3, **memory), decoder.new_cache(3, 9, static=True, **memory)
    decoder(words[:, :4], cache=growing, mask=mask)
    decoder(words[:, :4], cache=static, mask=mask)
    step = torch.compile(lambda word: decoder(word, cache=static), backend=counted, fullgraph=True)
    for word in words[:, 4:].split(1, 1):
        torch.testing.assert_close(step(word), decoder(word, cache=growing))
    assert len(graphs) == 1


@torch.no_grad()
def test_storage_grows_by_doubling_and_is_written_in_place():
    decoder, _ = build("rope")
    cache = decoder.new_cache(2)
    addresses = set()
    for word in torch.randint(0, WORDS, (2, 100)).split(1, 1):
        decoder(word, cache=cache)
        addresses.add(cache.pairs[0].shape[2])
    assert addresses == {16, 32, 64, 128}
    ahead = decoder.new_cache(2, 100)
    decoder(torch.ones(2, 1, dtype=torch.long), cache=ahead)
    first = ahead.pairs[0].data_ptr()
    decoder(torch.ones(2, 99, dtype=torch.long), cache=ahead)
    assert ahead.pairs[0].data_ptr() == first


@torch.no_grad()
def test_the_memory_is_projected_once():
    decoder, memory = build("translator")
    calls = []
    decoder.layers[1].memory_attention.project.register_forward_hook(lambda *_: calls.append(1))
    cache = decoder.new_cache(3)
    for word in torch.randint(0, WORDS, (3, 5)).split(1, 1):
        decoder(word, cache=cache, **memory)
    assert len(calls) == 1


def test_rows_of_a_static_cache_stay_as_many():
    decoder, _ = build("rope")
    with pytest.raises(ValueError, match="rows has 2 entries; a static cache keeps its 3"):
        decoder.new_cache(3, 5, static=True).select(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="max_length is 0"):
        KeyValueCache(0)
