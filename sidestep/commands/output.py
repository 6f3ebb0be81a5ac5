"""The folder a command writes to: made if need be, with the log in it, and gone again when nothing came of it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidestep.config.runs import CHECKPOINTS
from sidestep.errors import ConfigError, SidestepError
from sidestep.files import cannot_write, clear_unfinished, held_alone
from sidestep.ui.problems import LOG_NAME, close_log, open_log, quiet_libraries

WAIT = 10  # Seconds; the processes that read songs outlive a run that was killed by five, and hold its lock.


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
            quiet_libraries()  # The wizard goes on, and without a log Python would print on the screen.
            log.unlink()
            _remove_empty(made)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of this folder, whose log is open and is what is locked; ConfigError where one is at work.

    What a run that was killed left half-written there is removed.
    """
    taken = ConfigError(
        f"Another run is writing to {folder}.",
        hint="Wait until it is done, stop it with Ctrl-C there, or choose another --output-dir.",
    )
    with held_alone(folder / LOG_NAME, taken=taken, wait=WAIT):
        for each in (folder, folder / CHECKPOINTS):
            clear_unfinished(each)
        yield


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
