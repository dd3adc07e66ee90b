"""Weights in safetensors files, written whole or not at all, and never unpickled."""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, meets either the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name is to outlast a power cut as well
        place = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def write_weights(state: Mapping[str, Tensor], folder: Path, stem: str) -> Path:
    """Write a module's ``state_dict`` to ``stem-<hash of the content>.safetensors``; tied tensors are written once.

    Raises:
        TypeError: if the state holds something other than tensors.
    """
    content = safetensors.torch.save(unique_tensors(state))
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    write_atomically(path, content)
    return path


def unique_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ``state_dict``, on the CPU, each memory once, under the first of its names."""
    seen: set[object] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the state {name!r} is a {type(tensor).__name__}, expected a tensor")
        if memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            unique[name] = tensor.detach().cpu().contiguous()
    # Two views that overlap without being equal would be refused: give each memory of its own.
    return {name: tensor.clone() if _is_view(tensor) else tensor for name, tensor in unique.items()}


def read_weights(module: nn.Module, path: Path) -> None:
    """Copy the weights in a file into a module, in place, dtypes as they were saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed, or its names and shapes are not those of the module.
    """
    copy_weights(module, read_tensors(path), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {str(path)!r}")
    try:
        saved: dict[str, Tensor] = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return saved


def copy_weights(module: nn.Module, saved: Mapping[str, Tensor], origin: str) -> None:
    """Copy named tensors into a module's own, in place; ``origin`` is what an error calls them."""
    own = module.state_dict()
    places = {memory_of(tensor) for name, tensor in own.items() if name in saved}
    missing = sorted(name for name, tensor in own.items() if name not in saved and memory_of(tensor) not in places)
    surplus = sorted(saved.keys() - own.keys())
    if missing or surplus:
        raise ValueError(f"{origin} does not fit {type(module).__name__}: missing {missing}, not expected {surplus}")
    for name, tensor in saved.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, expected {list(own[name].shape)}"
            raise ValueError(f"{origin} does not fit {type(module).__name__}: {name} has shape {shapes}")
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in saved.items():
            if tensors[name].dtype != tensor.dtype:
                tensors[name].data = tensors[name].data.to(tensor.dtype)
            tensors[name].copy_(tensor)


def memory_of(tensor: Tensor) -> object:
    """What two names of one tensor have in common: the memory and how it is read."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
