"""Find, probe and read audio files: wav, flac, mp3, ogg and opus, through libsndfile."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from sidestep.data.containers import check_whole, cut_off, wrong_length
from sidestep.errors import DataError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})
UNREAD_SUFFIXES = frozenset({".m4a", ".aac", ".wma", ".aif", ".aiff", ".mp4", ".alac", ".ape", ".wv"})
READABLE = "wav, flac, mp3, ogg and opus"

SAMPLE_RATE = 48_000  # Hz, what the model hears.
# The kernel that resamples has about (48000 / g) * (rate / g) values, g the greatest common divisor of the rates:
# 23,520 for 44.1 kHz, but two thousand million for 44,101 Hz.
LARGEST_KERNEL = 64_000_000
# One latent frame of the VAE is 1920 samples at 48 kHz; less sound gives no latent at all.
MINIMUM_SECONDS = 1920 / SAMPLE_RATE
BLOCK_FRAMES = 1 << 18
# What libsndfile reports for a FLAC whose encoder did not know the length (written to a pipe).
UNKNOWN_FRAMES = 1 << 62
# An MP3's header may count two frames too many, and a gapless one hides up to two times 4095 samples of padding.
SHORTFALL_SAMPLES = 2 * 1152
PADDING_SAMPLES = SHORTFALL_SAMPLES + 2 * 4095


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file's header says: length in seconds, sample rate in Hz, number of channels."""

    seconds: float
    sample_rate: int
    channels: int


def find_files(folder: Path) -> list[Path]:
    """List every file below `folder`, sorted by its relative path; hidden files and folders are left out.

    Links are followed, each real folder once. Raises DataError when a folder is missing or cannot be listed.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}.", hint="Give the folder that holds the songs.")
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def find_audio(folder: Path) -> list[Path]:
    """List the audio files below `folder`, sorted by relative path, whatever the case of their suffix.

    Raises DataError when the folder is missing or holds no audio.
    """
    files = find_files(folder)
    audio = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    if not audio:
        others = sorted({path.suffix.lower() for path in files} & UNREAD_SUFFIXES)
        hint = f"Convert the {' '.join(others)} files to FLAC first." if others else "Is it the right folder?"
        raise DataError(f"There is no audio in {folder} (searched for {READABLE}, subfolders too).", hint=hint)
    return audio


def probe(path: Path) -> AudioInfo:
    """Read length, rate and channels without decoding.

    Raises DataError naming the file when it is unreadable, cut off, empty, shorter than one latent frame (0.04 s),
    or of a sample rate that cannot be resampled.
    """
    with _open(path) as file:
        return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels)


def read_audio(path: Path, *, max_seconds: float) -> tuple[np.ndarray, int]:
    """Read a track as float32 [channels, samples] at its own rate (Hz, returned second).

    Mono stays one channel; of more than two the first two are kept. What lies behind `max_seconds` is left out; 0 means
    the whole file. Raises DataError naming the file when it is unreadable, cut off, shorter than 0.04 s, of a rate that
    cannot be resampled, or holds NaN or infinite samples.
    """
    with _open(path) as file:
        frames = file.frames
        if max_seconds > 0:
            frames = min(frames, round(max_seconds * file.samplerate))
        blocks = list(_decode(file, path, frames))
        return np.ascontiguousarray(np.concatenate(blocks).T), file.samplerate


def stream_audio(path: Path) -> Iterator[np.ndarray]:
    """Yield the whole track in float32 blocks [samples, channels], its first two channels; errors as `read_audio`."""
    with _open(path) as file:
        yield from _decode(file, path, file.frames)


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").strip().rstrip(".") or "it cannot be decoded"


def _cannot_list(error: OSError) -> None:
    raise DataError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error


@contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    if not path.is_file():
        what = "is a link to a file that is not there" if path.is_symlink() else "is not there"
        raise DataError(f"{path.name} {what}.")
    if (readable := str(path).encode(errors="replace").decode()) != str(path):
        # libsndfile's binding cannot open it, and no JSON can name it.
        raise DataError(f"The path {readable} is not valid UTF-8.", hint="Rename what has a ? in it.")
    held = check_whole(path)
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{path.name} cannot be read as audio ({_reason(error)}).",
            hint=f"{READABLE} can be read; convert it, or take it out of the folder.",
        ) from error
    with file:
        if file.frames >= UNKNOWN_FRAMES:
            raise wrong_length(path, "its header does not say how long it is")
        if held is not None and abs(file.frames - held) > PADDING_SAMPLES:
            told, there = file.frames / file.samplerate, held / file.samplerate
            raise wrong_length(path, f"{told:.1f} s in place of {there:.1f} s")
        if file.frames / file.samplerate < MINIMUM_SECONDS:
            length = "holds no sound: its length is zero" if not file.frames else f"is too short: {file.frames} samples"
            raise DataError(f"{path.name} {length}.", hint=f"A song needs at least {MINIMUM_SECONDS} s.")
        _check_rate(path, file.samplerate)
        yield file


def _check_rate(path: Path, rate: int) -> None:
    divisor = math.gcd(rate, SAMPLE_RATE)
    if (SAMPLE_RATE // divisor) * (rate // divisor) > LARGEST_KERNEL:
        raise DataError(
            f"{path.name} has a sample rate of {rate} Hz, which is too odd to resample to {SAMPLE_RATE} Hz.",
            hint=f"Convert it first: ffmpeg -i song{path.suffix} -ar {SAMPLE_RATE} converted.flac",
        )


def _decode(file: soundfile.SoundFile, path: Path, frames: int) -> Iterator[np.ndarray]:
    """Yield float32 blocks [samples, channels] until `frames` are read."""
    left = frames
    while left > 0:
        try:
            block = file.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)[:, :2]
        except soundfile.LibsndfileError as error:
            raise cut_off(path, _reason(error)) from error
        if not len(block):
            if left > SHORTFALL_SAMPLES:
                there, told = (frames - left) / file.samplerate, file.frames / file.samplerate
                raise cut_off(path, f"its header promises {told:.1f} s, {there:.1f} s are there")
            return
        if not np.isfinite(block).all():
            raise DataError(
                f"{path.name} holds samples that are not finite (NaN or infinity).", hint="Export the song again."
            )
        left -= len(block)
        yield block
