"""The feed-forward encoder is a perceptron on the window around each position."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from probllm.nn import FeedForwardEncoder, VectorInputs


@given(length=st.integers(1, 6), window=st.integers(0, 3), layers=st.integers(1, 3))
def test_a_state_is_the_perceptron_of_its_window(length, window, layers):
    encoder = FeedForwardEncoder(VectorInputs(2), hidden=4, layers=layers, window=window).double()
    vectors = torch.randn(1, length, 2, dtype=torch.float64)
    states = encoder(vectors)[0]
    for t in range(length):
        seen = [vectors[0, i] if 0 <= i < length else torch.zeros(2) for i in range(t - window, t + window + 1)]
        expected = torch.cat(seen).double()
        for layer in encoder.layers:
            expected = F.gelu(layer(expected))
        torch.testing.assert_close(states[t], expected)
