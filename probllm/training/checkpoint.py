"""All that a killed run needs to go on to the same numbers, in one file that is replaced whole.

``checkpoint.safetensors`` holds the tensors (weights, optimisers, averages, best weights, the states of the random
number generators) and, in its header, one JSON object with everything else: one file, so that a kill can never leave
the halves of two checkpoints, and nothing in it is unpickled. The header holds a checksum of each tensor too.
"""

import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from probllm.models.weights import write_atomically

CHECKPOINT_FILE = "checkpoint.safetensors"
Generators: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], generators: Sequence[Generators]
) -> None:
    """Write a checkpoint: tensors and JSON values, with the states of each process's random number generators."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for rank, (states, _) in enumerate(generators):
        held |= {f"random/{rank}/{name}": state for name, state in states.items()}
    sums = {name: _checksum(tensor) for name, tensor in held.items()}
    state = {**values, "generators": [numbers for _, numbers in generators], "checksums": sums}
    write_atomically(folder / CHECKPOINT_FILE, safetensors.torch.save(held, {"state": json.dumps(state)}))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the values of the checkpoint in a folder, None where there is none.

    Raises:
        ValueError: if the file is not a checkpoint of ours, or is damaged; the message names the first tensor that is.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"{path} is not a checkpoint: it is a pickle, as torch.save writes, and is never loaded")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            values = json.loads(opened.metadata()["state"])
        sums = values.pop("checksums")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error!r}") from error
    for name in sorted(tensors.keys() | sums.keys()):
        if name not in tensors or sums.get(name) != _checksum(tensors[name]):
            raise ValueError(f"{path} is damaged: {name} is not what was written")
    return tensors, values


def random_states() -> Generators:
    """The states of torch's, numpy's and Python's random number generators, as tensors and JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        **{f"cuda/{i}": state for i, state in enumerate(cuda)},
    }
    return tensors, {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": name, "position": position, "has_gauss": has_gauss, "gauss": cached},
        "cuda": len(cuda),
    }


def restore_random_states(tensors: Mapping[str, Tensor], values: Mapping[str, Any], rank: int = 0) -> None:
    """Set torch's, numpy's and Python's generators (and CUDA's, where there are as many devices) as they were.

    Args:
        tensors, values: of the checkpoint.
        rank: the process's; one that had no part in the checkpoint keeps its generators as they are.
    """
    if rank >= len(values["generators"]):
        return
    generators, prefix = values["generators"][rank], f"random/{rank}/"
    torch.set_rng_state(tensors[f"{prefix}torch"])
    words = tuple(tensors[f"{prefix}python"].tolist())
    random.setstate((generators["python"]["version"], words, generators["python"]["gauss"]))
    numpy = generators["numpy"]
    keys = tensors[f"{prefix}numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    if torch.cuda.is_available() and torch.cuda.device_count() == generators["cuda"]:
        torch.cuda.set_rng_state_all([tensors[f"{prefix}cuda/{i}"] for i in range(generators["cuda"])])


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
