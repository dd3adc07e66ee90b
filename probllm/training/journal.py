"""What a run measures, written while it runs: a line of JSON a step and an epoch, and TensorBoard's curves.

The files are appended to only, but that a run which goes on from a checkpoint first cuts off what was written of later
steps, for it makes them again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from probllm.models.weights import write_atomically

METRICS_FILE, STEPS_FILE = "metrics.jsonl", "steps.jsonl"


class Journal:
    """The files in which a run tells of its steps and epochs.

    Args:
        folder: for ``steps.jsonl`` and ``metrics.jsonl``; None: none are written.
        tensorboard: for TensorBoard's files; None: none are written.
    Raises:
        ImportError: if TensorBoard is asked for and missing.
    """

    def __init__(self, folder: Path | None, tensorboard: Path | None) -> None:
        self.folder, self.tensorboard = folder, tensorboard
        self._steps: TextIO | None = None
        self._board: Any = None
        if tensorboard is not None:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                needed = "tensorboard is given, but the package is missing: pip install 'probllm[tensorboard]'"
                raise ImportError(needed) from error

    def open(self, step: int, epochs: Sequence[Mapping[str, float]]) -> None:
        """Begin, or go on, after so many steps and these epochs."""
        if self.folder is not None:
            cut_after(self.folder / STEPS_FILE, step)
            if epochs or (self.folder / METRICS_FILE).is_file():
                lines = "".join(json.dumps(row) + "\n" for row in epochs)
                write_atomically(self.folder / METRICS_FILE, lines.encode())
            self._steps = open(self.folder / STEPS_FILE, "a", buffering=1)  # noqa: SIM115
        if self.tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.tensorboard), purge_step=step + 1)

    def step(self, row: Mapping[str, float]) -> None:
        """Tell of a step: ``{"step": 1, "epoch": 1, "loss": ..., ...}``."""
        if self._steps is not None:
            self._steps.write(json.dumps(row) + "\n")
        self._draw(row, "train")

    def epoch(self, row: Mapping[str, float]) -> None:
        """Tell of an epoch."""
        if self.folder is not None:
            with open(self.folder / METRICS_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
        self._draw(row, "epoch")

    def keep(self) -> None:
        """Make sure that what was told is on the disk, as a checkpoint that counts on it will be."""
        if self._steps is not None:
            self._steps.flush()
            os.fsync(self._steps.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._steps is not None:
            self._steps.close()
        if self._board is not None:
            self._board.close()

    def _draw(self, row: Mapping[str, float], kind: str) -> None:
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._board.add_scalar(f"{kind}/{name}", value, int(row.get("step", row["epoch"])))


def cut_after(path: Path, step: int) -> None:
    """Cut a file of steps behind the last line of a step up to this one, and what a kill has left of a line."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
