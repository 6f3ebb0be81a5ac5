"""Which safetensors file holds which tensor, and whether that is what a model wants; reads headers, not whole files."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Thread
from typing import Any

import numpy as np

from sidestep.errors import ModelError

DOWNLOAD_AGAIN = "Download this checkpoint again: the file is incomplete or was changed."
LET_READ = "Let this user read it; another one may have downloaded it."
_LARGEST_HEADER = 100_000_000  # Bytes; the limit of the safetensors format.
_SHOWN = 5
_PORTION = 100_000_000  # Bytes.
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its 16 bits instead.
_UNQUANTISED = "Use a complete, unquantised ACE-Step 1.5 checkpoint whose config.json belongs to its weights."
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `name` inside `file`, its shape and safetensors dtype, where its data begin and how many
    bytes they are."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int

    def first_values(self, count: int) -> np.ndarray:
        """Read the first `count` values (fewer if it is smaller), row by row, as float32 [n], and nothing more.

        ModelError for a quantised tensor.
        """
        check_formats([self])
        values = np.fromfile(
            self.file, _NUMPY_DTYPES[self.dtype], min(count, math.prod(self.shape)), offset=self.offset
        )
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint. Raises ModelError when it is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing.", hint="Download this checkpoint again: it is incomplete.") from error
    except PermissionError as error:
        raise ModelError(f"{path} may not be read: {error.strerror}.", hint=LET_READ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", hint=DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.", hint=DOWNLOAD_AGAIN)
    return content


def read_weights(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """List the tensors of `{stem}.safetensors`, or of the shards named in `{stem}.safetensors.index.json`.

    Raises ModelError for a missing or truncated file, a missing shard, and an index that does not fit its shards.
    """
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return read_header(single)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} holds no weights: neither {single.name} nor {index.name} is there.",
            hint="Download this checkpoint again: it is incomplete. Weights in other formats (.bin, .pt) are not read.",
        )
    return _read_shards(index)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file. Raises ModelError when it is truncated or no safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == _LFS_POINTER[:8]:
                raise ModelError(f"{file} is a Git LFS pointer, not the weights.", hint="Run `git lfs pull` there.")
            if len(start) < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise ModelError(f"{file} is truncated or no safetensors file.", hint=DOWNLOAD_AGAIN)
            header = json.loads(stream.read(length))
    except PermissionError as error:
        raise ModelError(f"{file} may not be read: {error.strerror}.", hint=LET_READ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}.", hint=DOWNLOAD_AGAIN) from error
    try:
        tensors = {
            name: _stored(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
        end = 8 + length + max((header[name]["data_offsets"][1] for name in tensors), default=0)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"The header of {file} is not that of a safetensors file.", hint=DOWNLOAD_AGAIN) from error
    if size != end:
        state = "truncated" if size < end else "damaged"
        raise ModelError(f"{file} is {state}: it has {size:,} bytes instead of {end:,}.", hint=DOWNLOAD_AGAIN)
    return tensors


def _stored(file: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"], start + begin, end - begin)


def in_portions(stored: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Yield the tensors in the order in which they lie on disk, file by file, some 100 MB (or one tensor) at a time."""
    portion: list[StoredTensor] = []
    size = 0
    for tensor in sorted(stored, key=lambda tensor: (tensor.file, tensor.offset)):
        if portion and (size + tensor.size > _PORTION or tensor.file != portion[0].file):
            yield portion
            portion, size = [], 0
        portion.append(tensor)
        size += tensor.size
    if portion:
        yield portion


def read_ahead(stored: Iterable[StoredTensor]) -> None:
    """Ask the system to fetch just these tensors from disk while the program does something else.

    Returns at once, and does nothing where the system takes no such hint. What is wrong with a file is not said here.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    portions = list(in_portions(stored))
    Thread(target=_fetch, args=(portions,), daemon=True).start()


def _fetch(portions: Iterable[Sequence[StoredTensor]]) -> None:
    for portion in portions:
        # Only a hint: reading the file will say what is wrong with it.
        with suppress(OSError), portion[0].file.open("rb") as file:
            for tensor in portion:
                os.posix_fadvise(file.fileno(), tensor.offset, tensor.size, os.POSIX_FADV_WILLNEED)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f'{index} has no "weight_map" from tensors to files.', hint=DOWNLOAD_AGAIN)
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if PurePath(name).name != name]
    if outside:
        raise ModelError(f"{index} names a file outside its folder: {outside[0]}.", hint=DOWNLOAD_AGAIN)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files: {shorten(missing)}.",
            hint="Download the missing files; the index names them.",
        )
    shards = {name: read_header(index.parent / name) for name in names}
    absent = [tensor for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if absent:
        raise ModelError(
            f"{index} names {len(absent)} tensors that its files do not hold: {shorten(absent)}.", hint=DOWNLOAD_AGAIN
        )
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def check_formats(stored: Iterable[StoredTensor]) -> None:
    """Raise ModelError for a tensor in a format that is not read: quantised numbers mean nothing by themselves."""
    for tensor in stored:
        if tensor.dtype not in _NUMPY_DTYPES:
            raise ModelError(f"{tensor.file} is quantised: {tensor.name} is {tensor.dtype}.", hint=_UNQUANTISED)


def shorten(names: Iterable[str]) -> str:
    """List the first few names, and say how many more there are."""
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def check_tensors(
    what: str,
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    *,
    name_on_disk: Callable[[str], str],
) -> None:
    """Raise ModelError naming the tensors that are missing, surplus, misshapen or quantised, by their names on disk.

    Both mappings are keyed by the model's own names; `stored` holds all that belongs to this part of the checkpoint.
    """
    shared = sorted(wanted.keys() & stored.keys())
    differences = {
        "missing": [name_on_disk(name) for name in sorted(wanted.keys() - stored.keys())],
        "surplus": [stored[name].name for name in sorted(stored.keys() - wanted.keys())],
        "of another shape": [
            f"{stored[name].name} (stored {list(stored[name].shape)}, wanted {list(wanted[name])})"
            for name in shared
            if stored[name].shape != tuple(wanted[name])
        ],
        "of a dtype that is not read": [
            f"{stored[name].name} ({stored[name].dtype})" for name in shared if stored[name].dtype not in _NUMPY_DTYPES
        ],
    }
    problems = [f"{len(found)} {problem}: {shorten(found)}" for problem, found in differences.items() if found]
    if problems:
        raise ModelError(f"The {what} does not fit its config.json: tensors {'; '.join(problems)}.", hint=_UNQUANTISED)
