"""Ctrl-C, Ctrl-Break, SIGTERM and a closed terminal: the first asks the run to stop when its step is done, the second
stops at once."""

import os
import signal
import stat
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from sidestep.events import Emit, Notice

# Windows alone has Ctrl-Break; it ends a process that does not take it. SIGHUP says that the terminal was closed.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")


class Interrupts:
    """While open, the first signal sets `is_requested` and the second raises KeyboardInterrupt.

    Where `can_be_repeated`, a second one means no more than the first: a launcher passes on what a job manager has sent
    to every process already, and kills what does not end by itself. So it is once the terminal is closed: a machine
    that is shut down tells both, more than once, and nobody is left to press Ctrl-C.
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
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name) and not _is_left_out(name)]
        self._earlier = {number: signal.signal(number, self._take) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            _let_go_of_terminal()
            self._can_be_repeated = True
        if self._is_requested:
            if self._can_be_repeated:
                return
            # What is cut off half-made fails once more while it is taken down; that is nothing to read.
            sys.unraisablehook = lambda unraisable: None
            raise KeyboardInterrupt
        self._is_requested = True
        again = "" if self._can_be_repeated else " Ctrl-C again stops at once."
        self._emit(Notice(text=f"Stopping: this step is finished and saved first.{again}"))


def _is_left_out(name: str) -> bool:
    """Say whether the run was started to outlive its terminal (nohup)."""
    return name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _let_go_of_terminal() -> None:
    """Have what is printed to a terminal that is gone go nowhere: writing to it would fail before the run is saved."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(nowhere.fileno(), stream)
