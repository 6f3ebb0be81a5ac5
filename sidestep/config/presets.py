"""Settings as JSON: shipped presets, the user's own, and a run's config.json."""

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sidestep.config.places import PROJECT, config_folder
from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.settings import parse_values, settings_of, values_of
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from sidestep.files import DEVICE_NAMES, cannot_read, write_whole

SHIPPED = PROJECT / "presets"
CONFIG_FORMAT = 1
PRESET_LIMIT = 1_000_000  # bytes; a preset is a page of text
FORBIDDEN = set('/\\:*?"<>|\0')


def preset_folders() -> tuple[Path, Path]:
    """Return where presets are looked for; the user's own win over the shipped ones."""
    return config_folder() / "presets", SHIPPED


def preset_names() -> dict[str, Path]:
    """Return every preset there is and its file; RunError where a folder may not be read."""
    found: dict[str, Path] = {}
    for folder in reversed(preset_folders()):
        try:
            found |= {path.stem: path for path in sorted(folder.glob("*.json"))}
        except OSError as error:
            raise cannot_read(folder, error) from error
    return found


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset, parsed; ConfigError for an unknown preset, an unknown key or a wrong value.

    A name with spaces is the preset that was saved under it.
    """
    presets = preset_names()
    stem = name if name in presets else _stem(name)
    if stem not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"There is no preset '{name}'{guess}.", hint=f"There are: {', '.join(sorted(presets))}.")
    content = _read_json(presets[stem])
    values = {key: value for key, value in content.items() if key not in ("name", "description")}
    parsed = parse_values(TrainConfig, values, source=f"Preset {name}")
    foreign = sorted(key for key in parsed if not _settings()[key].in_presets)
    if foreign:
        raise ConfigError(f"Preset {name}: {', '.join(foreign)} cannot be part of a preset.", hint="Give it as a flag.")
    return parsed


def preset_description(name: str) -> str:
    """Return what a preset says about itself; ConfigError when its file cannot be read."""
    return str(_read_json(preset_names()[name]).get("description", ""))


def is_own_preset(name: str) -> bool:
    """Say whether a preset is the user's own, and not a shipped one."""
    return (preset_folders()[0] / f"{name}.json").is_file()


def delete_preset(name: str) -> None:
    """Remove a preset of the user's own; a shipped one of the same name is there again."""
    (preset_folders()[0] / f"{name}.json").unlink(missing_ok=True)


def own_preset_path(name: str) -> Path:
    """Return the file of a preset of the user's own, there or not; ConfigError for what cannot be a name."""
    stem = name.strip()
    if not stem or FORBIDDEN & set(stem) or ".." in stem or stem.lower() in DEVICE_NAMES or stem != stem.strip("."):
        raise ConfigError(f"'{name}' cannot be the name of a preset.", hint="Use letters, digits, - and _.")
    return preset_folders()[0] / f"{_stem(name)}.json"


def save_preset(name: str, config: TrainConfig, *, description: str = "", without: Collection[str] = ()) -> Path:
    """Write the settings that differ from the defaults as a preset of the user's own.

    `without` are settings that nobody chose: what a recipe pins is no part of a preset, which serves every recipe.
    """
    path = own_preset_path(name)
    changed = {
        setting.name: getattr(config, setting.name)
        for setting in settings_of(TrainConfig)
        if setting.in_presets and setting.name not in without and getattr(config, setting.name) != setting.default
    }
    write_whole(path, _to_json({"name": name.strip(), "description": description, **changed}))
    return path


def run_config_text(config: TrainConfig, *, recipe: str, version: str, objective: str) -> str:
    """Return a run's config.json: its settings, its recipe by name and in words, and who wrote it."""
    settings = {name: _absolute(value) for name, value in values_of(config).items() if name != "resume_from"}
    return _to_json(
        {
            "format_version": CONFIG_FORMAT,
            "sidestep_version": version,
            "recipe": recipe,
            "objective": objective,
            "settings": settings,
        }
    )


def read_run_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the recipe and the settings of an earlier run's config.json; ConfigError when it is not one."""
    content = _read_json(path)
    settings = content.get("settings")
    recipe = content.get("recipe")
    if not isinstance(settings, dict) or not isinstance(recipe, str) or recipe not in RECIPE_PINS:
        raise ConfigError(f"{path} is not the config.json of a run.", hint="It lies in a run's output folder.")
    if content.get("format_version") != CONFIG_FORMAT:
        raise ConfigError(f"{path} has format {content.get('format_version')}; this Side-Step reads {CONFIG_FORMAT}.")
    return recipe, parse_values(TrainConfig, settings, source=str(path))


def is_run_config(path: Path) -> bool:
    """Say whether this file is the config.json of a run, whatever version wrote it."""
    try:
        content = _read_json(path)
    except (ConfigError, OSError):
        return False
    return "recipe" in content and "settings" in content


def _stem(name: str) -> str:
    return name.strip().replace(" ", "_")


def _settings() -> dict[str, Any]:
    return {setting.name: setting for setting in settings_of(TrainConfig)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if path.stat().st_size > PRESET_LIMIT:
        raise ConfigError(f"{path} is too large to be settings.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.", hint="Mend it, or save the preset anew.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", hint="Let this user read it.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold settings.")
    return content


def _absolute(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value


def _to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
