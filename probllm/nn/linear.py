"""Linear layers, fast too where a few rows are read at a time, as in writing text token by token on a CPU.

There the time goes into reading the weights from memory, and the general matrix product reads them slowly: for one row
of 256 and 8,192 outputs it takes about three times as long as ``kernels.few_rows``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from probllm.math.kernels.few_rows import CHUNK, times_transposed
from probllm.math.kernels.threads import run_shares

MOST_ROWS, LEAST_SIZE = 8, 1 << 14  # beyond and below, torch is as fast
_NO_BIAS = np.zeros(1, np.float32)


class Linear(nn.Linear):
    """As ``torch.nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as ``torch.nn.functional.linear``: ``[..., N]`` of x ``[..., K]``, weight ``[N, K]``, bias ``[N]``."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_small(x, weight):
        return F.linear(x, weight, bias)
    outer, inner = weight.shape
    found = torch.empty(*x.shape[:-1], outer)
    arguments = (
        x.numpy().reshape(-1, inner), weight.detach().numpy(), _NO_BIAS if bias is None else bias.detach().numpy(),
        found.numpy().reshape(-1, outer),
    )  # fmt: skip
    run_shares(times_transposed, arguments, -(-outer // CHUNK), weight.numel() * (0.14 + 0.04 * (x.numel() // inner)))
    return found


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel does it, and faster."""
    inner = weight.shape[-1]
    return (
        0 < x.numel() <= MOST_ROWS * inner
        and weight.numel() >= LEAST_SIZE
        and is_plain(x)
        and x.shape[-1] == inner
        and weight.dtype is torch.float32
        and weight.is_cpu
        and weight.is_contiguous()
        and type(weight) in (nn.Parameter, Tensor)
    )


def is_plain(*inputs: Tensor) -> bool:
    """Whether they are float32 on the CPU, in none of torch's transforms, and without a gradient of their own."""
    if (
        torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    return all(x.dtype is torch.float32 and x.is_cpu and type(x) is Tensor and not x.requires_grad for x in inputs)
