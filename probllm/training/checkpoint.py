"""All that a killed run needs to go on to the same numbers, in one file that is replaced whole.

``checkpoint.safetensors`` holds the tensors (weights, optimisers, averages, best weights, the states of the random
number generators) and, in its header, one JSON object with everything else: one file, so that a kill can never leave
the halves of two checkpoints, and nothing in it is unpickled.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from probllm.models.weights import write_atomically

CHECKPOINT_FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a checkpoint: tensors and JSON values, with the states of all random number generators."""
    states, generators = _random_states()
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in {**tensors, **states}.items()}
    header = {"state": json.dumps({**values, "generators": generators})}
    write_atomically(folder / CHECKPOINT_FILE, safetensors.torch.save(held, header))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the values of the checkpoint in a folder, None where there is none.

    Raises:
        ValueError: if the file is not a checkpoint of ours.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads(file.metadata()["state"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error!r}") from error
    return tensors, values


def restore_random_states(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Set torch's, numpy's and Python's generators (and CUDA's, where there are as many devices) as they were."""
    generators = values["generators"]
    torch.set_rng_state(tensors["random/torch"])
    words = tuple(tensors["random/python"].tolist())
    random.setstate((generators["python"]["version"], words, generators["python"]["gauss"]))
    numpy = generators["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    if torch.cuda.is_available() and torch.cuda.device_count() == generators["cuda"]:
        torch.cuda.set_rng_state_all([tensors[f"random/cuda/{i}"] for i in range(generators["cuda"])])


def _random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {
        "random/torch": torch.get_rng_state(),
        "random/python": torch.tensor(words, dtype=torch.int64),
        "random/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        **{f"random/cuda/{i}": state for i, state in enumerate(cuda)},
    }
    return tensors, {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": name, "position": position, "has_gauss": has_gauss, "gauss": cached},
        "cuda": len(cuda),
    }
