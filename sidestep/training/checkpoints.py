"""Adapters and resume states on disk: whole or not at all, and strict when they are read.

A checkpoint folder holds the adapter as other programs load it, the run's config.json, and `training_state.pt`, which
alone is what training goes on from: the raw weights, the optimizer, the position. It is read with weights_only=True.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from torch import Tensor

from sidestep.config.runs import RUN_CONFIG, STATE_FILE
from sidestep.errors import ModelError, RunError
from sidestep.files import move
from sidestep.training.adapters.base import Adapter

STATE_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything training goes on from. `identity` says which songs and which model it was made with."""

    state: Mapping[str, int | float]
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    ema: Mapping[str, Tensor]
    identity: Mapping[str, str]


def save_checkpoint(
    folder: Path, snapshot: Snapshot, adapter: Adapter, *, config_text: str, about: Mapping[str, str]
) -> None:
    """Write a checkpoint folder in one move."""

    def fill(temporary: Path) -> None:
        content = {name: getattr(snapshot, name) for name in snapshot.__slots__}
        with (temporary / STATE_FILE).open("wb") as file:
            torch.save({"format_version": STATE_FORMAT, **content}, file)
        adapter.write(temporary, snapshot.adapter, about=about)
        (temporary / RUN_CONFIG).write_text(config_text, encoding="utf-8")

    write_folder(folder, fill)


def save_adapter(folder: Path, adapter: Adapter, values: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
    """Write an adapter folder in one move."""
    write_folder(folder, lambda temporary: adapter.write(temporary, values, about=about))


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint folder; ModelError when it is damaged, incomplete or of another format."""
    path = folder / STATE_FILE
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, BadZipFile) as error:
        raise ModelError(
            f"The checkpoint {folder} {'may not be opened' if isinstance(error, PermissionError) else 'is damaged'}.",
            hint="Resume from an earlier one: --resume-from takes a checkpoints/epoch_* folder too.",
        ) from error
    if not isinstance(content, dict) or content.get("format_version") != STATE_FORMAT:
        raise ModelError(f"{path} is not a resume state of this Side-Step (format {STATE_FORMAT}).")
    missing = {"format_version", *Snapshot.__slots__} - content.keys()
    if missing:
        raise ModelError(f"{path} is incomplete: {', '.join(sorted(missing))} missing.")
    return Snapshot(**{name: content[name] for name in Snapshot.__slots__})


def _check_sums(path: Path) -> None:
    """Raise BadZipFile for a byte that is not as it was written; torch.load takes such a file as it is."""
    with ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise BadZipFile(f"{damaged} does not match its checksum.")


def newest_good(candidates: list[Path]) -> tuple[Path, Snapshot, list[ModelError]]:
    """Return the first checkpoint that can be read and what ails those before it; ModelError when none can."""
    problems: list[ModelError] = []
    for folder in candidates:
        try:
            return folder, load_checkpoint(folder), problems
        except ModelError as problem:
            problems.append(problem)
    raise problems[0]


def write_folder(
    target: Path, fill: Callable[[Path], None], *, then: str = "resume from the last checkpoint", is_alone: bool = True
) -> None:
    """Write a folder whole or not at all: filled under a temporary name beside it, flushed, then renamed.

    RunError, which ends with what to do `then`, when the disk is full or the folder cannot be written; what was there
    before stays. `is_alone`: no other process writes this folder; where one may, the temporary name is nobody else's.
    """
    temporary = target.with_name(f".{target.name}.writing{'' if is_alone else token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        fill(temporary)
        _flush(temporary)
        _put_in_place(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise RunError(
            f"{target} could not be written: {reason}.",
            hint=f"Free some disk space, or check that the folder may be written, then {then}.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        move(target, replaced)
    try:
        move(temporary, target)
    except OSError:
        if replaced.exists():
            move(replaced, target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: Exception) -> str | None:
    """Say what the disk did; None for an error that does not come from it."""
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save closes its archive while the file's error is on its way, and fails with a RuntimeError of its own.
    cause = error if isinstance(error, OSError) else error.__context__
    return (cause.strerror or str(cause)) if isinstance(cause, OSError) else None


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
