"""Sounds on disk. Loads no torch."""

import io
import re
from pathlib import Path

import numpy as np
import soundfile

from sidestep.files import write_whole

SAMPLE_RATE = 48_000
_SUBTYPE = "PCM_16"


def write_flac(path: Path, audio: np.ndarray) -> None:
    """Write a sound [channels, samples] at 48 kHz as FLAC in one move; RunError when the file cannot be written."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T, SAMPLE_RATE, format="FLAC", subtype=_SUBTYPE)
    write_whole(path, buffer.getvalue())


def free_path(path: Path) -> Path:
    """Return the path, or the first of path_2, path_3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free


def file_stem(text: str, *, longest: int = 40) -> str:
    """Return letters and digits of a text, joined by dashes, for the name of a file."""
    return re.sub(r"[^\w]+", "-", text, flags=re.UNICODE).strip("-_")[:longest].rstrip("-_") or "sample"
