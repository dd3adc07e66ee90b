"""An exponential moving average of the weights, often better than the last of them.

    average_t = d_t * average_{t-1} + (1 - d_t) * weights_t,    d_t = min(decay, (1 + t) / (10 + t))

so that the first steps, far from where training ends, are soon forgotten. Polyak and Juditsky (1992).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """The average of named tensors, which a module's own are exchanged for while it is judged.

    Args:
        tensors: the weights by name, each memory once; those that are no floats (counters) are copied, not averaged.
        decay: in (0, 1); the average looks back over about 1 / (1 - decay) steps.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after the step of this number, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    @contextmanager
    def in_place(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The average in place of the weights, for as long as the context lasts."""
        self._exchange(tensors)
        try:
            yield
        finally:
            self._exchange(tensors)

    @torch.no_grad()
    def _exchange(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            held = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(held)
