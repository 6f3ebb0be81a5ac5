"""What a run's output folder tells: its curves, samples, settings and rank map. Loads no torch.

The files may have been changed by hand, or torn when a machine went down: what cannot be read is left out and counted.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from sidestep.config.rank_map import RankMap, kept_map, read_rank_map
from sidestep.config.runs import RUN_CONFIG
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import SidestepError

METRICS = "metrics.jsonl"
SAMPLES = Path("samples", "samples.json")
Points = list[tuple[float, float]]
_LARGEST = 1e30  # of a number in a chart
T = TypeVar("T", bound=dict[str, Any] | list[Any])
_MODULE = re.compile(r"layers\.\d+\..+")


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
    prompts: list[Mapping[str, Any] | None] = field(default_factory=list)
    """The prompts of samples.json by their number, from 1; None for one that cannot be read."""
    renderings: list[Mapping[str, Any]] = field(default_factory=list)
    rank_map: RankMap | None = None
    unread: Counter[str] = field(default_factory=Counter)
    """How many parts of a file cannot be read, by the file's name."""


def read_story(folder: Path) -> Story:
    """Read a run's folder; what is not there yet is left out, and what cannot be read is counted in `unread`."""
    story = Story(folder=folder, name=folder.resolve().name)
    config = _json(folder / RUN_CONFIG, story)
    settings = _of_kind(config.get("settings", {}), dict, RUN_CONFIG, story)
    story.name = str(settings.get("run_name") or story.name)
    story.settings = settings
    story.version = str(config.get("sidestep_version", ""))
    story.recipe = str(config.get("objective", ""))
    for line in _lines(folder / METRICS, story):
        _take(story, line)
    _take_samples(story)
    home = (folder / SAMPLES).parent.resolve()
    story.renderings = [entry for entry in story.renderings if (home / entry["file"]).resolve().is_relative_to(home)]
    dataset = _json(Path(str(settings.get("dataset_dir") or "")) / "preprocess_meta.json", story)
    songs = dataset.get("songs")
    story.songs = sorted(str(name) for name in songs.values()) if isinstance(songs, dict) else []
    if all(isinstance(settings.get(name), str | None) for name in ("rank_map", "output_dir")):
        rank_map = kept_map(settings, folder)
        story.rank_map = _rank_map(rank_map, story) if rank_map else None
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
    if not _is_number(step):
        story.unread[METRICS] += 1
        return
    match line.get("event"):
        case "run_started":
            story.facts = _of_kind(line.get("facts", {}), dict, METRICS, story)
            story.recipe = str(line.get("recipe", story.recipe))
            story.epochs, story.steps, story.ended = line.get("epochs", 0), line.get("steps", 0), ""
        case "metrics":
            story.step, story.epoch = int(step), line.get("epoch", 0)
            for name in ("loss", "lr", "grad_norm"):
                _add(story, name, step, line.get(name))
        case "validated":
            _add(story, "validation", step, line.get("loss"))
        case "epoch_done":
            _add(story, "epoch_loss", step, line.get("loss"))
        case "run_done":
            story.ended = str(line.get("reason", ""))


def _add(story: Story, name: str, step: float, value: object) -> None:
    if _is_number(value):
        story.curves.setdefault(name, []).append((step, value))
    elif not isinstance(value, float | None):  # Not finite, or not measured.
        story.unread[METRICS] += 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _lines(path: Path, story: Story) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(_of_kind(json.loads(text), dict, METRICS, story))
        except (ValueError, RecursionError):
            story.unread[METRICS] += 1
    return found


def _json(path: Path, story: Story) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    return _of_kind(content, dict, path.name, story)


def _of_kind(value: Any, kind: type[T], file: str, story: Story) -> T:
    """Return what was read from a file; empty, and counted, where it is of another kind."""
    if isinstance(value, kind):
        return value
    story.unread[file] += 1
    return kind()


def is_whole(folder: Path, epoch: int | None) -> bool:
    """Say whether every prompt of a run is rendered at this epoch (None: by the model alone)."""
    story = Story(folder=folder, name="")
    _take_samples(story)
    return len(story.prompts) <= sum(entry["epoch"] == epoch for entry in story.renderings)


def _take_samples(story: Story) -> None:
    path = story.folder / SAMPLES
    samples = _json(path, story)
    prompts = _of_kind(samples.get("prompts", []), list, path.name, story)
    renderings = _of_kind(samples.get("renderings", []), list, path.name, story)
    story.prompts = [prompt if _is_prompt(prompt) else None for prompt in prompts]
    story.renderings = [entry for entry in renderings if is_rendering(entry)]
    if lost := story.prompts.count(None) + len(renderings) - len(story.renderings):
        story.unread[path.name] += lost


def is_rendering(entry: object) -> TypeGuard[dict[str, Any]]:
    """Say whether an entry of samples.json says which prompt was rendered when, and into which file."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("epoch", ""), int | None)
        and all(isinstance(entry.get(name), int) for name in ("step", "prompt"))
        and isinstance(entry.get("file"), str)
        and "\0" not in entry["file"]
    )


def _is_prompt(prompt: object) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(prompt, dict)
        and all(isinstance(prompt.get(name), str) for name in ("caption", "lyrics"))
        and all(_is_number(prompt.get(name)) for name in ("seed", "duration"))
    )


def _rank_map(path: Path, story: Story) -> RankMap | None:
    """Return the map, or None where it is gone or damaged."""
    if not path.exists():
        return None
    try:
        rank_map = read_rank_map(path)
    except SidestepError:
        rank_map = None
    if rank_map is None or not all(_MODULE.fullmatch(module.name) for module in rank_map.modules):
        story.unread[path.name] += 1
        return None
    return rank_map
