"""The arguments of ``fit`` that decide its numbers, checked at the door."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from probllm.training.optimisers import NAMES, OptimiserFactory, OptimiserName
from probllm.training.schedule import SCHEDULES, Schedule


@dataclass(frozen=True)
class Settings:
    """See ``fit``.

    Raises:
        TypeError, ValueError: for a value that makes no sense; the message names it.
    """

    epochs: int
    batch_size: int | None
    max_tokens: int | None
    accumulate: int
    learning_rate: float
    weight_decay: float
    optimiser: OptimiserName | OptimiserFactory
    schedule: Schedule
    warmup: float
    decay: float
    clip: float | None
    patience: int | None
    metric: Callable[[Any, Any], float] | None
    mode: Literal["max", "min"]
    ema: float | None
    mixed_precision: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_tokens", "accumulate", "patience"):
            value = getattr(self, name)
            if value is None and name not in ("epochs", "accumulate"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed!r}, expected a whole number from 0 to 2**32 - 1")
        bounds: list[tuple[str, str, Callable[[float], bool]]] = [
            ("learning_rate", "above 0", lambda x: x > 0),
            ("weight_decay", "of at least 0", lambda x: x >= 0),
            ("warmup", "in [0, 1)", lambda x: 0 <= x < 1),
            ("decay", "in (0, 1]", lambda x: 0 < x <= 1),
            ("clip", "above 0", lambda x: x > 0),
            ("ema", "strictly between 0 and 1", lambda x: 0 < x < 1),
        ]
        for name, expected, holds in bounds:
            number = getattr(self, name)
            if number is None and name in ("clip", "ema"):
                continue
            if not isinstance(number, (int, float)) or not math.isfinite(number) or not holds(number):
                raise ValueError(f"{name} is {number!r}, expected a finite number {expected}")
        for name, choices in (("schedule", SCHEDULES), ("mode", ("max", "min"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup and decay are {self.warmup} and {self.decay}, expected a sum of at most 1")
        if not callable(self.optimiser) and self.optimiser not in NAMES:
            raise ValueError(f"optimiser is {self.optimiser!r}, expected {', '.join(map(repr, NAMES))} or a function")
        if self.metric is not None and not callable(self.metric):
            kind = type(self.metric).__name__
            raise TypeError(f"metric is a {kind}, expected a function metric(model, validation) -> float")

    def bounds(self, times: int) -> tuple[int | None, int | None]:
        """So many times the sequences and tokens that are computed at once."""
        size = 32 if self.batch_size is None and self.max_tokens is None else self.batch_size
        return size and size * times, self.max_tokens and self.max_tokens * times

    def to_json(self) -> dict[str, Any]:
        """As JSON values; functions by their names."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            key: getattr(value, "__name__", "function") if callable(value) else value for key, value in values.items()
        }
