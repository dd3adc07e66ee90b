"""Packed sequences are separate sequences: states, gradients, memories; and no padding is computed."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad

from probllm.nn import TransformerDecoder, TransformerEncoder, pack, segment_lengths, unpack
from probllm.nn.packing import Packing

WORDS, MEMORY = 11, 6
SMALL: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 4, "feedforward": 10, "dropout": 0.0}
STACKS = {
    "encoder": lambda: TransformerEncoder(WORDS, **SMALL),
    "encoder_window": lambda: TransformerEncoder(WORDS, window=2, norm_first=False, positions="none", **SMALL),
    "encoder_causal": lambda: TransformerEncoder(WORDS, causal=True, positions="sinusoidal", **SMALL),
    "decoder": lambda: TransformerDecoder(WORDS, kv_heads=2, qk_norm=True, **SMALL),
    "decoder_learned": lambda: TransformerDecoder(WORDS, positions="learned", max_length=12, **SMALL),
    "decoder_window": lambda: TransformerDecoder(WORDS, window=3, **SMALL),
    "translator": lambda: TransformerDecoder(WORDS, memory_dim=MEMORY, **SMALL),
    "translator_window": lambda: TransformerDecoder(WORDS, memory_dim=MEMORY, window=2, kv_heads=1, **SMALL),
}
every_stack = pytest.mark.parametrize("name", STACKS)
some_lengths = st.lists(st.integers(1, 12), min_size=1, max_size=7) | st.integers(1, 4).map(lambda n: [n] * 4)


def draw(name: str, lengths: list[int], seed: int) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The stack, sequences of these lengths, and memories of other lengths."""
    torch.manual_seed(seed)
    stack = STACKS[name]().double()
    words = [torch.randint(0, WORDS, (n,)) for n in lengths]
    memories = [torch.randn(int(torch.randint(1, 9, ())), MEMORY, dtype=torch.float64) for _ in lengths]
    return stack, words, memories if "translator" in name else []


def packed(words: list[torch.Tensor], memories: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    row, lengths = pack(words)
    if not memories:
        return row, {"segments": lengths}
    memory, sizes = pack(memories)
    return row, {"segments": lengths, "memory": memory, "memory_segments": sizes}


@pytest.fixture(params=["many groups", "one group"])
def _grouping(request, monkeypatch):
    """Sequences here are so short that all of them would go into one group."""
    if request.param == "many groups":
        monkeypatch.setattr("probllm.nn.packing._SLACK", 0)


@every_stack
@pytest.mark.usefixtures("_grouping")
def test_packed_is_separate_in_states_and_gradients(name):
    @given(lengths=some_lengths, seed=st.integers(0, 99))
    def check(lengths, seed):
        stack, words, memories = draw(name, lengths, seed)
        row, keywords = packed(words, memories)
        together = stack(row, **keywords)
        assert together.shape == (1, sum(lengths), 8)
        apart = torch.cat(
            [stack(w[None], **({"memory": memories[i][None]} if memories else {})) for i, w in enumerate(words)], 1
        )
        torch.testing.assert_close(together, apart)
        slopes = []
        for states in (together, apart):
            total = (states * torch.arange(states.numel()).view_as(states)).sum()
            slopes.append(torch.autograd.grad(total, list(stack.parameters())))
        torch.testing.assert_close(*slopes)
        blocks = functional_call(stack, {}, (row,), keywords)
        weights = dict(stack.named_parameters())
        traced = grad(lambda w: functional_call(stack, w, (row,), keywords).pow(2).sum())(weights)
        expected = torch.autograd.grad(blocks.pow(2).sum(), list(weights.values()))
        torch.testing.assert_close([traced[k] for k in weights], list(expected))

    check()


@pytest.mark.parametrize("name", ["encoder", "decoder", "translator"])
def test_a_packed_row_compiles_as_one_graph(name):
    stack, words, memories = draw(name, [3, 5, 1], 0)
    row, keywords = packed(words, memories)
    expected = stack(row, **keywords)
    stack.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(stack(row, **keywords), expected)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_filling_up_wastes_little(lengths):
    packing = Packing(torch.tensor(lengths), sum(lengths))
    q = torch.zeros(1, sum(lengths), 1, 1)
    packing.attend(q, q, q, True)
    groups = packing._plan.groups
    assert sum(g.rows for g in groups) == len(lengths)
    cost = sum(g.rows * g.queries * g.keys for g in groups)
    assert cost <= 1.3 * sum(n * n for n in lengths) + 2048 * len(groups)


def test_learned_positions_are_as_many_as_the_longest_sequence_needs():
    stack, _, _ = draw("decoder_learned", [3], 0)
    stack(torch.ones(1, 30, dtype=torch.long), segments=torch.tensor([12, 6, 12]))
    with pytest.raises(ValueError, match="length 13; expected at most max_length = 12"):
        stack(torch.ones(1, 30, dtype=torch.long), segments=torch.tensor([5, 13, 12]))


@given(lengths=some_lengths)
def test_unpack_undoes_pack(lengths):
    sequences = [torch.randn(n, 2) for n in lengths]
    row, sizes = pack(sequences)
    assert sizes.tolist() == lengths
    assert all(torch.equal(a, b) for a, b in zip(unpack(row, sizes), sequences, strict=True))


def test_documents_numbered_in_rows_are_segments_of_one_row():
    documents = torch.tensor([[7, 7, 7, 2, 2], [2, 2, 5, 5, 7]])
    assert segment_lengths(documents).tolist() == [3, 2, 2, 2, 1]
    stack, _, _ = draw("decoder", [1], 0)
    words = torch.randint(0, WORDS, (2, 5))
    states = stack(words.view(1, -1), segments=segment_lengths(documents)).view(2, 5, -1)
    torch.testing.assert_close(states[1, 2:4], stack(words[1:2, 2:4])[0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"segments": torch.tensor([2, 3])}, "segments is .* add up to 4"),
        ({"segments": torch.tensor([4, 0])}, "at least 1"),
        ({"segments": torch.tensor([[4]])}, "segments is shape"),
        ({"segments": [4]}, "segments is list"),
        ({"segments": torch.tensor([4]), "mask": torch.ones(1, 4, dtype=torch.bool)}, "with a mask"),
        ({"segments": torch.tensor([4]), "memory_segments": None}, "memory_segments is None"),
        ({"segments": torch.tensor([1, 3])}, "memory_segments has 1 sequences; expected 2"),
        ({"memory_segments": torch.tensor([4])}, "without segments"),
        ({"words": torch.ones(2, 4, dtype=torch.long), "segments": torch.tensor([4])}, "inputs has 2 rows"),
    ],
)
def test_bad_segments_raise_by_name(keywords, message):
    stack, _, _ = draw("translator", [1], 0)
    given = {"memory": torch.zeros(1, 3, MEMORY).double(), "memory_segments": torch.tensor([3]), **keywords}
    words = given.pop("words", torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        stack(words, **given)
