"""What a fit was: its history, its best epoch and what it cost."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from probllm.models.weights import write_atomically


@dataclass
class Run:
    """The record of a fit.

    Attributes:
        history: one dict an epoch (or an iteration of EM): ``epoch``, ``loss`` (nats per sequence), the named losses
            where there are several, ``learning_rate``, ``gradient_norm``, ``validation_loss``, ``validation_<metric>``,
            ``seconds`` since the start.
        best_epoch: the epoch whose weights the model holds, from 1; None where the last ones are kept.
        best_value: the validation loss or metric there.
        monitored: the key of the history by which the best epoch was chosen; None without validation.
        seconds: the time of it all, validation included, summed over a run's parts where it was resumed.
        training_seconds: the part of it spent on training steps.
        tokens: how many tokens (sequences, where there is no mask) were trained on.
        steps: how many steps the optimiser made.
        stopped: ``"epochs"`` (all were made), ``"patience"`` or ``"estimate"`` (closed form or EM).
        parameters: how many numbers were trained.
        device: where.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    best_value: float | None = None
    monitored: str | None = None
    seconds: float = 0.0
    training_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    stopped: str = "epochs"
    parameters: int = 0
    device: str = "cpu"

    @property
    def epochs(self) -> int:
        """How many epochs were made."""
        return len(self.history)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of training; 0 where nothing was timed."""
        return self.tokens / self.training_seconds if self.training_seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The run as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The run that ``to_json`` described.

        Raises:
            ValueError: if a value is missing or unknown.
        """
        try:
            names = {each.name for each in dataclasses.fields(cls)}
            if values.keys() != names:
                raise ValueError(f"missing {sorted(names - values.keys())}, unknown {sorted(values.keys() - names)}")
            return cls(**values)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"not the record of a run: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the run as a JSON file, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file is not the record of a run; the message names it.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
