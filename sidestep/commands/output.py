"""The folder a command writes to: made if need be, with the log in it, and gone again when nothing came of it."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidestep.errors import ConfigError, SidestepError
from sidestep.files import cannot_write
from sidestep.ui.problems import LOG_NAME, close_log, open_log

WAIT = 10  # Seconds; the processes that read songs outlive a run that was killed by five, and hold its lock.
_BEYOND = 2**30  # Where Windows locks a byte of the log: nothing is ever written there.

logger = logging.getLogger(__name__)


@contextmanager
def log_in(folder: Path) -> Iterator[None]:
    """Make the folder if need be and keep the log in it; RunError when nothing can be written there.

    What was made is taken back when the command is refused, or stopped, before it has written anything else there.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    _check_writable(folder)
    before = set(folder.iterdir())
    log = folder / LOG_NAME
    open_log(log)
    try:
        yield
    except (SidestepError, KeyboardInterrupt):
        if log not in before and log.exists() and set(folder.iterdir()) == {*before, log}:
            close_log()
            log.unlink()
            _remove_empty(made)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of this folder, whose log is open; ConfigError where one is at work in it.

    The lock is the system's, on the log: it is gone with the process, whatever ends that.
    """
    file = os.open(folder / LOG_NAME, os.O_RDWR)
    try:
        until = time.monotonic() + WAIT
        while not _is_locked(file):
            if time.monotonic() > until:
                raise ConfigError(
                    f"Another run is writing to {folder}.",
                    hint="Wait until it is done, stop it with Ctrl-C there, or choose another --output-dir.",
                )
            time.sleep(0.2)
        yield
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    """Lock the file; False where another process has. Where the file system knows no locks, nothing is locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, _BEYOND, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning("The folder is not locked against other runs: %s", error)
    return True


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise cannot_write(folder, error) from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()
