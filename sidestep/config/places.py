"""Where Side-Step keeps what belongs to the user: settings between starts, and presets."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import platformdirs

from sidestep.config.shell import SCRIPT, download_line
from sidestep.errors import ConfigError
from sidestep.files import cannot_read, write_whole

PROJECT = SCRIPT.parent
CHECKPOINT_VARIABLE = "SIDESTEP_CHECKPOINT_DIR"
MAIN_REPOSITORY = "ACE-Step/Ace-Step1.5"  # The turbo model and the parts that all models share.
MODEL_REPOSITORY = "ACE-Step/acestep-v15-"  # The other models, each in one of its own: base, sft, xl-turbo, ...


def product_version() -> str:
    """Return Side-Step's version, which stands in pyproject.toml alone."""
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def config_folder() -> Path:
    """Return the user's own folder for settings and presets, by the platform's custom."""
    return Path(platformdirs.user_config_dir("sidestep", appauthor=False))


def remembered() -> dict[str, str]:
    """Return what earlier starts remembered; nothing on a new machine. RunError where it may not be read."""
    path = config_folder() / "settings.json"
    try:
        if not path.is_file():
            return {}
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot_read(path, error) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.", hint="Mend it or delete it.") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} does not hold settings.", hint="Delete it; it is made anew.")
    return saved


def remember(name: str, value: str) -> None:
    """Keep one setting for the next start."""
    saved = remembered()
    if saved.get(name) != value:
        _write_remembered({**saved, name: value})


def forget(names: Iterable[str]) -> None:
    """Keep these settings no longer."""
    gone = set(names)
    _write_remembered({name: value for name, value in remembered().items() if name not in gone})


def _write_remembered(saved: Mapping[str, str]) -> None:
    text = json.dumps(saved, indent=2, ensure_ascii=False) + "\n"
    write_whole(config_folder() / "settings.json", text)


def default_checkpoint_dir() -> Path:
    """Return the checkpoint folder when none was named: the environment's, the last used, else ./checkpoints."""
    named = os.environ.get(CHECKPOINT_VARIABLE)
    if named:
        return Path(named).expanduser()
    saved = remembered().get("checkpoint_dir")
    if saved and Path(saved).is_dir():
        return Path(saved)
    here = Path("checkpoints")
    if here.is_dir() and any(here.iterdir()):
        return here
    raise ConfigError(
        "Where are the ACE-Step checkpoints? There is no ./checkpoints folder and none was used before.",
        hint=f"Name the folder with --checkpoint-dir, or in {CHECKPOINT_VARIABLE}. To get the models:\n"
        f"  {download_line(MAIN_REPOSITORY, Path('checkpoints'))}\n"
        f"  {download_line(MODEL_REPOSITORY + 'base', Path('checkpoints/acestep-v15-base'))}",
    )
