"""What a run's output folder tells: its curves, samples, settings and rank map. Loads no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.config.rank_map import RankMap, kept_map, read_rank_map
from sidestep.config.runs import RUN_CONFIG
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import SidestepError

METRICS = "metrics.jsonl"
SAMPLES = Path("samples", "samples.json")
Points = list[tuple[float, float]]


@dataclass(slots=True, kw_only=True)
class Story:
    """A run as its files tell it. Curves are (step, value)."""

    folder: Path
    name: str
    recipe: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 0
    steps: int = 0
    step: int = 0
    epoch: int = 0
    ended: str = ""
    curves: dict[str, Points] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    songs: list[str] = field(default_factory=list)
    samples: Mapping[str, Any] = field(default_factory=dict)
    rank_map: RankMap | None = None


def read_story(folder: Path) -> Story:
    """Read a run's folder; what is not there yet is left out."""
    config = _json(folder / RUN_CONFIG)
    settings = config.get("settings", {})
    story = Story(folder=folder, name=str(settings.get("run_name") or folder.resolve().name), settings=settings)
    story.version = str(config.get("sidestep_version", ""))
    story.recipe = str(config.get("objective", ""))
    for line in _lines(folder / METRICS):
        _take(story, line)
    story.samples = _samples(folder)
    dataset = _json(Path(str(settings.get("dataset_dir") or "")) / "preprocess_meta.json")
    songs = dataset.get("songs")
    story.songs = sorted(str(name) for name in songs.values()) if isinstance(songs, dict) else []
    rank_map = kept_map(settings, folder)
    story.rank_map = _rank_map(rank_map) if rank_map else None
    return story


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not at their defaults, by flag."""
    defaults = {setting.name: (setting.flag, setting.default) for setting in settings_of(TrainConfig)}
    plain = json.loads(json.dumps({name: default for name, (_, default) in defaults.items()}, default=str))
    return {
        defaults[name][0]: value
        for name, value in settings.items()
        if name in defaults and value != plain[name] and value is not None
    }


def _take(story: Story, line: Mapping[str, Any]) -> None:
    step = line.get("step", 0)
    match line.get("event"):
        case "run_started":
            story.facts = line.get("facts", {})
            story.recipe = line.get("recipe", story.recipe)
            story.epochs, story.steps, story.ended = line.get("epochs", 0), line.get("steps", 0), ""
        case "metrics":
            story.step, story.epoch = step, line.get("epoch", 0)
            for name in ("loss", "lr", "grad_norm"):
                _add(story, name, step, line.get(name))
        case "validated":
            _add(story, "validation", step, line.get("loss"))
        case "epoch_done":
            _add(story, "epoch_loss", step, line.get("loss"))
        case "run_done":
            story.ended = str(line.get("reason", ""))


def _add(story: Story, name: str, step: float, value: float | None) -> None:
    if value is not None and math.isfinite(value):
        story.curves.setdefault(name, []).append((step, value))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # Torn when a machine went down.
        if isinstance(line, dict):
            found.append(line)
    return found


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _samples(folder: Path) -> dict[str, Any]:
    """Return what samples.json says, but for renderings that are no files of its own folder."""
    samples = _json(folder / SAMPLES)
    home = (folder / SAMPLES).parent.resolve()
    inside = [entry for entry in samples.get("renderings", []) if (home / entry["file"]).resolve().is_relative_to(home)]
    return {**samples, "renderings": inside} if samples else {}


def _rank_map(path: Path) -> RankMap | None:
    """Return the map, or None where it is gone or damaged."""
    try:
        return read_rank_map(path)
    except SidestepError:
        return None
