"""The design of nanoGPT, for the benchmarks: learned positions, LayerNorm before each part, GELU, a tied output layer.

Own code after the design of github.com/karpathy/nanoGPT; the loop that generates has a cache, which theirs has not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind its norm."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.gelu, self.out = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(D, dim=2)
        q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in (q, k, v))
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        rate = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1, dropout_p=rate)
        x = x + self.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, L, D)))
        return x + self.dropout(self.out(self.gelu(self.c_fc(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """A language model over ``vocabulary`` tokens that sees ``length`` of them."""

    def __init__(
        self, vocabulary: int, length: int, dim: int = 256, layers: int = 4, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.drop, self.h = nn.Dropout(dropout), nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("c_proj.weight", "out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def states(self, words: Tensor, start: int = 0, past: list[list[Tensor]] | None = None) -> Tensor:
        x = self.drop(self.wte(words) + self.wpe(torch.arange(start, start + words.shape[1])))
        for i, block in enumerate(self.h):
            x = block(x, None if past is None else past[i])
        return self.ln_f(x)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(self.states(words)).flatten(0, 1), targets.flatten())

    def generate(self, words: Tensor, count: int) -> Tensor:
        """``count`` tokens behind the given ones, the most probable ones."""
        past: list[list[Tensor]] = [[] for _ in self.h]
        result, start = [words], 0
        for _ in range(count):
            states = self.states(words, start, past)
            start += words.shape[1]
            words = self.lm_head(states[:, -1:]).argmax(-1)
            result.append(words)
        return torch.cat(result, 1)


def optimiser(model: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW as nanoGPT sets it for characters: decay on matrices alone, beta2 = 0.99."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.99), fused=True)
