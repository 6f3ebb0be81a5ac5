"""The runs that can be gone on with: where they are, how far they came, what they trained."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sidestep.config.presets import read_run_config
from sidestep.config.runs import RUN_CONFIG, checkpoints_in
from sidestep.errors import ConfigError

TAIL = 65_536  # Bytes at the end of metrics.jsonl that are searched for the last loss.


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A run on disk. `problem` says why it cannot be gone on with."""

    folder: Path
    recipe: str
    settings: Mapping[str, Any]
    epoch: int
    saved: datetime
    loss: float | None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        epochs = f"epoch {self.epoch} of {self.settings['epochs']}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"{epochs}, {self.saved:%Y-%m-%d %H:%M}{loss}"


def find_runs(places: Iterable[Path]) -> list[FoundRun]:
    """The runs in these folders and one level below them, the newest first."""
    folders = {folder.resolve() for place in places if place.is_dir() for folder in (place, *_subfolders(place))}
    runs = [read_run(folder) for folder in folders if checkpoints_in(folder)]
    return sorted(runs, key=lambda run: (run.saved, str(run.folder)), reverse=True)


def read_run(folder: Path) -> FoundRun:
    """What a run's newest checkpoint says; the folder has one."""
    newest = checkpoints_in(folder)[0]
    recipe, settings, problem = "", {}, ""
    try:
        recipe, settings = read_run_config(newest / RUN_CONFIG)
    except ConfigError as error:
        problem = error.message
    return FoundRun(
        folder=folder,
        recipe=recipe,
        settings=settings,
        epoch=int(newest.name.split("_")[1]),
        saved=datetime.fromtimestamp(newest.stat().st_mtime),
        loss=_last_loss(folder / "metrics.jsonl"),
        problem=problem,
    )


def _subfolders(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:  # Not ours to read: no run of ours is there.
        return []


def _last_loss(path: Path) -> float | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    losses = (_loss_of(line) for line in reversed(lines))
    return next((loss for loss in losses if loss is not None), None)


def _loss_of(line: str) -> float | None:
    try:
        values = json.loads(line)
    except ValueError:  # The first line of the tail, or one that was torn when a machine went down.
        return None
    if not isinstance(values, dict) or values.get("event") not in ("epoch_done", "metrics"):
        return None
    loss = values.get("loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else None
