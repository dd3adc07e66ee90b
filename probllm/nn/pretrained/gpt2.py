"""GPT-2 (Radford et al., 2019): learned positions, norms first, GELU by tanh, biases, a tied output layer."""

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
    translate,
    translate_back,
    unload,
    write_checkpoint,
)
from probllm.nn.transformer import TransformerDecoder

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu",
}  # fmt: skip
_HEAD = "lm_head.weight"


def read_gpt2(folder: str | Path) -> tuple[TransformerDecoder, Head]:
    """A decoder and its head out of a folder with ``config.json`` and ``model.safetensors``.

    Logits are ``head.logits(decoder(ids), decoder.token_weight)``. The weights keep the file's dtype. The file's
    ``resid_pdrop`` becomes the decoder's dropout, which drops units within the perceptrons as well.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder holds a pickle only, another family, a corrupt file or a tensor of another shape.
    """
    config = read_config(folder, ["gpt2"])
    check_config(
        config, "GPT-2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    tensors = read_tensors(folder)
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    with torch.device("meta"):
        decoder = TransformerDecoder(
            WordEmbedding(config["vocab_size"], config["n_embd"]),
            dim=config["n_embd"],
            layers=config["n_layer"],
            heads=config["n_head"],
            feedforward=config.get("n_inner"),
            positions="learned",
            activation=translate("activation_function", config.get("activation_function", "gelu_new"), _ACTIVATIONS),  # type: ignore[arg-type]
            dropout=config.get("resid_pdrop", 0.1),
            attention_dropout=config.get("attn_pdrop", 0.1),
            max_length=config["n_positions"],
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )
    load(decoder, _table(decoder), tensors, prefix)
    weight = tensors.pop(_HEAD, None)
    if weight is not None and weight.shape != decoder.token_weight.shape:
        raise ValueError(
            f"the tensor {_HEAD!r} has shape {list(weight.shape)}; config.json says {list(decoder.token_weight.shape)}"
        )
    # Masks that files of old hold beside the weights.
    extra = {name: t for name, t in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    present = weight is not None or "LMHead" in str(config.get("architectures", ""))
    return decoder, Head(weight, config=config, extra=extra, prefix=prefix, present=present)


def write_gpt2(folder: str | Path, decoder: TransformerDecoder, head: Head | None = None) -> None:
    """Write a decoder, with the head that it was read with or a tied one, so that ``transformers`` reads it.

    Raises:
        ValueError: if the decoder has options that GPT-2 has not; the message names the first.
    """
    head = Head() if head is None else head
    check_options(
        decoder, "GPT-2", kv_heads=None, norm="layer", positions="learned", norm_first=True, window=None, qk_norm=False,
        bias=True, qkv_bias=None, head_dim=None, embedding_norm=False, memory_dim=None,
    )  # fmt: skip
    options = decoder.config_arguments
    written = head.config.get("activation_function")
    activation = translate_back("activation", options["activation"], _ACTIVATIONS, "GPT-2", written)
    config: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": options["attention_dropout"],
        "embd_pdrop": options["dropout"],
        "resid_pdrop": options["dropout"],
        "n_inner": options["feedforward"],
        **head.config,
        "model_type": "gpt2",
        "activation_function": activation,
        "layer_norm_epsilon": 1e-5 if options["norm_eps"] is None else options["norm_eps"],
        "n_embd": decoder.dim,
        "n_head": options["heads"],
        "n_layer": options["layers"],
        "n_positions": options["max_length"],
        "tie_word_embeddings": head.weight is None,
        "vocab_size": len(decoder.token_weight),
    }
    tensors = unload(decoder, _table(decoder), "transformer." if head.prefix is None else head.prefix)
    if head.weight is not None:
        tensors[_HEAD] = head.weight
    write_checkpoint(folder, config, {**tensors, **head.extra})


def _table(decoder: TransformerDecoder) -> list[Weight]:
    table = [Weight("embedding.weight", ("wte.weight",)), Weight("position_table", ("wpe.weight",))]
    for i in range(len(decoder.layers)):
        for ours, theirs in (("attention_norm", "ln_1"), ("feedforward_norm", "ln_2")):
            table += [Weight(f"layers.{i}.{ours}.{w}", (f"h.{i}.{theirs}.{w}",)) for w in ("weight", "bias")]
        for ours, theirs in (
            ("attention.project", "attn.c_attn"),
            ("attention.output", "attn.c_proj"),
            ("feedforward.input", "mlp.c_fc"),
            ("feedforward.output", "mlp.c_proj"),
        ):
            table.append(Weight(f"layers.{i}.{ours}.weight", (f"h.{i}.{theirs}.weight",), transposed=True))
            table.append(Weight(f"layers.{i}.{ours}.bias", (f"h.{i}.{theirs}.bias",)))
    return [*table, *(Weight(f"norm.{w}", (f"ln_f.{w}",)) for w in ("weight", "bias"))]
