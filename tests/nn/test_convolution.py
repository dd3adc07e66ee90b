"""The convolutional encoder sees exactly as far as its dilations reach."""

import pytest
import torch

from probllm.nn import ConvolutionEncoder, VectorInputs


@pytest.mark.parametrize(
    ("width", "dilations", "causal", "before", "after"),
    [(3, (1, 2, 4), False, 7, 7), (5, (1, 2), False, 6, 6), (1, (1,), False, 0, 0), (2, (1, 2, 4), True, 7, 0)],
)
def test_a_state_depends_on_what_the_dilations_reach(width, dilations, causal, before, after):
    encoder = ConvolutionEncoder(VectorInputs(2), 6, width, dilations, causal).double()
    vectors = torch.randn(1, 21, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(encoder(vectors)[0, 10].pow(2).sum(), vectors)
    seen = slope[0].abs().sum(-1).nonzero().flatten()
    assert (seen.min(), seen.max()) == (10 - before, 10 + after)


def test_a_convolution_without_dilations_is_its_residual_layer():
    encoder = ConvolutionEncoder(VectorInputs(4), 4, width=1, dilations=(1,)).double()
    vectors = torch.randn(2, 3, 4, dtype=torch.float64)
    x = encoder.project(vectors)
    w, b = encoder.convolutions[0].weight[..., 0], encoder.convolutions[0].bias
    expected = x + torch.nn.functional.gelu(encoder.norms[0](x) @ w.T + b)
    torch.testing.assert_close(encoder(vectors), expected)
