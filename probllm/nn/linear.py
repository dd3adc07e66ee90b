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

from probllm.math.kernels import few_rows as kernels
from probllm.math.kernels.threads import SMALL, run_shares

MOST_ROWS, LEAST_SIZE = 8, 1 << 14  # beyond and below, torch is as fast
_NO_BIAS = np.zeros(1, np.float32)


class Linear(nn.Linear):
    """As ``torch.nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as ``torch.nn.functional.linear``: ``[..., N]`` of x ``[..., K]``, weight ``[N, K]``, bias ``[N]``."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_small(x, weight, bias):
        return F.linear(x, weight, bias)
    outer, inner = weight.shape
    found = torch.empty(*x.shape[:-1], outer)
    arguments = (
        x.contiguous().numpy().reshape(-1, inner), *_arrays(weight, bias), found.numpy().reshape(-1, outer)
    )  # fmt: skip
    run_shares(kernels.times_transposed, arguments, -(-outer // kernels.CHUNK), _nanoseconds(x, weight))
    return found


def perceptron(x: Tensor, first: Linear, second: Linear, activation: str) -> Tensor | None:
    """second(a(first(x))) for GELU and ReLU, if it is done as fast by one kernel; else None."""
    if activation not in ("gelu", "relu") or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not all(
        type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in (first, second)
    ):
        return None  # someone looks at the layers or changes them
    if not _is_small(x, first.weight, first.bias) or not _is_readable(second.weight, second.bias):
        return None
    if _nanoseconds(x, first.weight) > SMALL:
        return None
    (hidden, inner), outer = first.weight.shape, len(second.weight)
    found, rows = torch.empty(*x.shape[:-1], outer), x.numel() // inner
    kernels.perceptron(
        x.contiguous().numpy().reshape(rows, inner), *_arrays(first.weight, first.bias), activation == "gelu",
        *_arrays(second.weight, second.bias), np.empty((rows, hidden), np.float32), found.numpy().reshape(rows, outer),
    )  # fmt: skip
    return found


def _arrays(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    return weight.detach().numpy(), _NO_BIAS if bias is None else bias.detach().numpy()


def _nanoseconds(x: Tensor, weight: Tensor) -> float:
    return weight.numel() * (0.14 + 0.04 * (x.numel() // weight.shape[-1]))


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel does it, and faster."""
    inner = weight.shape[-1]
    return (
        0 < x.numel() <= MOST_ROWS * inner
        and weight.numel() >= LEAST_SIZE
        and is_plain(x)
        and x.shape[-1] == inner
        and _is_readable(weight, bias)
    )


def _is_readable(*weights: Tensor | None) -> bool:
    """Whether the kernels can read them where they lie."""
    return all(
        x is None or (x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and type(x) in (nn.Parameter, Tensor))
        for x in weights
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
