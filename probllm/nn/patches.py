"""A picture as a sequence: square patches, each projected to a vector, and a Transformer over them.

Source: Dosovitskiy et al. (2021), section 3.1, with a learned vector for each place. Pooling belongs to the model: a
class token is an option.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probllm.nn.encoder import Encoder, Inputs, check_mask, check_positive, pick, zero_padding
from probllm.nn.norms import Norm
from probllm.nn.transformer import TransformerEncoder
from probllm.nn.transformer_layer import Activation


class PatchEmbedding(Encoder):
    """Each patch projected to a vector, plus the learned vector of its place: ``length`` positions.

    Args:
        image_size: height and width in pixels, or one number for both; multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        channels: channels of the pictures.
        dim: size of a vector.
        key: entry of a dict of inputs to read.
        class_token: put a learned vector with a place of its own before the patches, at position 0.
        bias: whether the projection of a patch has a bias.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        channels: int = 1,
        dim: int = 128,
        key: str = "image",
        class_token: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_positive(image_size=height, patch_size=patch_size, channels=channels, dim=dim)
        check_positive(image_size=width)
        if height % patch_size or width % patch_size:
            raise ValueError(f"image_size is {height}×{width}; expected multiples of patch_size, {patch_size}")
        self.dim, self.key = dim, key
        self.shape = (channels, height, width)
        self.length = (height // patch_size) * (width // patch_size) + class_token
        self.convolution = nn.Conv2d(channels, dim, patch_size, stride=patch_size, bias=bias)
        self.class_token = nn.Parameter(torch.randn(dim) / dim**0.5) if class_token else None
        self.places = nn.Parameter(torch.randn(self.length, dim) / dim**0.5)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, length, dim]``, row by row, from pictures ``[B, channels, height, width]``.

        A mask is ``[B, length]``; where there is a class token, its own entry comes first.
        """
        pictures = pick(inputs, self.key)
        if not pictures.is_floating_point():
            raise TypeError(f"{self.key} has dtype {pictures.dtype}; expected a floating dtype")
        if pictures.shape[1:] != self.shape:
            raise ValueError(f"{self.key} has shape {list(pictures.shape)}; expected [batch, *{list(self.shape)}]")
        patches = self.convolution(pictures).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            patches = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], 1)
        check_mask(mask, patches.shape[:2])
        return zero_padding(patches + self.places, mask)


class PatchEncoder(TransformerEncoder):
    """A Transformer over the patches of a picture: ``[B, C, H, W] -> [B, length, dim]``.

    A mask ``[B, length]`` drops patches; those that stay keep their places. A class token is position 0 of the
    states and of the mask.

    Args:
        image_size, patch_size, channels: as in ``PatchEmbedding``.
        dim, layers, heads, kv_heads, feedforward, norm, activation, dropout, attention_dropout, norm_eps,
            embedding_norm: as in ``TransformerEncoder``.
        class_token: as in ``PatchEmbedding``.
        patch_bias: whether the projection of a patch has a bias.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        channels: int = 1,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        feedforward: int | None = None,
        norm: Norm = "layer",
        activation: Activation = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        class_token: bool = False,
        patch_bias: bool = True,
        norm_eps: float | None = None,
        embedding_norm: bool = False,
    ) -> None:
        embedding = PatchEmbedding(image_size, patch_size, channels, dim, class_token=class_token, bias=patch_bias)
        super().__init__(
            embedding,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            feedforward=feedforward,
            norm=norm,
            positions="none",
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            norm_eps=norm_eps,
            embedding_norm=embedding_norm,
        )
        self.length = embedding.length
