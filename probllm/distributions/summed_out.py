"""What the laws share that have summed a structure out: samples of it beside the value, and no mode and no entropy."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self

from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probllm.distributions.structure import expanded


class SummedOutDistribution(TorchDistribution):  # type: ignore[misc]
    """A subclass gives ``log_prob``, ``sample_joint``, ``posterior``, and says why there is no mode."""

    has_enumerate_support = False
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    _of_what: ClassVar[str]  # whose mode it would be
    _because: ClassVar[str]  # why there is none, and what there is instead

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same law over a larger batch; nothing is copied."""
        return expanded(self, batch_shape, _instance)

    def sample_joint(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Exact samples of the structure and the value."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in sample_joint")

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact samples of the value; see ``sample_joint``."""
        return self.sample_joint(sample_shape)[1]

    @property
    def mode(self) -> Tensor:
        self._intractable("mode")

    def entropy(self) -> Tensor:
        """Intractable.

        Raises:
            NotImplementedError: always, with the reason.
        """
        self._intractable("entropy")

    def _intractable(self, what: str) -> NoReturn:
        raise NotImplementedError(f"the {what} of {self._of_what} is intractable: {self._because}")
