"""Commands to be copied: what starts Side-Step here, quoted as the system's shell reads it."""

import os
import shlex
import subprocess
from collections.abc import Iterable

INSTALLER = "install_windows.bat" if os.name == "nt" else "./install.sh"
START_VARIABLE = "SIDESTEP_START"  # Set by the launchers that the installers leave.


def start_words() -> tuple[str, ...]:
    """Return the words that start Side-Step: the launcher that it was started with, else `uv run train.py`."""
    launcher = os.environ.get(START_VARIABLE)
    return (launcher,) if launcher else ("uv", "run", "train.py")


def shell_line(words: Iterable[object], *, is_windows: bool = os.name == "nt") -> str:
    """Return words as one line for a POSIX shell, or for Windows' cmd and PowerShell."""
    texts = map(str, words)
    return " ".join(map(_for_windows, texts)) if is_windows else shlex.join(texts)


def _for_windows(word: str) -> str:
    quoted = subprocess.list2cmdline([word])
    # Those are for the program that is started; these for the shell.
    return f'"{word}"' if quoted == word and set(word) & set("&|<>()^;,'") else quoted
