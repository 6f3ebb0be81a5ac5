"""The folders that training reads and writes: models, output."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sidestep.config.places import default_checkpoint_dir
from sidestep.doctor.finding import Finding
from sidestep.errors import ConfigError, ModelError
from sidestep.files import cannot_write, nearest_existing
from sidestep.model.checkpoint import check_encoders, find_checkpoint, list_models

GIB = 2**30
# A default run of the 2B model keeps a checkpoint of some 0.5 GB every ten epochs.
ENOUGH_DISK = 10 * GIB


def models(root: Path | None, variant: str | None) -> Iterator[Finding]:
    """Examine the model that was named, else every one in the checkpoint folder.

    No model that is whole is a problem; one that is not, beside another that is, a note.
    """
    try:
        folder = root or default_checkpoint_dir()
        names = [variant] if variant else list_models(folder)
        if not names:
            find_checkpoint(folder, "turbo")  # Says what it is that has no model.
    except (ConfigError, ModelError) as error:
        yield Finding("Models", error.message, "problem", error.hint)
        return
    broken: list[tuple[str, ModelError | ConfigError]] = []
    whole, trainable = [], []
    for name in names:
        try:
            checkpoint = find_checkpoint(folder, name)
            trainable.append(name)
            check_encoders(checkpoint)
            whole.append(name)
        except (ConfigError, ModelError) as error:
            broken.append((name, error))
    if whole:
        yield Finding("Models", f"{', '.join(whole)}: all files are there ({folder}).")
    for name, error in broken:
        if name in trainable:
            text = f"{name} can be trained on tensors, but songs cannot be preprocessed: {error.message}"
            yield Finding("Models", text, "note", error.hint)
        else:
            yield Finding("Models", f"{name}: {error.message}", "note" if trainable else "problem", error.hint)


def output(folder: Path) -> Finding:
    """Say whether the folder, or the nearest one above it that is there, can be written, and how much it takes."""
    there = nearest_existing(folder)
    if there is None:
        return Finding(
            "Output", f"There is no {folder.absolute().anchor} here.", "problem", "Choose another --output-dir."
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        refused = cannot_write(there, error)
        return Finding("Output", refused.message, "problem", refused.hint)
    text = f"{folder} can be written; {free / GIB:.0f} GiB free."
    if free >= ENOUGH_DISK:
        return Finding("Output", text)
    return Finding(
        "Output", text, "note", "A checkpoint takes about half a GiB: raise --save-every, or free some space."
    )
