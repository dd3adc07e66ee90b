"""CLIP (Radford et al., 2021): a text and a picture as vectors of one space, compared by their cosine.

The text's vector is a projection of a causal Transformer's state at the end token, the picture's of the class token's
state in a Transformer over patches: ``logits = exp(scale) · cos(A h_picture, B h_text)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from probllm.nn.embeddings import WordEmbedding
from probllm.nn.patches import PatchEncoder
from probllm.nn.pretrained.checkpoint import (
    Weight,
    check_options,
    load,
    read_config,
    read_tensors,
    translate,
    translate_back,
    unload,
    write_checkpoint,
)
from probllm.nn.pretrained.vit import read_patch_size
from probllm.nn.transformer import TransformerEncoder

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip
# What a config need not say.
_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0, "eos_token_id": 49407,
}  # fmt: skip
_IMAGE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}  # fmt: skip
# Configs of old say 2 whatever the token's id is: it is the highest of all.
_UNKNOWN_END = 2


class CLIP(NamedTuple):
    """Both encoders, and what compares their states.

    Attributes:
        text: a causal encoder of ids.
        image: an encoder of pictures with a class token.
        text_projection: ``[size, text.dim]``.
        image_projection: ``[size, image.dim]``.
        scale: logarithm of what the cosines are multiplied by, ``[]``.
        end: id of the token that ends a text; None where it is the highest id of the text.
        config: the file's ``config.json``.
    """

    text: TransformerEncoder
    image: PatchEncoder
    text_projection: Tensor
    image_projection: Tensor
    scale: Tensor
    end: int | None = None
    config: Mapping[str, Any] = {}

    def text_vectors(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors ``[B, size]`` of length 1 of texts ``[B, L]``, each taken at its first end token.

        Raises:
            ValueError: if a text has none.
        """
        if self.end is not None and not bool((ids == self.end).any(-1).all()):
            raise ValueError(f"ids has a row without the end token, {self.end}")
        last = (ids if self.end is None else (ids == self.end).int()).argmax(-1)
        states = self.text(ids, mask)[torch.arange(len(ids), device=ids.device), last]
        return F.normalize(F.linear(states, self.text_projection), dim=-1)

    def image_vectors(self, pictures: Tensor) -> Tensor:
        """Vectors ``[B, size]`` of length 1 of pictures ``[B, channels, height, width]``."""
        return F.normalize(F.linear(self.image(pictures)[:, 0], self.image_projection), dim=-1)

    def logits(self, pictures: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """How well each picture and each text go together, ``[pictures, texts]``; the mask is that of the texts."""
        return self.scale.exp() * self.image_vectors(pictures) @ self.text_vectors(ids, mask).T


def read_clip(folder: str | Path) -> CLIP:
    """The encoders, projections and scale out of a folder with ``config.json`` and ``model.safetensors``.

    The weights keep the file's dtype. Positions of the text are numbered by the mask: padding on the right is as
    theirs, on the left it shifts nothing.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder holds a pickle only, another family, a corrupt file, a tensor of another shape or one
            that CLIP has not.
    """
    config = read_config(folder, ["clip"])
    texts, images = _settings(config, "text", _TEXT), _settings(config, "vision", _IMAGE)
    end = texts["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"config.json: eos_token_id is {end!r}; expected one id")
    tensors = read_tensors(folder)
    with torch.device("meta"):
        text = TransformerEncoder(
            WordEmbedding(texts["vocab_size"], texts["hidden_size"]),
            positions="learned",
            causal=True,
            max_length=texts["max_position_embeddings"],
            **_shared(texts),
        )
        image = PatchEncoder(
            images["image_size"],
            read_patch_size(images["patch_size"]),
            images["num_channels"],
            class_token=True,
            patch_bias=False,
            embedding_norm=True,
            **_shared(images),
        )
        size = config.get("projection_dim", 512)
        projections = [torch.nn.Linear(encoder.dim, size, bias=False) for encoder in (text, image)]
    load(text, _text_table(text), tensors, "text_model.")
    load(image, _image_table(image), tensors, "vision_model.")
    for projection, name in zip(projections, ("text_projection", "visual_projection"), strict=True):
        load(projection, [Weight("weight", (f"{name}.weight",))], tensors)
    scale = tensors.pop("logit_scale", None)
    if scale is None:
        raise ValueError("the checkpoint lacks the tensor 'logit_scale'")
    if scale.shape:
        raise ValueError(f"the tensor 'logit_scale' has shape {list(scale.shape)}; expected []")
    # Files of old hold the numbers of the positions.
    unknown = sorted(name for name in tensors if not name.endswith(".embeddings.position_ids"))
    if unknown:
        raise ValueError(f"the checkpoint holds the tensor {unknown[0]!r}, which CLIP has not")
    first, second = (projection.weight.data for projection in projections)
    return CLIP(text, image, first, second, scale, None if end == _UNKNOWN_END else end, config)


def write_clip(folder: str | Path, clip: CLIP) -> None:
    """Write what ``read_clip`` reads, so that ``transformers`` reads it as a ``CLIPModel``.

    Raises:
        ValueError: if an encoder has options that CLIP has not, or a projection is of another size; the message names
            the first.
    """
    text, image = clip.text, clip.image
    common: dict[str, Any] = {"kv_heads": None, "norm": "layer"}
    check_options(
        text, "CLIP", **common, positions="learned", causal=True, norm_first=True, window=None, qk_norm=False,
        bias=True, qkv_bias=None, head_dim=None, embedding_norm=False,
    )  # fmt: skip
    check_options(image, "CLIP", **common, class_token=True, patch_bias=False, embedding_norm=True)
    embedding, height_and_width = text.embedding, image.config_arguments["image_size"]
    if type(embedding) is not WordEmbedding or embedding.dim != text.dim:
        raise ValueError(
            f"embedding is a {type(embedding).__name__} of dim {embedding.dim}; a CLIP checkpoint has a WordEmbedding "
            f"of dim {text.dim}"
        )
    sides = {height_and_width} if isinstance(height_and_width, int) else set(height_and_width)
    if len(sides) != 1:
        raise ValueError(f"image_size is {height_and_width}; a CLIP checkpoint has square pictures")
    size = len(clip.text_projection)
    for name, encoder in (("text", text), ("image", image)):
        found = list(getattr(clip, f"{name}_projection").shape)
        if found != [size, encoder.dim]:
            raise ValueError(f"{name}_projection has shape {found}; expected {[size, encoder.dim]}")
    if clip.end == _UNKNOWN_END:
        raise ValueError(f"end is {clip.end}, which CLIP checkpoints write where the end is the highest id")
    old = {name: _settings(clip.config, name, {}) for name in ("text", "vision")}
    config: dict[str, Any] = {
        "architectures": ["CLIPModel"],
        **{name: value for name, value in clip.config.items() if not name.endswith("_config_dict")},
        "model_type": "clip",
        "projection_dim": size,
        "text_config": {
            **_shared_back(text, old["text"]),
            "eos_token_id": _UNKNOWN_END if clip.end is None else clip.end,
            "max_position_embeddings": text.max_length,
            "model_type": "clip_text_model",
            "vocab_size": embedding.vocabulary_size,
        },
        "vision_config": {
            **_shared_back(image, old["vision"]),
            "image_size": sides.pop(),
            "model_type": "clip_vision_model",
            "num_channels": image.config_arguments["channels"],
            "patch_size": image.config_arguments["patch_size"],
        },
    }
    tensors = {
        **unload(text, _text_table(text), "text_model."),
        **unload(image, _image_table(image), "vision_model."),
        "text_projection.weight": clip.text_projection,
        "visual_projection.weight": clip.image_projection,
        "logit_scale": clip.scale,
    }
    write_checkpoint(folder, config, tensors)


def _settings(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    # Where a file of old has both, the one of the longer name holds.
    given = config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
    return {**defaults, **given}


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dim": settings["hidden_size"],
        "layers": settings["num_hidden_layers"],
        "heads": settings["num_attention_heads"],
        "feedforward": settings["intermediate_size"],
        "activation": translate("hidden_act", settings["hidden_act"], _ACTIVATIONS),
        "dropout": 0.0,
        "attention_dropout": settings["attention_dropout"],
        "norm_eps": settings["layer_norm_eps"],
    }


def _shared_back(encoder: TransformerEncoder, old: Mapping[str, Any]) -> dict[str, Any]:
    options = encoder.config_arguments
    return {
        **old,
        "attention_dropout": options["attention_dropout"],
        "hidden_act": translate_back("activation", options["activation"], _ACTIVATIONS, "CLIP", old.get("hidden_act")),
        "hidden_size": encoder.dim,
        "intermediate_size": 4 * encoder.dim if options["feedforward"] is None else options["feedforward"],
        "layer_norm_eps": 1e-5 if options["norm_eps"] is None else options["norm_eps"],
        "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"],
    }


def _text_table(encoder: TransformerEncoder) -> list[Weight]:
    return [
        Weight("embedding.weight", ("embeddings.token_embedding.weight",)),
        Weight("position_table", ("embeddings.position_embedding.weight",)),
        *_layers(encoder, {"norm": "final_layer_norm"}),
    ]


def _image_table(encoder: PatchEncoder) -> list[Weight]:
    return [
        Weight("embedding.class_token", ("embeddings.class_embedding",)),
        Weight("embedding.places", ("embeddings.position_embedding.weight",)),
        Weight("embedding.convolution.weight", ("embeddings.patch_embedding.weight",)),
        *_layers(encoder, {"embedding_norm": "pre_layrnorm", "norm": "post_layernorm"}),
    ]


def _layers(encoder: TransformerEncoder, norms: Mapping[str, str]) -> list[Weight]:
    table = []
    rows = (encoder.dim,) * 3
    for w in ("weight", "bias"):
        table += [Weight(f"{ours}.{w}", (f"{theirs}.{w}",)) for ours, theirs in norms.items()]
        for i in range(len(encoder.layers)):
            ours, theirs = f"layers.{i}", f"encoder.layers.{i}"
            table += [
                Weight(f"{ours}.attention.project.{w}", tuple(f"{theirs}.self_attn.{p}_proj.{w}" for p in "qkv"), rows),
                Weight(f"{ours}.attention.output.{w}", (f"{theirs}.self_attn.out_proj.{w}",)),
                Weight(f"{ours}.attention_norm.{w}", (f"{theirs}.layer_norm1.{w}",)),
                Weight(f"{ours}.feedforward.input.{w}", (f"{theirs}.mlp.fc1.{w}",)),
                Weight(f"{ours}.feedforward.output.{w}", (f"{theirs}.mlp.fc2.{w}",)),
                Weight(f"{ours}.feedforward_norm.{w}", (f"{theirs}.layer_norm2.{w}",)),
            ]
    return table
