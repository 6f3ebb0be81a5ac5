"""Finds an adapter's weights file and what its header says; reads headers only and loads no torch."""

import json
from pathlib import Path
from typing import Any

from sidestep.config.runs import COPY_AGAIN, LOHA_FILE, LOKR_FILE, LORA_FILE, checkpoints_in, final_of_run
from sidestep.errors import ModelError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_FILES = (LORA_FILE, LOKR_FILE, LOHA_FILE, DIFFUSERS_FILE)
_LARGEST_HEADER = 100_000_000  # Bytes; the limit of the safetensors format.


def find_adapter(path: Path) -> Path:
    """Return the weights file of an adapter: `path` itself, or the one in that folder or in adapter/ below it.

    The output folder of a run means its final adapter. ModelError when there is none, or several that could be meant.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is not a safetensors file.", hint="Give an adapter's folder or its .safetensors.")
        return path
    if not path.is_dir():
        raise ModelError(f"There is no adapter {path}: no such file or folder.")
    for folder in (path, path / "adapter", *final_of_run(path)):
        for name in _FILES:
            if (folder / name).is_file():
                return folder / name
    checkpoints = checkpoints_in(path)
    if checkpoints:  # A run's folder may hold another safetensors file: the directions of a rank map.
        raise ModelError(
            f"The run in {path} has not come to its final adapter.",
            hint=f"Its checkpoints hold the adapter as it was then: give {checkpoints[0]}, or go on with the run.",
        )
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} safetensors files" if found else "no safetensors file"
    raise ModelError(f"{path} holds {what}.", hint="Give the file of the adapter itself.")


def header_of(file: Path) -> dict[str, str]:
    """Return the header's own words of a safetensors file. ModelError when it is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ModelError(f"{file} is no safetensors file.", hint=COPY_AGAIN)
            content = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}.", hint=COPY_AGAIN) from error
    words = content.get("__metadata__", {}) if isinstance(content, dict) else {}
    return words if isinstance(words, dict) else {}


def origin_of(file: Path) -> dict[str, Any]:
    """Return what our own training wrote about an adapter: `model_variant`, `decoder`, ...; empty for others'."""
    try:
        origin = json.loads(str(header_of(file).get("sidestep", "{}")))
    except (ValueError, RecursionError):
        return {}
    return origin if isinstance(origin, dict) else {}
