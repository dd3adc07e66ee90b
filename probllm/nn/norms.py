"""The norms of the layers: LayerNorm (Ba et al., 2016) and RMSNorm (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer", "rms"]


class RMSNorm(nn.RMSNorm):
    """torch's, with its scale in the precision of what it reads: beside one of another torch has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(norm: Norm, dim: int, eps: float | None = None, bias: bool = True) -> nn.Module:
    """LayerNorm (``"layer"``) or RMSNorm (``"rms"``) of vectors of ``dim``."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm is {norm!r}; expected 'layer' or 'rms'")
    if norm == "layer":
        return nn.LayerNorm(dim, eps=1e-5 if eps is None else eps, bias=bias)
    return RMSNorm(dim, eps=1e-6 if eps is None else eps)
