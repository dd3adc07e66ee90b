"""Dropout (Srivastava et al. 2014) whose mask costs little on a CPU.

Torch draws a number for each unit, which takes longer than the layer that it follows. Here one draw of 64 bits serves
four units: a unit is dropped where its 16 bits are below the probability's first 16. What remains is divided by exactly
the share that remains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from probllm.nn.encoder import in_transform

_STEPS = 1 << 16


class Dropout(nn.Dropout):
    """As ``torch.nn.Dropout``; on a CPU ``p`` is rounded to a multiple of 1 / 65,536."""

    def forward(self, states: Tensor) -> Tensor:
        """States of the same shape, some of them 0 in training."""
        if not (self.training and self.p):
            return states
        steps = round(self.p * _STEPS)
        traced = torch.compiler.is_compiling() or in_transform(states)
        if traced or states.device.type != "cpu" or self.inplace or not 0 < steps < _STEPS:
            return super().forward(states)
        bits = torch.empty(-(-states.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
        kept = bits.view(torch.int16)[: states.numel()].view(states.shape) >= steps - _STEPS // 2
        return states * kept.to(states.dtype).mul_(_STEPS / (_STEPS - steps))
