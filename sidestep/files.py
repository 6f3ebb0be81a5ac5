"""Files written whole or not at all, and what is said when they cannot be."""

import errno
import os
from pathlib import Path

from sidestep.errors import RunError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file in one move: under a temporary name in the same folder, flushed, then renamed; text as UTF-8.

    The folder is made if need be. RunError when the disk is full or the folder cannot be written; what was there
    before stays, and nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.writing")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunError:
    """Return the error for a file or folder that the system will not let us write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"The disk is full: {path} cannot be written.", hint="Free some space, then run it again.")
    reason = error.strerror or str(error)
    return RunError(f"{path} cannot be written: {reason}.", hint="Choose another folder, or make this one writable.")
