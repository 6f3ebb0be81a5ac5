"""Ctrl-C and SIGTERM: the first asks the run to stop when its step is done, the second stops at once."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from sidestep.events import Emit, Notice

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While open, the first signal sets `is_requested` and the second raises KeyboardInterrupt."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._is_requested = False
        self._earlier: dict[int, Any] = {}

    def is_requested(self) -> bool:
        """Say whether a stop was asked for."""
        return self._is_requested

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            # What is cut off half-made fails once more while it is taken down; that is nothing to read.
            sys.unraisablehook = lambda unraisable: None
            raise KeyboardInterrupt
        self._is_requested = True
        self._emit(Notice(text="Stopping: this step is finished and saved first. Ctrl-C again stops at once."))
