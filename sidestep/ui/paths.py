"""Paths as people type, paste and drag them; and what a folder holds, without loading torch."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from sidestep.data.audio import AUDIO_SUFFIXES, find_audio
from sidestep.errors import DataError
from sidestep.files import nearest_existing

QUOTES = "'\""
# A quote within a quoted word, as shells and terminals write it.
ESCAPED_QUOTES = (r"\'", r"\"", """'"'"'""")


def read_path(text: str, *, is_windows: bool = os.name == "nt") -> Path:
    """The path that was meant: quotes, `~`, `file://` and the backslashes before spaces of a dragged folder are undone.

    ValueError when nothing is left, or the system takes no such path.
    """
    bare = _without_quotes(text.strip(), is_windows=is_windows)
    if bare.startswith("file://"):
        bare = unquote(bare.removeprefix("file://"))
    if not bare or "\0" in bare:
        raise ValueError("A path is needed here.")
    # A terminal escapes what is dragged into it; on Windows, and in the rare name that has one, a backslash is itself.
    if "\\" in bare and not is_windows and not _exists(bare):
        bare = re.sub(r"\\(.)", r"\1", bare)
    _exists(bare)
    return Path(bare).expanduser()


def _without_quotes(text: str, *, is_windows: bool) -> str:
    """What stands in the quotes that a path begins with, also where a shell's word has several: 'it'\\''s'.

    An apostrophe that no shell escaped is one of the name: 'Rock 'n' Roll'.
    """
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in QUOTES
    is_word = not is_quoted or any(escaped in text for escaped in ESCAPED_QUOTES)
    if is_word and not is_windows and text[:1] in QUOTES:
        try:
            words = shlex.split(text)
        except ValueError:  # The apostrophe of a name: 'it's'/.
            words = []
        if len(words) == 1:
            return words[0]
    return text[1:-1] if is_quoted else text


class PathCompleter(Completer):
    """Completes a path with Tab, behind a quote or `~` too; folders end in a separator."""

    def __init__(self, *, only_folders: bool) -> None:
        self._only_folders = only_folders

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What the text before the cursor can become."""
        text = document.text_before_cursor.lstrip().lstrip(QUOTES)
        head, _, start = text.replace(os.sep, "/").rpartition("/")
        folder = f"{head}/" if head or text.startswith("/") else "."
        for entry in _entries(folder):
            if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                is_folder = entry.is_dir()
                if is_folder or not self._only_folders:
                    ending = os.sep if is_folder else ""
                    yield Completion(entry.name[len(start) :] + ending, display=entry.name + ending)


def count_tensors(folder: Path) -> int:
    """How many songs a folder of tensors holds: what its manifest lists, else its .pt files."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        try:
            listed = json.loads(manifest.read_text(encoding="utf-8-sig"))
        except ValueError:  # Training explains a damaged manifest; here only a number is wanted.
            listed = None
        if isinstance(listed, dict) and isinstance(listed.get("samples"), list):
            return len(listed["samples"])
    return sum(not path.name.endswith(".tmp.pt") for path in folder.glob("*.pt")) if folder.is_dir() else 0


def holds_songs(folder: Path) -> bool:
    """Whether a folder holds audio and no tensors: songs that are still to be preprocessed."""
    return folder.is_dir() and not count_tensors(folder) and _holds_audio(folder)


def what_is_wrong_with_songs(folder: Path) -> str:
    """Why a folder cannot be a source of songs; nothing when it can."""
    try:
        find_audio(folder)
    except DataError as error:
        return error.message
    return ""


def what_is_wrong_with_data(folder: Path) -> str:
    """Why a folder cannot be trained on, neither as tensors nor as songs; nothing when it can."""
    if not folder.is_dir():
        return f"There is no folder {folder}."
    if count_tensors(folder) or _holds_audio(folder):
        return ""
    return f"{folder} holds neither tensors (.pt files) nor songs."


def what_is_wrong_with_output(path: Path) -> str:
    """Why nothing could be written to a folder, as far as that can be seen; nothing when it could."""
    existing = nearest_existing(path)
    if existing is None:
        return f"There is no {path.absolute().anchor} here."
    if not existing.is_dir():
        return f"{existing} is a file, not a folder."
    return "" if os.access(existing, os.W_OK) else f"{existing} cannot be written to."


def free_name(path: Path) -> Path:
    """This path, or the first one with a number behind it where nothing is yet: lora, lora_2, lora_3."""
    if not path.exists():
        return path
    stem = re.sub(r"_\d+$", "", path.name)
    return next(new for number in range(2, 10_000) if not (new := path.with_name(f"{stem}_{number}")).exists())


def beside(folder: Path, ending: str) -> Path:
    """A folder next to this one with a longer name, also where it was given as `.` or with a separator at its end."""
    whole = folder if folder.name not in ("", "..") else folder.resolve()
    return whole.with_name(f"{whole.name}_{ending}") if whole.name else whole / ending


def _holds_audio(folder: Path) -> bool:
    """Whether there is a song below a folder; looks no further than the first."""
    files = (name for _, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in files)


def _exists(text: str) -> bool:
    """Whether there is such a path; ValueError, with the reason, where the system will not even look."""
    try:
        return Path(text).expanduser().exists()
    except OSError as error:
        raise ValueError(f"{text} cannot be used: {error.strerror}.") from error
    except RuntimeError as error:
        raise ValueError(f"There is no user {text.partition('/')[0]} here.") from error


def _entries(folder: str) -> list[Path]:
    try:
        return sorted(Path(folder).expanduser().iterdir(), key=lambda path: path.name.lower())
    except (OSError, RuntimeError):  # Not there, or not ours to read: nothing to complete.
        return []
