"""`metrics.jsonl`: what a run reported, a JSON object a line, for people who plot it themselves."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from sidestep.events import CheckpointSaved, EpochDone, Event, Metrics, Notice, RunDone, RunStarted, Validated
from sidestep.files import cannot_write, write_whole

NAMES: dict[type[Event], str] = {
    RunStarted: "run_started",
    Metrics: "metrics",
    Validated: "validated",
    EpochDone: "epoch_done",
    CheckpointSaved: "checkpoint_saved",
    Notice: "notice",
    RunDone: "run_done",
}


class MetricsFile:
    """A sink that adds a line for each event of `NAMES`; every line is flushed, none holds NaN or infinity.

    Each line has `event`, `time` (ISO 8601, UTC) and `step`, then the event's own fields. A run that goes on after
    `first_step` keeps the lines up to that step, so the file reads as one run; a run from the start begins it anew.
    Raises RunError where the file cannot be written.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        self._step = first_step
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _keep_lines(path, first_step)
            self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failure:
            # A full disk was already reported by the line that met it; closing only meets it again.
            if error is None:
                raise cannot_write(self._path, failure) from failure

    def __call__(self, event: Event) -> None:
        """Write the event's line."""
        name = NAMES.get(type(event))
        if name is None:
            return
        fields = _fields(event)
        self._step = fields.setdefault("step", self._step)
        line = {"event": name, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error


def _fields(event: Event) -> dict[str, Any]:
    """The event's fields as JSON knows them: paths as text, numbers that are not finite as null."""
    values = {name: getattr(event, name) for name in event.__dataclass_fields__}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return value.as_posix()
        case Mapping():
            return {key: _as_json(item) for key, item in value.items()}
        case _:
            return value


def _keep_lines(path: Path, first_step: int) -> None:
    """Drop the lines beyond `first_step`, and one that was torn when a machine went down; all of them for step 0."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if first_step else []
    kept = [line for line in lines if _step_of(line) <= first_step]
    write_whole(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """The step a line belongs to; infinity for a line that is not one of ours."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else math.inf
