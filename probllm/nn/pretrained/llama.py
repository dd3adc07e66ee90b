"""Llama (Touvron et al., 2023), Mistral, Qwen 2 and 3: rotary positions, RMSNorm first, SwiGLU, few biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from probllm.nn.embeddings import WordEmbedding
from probllm.nn.pretrained.checkpoint import (
    Head,
    Weight,
    check_config,
    check_options,
    load,
    read_config,
    read_tensors,
    unload,
    write_checkpoint,
)
from probllm.nn.transformer import TransformerDecoder

_HEAD = "lm_head.weight"
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def read_llama(folder: str | Path) -> tuple[TransformerDecoder, Head]:
    """A decoder and its head out of a folder with ``config.json`` and safetensors: llama, mistral, qwen2 or qwen3.

    Logits are ``head.logits(decoder(ids), decoder.token_weight)``. The weights keep the file's dtype.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder holds a pickle only, another family, a corrupt file or a tensor of another shape, or
            its rotary positions are scaled.
    """
    config = read_config(folder, list(_FAMILIES))
    kind = config["model_type"]
    check_config(config, _FAMILIES[kind], hidden_act="silu", mlp_bias=False, use_sliding_window=False)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(f"config.json: rope_type is {scaling!r}; 'default' can be read")
    biased = bool(config.get("attention_bias", False))
    if biased and kind != "qwen2":
        raise ValueError("config.json: attention_bias is True; without biases (or Qwen2's) it can be read")
    tensors = read_tensors(folder)
    prefix = "model." if "model.embed_tokens.weight" in tensors else ""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or dim // heads
    with torch.device("meta"):
        decoder = TransformerDecoder(
            WordEmbedding(config["vocab_size"], dim),
            dim=dim,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            feedforward=config["intermediate_size"],
            norm="rms",
            activation="swiglu",
            dropout=0.0,
            attention_dropout=config.get("attention_dropout", 0.0),
            max_length=config["max_position_embeddings"],
            window=config.get("sliding_window") if kind == "mistral" else None,
            qk_norm=kind == "qwen3",
            bias=False,
            qkv_bias=kind == "qwen2",
            head_dim=head_dim,
            rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )
    load(decoder, _table(decoder), tensors, prefix)
    weight = tensors.pop(_HEAD, None)
    extra = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    return decoder, Head(weight, config=config, extra=extra, prefix=prefix)


def write_llama(folder: str | Path, decoder: TransformerDecoder, head: Head | None = None) -> None:
    """Write a decoder, with the head that it was read with or a tied one, so that ``transformers`` reads it.

    It becomes a Qwen3 where queries and keys are normalised, a Qwen2 where their projections have biases, a Mistral
    where there is a window, else a Llama.

    Raises:
        ValueError: if the decoder has options that none of them has; the message names the first.
    """
    head = Head() if head is None else head
    check_options(
        decoder, "Llama", norm="rms", positions="rope", activation="swiglu", norm_first=True, bias=False,
        embedding_norm=False, memory_dim=None,
    )  # fmt: skip
    options = decoder.config_arguments
    special = {
        "qwen3": options["qk_norm"],
        "qwen2": bool(options["qkv_bias"]),
        "mistral": options["window"] is not None,
    }
    kinds = [kind for kind, given in special.items() if given] or ["llama"]
    if len(kinds) > 1:
        raise ValueError(f"the decoder is {' and '.join(_FAMILIES[k] for k in kinds)} at once; no checkpoint is")
    name = _FAMILIES[kinds[0]]
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        **head.config,
        "model_type": kinds[0],
        "attention_dropout": options["attention_dropout"],
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.dim,
        "intermediate_size": 4 * decoder.dim if options["feedforward"] is None else options["feedforward"],
        "max_position_embeddings": options["max_length"],
        "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"],
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": 1e-6 if options["norm_eps"] is None else options["norm_eps"],
        # Both ways in which readers of different years look for it.
        "rope_parameters": {"rope_theta": options["rope_base"], "rope_type": "default"},
        "rope_theta": options["rope_base"],
        "tie_word_embeddings": head.weight is None,
        "vocab_size": len(decoder.token_weight),
    }
    if kinds[0] == "mistral":
        config["sliding_window"] = options["window"]
    tensors = unload(decoder, _table(decoder), "model." if head.prefix is None else head.prefix)
    if head.weight is not None:
        tensors[_HEAD] = head.weight
    write_checkpoint(folder, config, {**tensors, **head.extra})


def _table(decoder: TransformerDecoder) -> list[Weight]:
    table = [Weight("embedding.weight", ("embed_tokens.weight",)), Weight("norm.weight", ("norm.weight",))]
    for i, layer in enumerate(decoder.stack):
        ours, theirs, attention = f"layers.{i}", f"layers.{i}", layer.attention
        rows = tuple(attention.head_dim * n for n in (attention.heads, attention.kv_heads, attention.kv_heads))
        parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        table.append(Weight(f"{ours}.attention.project.weight", tuple(f"{part}.weight" for part in parts), rows))
        if attention.project.bias is not None:
            table.append(Weight(f"{ours}.attention.project.bias", tuple(f"{part}.bias" for part in parts), rows))
        if attention.query_norm is not None:
            table.append(Weight(f"{ours}.attention.query_norm.weight", (f"{theirs}.self_attn.q_norm.weight",)))
            table.append(Weight(f"{ours}.attention.key_norm.weight", (f"{theirs}.self_attn.k_norm.weight",)))
        hidden = layer.feedforward.output.in_features
        gated = tuple(f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        table += [
            Weight(f"{ours}.attention.output.weight", (f"{theirs}.self_attn.o_proj.weight",)),
            Weight(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)),
            Weight(f"{ours}.feedforward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
            Weight(f"{ours}.feedforward.input.weight", gated, (hidden, hidden)),
            Weight(f"{ours}.feedforward.output.weight", (f"{theirs}.mlp.down_proj.weight",)),
        ]
    return table
