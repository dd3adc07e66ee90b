"""A law over structures whose whole surface follows from one recursion, written once over a semiring.

A subclass names its parts and their dimensions, gives the ``Recursion`` that sums over its structures, and says how a
structure is read off the parts that it uses. Then log Z is the recursion over logs and the marginals its gradient; the
mode is the gradient over maxima, the k best over k maxima, a sample over drawn sums. A compiled kernel for one of
these replaces ``_best`` or ``_draw``, or stands in the recursion itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor

from probllm.distributions.structure import StructuredDistribution, masked
from probllm.math import recursion
from probllm.math.chain import check_lengths, is_wrapped
from probllm.math.masks import mask_from_lengths
from probllm.math.recursion import Recursion
from probllm.math.semirings import MAX, SAMPLING, KMax, Semiring
from probllm.math.shapes import broadcast_shapes

SAMPLES_AT_ONCE = 1 << 24  # entries of the parts that are copied for one round of draws


class InsideDistribution(StructuredDistribution):
    """What a subclass sets, beside ``_structure``, ``_score``, ``_greatest`` and ``_with``."""

    _dims: ClassVar[dict[str, int]]  # dimensions of each part beside the batch's, the main part first
    _recursion: Recursion
    _given: dict[str, Tensor]  # the parts as the caller gave them, of one dtype
    lengths: Tensor  # [*own batch] long

    def _structure(self, used: dict[str, Tensor]) -> Tensor:
        """The structures ``[*lead, *event]`` that use the parts which are 1 (others 0), ``[*lead, ...]`` each."""
        raise NotImplementedError(f"{type(self).__name__} is abstract in _structure")

    def _real(self, value: Tensor) -> Tensor:
        """The value with 0 behind its length; a structure that is no sequence of steps says what its padding is."""
        return torch.where(mask_from_lengths(self.lengths, value.shape[-1]), value, 0)

    def _set_up(self, parts: dict[str, Tensor], lengths: Tensor | None, longest: int, event: tuple[int, ...]) -> None:
        """Checks dtypes, broadcasts the batch shapes, and sets what the base needs. Event shapes: the caller's check.

        Raises:
            TypeError: for scores that are not floating-point tensors.
            ValueError: for batch shapes that do not broadcast, devices that differ, or lengths out of range.
        """
        main = next(iter(parts.values()))
        dtype, device = main.dtype, main.device
        for name, x in parts.items():
            if not x.is_floating_point():
                raise TypeError(f"{name}: expected floating-point scores, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"{name}: expected device {device} as {next(iter(parts))}, got {x.device}")
        leading = {name: x.shape[: x.dim() - self._dims[name]] for name, x in parts.items()}
        if lengths is not None:
            check_lengths(lengths, longest)
            leading["lengths"] = lengths.shape
        try:
            self._own_shape = broadcast_shapes(*leading.values())
        except RuntimeError:
            shapes = {name: list(shape) for name, shape in leading.items()}
            raise ValueError(f"batch shapes do not broadcast: {shapes}") from None
        self._given = {name: x if x.dtype == dtype else x.to(dtype) for name, x in parts.items()}
        if lengths is None:
            self.lengths = torch.full(self._own_shape, longest, dtype=torch.long, device=device)
        else:
            self.lengths = lengths.to(device, torch.long).expand(self._own_shape)
        self._kept = {}
        super().__init__(self._own_shape, torch.Size(event), validate_args=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        return self._given

    def condition(self, allowed: Tensor) -> Self:
        """The law given that its structure uses allowed main parts alone; ``log_partition`` keeps their mass.

        Args:
            allowed: bool, in the shape of the main scores.
        """
        main = next(iter(self._dims))
        return self._conditioned(**{main: masked("allowed", self.parts[main], allowed, self._dims[main])})

    # ---- what the base asks for

    def _rows(self, name: str, batch: torch.Size | None = None) -> Tensor:
        """A part of its own for each row of the batch (the stored one if None)."""
        x = self.parts[name]
        shape = (*(self._own_shape if batch is None else batch), *x.shape[x.dim() - self._dims[name] :])
        return x if x.shape == shape else x.expand(shape)  # a view would be one more step of the gradient

    def _expand_part(self, name: str, x: Tensor) -> Tensor:
        return self._rows(name, self.batch_shape)

    def _counting(self, name: str, scores: Tensor) -> Tensor:
        """A part with 0 where its scores do not count."""
        return scores

    def _checked_parts(self) -> dict[str, Tensor]:
        """The parts, once they are known to hold no NaN and no +inf."""

        def sound(scores: Tensor) -> bool:
            return bool(scores.amax() < math.inf)

        def check() -> bool:
            for name, x in self.parts.items():
                if not is_wrapped(x) and x.numel():
                    scores = x.detach()
                    if not sound(scores) and not sound(self._counting(name, scores)):
                        raise ValueError(f"{name}: scores must not be NaN or +inf (-inf forbids)")
            return True

        self._keep("checked", check)
        return self.parts

    def _flat(self, name: str, shared: bool, checked: bool = True) -> Tensor:
        """A part as ``[B, ...]``, or ``[1, ...]`` where all rows share it and ``shared`` allows."""
        x = (self._checked_parts() if checked else self.parts)[name]
        lead = x.dim() - self._dims[name]
        if lead == 1 == len(self._own_shape) and x.shape[0] == self._own_shape[0]:
            return x
        if shared and math.prod(x.shape[:lead]) == 1:
            return x.reshape(1, *x.shape[lead:])
        rows = self._rows(name)
        return (
            rows
            if len(self._own_shape) == 1
            else rows.reshape(math.prod(self._own_shape), *rows.shape[-self._dims[name] :])
        )

    def _flat_lengths(self) -> Tensor:
        return self.lengths if self.lengths.dim() == 1 else self.lengths.reshape(-1)

    def _flat_parts(self, checked: bool = True) -> tuple[Tensor, ...]:
        """The parts as a ``Recursion`` takes them: what all rows share, but for the main part, once."""
        rows, main = math.prod(self._own_shape), next(iter(self._dims))
        return tuple([self._flat(name, rows > 1 and name != main, checked) for name in self._dims])

    def _plain_parts(self) -> tuple[Tensor, ...] | None:
        """The same; None where kernels do not take them: on another device, under ``torch.func``, without rows."""
        parts = self._flat_parts()
        plain = all(x.device.type == "cpu" and not is_wrapped(x) for x in (*parts, self.lengths))
        return parts if plain and self.lengths.numel() else None

    def _grown(self, structures: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        """Structures ``[*lead, B, ...]`` in the batch's own shape."""
        return structures.reshape(*lead, *self._own_shape, *self.event_shape)

    @property
    def _looked_at(self) -> bool:
        """Whether the recursion itself looks for what must not be among the scores."""
        return self._recursion.checks and self.lengths.is_cpu

    def _log_z(self) -> Tensor:
        rows, scores = math.prod(self._own_shape), self._flat_parts(not self._looked_at)
        if rows == 0:  # an empty batch: nothing, with gradients
            return sum(x.sum() for x in scores).double().expand(self._own_shape)  # type: ignore[union-attr]
        both = recursion.log_partitions(self._recursion, scores, self._flat_lengths(), self._dtype)
        if len(self._own_shape) != 1:
            both = both[0].reshape(self._own_shape), both[1].reshape(self._own_shape)
        self._keep("rounded", lambda: both[1])
        return both[0]

    def _expected(self) -> dict[str, Tensor]:
        scores = tuple(self._flat(name, False, not self._looked_at) for name in self._dims)
        if math.prod(self._own_shape) == 0:
            found = tuple(x * 1.0 for x in scores)
        else:
            found = recursion.expected_parts(self._recursion, scores, self._flat_lengths())
        return {name: x.reshape(*self._own_shape, *x.shape[1:]) for name, x in zip(self._dims, found, strict=True)}

    def _main_expected(self) -> Tensor:
        if "expected" in self._kept or math.prod(self._own_shape) == 0:
            return super()._main_expected()
        # what rows share stays shared: its gradient is summed over them and thrown away
        scores = self._flat_parts(not self._looked_at)
        found = recursion.expected_parts(self._recursion, scores, self._flat_lengths())[0]
        return found.reshape(*self._own_shape, *found.shape[1:])

    def _run(
        self, semiring: Semiring, lead: tuple[int, ...] = ()
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The recursion's values ``[width, *lead, *own batch]``, and what takes weights of them to the gradient in the
        parts of their sum; float64."""
        self._checked_parts()
        batch = torch.Size((*lead, *self._own_shape))
        parts = [self._rows(name, batch).detach().double() for name in self._dims]

        def values(*given: Tensor) -> Tensor:
            return self._recursion.inside(semiring, tuple(semiring.lift(x) for x in given), self.lengths)

        found, pull = torch.func.vjp(values, *parts)[:2]
        return found, pull

    def _read(self, values: Tensor, pull: Callable[[Tensor], tuple[Tensor, ...]], which: int) -> Tensor:
        """The structures that the gradient of one of the values points at; -1 where it is -inf."""
        weights = torch.zeros_like(values)
        weights[which] = 1.0
        used = pull(weights)
        structure = self._structure(dict(zip(self._dims, used, strict=True)))
        value = values[which]
        return torch.where((value == -math.inf).reshape(*value.shape, *(1,) * len(self.event_shape)), -1, structure)

    def _best(self) -> Tensor:
        return self._read(*self._run(MAX), 0)

    def _k_best(self, k: int) -> Tensor:
        values, pull = self._run(KMax(k))
        return torch.stack([self._read(values, pull, i) for i in range(k)])

    def _draw(self, n: int) -> Tensor:
        size = sum(self._rows(name).numel() for name in self._dims)
        at_once = max(1, min(n, SAMPLES_AT_ONCE // max(1, size)))
        drawn = []
        for first in range(0, n, at_once):
            drawn.append(self._read(*self._run(SAMPLING, (min(at_once, n - first),)), 0))
        if not drawn:
            return self.lengths.new_zeros((0, *self._own_shape, *self.event_shape))
        return torch.cat(drawn)

    def _sum_parts(self, name: str, terms: Tensor) -> Tensor:
        return terms.flatten(-self._dims[name]).sum(-1)

    def _matching(self, other: Self) -> dict[str, Tensor]:
        if bool((self.lengths != other.lengths).any()):
            raise ValueError("q: expected a law with the same lengths")
        return other.parts
