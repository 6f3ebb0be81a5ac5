"""Ctrl-C, Ctrl-Break and SIGTERM: the first asks the run to stop when its step is done, the second stops at once."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from sidestep.events import Emit, Notice

# Windows alone has Ctrl-Break; it ends a process that does not take it.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")


class Interrupts:
    """While open, the first signal sets `is_requested` and the second raises KeyboardInterrupt.

    Where `can_be_repeated`, a second one means no more than the first: a launcher passes on what a job manager has sent
    to every process already, and kills what does not end by itself.
    """

    def __init__(self, emit: Emit, *, can_be_repeated: bool = False) -> None:
        self._emit = emit
        self._can_be_repeated = can_be_repeated
        self._is_requested = False
        self._earlier: dict[int, Any] = {}

    def is_requested(self) -> bool:
        """Say whether a stop was asked for."""
        return self._is_requested

    def __enter__(self) -> Self:
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        self._earlier = {number: signal.signal(number, self._take) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            if self._can_be_repeated:
                return
            # What is cut off half-made fails once more while it is taken down; that is nothing to read.
            sys.unraisablehook = lambda unraisable: None
            raise KeyboardInterrupt
        self._is_requested = True
        again = "" if self._can_be_repeated else " Ctrl-C again stops at once."
        self._emit(Notice(text=f"Stopping: this step is finished and saved first.{again}"))
