"""The progress bar of a fit, and how Ctrl-C ends one between two steps."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class ProgressBar:
    """A line in the terminal with the epoch, the loss and the rate; nothing where there is no terminal.

    Args:
        shown: False keeps it silent in a terminal too.
        epochs: how many there are to be.
    """

    def __init__(self, shown: bool, epochs: int) -> None:
        self.epochs = epochs
        self.bar: Any = None
        self._shown = shown
        self._loss: float | None = None
        self._since, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> "ProgressBar":
        from rich.console import Console

        console = Console(stderr=True)
        if self._shown and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}")
            numbers = TextColumn("{task.fields[numbers]}")
            self.bar = Progress(text, BarColumn(), MofNCompleteColumn(), numbers, TimeElapsedColumn(), console=console)
            self.bar.start()
            self.line = self.bar.add_task("", total=1, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def epoch(self, epoch: int, steps: int, done: int) -> None:
        """Begin an epoch (from 0) of so many steps."""
        self._since, self._tokens = time.perf_counter(), 0
        if self.bar is not None:
            self.bar.update(self.line, description=f"epoch {epoch + 1}/{self.epochs}", total=steps, completed=done)

    def step(self, loss: float, tokens: int) -> None:
        """Tell of a step."""
        if self.bar is None:
            return
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        self.bar.update(self.line, advance=1, numbers=f"loss {self._loss:.4g}  {rate:,.0f} tokens/s")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)


class Interrupt:
    """Whether Ctrl-C was pressed."""

    requested = False


@contextmanager
def delayed_interrupt(bar: ProgressBar) -> Iterator[Interrupt]:
    """Ctrl-C sets a flag, so that a step is never cut in two; pressed again, it raises at once.

    A handler of the caller's own is left alone, as is a thread other than the main one.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        bar.say("stopping after this step; Ctrl-C again stops at once")

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
