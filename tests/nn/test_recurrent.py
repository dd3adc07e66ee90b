"""Recurrent encoders against torch's own: packed sequences, its gates, its weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from probllm.nn import RecurrentEncoder, VectorInputs
from probllm.nn.recurrent import _step_by_step

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), layers=st.integers(1, 2))
def test_states_are_those_of_packed_sequences(cell, bidirectional, lengths, layers):
    encoder = RecurrentEncoder(VectorInputs(3), 4, layers, cell, bidirectional).double()
    peer = CELLS[cell](3, 4, layers, batch_first=True, bidirectional=bidirectional).double()
    for i in range(layers):
        for suffix, ours in (("", encoder.forwards), ("_reverse", encoder.backwards)):
            if ours is not None:
                for name, weight in ours[i].named_parameters():
                    getattr(peer, name.replace("_l0", f"_l{i}{suffix}")).data.copy_(weight)
    size = max(lengths) + 1
    vectors = torch.randn(len(lengths), size, 3, dtype=torch.float64)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    packed = pack_padded_sequence(vectors, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(peer(packed)[0], batch_first=True, total_length=size)
    torch.testing.assert_close(encoder(vectors, mask), expected)


@pytest.mark.parametrize("cell", CELLS)
@given(batch=st.integers(1, 3), length=st.integers(1, 5))
def test_step_by_step_is_the_fused_recurrence(cell, batch, length):
    layer = CELLS[cell](3, 4, batch_first=True).double()
    vectors = torch.randn(batch, length, 3, dtype=torch.float64)
    torch.testing.assert_close(_step_by_step(cell, layer, vectors)[0], layer(vectors)[0])


def test_dropout_drops_the_same_units_at_all_positions_of_a_row():
    encoder = RecurrentEncoder(VectorInputs(3), hidden=50, dropout=0.5)
    states = encoder(torch.randn(4, 6, 3))
    dropped = states == 0
    assert (dropped == dropped[:, :1]).all()
    assert (dropped[0, 0] != dropped[1, 0]).any()
    assert 0.3 < dropped.double().mean() < 0.7
    assert not (encoder.eval()(torch.randn(4, 6, 3)) == 0).any()


def test_the_forget_gate_starts_open():
    layer = RecurrentEncoder(VectorInputs(3), hidden=5).forwards[0]
    assert torch.equal((layer.bias_ih_l0 + layer.bias_hh_l0).view(4, 5).sum(1), torch.tensor([0.0, 5.0, 0.0, 0.0]))


def test_long_sequences_stay_finite():
    encoder = RecurrentEncoder(VectorInputs(3), hidden=4, layers=2)
    states = encoder(100 * torch.randn(1, 3000, 3))
    states.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
