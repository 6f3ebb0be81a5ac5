"""What tests share: toy checkpoints, made once a session."""

import gc
import os
import sys
from collections.abc import MutableMapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Toys are so small that several threads only wait for each other: one is up to ten times as fast. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from sidestep.model.checkpoint import Checkpoint


MANY = 100
_tests = count()
_modules = 0  # That were loaded when garbage was last looked for everywhere.


@pytest.fixture(autouse=True)
def _little_garbage() -> None:
    """Leave out of later collections what libraries hold: all of it takes a third of a second, many times a test."""
    global _modules
    if len(sys.modules) > _modules + MANY:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(autouse=True, scope="session")
def _settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep what the tests' runs remember out of the settings of whoever runs them."""
    folder = tmp_path_factory.mktemp("settings")
    _keep_settings_in(folder, os.environ)
    return folder


@pytest.fixture(autouse=True)
def _own_settings(_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settings folder of the test's own, not made yet: a checkpoint folder that is typed is remembered."""
    variables: dict[str, str] = {}
    _keep_settings_in(_settings / str(next(_tests)), variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def _keep_settings_in(folder: Path, environment: MutableMapping[str, str]) -> None:
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "APPDATA"):
        environment[name] = str(folder)


def _toy(folder: Path, variant: str) -> "Checkpoint":
    # Imported here because the tests that ask for no checkpoint must run without torch.
    from sidestep.demo.checkpoint import build_toy_checkpoint
    from sidestep.model.checkpoint import find_checkpoint

    return find_checkpoint(build_toy_checkpoint(folder, variant=variant), variant)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """A toy of the base model: four layers, random weights. Read only."""
    return _toy(tmp_path_factory.mktemp("base"), "base")


@pytest.fixture(scope="session")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoint":
    """A toy of the turbo model. Read only."""
    return _toy(tmp_path_factory.mktemp("turbo"), "turbo")
