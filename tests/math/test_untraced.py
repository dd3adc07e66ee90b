"""torch.compile leaves compiled kernels alone, and importing them does not load it."""

import subprocess
import sys

import torch

from probllm.distributions import LinearChainCRF


def test_a_compiled_function_breaks_its_graph_at_the_law_and_gives_the_same() -> None:
    tags = torch.tensor([[0, 1, 2], [3, 0, 1]])

    def loss(emissions: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
        return -LinearChainCRF(2 * emissions, transitions).log_prob(tags).sum()

    scores = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    plain = torch.autograd.grad(loss(*scores), scores)
    compiled = torch.autograd.grad(torch.compile(loss, backend="eager")(*scores), scores)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_summing_a_chain_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from probllm.math.chain import log_partition\n"
        "log_partition(torch.randn(2, 3, 4), torch.randn(4, 4))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
