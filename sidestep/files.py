"""Files written whole or not at all, and what is said when they cannot be."""

import errno
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidestep.errors import RunError, SidestepError

# Windows takes no file and no folder of these names, whatever their ending.
DEVICE_NAMES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))}
)
# Windows' errors where another program (a virus scanner, OneDrive, a player) has a file open for a moment.
HELD_BY_ANOTHER = (5, 32, 33)
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # Seconds between the attempts to move such a file.
IS_WINDOWS = os.name == "nt"
# What a system says where another process holds a lock: Linux and macOS, Windows.
LOCKED_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_BEYOND = 2**30  # The byte that Windows locks, which nobody can read then: nothing is ever written there.
WINDOWS_LONGEST_PATH = 259
# Temporary names of files and of checkpoints; no file of the user's is called so.
_UNFINISHED = re.compile(r"\.([0-9a-f]{8}|epoch_\d+(_step_\d+)?)\.writing")

logger = logging.getLogger(__name__)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file in one move: under a temporary name in the same folder, flushed, then renamed; text as UTF-8.

    The folder is made if need be. RunError when the disk is full or the folder cannot be written; what was there
    before stays, and nothing half-written is left.
    """
    # A name of its own: two processes may write the same file at once, and the last one wins. A short one: what Windows
    # takes of `path`, it takes of this.
    temporary = path.with_name(f".{secrets.token_hex(4)}.writing")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def clear_unfinished(folder: Path) -> None:
    """Remove what a process that was killed left half-written in a folder that is locked against all others."""
    for path in folder.glob(".*.writing"):
        if not _UNFINISHED.fullmatch(path.name):
            continue
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            logger.warning("%s is left over and cannot be removed: %s", path, error)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder, a file in the place of what is there; OSError when the system refuses.

    Where Windows says that another program has it open, it is tried again for six seconds.
    """
    for wait in WAITS:
        try:
            source.replace(target)
        except OSError as error:
            if not _is_held(error):
                raise
            time.sleep(wait)
        else:
            return
    source.replace(target)


def nearest_existing(path: Path) -> Path | None:
    """Return the path, or the nearest one above it that is there; None on a drive that Windows does not have."""
    whole = path.absolute()
    return next((each for each in (whole, *whole.parents) if each.exists()), None)


@contextmanager
def held_alone(path: Path, *, taken: SidestepError, wait: float = 0) -> Iterator[None]:
    """Hold a lock on the file `path` for as long as the block lasts; raises `taken` where another process holds it.

    `wait`: seconds to wait for the other one. The system lets go of it however the process ends. The file is made if
    need be and stays: were it deleted, two processes could each lock a file of that name. A file system that knows no
    locks (some network shares) keeps nobody out; the log says so.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        until = time.monotonic() + wait
        while not _is_locked(file.fileno()):
            if time.monotonic() >= until:
                raise taken
            time.sleep(0.2)
        yield


def _is_locked(descriptor: int) -> bool:
    """Lock the file; False where another process has. Where the file system knows no locks, nothing is locked."""
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in LOCKED_BY_ANOTHER:
            return False
        logger.warning("The folder is not locked against other processes: %s", error)
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(error: OSError) -> bool:
    return getattr(error, "winerror", None) in HELD_BY_ANOTHER


def cannot_read(path: Path, error: OSError) -> RunError:
    """Return the error for a file or folder of the user's own settings that may not be read."""
    return RunError(
        f"{path} cannot be read: {error.strerror}.", hint="Let this user read it. Is HOME the folder of another user?"
    )


def cannot_write(path: Path, error: OSError) -> RunError:
    """Return the error for a file or folder that the system will not let us write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"The disk is full: {path} cannot be written.", hint="Free some space, then run it again.")
    reason = error.strerror or str(error)
    if _is_held(error):
        how = "Close what may have it open (a player, an editor, OneDrive), and see that the folder may be written."
        return RunError(f"{path} cannot be written: {reason.rstrip('.')}.", hint=how)
    if IS_WINDOWS and len(str(path.absolute())) > WINDOWS_LONGEST_PATH:
        return RunError(
            f"Windows cannot write {path}: its path is too long.", hint="Choose a shorter path for the folder."
        )
    return RunError(f"{path} cannot be written: {reason}.", hint="Choose another folder, or make this one writable.")
