"""Words from subwords: one vector a word, whatever the padding of either."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import RecurrentEncoder, SubwordPooling, TransformerEncoder, from_config, pool_subwords, to_config


@st.composite
def sentences(draw):
    """Pieces per word of each sentence; 0 is a word that was cut off."""
    return draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3))


def indices(sentence: list[int], padding: int = 0) -> list[int]:
    """A special token, each word's pieces, a special token, padding."""
    return [-1, *(w for w, n in enumerate(sentence) for _ in range(n)), -1] + [-1] * padding


@pytest.mark.parametrize("pooling", ["first", "mean"])
@given(batch=sentences(), extra=st.integers(0, 2))
def test_a_word_is_the_first_or_the_mean_of_its_pieces(pooling, batch, extra):
    size = max(sum(s) for s in batch) + 2
    word_index = torch.tensor([indices(s, size - sum(s) - 2) for s in batch])
    length = max(len(s) for s in batch) + extra
    states = torch.randn(*word_index.shape, 3, dtype=torch.float64)
    words = pool_subwords(states, word_index, length, pooling)
    assert words.shape == (len(batch), length, 3)
    for b in range(len(batch)):
        for w in range(length):
            pieces = states[b, word_index[b] == w]
            expected = torch.zeros(3, dtype=torch.float64)
            if len(pieces):
                expected = pieces[0] if pooling == "first" else pieces.mean(0)
            torch.testing.assert_close(words[b, w], expected)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@given(batch=sentences())
def test_padding_of_words_and_subwords_changes_nothing(pooling, batch):
    torch.manual_seed(0)
    inner = TransformerEncoder(9, dim=8, layers=1, dropout=0.0)
    encoder = SubwordPooling(inner, pooling).double()
    size = max(sum(s) for s in batch) + 3
    word_index = torch.tensor([indices(s, size - sum(s) - 2) for s in batch])
    subwords = torch.randint(0, 9, word_index.shape)
    real = torch.arange(size) < torch.tensor([sum(s) + 2 for s in batch])[:, None]
    length = max(len(s) for s in batch) + 1
    mask = torch.arange(length) < torch.tensor([len(s) for s in batch])[:, None]
    words = encoder({"subwords": subwords, "word_index": word_index, "subword_mask": real}, mask)
    assert not words[~mask].any()
    for b, sentence in enumerate(batch):
        n = sum(sentence) + 2
        alone = {"subwords": subwords[b : b + 1, :n], "word_index": word_index[b : b + 1, :n]}
        alone["subword_mask"] = real[b : b + 1, :n]
        expected = encoder(alone, torch.ones(1, len(sentence), dtype=torch.bool))
        torch.testing.assert_close(words[b, mask[b]], expected[0])


def test_without_a_mask_there_are_as_many_words_as_indices():
    encoder = SubwordPooling(RecurrentEncoder(9, hidden=4))
    inputs = {"subwords": torch.tensor([[1, 2, 3], [4, 0, 0]]), "word_index": torch.tensor([[0, 0, 1], [0, -1, -1]])}
    words = encoder(inputs)
    assert words.shape == (2, 2, encoder.dim)
    assert not words[1, 1].any()
    again = from_config(to_config(encoder))
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(inputs), words)


@pytest.mark.parametrize(
    ("word_index", "error", "message"),
    [
        (torch.tensor([[0, 3]]), ValueError, "word_index has ids from 0 to 3; expected ids from 0 to 1"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "word_index has dtype"),
        (torch.tensor([[0, 1, 1]]), ValueError, "word_index has shape"),
    ],
)
def test_bad_indices_raise_by_name(word_index, error, message):
    with pytest.raises(error, match=message):
        pool_subwords(torch.zeros(1, 2, 3), word_index, 2)
    with pytest.raises(TypeError, match="expected a dict"):
        SubwordPooling(RecurrentEncoder(9, hidden=4))(torch.zeros(1, 2, dtype=torch.long))
