"""The processes that train together: one, or those of ``torchrun`` or of a group that the caller has made."""

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process among all. Every method but for the properties is to be called by all of them alike.

    Args:
        device: where each of them computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the processes."""
        if self.size == 1 or not values:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def any(self, *flags: bool) -> list[bool]:
        """Whether any process says so."""
        return [total > 0 for total in self.sum([float(flag) for flag in flags])]

    def of_first(self, value: float) -> float:
        """The first process's number."""
        return self.sum([value if self.first else 0.0])[0]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            moved = tensor.to(self.device)
            dist.broadcast(moved, 0)
            tensor.copy_(moved)

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes, on the first; nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found)
        return found or []

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The mean of the gradients of all processes in place of each; one that is missing everywhere stays so."""
        if self.size == 1:
            return
        own = list(parameters)
        there = self.any(*(parameter.grad is not None for parameter in own))
        for parameter, present in zip(own, there, strict=True):
            if present:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def start(device: str | torch.device | None) -> Processes:
    """The processes that this one was started with, in a group that is made where ``torchrun`` says so and none is.

    Args:
        device: where to compute; by default a GPU where there is one, that of the process's local rank if started by
            ``torchrun``.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and where.index is None and "LOCAL_RANK" in os.environ:
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if several and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Processes(where)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is this process's shard of a tensor (torch's ``DTensor``, which it takes seconds to import)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a shard, put together on every one; any other as it is."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as ``like`` is, where that is cut."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
