"""A stage for the wizard: a machine with models, songs, tensors and runs, and a user who presses keys."""

import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from safetensors.numpy import save_file

from sidestep.config.presets import run_config_text
from sidestep.config.resolve import resolve_training
from sidestep.ui.asker import KeyAsker
from sidestep.ui.command_line import Plan
from sidestep.ui.console import open_console
from sidestep.ui.machine import Gpu
from sidestep.ui.wizard import Wizard
from tests.unit.terminal import Terminal

ENTER, BACK, LEAVE, UP, DOWN, SPACE = "\r", "\x02", "\x03", "\x1b[A", "\x1b[B", " "
END = "\x1b[F"
CLEAR = "\x05\x15"  # To the end of the line, then everything before the cursor.
EXIT = UP + ENTER  # The last entry of the menu.
EXIT_AFTERWARDS = UP + UP + ENTER  # In "What next?" it stands above Back.


def typed(text: str | Path) -> str:
    """The keys that replace what stands in a line and accept it."""
    return f"{CLEAR}{text}{ENTER}"


def down(times: int) -> str:
    """The keys that choose an entry so far below the suggested one."""
    return DOWN * times + ENTER


class NoHub:
    """A hub that nothing may be fetched from."""

    def sizes(self, repository: str) -> dict[str, int]:
        raise AssertionError(f"{repository} was asked for")

    def download(self, repository: str, folder: Path, without: Sequence[str]) -> None:
        raise AssertionError(f"{repository} was fetched")


@dataclass
class Stage:
    """The machine, and what was started on it."""

    folder: Path
    started: list[Plan] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    """What the next actions fail with."""
    gpus: tuple[Gpu, ...] = ()
    start_hooks: dict[int, Callable[[], object]] = field(default_factory=dict)
    """What actions leave behind, by their place from 0."""

    def play(self, *keys: str, hub: Any = None) -> tuple[int, str]:
        """Open the wizard, press keys, then Ctrl-C; returns the exit code and everything on the screen."""
        screen = Terminal()
        console = open_console(plain=False, stream=screen)
        wizard = Wizard(
            KeyAsker(console), console, start=self.start, hub=hub or NoHub(), find_gpus=lambda: self.gpus
        )  # fmt: skip
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text("".join(keys) + LEAVE)
            try:
                with redirect_stderr(screen):
                    code = wizard.run()
            except KeyboardInterrupt:
                code = 130
        return code, re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())

    def start(self, plan: Plan) -> int:
        """Take a plan as the wizard starts it."""
        self.started.append(plan)
        self.start_hooks.get(len(self.started) - 1, lambda: None)()
        if self.failures:
            raise self.failures.pop(0)
        return 0

    def tensors(self, name: str = "tensors", *, songs: int = 4) -> Path:
        """Make a folder of tensors, as far as it is looked at without torch."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        for number in range(songs):
            (folder / f"song{number}.pt").write_bytes(b"PK")
        return folder

    def songs(self, name: str = "songs") -> Path:
        """Make a folder with a song."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        soundfile.write(folder / "song.wav", np.zeros((4800, 2), np.float32), 48_000)
        return folder

    def run(self, name: str, *, epoch: int = 10, **values: Any) -> Path:
        """Make the folder of a run that stopped after an epoch."""
        folder = self.folder / "output" / name
        checkpoint = folder / "checkpoints" / f"epoch_{epoch}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "training_state.pt").write_bytes(b"PK")
        known = {"dataset_dir": self.folder / "tensors", "checkpoint_dir": self.folder / "models"}
        config = resolve_training("fixed", {**known, "output_dir": folder, "model_variant": "base", **values}).config
        text = run_config_text(config, recipe="fixed", version="1", objective="")
        (checkpoint / "config.json").write_text(text, encoding="utf-8")
        lines = [{"event": "epoch_done", "step": 1, "loss": 0.75}, {"event": "run_done", "step": 1}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return folder


def make_models(root: Path, *folders: str, **config: Any) -> Path:
    """Make a checkpoint folder, as far as it is looked at without torch."""
    for name in folders:
        (root / name).mkdir(parents=True)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        content = {"model_type": "acestep", "num_hidden_layers": 2, **sizes, **config}
        (root / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
        save_file({"decoder.proj_in.1.bias": np.zeros(8, np.float32)}, root / name / "model.safetensors")
    return root


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A machine of its own with the models base and turbo, known by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    models = make_models(tmp_path / "models", "acestep-v15-base", "acestep-v15-turbo")
    monkeypatch.setenv("SIDESTEP_CHECKPOINT_DIR", str(models))
    return Stage(tmp_path)


def plain_lines(*lines: str) -> Any:
    """A reader of lines for the plain asker: these, then the end of the input."""
    waiting = list(lines)

    def read(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


def silent_console() -> Any:
    """A console whose output nobody reads."""
    return open_console(plain=True, stream=io.StringIO())
