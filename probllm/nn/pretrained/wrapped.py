"""Any model of ``transformers`` as an encoder: of subwords, or of words pooled from their subwords.

Given as a module or as a local folder; nothing is downloaded. The encoder's config holds the model's own, so that a
saved tagger rebuilds it and loads its weights with the rest. Needs the extra ``hub``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probllm.nn.encoder import Encoder, Inputs, check_ids, check_mask, pick, zero_padding
from probllm.nn.subwords import Pooling, pool_subwords


class PretrainedEncoder(Encoder):
    """The last hidden states of a ``transformers`` model; of an encoder-decoder, those of its encoder.

    The inputs are ids ``[B, S]``, or a dict with ``subwords`` ``[B, S]`` and, for one vector a word, ``word_index``
    ``[B, S]`` and ``subword_mask`` ``[B, S]`` as ``SubwordPooling`` takes them; the mask then counts words.

    Args:
        model: a module of ``transformers``, a local folder that ``from_pretrained`` reads (safetensors only), or what
            ``to_config`` keeps of one: its class and config, for a model of fresh weights.
        pooling: ``"first"`` or ``"mean"`` of a word's subwords.
    """

    def __init__(self, model: nn.Module | str | Path | Mapping[str, Any], pooling: Pooling = "first") -> None:
        super().__init__()
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling is {pooling!r}; expected 'first' or 'mean'")
        self.pooling = pooling
        if isinstance(model, (str, Path)):
            model = _read(Path(model))
        elif isinstance(model, Mapping):
            model = _rebuild(model)
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or config is None or not hasattr(config, "to_json_string"):
            raise TypeError(f"model is a {type(model).__name__}; expected a transformers model or a folder with one")
        settings = json.loads(config.to_json_string(use_diff=False))
        kept = {"name": type(model).__name__, "settings": settings}
        object.__setattr__(self, "config_arguments", {"model": kept, "pooling": pooling})
        self.model = model
        whole: Any = model
        inner = whole.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
        # A head's base model gives the states; it is found anew in each call, and registered once, as ``model``.
        base = inner if inner is not model else getattr(model, "base_model", model)
        self._path = next(name for name, module in model.named_modules() if module is base)
        size = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        if not isinstance(size, int):
            raise ValueError(f"the config of the {type(model).__name__} names no hidden_size")
        self.dim: int = size
        embeddings = whole.get_input_embeddings()
        self.vocabulary_size: int = embeddings.num_embeddings
        self._takes = set(inspect.signature(base.forward).parameters)

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """``[B, S, dim]``, one a subword; or, where the inputs have a ``word_index``, ``[B, L, dim]``, one a word."""
        subwords = pick(inputs, "subwords")
        check_ids("subwords", subwords, self.vocabulary_size, rank=2)
        if isinstance(inputs, Tensor) or "word_index" not in inputs:
            check_mask(mask, subwords.shape)
            return zero_padding(self._states(subwords, mask), mask)
        word_index = inputs["word_index"]
        real = inputs.get("subword_mask", word_index >= 0)
        check_mask(real, subwords.shape, "subword_mask")
        states = self._states(subwords, real)
        length = mask.shape[1] if mask is not None else int(word_index.max()) + 1
        pooled = pool_subwords(states, word_index, length, self.pooling)
        check_mask(mask, pooled.shape[:2])
        return zero_padding(pooled, mask)

    def _states(self, subwords: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(subwords, dtype=torch.bool) if mask is None else mask
        # A row without any real subword looks at all of them, finitely; its states count for nothing.
        attended = mask | ~mask.any(1, keepdim=True)
        base = self.model.get_submodule(self._path)
        keywords: dict[str, Any] = {"input_ids": subwords, "attention_mask": attended.long()}
        if "use_cache" in self._takes:
            keywords["use_cache"] = False
        states: Tensor = base(**keywords).last_hidden_state
        return states


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("PretrainedEncoder needs transformers: pip install 'probllm[hub]'") from error
    return transformers


def _read(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing; expected a local folder, nothing is downloaded")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no safetensors; a pickle may run anything when it is read, and is refused")
    model: nn.Module = _transformers().AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model


def _rebuild(kept: Mapping[str, Any]) -> nn.Module:
    transformers = _transformers()
    settings = dict(kept["settings"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    # One of the library's own models, never another attribute that a config may name.
    found = getattr(transformers, str(kept["name"]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"the config names {kept['name']!r}, which is no model of transformers")
    model: nn.Module = found(config)
    return model
