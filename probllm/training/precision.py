"""Whether bfloat16 pays."""

from __future__ import annotations

import torch


def fast_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether a device multiplies matrices faster in bfloat16 than in float32, so that ``mixed_precision`` saves time.

    A GPU does that trains in bfloat16 at all, and a CPU with instructions for it (AVX512-BF16, AMX).
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # named so in torch; without them the answer is no
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(check()) for check in checks if check is not None)
