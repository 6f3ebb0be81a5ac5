"""What the first pass leaves for the second: one small file a song and part, so that an interrupted run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.errors import RunError
from sidestep.files import write_whole
from sidestep.preprocess.tensors import PASS1_NAME

SUFFIX = ".safetensors"


def write_part(
    folder: Path, name: str, tensors: Mapping[str, Tensor], *, key: str, facts: Mapping[str, int] | None = None
) -> None:
    """Keep `tensors` and `facts` under `name`; they hold as long as `key` is asked for. Raises RunError."""
    header = {"key": key, "facts": json.dumps(facts or {})}
    write_whole(_path(folder, name), safetensors.torch.save(dict(tensors), header))


def read_part(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors and facts kept under `name`, which `has_part` has said to be there."""
    with safe_open(_path(folder, name), framework="pt") as content:
        facts = json.loads(content.metadata()["facts"])
        return {key: content.get_tensor(key) for key in content.keys()}, facts  # noqa: SIM118 (no mapping)


def has_part(folder: Path, name: str, *, key: str) -> bool:
    """Whether `name` is kept for this very `key`."""
    path = _path(folder, name)
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as content:
            return (content.metadata() or {}).get("key") == key
    except SafetensorError:
        return False


def make_parts_folder(folder: Path) -> None:
    """Make `folder` and the place for the parts in it. Raises RunError when that is not possible."""
    try:
        (folder / PASS1_NAME).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}.", hint="Choose another --tensor-output."
        ) from error


def remove_parts(folder: Path, name: str = "") -> None:
    """Remove what is kept under `name`; without it everything, with what a killed run left half-written."""
    parts = folder / PASS1_NAME
    try:
        if name:
            _path(folder, name).unlink(missing_ok=True)
            return
        for path in parts.iterdir():
            if path.name.endswith((SUFFIX, ".writing")):
                path.unlink()
        if not any(parts.iterdir()):
            parts.rmdir()
    except OSError as error:
        raise RunError(f"{parts} cannot be cleared: {error.strerror or error}.", hint="Delete it.") from error


def _path(folder: Path, name: str) -> Path:
    return folder / PASS1_NAME / f"{name}{SUFFIX}"
