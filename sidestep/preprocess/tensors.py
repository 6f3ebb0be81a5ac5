"""The tensor file of one song, and the list of the songs in a folder: written, read, checked.

A tensor file is `torch.save` of a dict (T latent frames of 1/25 s, L condition rows, D width of the condition encoder):

| key | shape | meaning |
|---|---|---|
| target_latents | [T, 64] | VAE latents of the audio |
| attention_mask | [T] | ones |
| encoder_hidden_states | [L, D] | lyrics, timbre and text rows from the condition encoder |
| encoder_attention_mask | [L] | True where a row is valid; ours are valid throughout |
| context_latents | [T, 128] | silence latents and a mask of ones, 64 channels each |
| metadata | dict | plain values, `format_version` among them |

The tools of ACE-Step and earlier releases of Side-Step write the same keys without `format_version`, with padding rows.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sidestep.config.shell import shell_line, start_words
from sidestep.errors import DataError
from sidestep.files import write_whole

FORMAT_VERSION = 2
FRAMES_PER_SECOND = 25
LATENT_CHANNELS = 64
MANIFEST_NAME = "manifest.json"
PASS1_NAME = ".pass1"
TENSOR_KEYS = ("target_latents", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "context_latents")
_PREPROCESS = shell_line([*start_words(), "fixed", "--preprocess"])
AGAIN = f"Run preprocessing again: {_PREPROCESS} ..."
DELETE = f"Delete the file and run preprocessing again: {_PREPROCESS} ..."


@dataclass(frozen=True, slots=True)
class Sample:
    """One song as training reads it: `target_latents` [T, 64], `encoder_hidden_states` [L, D] (valid rows only),
    `context_latents` [T, 128], all on the CPU in the dtype they were stored in, and `metadata`."""

    target_latents: Tensor
    encoder_hidden_states: Tensor
    context_latents: Tensor
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Header:
    """What a tensor file says of itself, read without its tensors: its length in latent frames (25 a second), the
    number and the width D of its valid condition rows, how often the song counts, and its metadata."""

    frames: int
    rows: int
    condition_width: int
    repeat: int
    metadata: Mapping[str, Any]


def write_sample(path: Path, sample: Sample) -> None:
    """Write `sample` as a tensor file; equal samples give equal bytes, whatever the file is called.

    Raises DataError when a tensor is misshapen or not finite, RunError when the file cannot be written.
    """
    write_whole(path, sample_bytes(sample, name=path.name))


def sample_bytes(sample: Sample, *, name: str) -> bytes:
    """The content of the tensor file of `sample`; `name` is what a DataError calls it."""
    latents, states, context = sample.target_latents, sample.encoder_hidden_states, sample.context_latents
    _check_tensors(name, latents, states, context)
    content = {
        "target_latents": _compact(latents),
        "attention_mask": torch.ones(latents.shape[0], dtype=latents.dtype),
        "encoder_hidden_states": _compact(states),
        "encoder_attention_mask": torch.ones(states.shape[0], dtype=torch.bool),
        "context_latents": _compact(context),
        # Through JSON: plain values only (a NumPy number or a Path makes the file unreadable with weights_only=True),
        # and no string object shared by two fields, which pickle would write as a reference.
        "metadata": json.loads(json.dumps({**sample.metadata, "format_version": FORMAT_VERSION}, allow_nan=False)),
    }
    buffer = io.BytesIO()
    # A buffer, not a path: torch.save writes the file's name into the archive.
    torch.save(content, buffer)
    return buffer.getvalue()


def read_sample(path: Path, *, allow_cover_context: bool = False) -> Sample:
    """Read a tensor file, ours or one of the ACE-Step tools, without its padding rows.

    Raises DataError naming the file when it is unreadable, lacks a key, is of another format version, is misshapen or
    not finite, or when its context holds the song itself (`preprocess_mode` lokr) and `allow_cover_context` is false.
    """
    content = _load(path)
    metadata = content["metadata"]
    if metadata.get("preprocess_mode") == "lokr" and not allow_cover_context:
        raise _cover_context_error(path)
    states, mask = content["encoder_hidden_states"], content["encoder_attention_mask"]
    if mask.shape != states.shape[:1]:
        raise DataError(
            f"{path.name} is damaged: {tuple(mask.shape)} mask for {tuple(states.shape)} condition rows.", hint=DELETE
        )
    mask = mask.bool()
    states = states if bool(mask.all()) else states[mask]
    _check_tensors(path.name, content["target_latents"], states, content["context_latents"])
    return Sample(content["target_latents"], states, content["context_latents"], metadata)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a tensor file, without reading its tensors from disk. Raises DataError like `read_sample`."""
    return _load(path, mmap=True)["metadata"]


def read_header(path: Path) -> Header:
    """The header of a tensor file. Raises DataError like `read_sample`, but for what only the numbers show."""
    content = _load(path, mmap=True)
    metadata, latents, states = content["metadata"], content["target_latents"], content["encoder_hidden_states"]
    if metadata.get("preprocess_mode") == "lokr":
        raise _cover_context_error(path)
    if latents.dim() != 2 or states.dim() != 2 or latents.shape[0] == 0:
        raise DataError(
            f"{path.name} is damaged: target_latents is {tuple(latents.shape)}, "
            f"encoder_hidden_states {tuple(states.shape)}.",
            hint=AGAIN,
        )
    repeat = metadata.get("repeat", 1)
    if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1:
        raise DataError(f"{path.name} says it counts {repeat!r} times; that must be a whole number from 1.", hint=AGAIN)
    rows = int(content["encoder_attention_mask"].sum())
    return Header(latents.shape[0], rows, states.shape[1], repeat, metadata)


def checksum(path: Path) -> str:
    """Identify the numbers of a tensor file by the checksums that its own directory lists; no tensor is read."""
    with zipfile.ZipFile(path) as file:
        return "".join(f"{record.CRC:08x}" for record in file.infolist() if "/data/" in record.filename)


def sample_frames(path: Path) -> int:
    """How many latent frames (25 a second) the song has, without reading its tensors from disk. Raises DataError."""
    latents = _load(path, mmap=True)["target_latents"]
    if latents.dim() != 2:
        raise DataError(f"{path.name} is damaged: target_latents is {tuple(latents.shape)}.", hint=DELETE)
    return latents.shape[0]


def sample_paths(folder: Path) -> list[Path]:
    """The tensor files to train on: those in the folder's manifest.json, in its order, or else every `*.pt`, sorted.

    Raises DataError when there are none, when preprocessing was interrupted, or when the manifest is malformed, names a
    file that is not there, or leaves the folder.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", hint=AGAIN)
    if any((folder / PASS1_NAME).glob("*")):
        raise DataError(
            f"Preprocessing into {folder} was interrupted before its second pass was over.",
            hint="Run the same preprocessing command again; it goes on where it was.",
        )
    if (folder / MANIFEST_NAME).is_file():
        paths = [listed_path(folder, entry) for entry in read_manifest(folder)]
    else:
        names = sorted(entry.name for entry in folder.glob("*.pt") if not entry.name.startswith("."))
        paths = [folder / name for name in names if not name.endswith(".tmp.pt")]
    if not paths:
        raise DataError(f"There are no tensor files in {folder}.", hint=AGAIN)
    return paths


def read_manifest(folder: Path) -> list[str]:
    """The entries of the folder's manifest.json, with forward slashes. Raises DataError when it is malformed."""
    path = folder / MANIFEST_NAME
    hint = f"Delete it to train on every .pt file of the folder, or preprocess again. {AGAIN}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint=hint) from error
    entries = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f'{path} has no list of file names under "samples".', hint=hint)
    return [entry.replace("\\", "/") for entry in entries]


def listed_path(folder: Path, entry: str) -> Path:
    """The file a manifest entry means: relative to the folder, or (older ACE-Step tools) to the current directory."""
    root = folder.resolve()
    candidates = [(base / PurePosixPath(entry)).resolve() for base in (root, Path.cwd())]
    inside = [path for path in candidates if path.is_relative_to(root)]
    if not inside:
        raise DataError(
            f"{folder / MANIFEST_NAME} lists {entry}, which is outside the folder.",
            hint="Tensor files must lie in the folder of their manifest.",
        )
    for path in inside:
        if path.is_file():
            return folder / path.relative_to(root)
    raise DataError(
        f"{folder / MANIFEST_NAME} lists {entry}, which is not there.",
        hint=f"Preprocess again, or delete manifest.json to train on every .pt file of the folder. {AGAIN}",
    )


def _cover_context_error(path: Path) -> DataError:
    return DataError(
        f"{path.name} was made in lokr mode: its context holds the song itself, which is then no task to learn.",
        hint=f"Preprocess the songs here; one set of tensors serves every adapter. {AGAIN}",
    )


def _load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The dict in a tensor file, its keys and types checked."""
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap) if is_archive else None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path.name} cannot be read: {_reason(error)}.", hint=DELETE) from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} is not a tensor file.", hint=DELETE)
    missing = [key for key in TENSOR_KEYS if not isinstance(content.get(key), Tensor)]
    missing += [] if isinstance(content.get("metadata"), dict) else ["metadata"]
    if missing:
        raise DataError(f"{path.name} lacks {', '.join(missing)}.", hint=DELETE)
    _check_version(path.name, content["metadata"].get("format_version"))
    return content


def _reason(error: Exception) -> str:
    """Say what is wrong with a file in our words; torch's advice is to read it unsafely."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return "it is not there" if isinstance(error, FileNotFoundError) else "it may not be opened"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than tensors and plain values"
    return "it is cut off or damaged"


def _check_version(name: str, version: object) -> None:
    """Files of other tools have no version; their layout is the one described above."""
    if version is None or version == FORMAT_VERSION:
        return
    age = "an older" if isinstance(version, int) and version < FORMAT_VERSION else "a newer"
    raise DataError(f"{name} was made by {age} Side-Step (format {version}, this is {FORMAT_VERSION}).", hint=AGAIN)


def _check_tensors(name: str, latents: Tensor, states: Tensor, context: Tensor) -> None:
    frames = latents.shape[0] if latents.dim() else 0
    wanted: Sequence[tuple[str, Tensor, bool]] = (
        ("target_latents", latents, latents.dim() == 2 and frames > 0 and latents.shape[1] == LATENT_CHANNELS),
        ("encoder_hidden_states", states, states.dim() == 2 and states.shape[0] > 0 and states.shape[1] > 0),
        ("context_latents", context, tuple(context.shape) == (frames, 2 * LATENT_CHANNELS)),
    )
    for key, tensor, fits in wanted:
        if not fits or not tensor.is_floating_point():
            raise DataError(
                f"{name} is damaged or of an older format: {key} is {tensor.dtype} {tuple(tensor.shape)}.", hint=DELETE
            )
        if not is_finite(tensor):
            raise DataError(
                f"{name}: {key} holds numbers that are not finite.",
                hint="Try --precision fp32; if it stays, leave this song out.",
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite.

    One that is not makes the sum so too, and a sum takes a fiftieth of the time of looking at every number. That finite
    numbers have a sum that is not happens in float16; only then every one is looked at.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU and owning its memory: a view would be saved with everything behind it."""
    return tensor.detach().to("cpu", copy=True).contiguous()
