"""What goes wrong: the two lines a user reads, and `sidestep.log`, which keeps the rest."""

import logging
import logging.handlers
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TextIO

import platformdirs

from sidestep.errors import RunError, SidestepError
from sidestep.files import cannot_write
from sidestep.ui.console import open_console

LOG_NAME = "sidestep.log"
INDENT = 2

logger = logging.getLogger("sidestep")


class LibraryLogger(logging.Logger):
    """A library's logger that leaves its records to the log: it takes no handler of its own and always propagates.

    Libraries set up a handler for stderr when they are imported, which is later than we can tell them not to.
    """

    propagate = property(lambda self: True, lambda self, value: None)  # pyright: ignore[reportAssignmentType]

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802
        """Take no handler."""


class WaitingRecords(logging.handlers.MemoryHandler):
    """Records from before the log is open."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)


class LogFile(logging.FileHandler):
    """The log's file. When it can no longer be written that is said once; what was to be logged goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say on stderr why the log ends here, and end it."""
        logging.getLogger().removeHandler(self)
        # Without any handler Python would print the warnings of libraries on the screen.
        logging.getLogger().addHandler(logging.NullHandler())
        reason = sys.exc_info()[1]
        open_console(plain=True, stream=sys.stderr).warning(f"{self.baseFilename} can no longer be written ({reason}).")


def show_error(error: SidestepError, *, stream: TextIO, plain: bool = False) -> None:
    """Print the message, then the hint: on a terminal wrapped to its width and indented, elsewhere a line each."""
    screen = open_console(plain=plain, stream=stream)
    first, *rest = screen.wrapped(f"Error: {error.message}", indent=INDENT)
    screen.print("\n".join([first, *(" " * INDENT + line for line in rest)]), style="red", wrap=False)
    if error.hint:
        hint = screen.way_out(error.hint, indent=INDENT)
        screen.print("\n".join(" " * INDENT + line for line in hint), wrap=False)


def show_bug(error: BaseException, *, stream: TextIO, plain: bool = False) -> None:
    """Write the traceback to the log and print two lines that name it: for errors that are our own fault."""
    log = _log_path()
    log_traceback(error)
    screen = open_console(plain=plain, stream=stream)
    screen.print(f"This is a bug in Side-Step: {type(error).__name__}: {_first_line(error)}", style="red", wrap=False)
    screen.print(f"  Please report it with the details in {log}", wrap=False)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or "no message"


def quiet_libraries() -> None:
    """Send Python warnings and the messages of libraries to the log instead of the screen.

    Call it before those libraries are imported. Until a log is open the records wait.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    logging.setLoggerClass(LibraryLogger)
    threading.excepthook = _log_thread
    if not _log_handlers():
        logging.getLogger().addHandler(WaitingRecords())


def open_log(path: Path) -> None:
    """Write the log to this file from now on, after what it holds already; an earlier log is closed.

    Raises RunError where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(path, error) from error
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for earlier in _log_handlers():
        if isinstance(earlier, WaitingRecords):
            earlier.setTarget(log)
            earlier.flush()
    close_log()
    logging.getLogger().addHandler(log)
    logger.setLevel(logging.INFO)


def close_log() -> None:
    """Close the log; what is logged afterwards is not kept."""
    for handler in _log_handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()


def log_traceback(error: BaseException) -> None:
    """Keep the error's traceback, with its causes, in the log; it waits there if no log is open yet."""
    logger.error("%s", error, exc_info=error)


def _log_handlers() -> list[logging.Handler]:
    return [each for each in logging.getLogger().handlers if isinstance(each, LogFile | WaitingRecords)]


def _log_path() -> Path:
    """The file of the open log; without one, a log is opened where the system keeps them."""
    for handler in _log_handlers():
        if isinstance(handler, LogFile):
            return Path(handler.baseFilename)
    path = platformdirs.user_log_path("sidestep", appauthor=False) / LOG_NAME
    try:
        open_log(path)
    except RunError:
        path = Path(tempfile.gettempdir()) / LOG_NAME
        open_log(path)
    return path


def _log_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value:
        log_traceback(failure.exc_value)
