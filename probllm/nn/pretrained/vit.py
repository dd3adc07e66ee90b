"""ViT (Dosovitskiy et al., 2021): patches behind a class token, learned places, norms first, pooler or classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from probllm.nn.patches import PatchEncoder
from probllm.nn.pretrained.checkpoint import (
    Head,
    Weight,
    check_config,
    check_options,
    load,
    read_config,
    read_tensors,
    translate,
    translate_back,
    unload,
    write_checkpoint,
)

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu",
}  # fmt: skip
_POOLER = [Weight(w, (f"pooler.dense.{w}",)) for w in ("weight", "bias")]
_CLASSIFIER = [Weight(w, (f"classifier.{w}",)) for w in ("weight", "bias")]


def read_vit(folder: str | Path) -> tuple[PatchEncoder, Head]:
    """An encoder of pictures and its head out of a folder with ``config.json`` and ``model.safetensors``.

    Position 0 of the states is the class token's. The head's ``logits(states[:, 0])`` are those of the labels, if the
    file holds a classifier (``head.present``), and ``head.pooled(states)`` is the pooler's output, if it holds one. The
    weights keep the file's dtype; its ``hidden_dropout_prob`` becomes the encoder's dropout, which drops units within
    the perceptrons as well.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder holds a pickle only, another family, a corrupt file or a tensor of another shape.
    """
    config = read_config(folder, ["vit"])
    check_config(config, "ViT", qkv_bias=True)
    tensors = read_tensors(folder)
    prefix = "vit." if any(name.startswith("vit.") for name in tensors) else ""
    dim = config["hidden_size"]
    with torch.device("meta"):
        encoder = PatchEncoder(
            config.get("image_size", 224),
            read_patch_size(config.get("patch_size", 16)),
            config.get("num_channels", 3),
            dim=dim,
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            feedforward=config["intermediate_size"],
            activation=translate("hidden_act", config.get("hidden_act", "gelu"), _ACTIVATIONS),  # type: ignore[arg-type]
            dropout=config.get("hidden_dropout_prob", 0.0),
            attention_dropout=config.get("attention_probs_dropout_prob", 0.0),
            class_token=True,
            norm_eps=config.get("layer_norm_eps", 1e-12),
        )
        pooler = nn.Linear(dim, config.get("pooler_output_size") or dim)
        classifier = nn.Linear(dim, _labels(config))
    load(encoder, _table(encoder), tensors, prefix)
    head = Head(config=config, prefix=prefix, present=any(name.startswith("classifier.") for name in tensors))
    if any(name.startswith(f"{prefix}pooler.") for name in tensors):
        check_config(config, "ViT", pooler_act="tanh")
        load(pooler, _POOLER, tensors, prefix)
        head.pooler = pooler
    if head.present:
        load(classifier, _CLASSIFIER, tensors)
        head.weight, head.bias = classifier.weight.data, classifier.bias.data
    head.extra = tensors
    return encoder, head


def write_vit(folder: str | Path, encoder: PatchEncoder, head: Head | None = None) -> None:
    """Write an encoder, with the head that it was read with or a classifier, so that ``transformers`` reads it.

    Raises:
        ValueError: if the encoder has options that ViT has not (the message names the first), or the head's classifier
            is of another size.
    """
    head = Head(present=False) if head is None else head
    check_options(
        encoder, "ViT", kv_heads=None, norm="layer", class_token=True, patch_bias=True, embedding_norm=False
    )  # fmt: skip
    options = encoder.config_arguments
    config: dict[str, Any] = {
        "architectures": ["ViTModel" if head.weight is None else "ViTForImageClassification"],
        **head.config,
        "model_type": "vit",
        "attention_probs_dropout_prob": options["attention_dropout"],
        "hidden_act": translate_back(
            "activation", options["activation"], _ACTIVATIONS, "ViT", head.config.get("hidden_act")
        ),
        "hidden_dropout_prob": options["dropout"],
        "hidden_size": encoder.dim,
        "image_size": options["image_size"],
        "intermediate_size": 4 * encoder.dim if options["feedforward"] is None else options["feedforward"],
        "layer_norm_eps": 1e-5 if options["norm_eps"] is None else options["norm_eps"],
        "num_attention_heads": options["heads"],
        "num_channels": options["channels"],
        "num_hidden_layers": options["layers"],
        "patch_size": options["patch_size"],
        "qkv_bias": True,
    }
    prefix = head.prefix
    if prefix is None:
        prefix = "" if head.weight is None else "vit."
    tensors = unload(encoder, _table(encoder), prefix)
    if head.pooler is not None:
        config |= {"pooler_act": "tanh", "pooler_output_size": head.pooler.out_features}
        tensors |= unload(head.pooler, _POOLER, prefix)
    if head.weight is not None:
        labels = len(head.weight)
        bias = head.weight.new_zeros(labels) if head.bias is None else head.bias
        if head.weight.shape != (labels, encoder.dim) or bias.shape != (labels,):
            raise ValueError(
                f"the head's weight has shape {list(head.weight.shape)} and its bias {list(bias.shape)}; expected "
                f"[labels, {encoder.dim}] and [labels]"
            )
        tensors |= {"classifier.weight": head.weight, "classifier.bias": bias}
        if _labels(config) != labels:
            config.pop("num_labels", None)
            names = [f"LABEL_{i}" for i in range(labels)]
            config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    write_checkpoint(folder, config, {**tensors, **head.extra})


def read_patch_size(size: int | list[int]) -> int:
    """The side of a patch, given as a number or as height and width.

    Raises:
        ValueError: if a patch is not square.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"config.json: patch_size is {size}; square patches can be read")
    return sides.pop()


def _labels(config: dict[str, Any]) -> int:
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def _table(encoder: PatchEncoder) -> list[Weight]:
    table = [
        Weight("embedding.class_token", ("embeddings.cls_token",), leading=2),
        Weight("embedding.places", ("embeddings.position_embeddings",), leading=1),
    ]
    rows = (encoder.dim,) * 3
    for w in ("weight", "bias"):
        table.append(Weight(f"embedding.convolution.{w}", (f"embeddings.patch_embeddings.projection.{w}",)))
        table.append(Weight(f"norm.{w}", (f"layernorm.{w}",)))
        for i in range(len(encoder.layers)):
            ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
            parts = tuple(f"{theirs}.attention.attention.{part}.{w}" for part in ("query", "key", "value"))
            table += [
                Weight(f"{ours}.attention.project.{w}", parts, rows),
                Weight(f"{ours}.attention.output.{w}", (f"{theirs}.attention.output.dense.{w}",)),
                Weight(f"{ours}.attention_norm.{w}", (f"{theirs}.layernorm_before.{w}",)),
                Weight(f"{ours}.feedforward.input.{w}", (f"{theirs}.intermediate.dense.{w}",)),
                Weight(f"{ours}.feedforward.output.{w}", (f"{theirs}.output.dense.{w}",)),
                Weight(f"{ours}.feedforward_norm.{w}", (f"{theirs}.layernorm_after.{w}",)),
            ]
    return table
