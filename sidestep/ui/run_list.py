"""The runs that can be gone on with: where they are, how far they came, what they trained."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a run's steps took: seconds, and GiB at the most where that was measured."""

    seconds_per_step: float
    steps_per_epoch: float
    memory_gib: float | None


def find_runs(places: Iterable[Path]) -> list[FoundRun]:
    """The runs in these folders and one level below them, the newest first."""
    folders = {folder.resolve() for place in places if place.is_dir() for folder in (place, *_subfolders(place))}
    runs = [read_run(folder) for folder in folders if checkpoints_in(folder)]
    return sorted(runs, key=lambda run: (run.saved, str(run.folder)), reverse=True)


def pace_of(folder: Path) -> Pace | None:
    """How fast a run went on at its end and what it took, by its own metrics.jsonl; None where that does not say."""
    events = _last_events(folder / "metrics.jsonl", "metrics", "epoch_done")
    rates = [rate for rate in _numbers(events, "steps_per_second") if rate > 0]
    ends = [event for event in events if event["event"] == "epoch_done"]
    steps, epochs = _numbers(ends[-1:], "step"), _numbers(ends[-1:], "epoch")
    if not rates or not steps or not epochs or not epochs[0]:
        return None
    return Pace(
        seconds_per_step=1 / median(rates),
        steps_per_epoch=steps[0] / epochs[0],
        memory_gib=max(_numbers(events, "memory_gib"), default=None),
    )


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
    losses = _numbers(_last_events(path, "epoch_done", "metrics"), "loss")
    return losses[-1] if losses else None


def _last_events(path: Path, *names: str) -> list[dict[str, Any]]:
    """The events of these names at the end of a metrics.jsonl, the latest last; none without one."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [event for line in lines if (event := _event(line)).get("event") in names]


def _event(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:  # The first line of the tail, or one that was torn when a machine went down.
        return {}
    return values if isinstance(values, dict) else {}


def _numbers(events: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    found = (event.get(name) for event in events)
    return [float(value) for value in found if isinstance(value, float | int) and math.isfinite(value)]
