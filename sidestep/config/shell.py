"""Commands to be copied: what starts Side-Step here, quoted as the system's shell reads it."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

INSTALLER = "install_windows.bat" if os.name == "nt" else "./install.sh"
START_VARIABLE = "SIDESTEP_START"  # Set by the launchers that the installers leave.
MARK = "locked.txt"  # What the installers leave in the environment that they make.
SCRIPT = Path(__file__).resolve().parent.parent.parent / "train.py"


def start_words(*, processes: int = 1) -> tuple[str, ...]:
    """Return the words that start Side-Step, in as many processes: its launcher, its Python, or `uv run`."""
    script = SCRIPT.name if _uv_runs_it() else _from_here(SCRIPT)
    if processes > 1:
        return (*program_words("torchrun"), "--standalone", "--nproc-per-node", str(processes), script)
    launcher = os.environ.get(START_VARIABLE)
    if launcher:
        return (launcher,)
    return ("uv", "run", script) if _uv_runs_it() else (*program_words("python"), script)


def program_words(name: str) -> tuple[str, ...]:
    """Return the words that start a program which is installed with Side-Step: `hf`, `torchrun`, `tensorboard`."""
    return ("uv", "run", name) if _uv_runs_it() else (_from_here(Path(sys.executable).with_name(name)),)


def _uv_runs_it() -> bool:
    """Say whether `uv run` is the way: not in an installer's environment, whose torch it might replace.

    And only in Side-Step's own folder: from another one it finds neither the script nor the environment.
    """
    is_installed = bool(os.environ.get(START_VARIABLE)) or Path(sys.prefix, MARK).is_file()
    return not is_installed and _here() == SCRIPT.parent


def _from_here(path: Path) -> str:
    here = _here()
    return str(path.relative_to(here) if here and path.is_relative_to(here) else path)


def _here() -> Path | None:
    """Return the current folder; None where it was deleted meanwhile."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


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
    return f'"{word}"' if quoted == word and set(word) & set("&|<>()^;,'@{}#") else quoted
