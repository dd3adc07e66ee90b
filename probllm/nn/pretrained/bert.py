"""BERT (Devlin et al., 2019): learned positions, token types, norms after, a transform before the tied output layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from probllm.nn.embeddings import TypedWordEmbedding
from probllm.nn.pretrained.checkpoint import (
    Head,
    OutputTransform,
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
from probllm.nn.transformer import TransformerEncoder

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_HEAD = "cls.predictions."
_TRANSFORM = [
    Weight(f"{ours}.{w}", (f"{_HEAD}transform.{theirs}.{w}",))
    for ours, theirs in (("dense", "dense"), ("norm", "LayerNorm"))
    for w in ("weight", "bias")
]


def read_bert(folder: str | Path) -> tuple[TransformerEncoder, Head]:
    """An encoder and its head out of a folder with ``config.json`` and ``model.safetensors``.

    The encoder takes ids, or a dict of ``words`` and ``types``, numbers of token types. The head's ``logits`` are those
    of the masked language model, if the file holds one (``head.present``). The weights keep the file's dtype; its
    ``hidden_dropout_prob`` becomes the encoder's dropout, which drops units within the perceptrons as well. Positions
    are numbered by the mask: padding on the right is as theirs, on the left it shifts nothing.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder holds a pickle only, another family, a corrupt file or a tensor of another shape.
    """
    config = read_config(folder, ["bert"])
    check_config(config, "BERT", position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    activation: Any = translate("hidden_act", config.get("hidden_act", "gelu"), _ACTIVATIONS)
    # Files of old call a norm's scale and shift gamma and beta.
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in read_tensors(folder).items()
    }
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
    dim, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
    with torch.device("meta"):
        encoder = TransformerEncoder(
            TypedWordEmbedding(config["vocab_size"], dim, config.get("type_vocab_size", 2)),
            dim=dim,
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            feedforward=config["intermediate_size"],
            positions="learned",
            activation=activation,
            dropout=config.get("hidden_dropout_prob", 0.1),
            attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
            max_length=config["max_position_embeddings"],
            norm_first=False,
            norm_eps=eps,
            embedding_norm=True,
        )
        transform = OutputTransform(dim, activation, eps)
    load(encoder, _table(encoder), tensors, prefix)
    head = Head(config=config, prefix=prefix, present=f"{_HEAD}transform.dense.weight" in tensors)
    if head.present:
        load(transform, _TRANSFORM, tensors)
        # Where the file holds both, the output layer's own bias is the one that is added.
        bias = f"{_HEAD}decoder.bias" if f"{_HEAD}decoder.bias" in tensors else f"{_HEAD}bias"
        head.transform, head.bias = transform, tensors.pop(bias, None)
        if not config.get("tie_word_embeddings", True):
            head.weight = tensors.pop(f"{_HEAD}decoder.weight", None)
    head.extra = tensors
    return encoder, head


def write_bert(folder: str | Path, encoder: TransformerEncoder, head: Head | None = None) -> None:
    """Write an encoder, with the head that it was read with or one of a model's, so that ``transformers`` reads it.

    Raises:
        ValueError: if the encoder has options that BERT has not; the message names the first.
    """
    head = Head(present=False) if head is None else head
    check_options(
        encoder, "BERT", kv_heads=None, norm="layer", positions="learned", causal=False, norm_first=False, window=None,
        qk_norm=False, bias=True, qkv_bias=None, head_dim=None, embedding_norm=True,
    )  # fmt: skip
    embedding, options = encoder.embedding, encoder.config_arguments
    if not isinstance(embedding, TypedWordEmbedding) or embedding.dim != encoder.dim:
        raise ValueError(f"embedding is a {type(embedding).__name__}; a BERT checkpoint has a TypedWordEmbedding")
    written = head.config.get("hidden_act")
    activation = translate_back("activation", options["activation"], _ACTIVATIONS, "BERT", written)
    config: dict[str, Any] = {
        "architectures": ["BertForMaskedLM" if head.transform is not None else "BertModel"],
        "attention_probs_dropout_prob": options["attention_dropout"],
        "hidden_dropout_prob": options["dropout"],
        **head.config,
        "model_type": "bert",
        "hidden_act": activation,
        "hidden_size": encoder.dim,
        "intermediate_size": 4 * encoder.dim if options["feedforward"] is None else options["feedforward"],
        "layer_norm_eps": 1e-5 if options["norm_eps"] is None else options["norm_eps"],
        "max_position_embeddings": options["max_length"],
        "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"],
        "tie_word_embeddings": head.weight is None,
        "type_vocab_size": embedding.types,
        "vocab_size": embedding.vocabulary_size,
    }
    prefix = head.prefix
    if prefix is None:
        prefix = "" if head.transform is None else "bert."
    tensors = unload(encoder, _table(encoder), prefix)
    if head.transform is not None:
        eps, activation = config["layer_norm_eps"], options["activation"]
        if head.transform.norm.eps != eps or head.transform.activation != activation:
            raise ValueError(
                f"the head's transform has norm_eps {head.transform.norm.eps} and activation "
                f"{head.transform.activation!r}; a BERT checkpoint has the encoder's, {eps} and {activation!r}"
            )
        tensors |= unload(head.transform, _TRANSFORM)
    if head.weight is not None and head.bias is not None:  # readers of an output layer of its own ask for both
        tensors[f"{_HEAD}decoder.bias"] = head.bias.clone()
    bias = f"{_HEAD}decoder.bias" if f"{_HEAD}bias" in head.extra else f"{_HEAD}bias"
    for name, tensor in ((bias, head.bias), (f"{_HEAD}decoder.weight", head.weight)):
        if tensor is not None:
            tensors[name] = tensor
    write_checkpoint(folder, config, {**tensors, **head.extra})


def _table(encoder: TransformerEncoder) -> list[Weight]:
    table = [
        Weight("embedding.weight", ("embeddings.word_embeddings.weight",)),
        Weight("embedding.type_weight", ("embeddings.token_type_embeddings.weight",)),
        Weight("position_table", ("embeddings.position_embeddings.weight",)),
        *(Weight(f"embedding_norm.{w}", (f"embeddings.LayerNorm.{w}",)) for w in ("weight", "bias")),
    ]
    rows = (encoder.dim,) * 3
    for i in range(len(encoder.layers)):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for w in ("weight", "bias"):
            parts = tuple(f"{theirs}.attention.self.{part}.{w}" for part in ("query", "key", "value"))
            table.append(Weight(f"{ours}.attention.project.{w}", parts, rows))
            table.append(Weight(f"{ours}.attention.output.{w}", (f"{theirs}.attention.output.dense.{w}",)))
            table.append(Weight(f"{ours}.attention_norm.{w}", (f"{theirs}.attention.output.LayerNorm.{w}",)))
            table.append(Weight(f"{ours}.feedforward.input.{w}", (f"{theirs}.intermediate.dense.{w}",)))
            table.append(Weight(f"{ours}.feedforward.output.{w}", (f"{theirs}.output.dense.{w}",)))
            table.append(Weight(f"{ours}.feedforward_norm.{w}", (f"{theirs}.output.LayerNorm.{w}",)))
    return table
