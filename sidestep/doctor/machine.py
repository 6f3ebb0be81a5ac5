"""The machine as far as it can be examined without torch: versions, packages, sound, processes."""

import io
import multiprocessing
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import soundfile

from sidestep.config.places import PROJECT, product_version
from sidestep.config.shell import INSTALLER
from sidestep.doctor.finding import Finding

GIB = 2**30
# Docker gives 64 MiB, and readers hand every batch over through it.
SHARED_MEMORY = 256 * 2**20
SAMPLE_RATE = 48_000
# File format and encoding of what README says can be read. One that libsndfile cannot write it cannot read either.
FORMATS = {
    "wav": ("WAV", "PCM_24"),
    "flac": ("FLAC", "PCM_24"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
SYNC = f"{INSTALLER} in Side-Step's folder installs what is needed."


def versions() -> Iterator[Finding]:
    """Say which Side-Step runs on which Python and system, and which of its packages are missing."""
    yield Finding(
        "Side-Step", f"{product_version()} on Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    missing = [name for name in _needed() if _installed(name) is None]
    if missing:
        yield Finding("Packages", f"These are not installed: {', '.join(missing)}.", "problem", SYNC)
    wanted, found = _needed().get("torch", ""), _installed("torch")
    if found and wanted and not f"{found}.".startswith(f"{wanted}."):
        yield Finding("Packages", f"torch {found} is not the {wanted} that Side-Step was tested with.", "note", SYNC)


def _needed() -> dict[str, str]:
    """Return the packages that are needed on this system, and the version where there is but one: `torch`: `2.11`."""
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    needed = {}
    for line in declared:
        name, _, condition = line.partition(";")
        # Without it all but one optimizer and one quantization work; the line about it says so.
        if not condition:
            exact = re.search(r"==([\d.]+)\.\*", name)
            needed[re.split(r"[<>=]", name)[0].strip()] = exact[1] if exact else ""
    return needed


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sound() -> Finding:
    """Write a tone in every format that songs may have, and read it again, in memory."""
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    tone = np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * 2, axis=1).astype(np.float32)
    unread = [name for name, kind in FORMATS.items() if not _comes_back(tone, *kind)]
    library = f"libsndfile {soundfile.__libsndfile_version__}"
    read = ", ".join(name for name in FORMATS if name not in unread)
    if not unread:
        return Finding("Sound", f"{read} can be read ({library}).")
    return Finding(
        "Sound",
        f"{', '.join(unread)} cannot be read ({library}); {read or 'nothing'} can.",
        "note" if {"wav", "flac"} - set(unread) else "problem",
        f"Convert songs to FLAC, or update soundfile. {SYNC}",
    )


def _comes_back(tone: np.ndarray, file_format: str, encoding: str) -> bool:
    """Say whether a tone is still itself after it was written and read; lossy formats keep its level."""
    file = io.BytesIO()
    try:
        soundfile.write(file, tone, SAMPLE_RATE, format=file_format, subtype=encoding)
        file.seek(0)
        heard, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, ValueError):  # ValueError: soundfile knows no such format.
        return False
    level = float(np.sqrt(np.square(heard[len(heard) // 4 : -len(heard) // 4]).mean()))
    return rate == SAMPLE_RATE and abs(level - 0.5 / np.sqrt(2)) < 0.02


def processes(shared: Path = Path("/dev/shm")) -> Finding:
    """Say how songs are read beside the training: how many CPU cores, how processes start, what they hand over by."""
    text = f"{os.cpu_count()} CPU cores; readers start by {multiprocessing.get_start_method()}"
    if not shared.is_dir():
        return Finding("Readers", f"{text}.")
    free = shutil.disk_usage(shared).free
    text += f"; {shared}: {free / GIB:.1f} GiB free."
    if free >= SHARED_MEMORY:
        return Finding("Readers", text)
    way_out = "Train with --num-workers 0, or give the container more: docker run --shm-size=2g."
    return Finding("Readers", f"{text} Readers hand batches over through it.", "note", way_out)
