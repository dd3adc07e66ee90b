"""Embeddings against what their formulas say, one word at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import CharacterCNN, FeatureEmbedding, VectorInputs, WordEmbedding, WordRepresentation
from probllm.nn.embeddings import distinct_rows


def test_word_dropout_gives_the_unknown_word_at_its_rate_in_training_only():
    embedding = WordEmbedding(50, 4, word_dropout=0.3, unknown=2)
    words = torch.full((100, 100), 7)
    unknown = (embedding(words) == embedding.weight[2]).all(-1)
    assert ((embedding(words) == embedding.weight[7]).all(-1) | unknown).any()
    assert abs(unknown.double().mean() - 0.3) < 0.025  # 5 standard deviations
    assert (embedding.eval()(words) == embedding.weight[7]).all()


@given(width=st.integers(1, 5), length=st.integers(1, 6), padding=st.integers(0, 4), seed=st.integers(0, 99))
def test_character_cnn_is_the_maximum_over_windows(width, length, padding, seed):
    torch.manual_seed(seed)
    encoder = CharacterCNN(9, 3, filters=4, widths=(width,)).double()
    word = torch.randint(1, 9, (length,))
    padded = F.pad(word, (0, padding)).view(1, 1, -1)
    convolution = encoder.convolutions[0]
    zeros = torch.zeros(width, 3, dtype=torch.float64)
    around = torch.cat([zeros, encoder.embedding[word], zeros])
    windows = [around[i + width - (width - 1) // 2 :][:width] for i in range(length)]
    scores = torch.stack([F.relu((convolution.weight * w.T).sum((1, 2)) + convolution.bias) for w in windows])
    torch.testing.assert_close(encoder(padded)[0, 0], scores.amax(0))


@given(data=st.data())
def test_computing_distinct_words_once_changes_neither_states_nor_gradients(data):
    batch, length, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    encoder = CharacterCNN(3, 3, filters=2).double()
    characters = torch.randint(0, 3, (batch, length, size))
    once, plain = encoder(characters), encoder.compose(characters.flatten(0, 1)).view(batch, length, -1)
    torch.testing.assert_close(once, plain)
    weights = torch.randn_like(once)
    slopes = [torch.autograd.grad((s * weights).sum(), list(encoder.parameters())) for s in (once, plain)]
    torch.testing.assert_close(*slopes)


@given(rows=st.lists(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), min_size=1, max_size=9))
def test_distinct_rows_put_back_give_the_rows(rows):
    rows = torch.tensor(rows + rows[:2])
    distinct, which = distinct_rows(rows)
    assert torch.equal(distinct[which], rows)
    assert len(distinct) == len({tuple(row) for row in rows.tolist()})


def test_distinct_rows_survive_a_collision(monkeypatch):
    monkeypatch.setattr("probllm.nn.embeddings._scattered", lambda count, device: torch.zeros(count, dtype=torch.long))
    rows = torch.tensor([[1, 2], [2, 1], [1, 2]])
    distinct, which = distinct_rows(rows)
    assert len(distinct) == 2
    assert torch.equal(distinct[which], rows)


def test_words_without_characters_are_zero():
    encoder = CharacterCNN(5, 3, 2)
    assert not encoder(torch.zeros(2, 3, 4, dtype=torch.long)).any()
    assert encoder(torch.zeros(2, 3, 0, dtype=torch.long)).shape == (2, 3, 2)


@pytest.mark.parametrize("sparse", [False, True])
@given(data=st.data())
def test_features_sum_their_vectors_in_any_order(sparse, data):
    ids = data.draw(st.lists(st.integers(1, 11), max_size=6))
    encoder = FeatureEmbedding(12, 3, sparse=sparse).double()
    zeros = data.draw(st.integers(1, 3))
    shuffled = data.draw(st.permutations(ids + [0] * zeros))
    state = encoder(torch.tensor([[shuffled]]))[0, 0]
    torch.testing.assert_close(state, sum((encoder.weight[i] for i in ids), torch.zeros(3).double()))
    state.sum().backward()
    gradient = encoder.weight.grad
    assert gradient.is_sparse == sparse
    counts = torch.bincount(torch.tensor([*ids, 0])[:-1], minlength=12).double()
    torch.testing.assert_close(gradient.to_dense() if sparse else gradient, counts[:, None].expand(12, 3))


def test_parts_stand_side_by_side():
    parts = [WordEmbedding(5, 2), FeatureEmbedding(6, 3)]
    both = WordRepresentation(parts)
    inputs = {"words": torch.tensor([[1, 2]]), "features": torch.tensor([[[1, 2], [3, 0]]])}
    assert both.dim == 5
    assert torch.equal(both(inputs), torch.cat([part(inputs) for part in parts], -1))


def test_a_part_must_be_an_encoder():
    with pytest.raises(TypeError, match=r"parts\[0\] is a Linear"):
        WordRepresentation([torch.nn.Linear(1, 1)])


def test_vectors_of_a_wrong_size_or_dtype_are_refused():
    with pytest.raises(ValueError, match="vectors has shape"):
        VectorInputs(3)(torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="vectors has dtype"):
        VectorInputs(3)(torch.zeros(1, 2, 3, dtype=torch.long))
