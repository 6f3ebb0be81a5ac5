"""Commands to be copied: what starts Side-Step here, quoted as the system's shell reads it."""

import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

INSTALLER = "install_windows.bat" if os.name == "nt" else "./install.sh"
START_VARIABLE = "SIDESTEP_START"  # Set by the launchers that the installers leave.


def start_words() -> tuple[str, ...]:
    """Return the words that start Side-Step: the launcher that it was started with, else `uv run train.py`."""
    launcher = os.environ.get(START_VARIABLE)
    return (launcher,) if launcher else ("uv", "run", "train.py")


def program_words(name: str) -> tuple[str, ...]:
    """Return the words that start a program which is installed with Side-Step: `hf`, `torchrun`, `tensorboard`."""
    if not os.environ.get(START_VARIABLE):
        return ("uv", "run", name)
    return (str(Path(".venv", "Scripts" if os.name == "nt" else "bin", name)),)


def shell_line(words: Iterable[object], *, is_windows: bool = os.name == "nt") -> str:
    """Return words as one line for a POSIX shell, or for Windows' cmd and PowerShell."""
    texts = map(str, words)
    return " ".join(map(_for_windows, texts)) if is_windows else shlex.join(texts)


def download_line(repository: str, folder: Path, *, without: Iterable[str] = ()) -> str:
    """Return the command that fetches a repository of Hugging Face, but for what lies in folders `without`."""
    left_out = (word for pattern in without for word in ("--exclude", f"{pattern}/*"))
    return shell_line([*program_words("hf"), "download", repository, "--local-dir", folder, *left_out])


def _for_windows(word: str) -> str:
    quoted = subprocess.list2cmdline([word])
    # Those are for the program that is started; these for the shell.
    return f'"{word}"' if quoted == word and set(word) & set("&|<>()^;,'") else quoted
