"""The protocol that every encoder follows, and the checks at its door.

``encoder(inputs, mask=None) -> [batch, length, encoder.dim]``. The inputs are the tensor that the encoder needs or a
dict from which it picks its own keys; the mask is True at real positions, in any pattern. What comes out at a real
position does not depend on the padding, and what comes out at a padded position is 0. An embedding is an encoder too,
one whose output at a position depends on that position alone, so encoders stack:
``RecurrentEncoder(WordEmbedding(...))``.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from probllm.nn.config import Configurable

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]


class Encoder(Configurable, nn.Module):
    """Base class of encoders: a plain module with ``dim``, rebuilt from its config and its weights.

    A subclass sets ``self.dim`` and defines ``forward(inputs, mask=None)``.
    """

    dim: int

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """States ``[batch, length, dim]`` of the inputs; 0 where ``mask`` ``[batch, length]`` is False."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(inputs, mask=None)")


def pick(inputs: Inputs, key: str) -> Tensor:
    """The tensor an encoder needs: ``inputs`` itself, or its entry ``key`` when it is a dict."""
    if isinstance(inputs, Tensor):
        return inputs
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is a {type(inputs).__name__}; expected a tensor or a dict with the key {key!r}")
    if key not in inputs:
        raise ValueError(f"inputs has the keys {sorted(inputs)}; expected {key!r} among them")
    return inputs[key]


def check_ids(name: str, ids: Tensor, size: int, rank: int) -> None:
    """Raise unless ``ids`` is a long (or int) tensor of that rank with values in ``0..size-1`` and a length.

    The range is looked at on the CPU alone, where it costs microseconds; on a GPU it would stall the stream, and the
    embedding kernel asserts it anyway.
    """
    if ids.dtype not in (torch.long, torch.int):
        raise TypeError(f"{name} has dtype {ids.dtype}; expected integer ids (torch.long)")
    if ids.dim() != rank:
        axes = ("batch", "length", "ids of each word")[:rank]
        raise ValueError(f"{name} has shape {list(ids.shape)}; expected {rank} axes [{', '.join(axes)}]")
    _check_length(name, ids)
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or in_transform(ids) or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(f"{name} has ids from {low} to {high}; expected ids from 0 to {size - 1}")


def check_mask(mask: Tensor | None, shape: torch.Size, name: str = "mask") -> None:
    """Raise unless ``mask`` is None or a bool tensor of that shape."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; expected torch.bool, True at real positions")
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {list(mask.shape)}; expected [batch, length] = {list(shape)}")


def check_states(name: str, states: Tensor, dim: int) -> None:
    """Raise unless ``states`` is a floating tensor ``[batch, length, dim]``, ``length`` at least 1."""
    if not isinstance(states, Tensor):
        raise TypeError(f"{name} is a {type(states).__name__}; expected a tensor [batch, length, {dim}]")
    if not states.is_floating_point():
        raise TypeError(f"{name} has dtype {states.dtype}; expected a floating dtype")
    if states.dim() != 3 or states.shape[-1] != dim:
        raise ValueError(f"{name} has shape {list(states.shape)}; expected [batch, length, {dim}]")
    _check_length(name, states)


def _check_length(name: str, tensor: Tensor) -> None:
    if not tensor.shape[1]:
        raise ValueError(f"{name} has length 0; expected at least one position")


def check_dropout(name: str, probability: float) -> None:
    """Raise unless ``probability`` is in [0, 1)."""
    if not 0 <= probability < 1:
        raise ValueError(f"{name} is {probability}; expected a probability in [0, 1)")


def check_positive(**sizes: int) -> None:
    """Raise unless every named size is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; expected a whole number of at least 1")


def zero_padding(states: Tensor, mask: Tensor | None) -> Tensor:
    """``states`` with 0 at padded positions. Filled and not multiplied, so that no NaN comes through."""
    return states if mask is None else states.masked_fill(~mask.unsqueeze(-1), 0.0)


def in_transform(*tensors: Tensor) -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp) looks at these tensors.

    Fused kernels lack batching rules and forward derivatives, and a batched tensor cannot say its values; under a
    transform the layers therefore take plain tensor operations to the same result.
    """
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
