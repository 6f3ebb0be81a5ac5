"""The wizard in a real pseudo-terminal: it opens without torch, Escape goes back, and leaving leaves it clean."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.config.places import PROJECT
from tests.unit.stage import make_models

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals of this kind")
SECONDS = 60  # A slow machine under load; the wizard itself takes less than one.

# Runs train.py as a user does, then says which heavy modules were imported on the way.
PROBE = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as left:
    code = left.code
heavy = {"torch", "torchaudio", "transformers", "diffusers", "peft", "lycoris", "huggingface_hub"} & set(sys.modules)
print(f"code {code} heavy {sorted(heavy)}.")
"""


class Screen:
    """A pseudo-terminal of 80 x 24 with the wizard in it."""

    def __init__(self, *arguments: str, home: Path, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        _set_size(theirs, rows=24, columns=80)
        known = {"PATH": "", "HOME": str(home), "XDG_CONFIG_HOME": str(home), "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=PROJECT, env={**known, **environment},
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Read on until a text appears; returns what came, that text included."""
        end, fresh = time.monotonic() + SECONDS, ""
        while text not in fresh:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not appear after: {self.seen[-500:]}"
            fresh += os.read(self._ours, 65_536).decode("utf-8", errors="replace")
            # prompt_toolkit asks where the cursor is; a terminal answers.
            for _ in range(fresh.count("\x1b[6n")):
                self.press("\x1b[1;1R")
            self.seen += fresh
        return fresh

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    make_models(tmp_path / "models", "acestep-v15-base")
    return tmp_path


def open_wizard(home: Path, *arguments: str, **environment: str) -> Screen:
    return Screen(*arguments, home=home, SIDESTEP_CHECKPOINT_DIR=str(home / "models"), **environment)


def _set_size(terminal: int, *, rows: int, columns: int) -> None:
    import termios

    termios.tcsetwinsize(terminal, (rows, columns))


def test_the_menu_opens_without_torch_and_exits(home: Path):
    screen = open_wizard(home)
    screen.wait_for("What would you like to do?")
    screen.wait_for("Exit")
    screen.press("\x1b[A\r")
    screen.wait_for("code 0 heavy [].")
    screen.close()


def test_escape_goes_back_and_ctrl_c_leaves_calmly(home: Path):
    screen = open_wizard(home)
    screen.wait_for("Exit")
    screen.press("\r")
    screen.wait_for("Start from")
    screen.press("\x1b")
    screen.wait_for("What would you like to do?")
    screen.press("\x03")
    screen.wait_for("code 130 heavy [].")
    assert "Left. Nothing more was started." in screen.seen
    assert "Traceback" not in screen.seen
    screen.close()


def test_no_colour_is_no_colour(home: Path):
    screen = open_wizard(home, NO_COLOR="1")
    screen.wait_for("Exit")
    screen.press("\x03")
    screen.wait_for("code 130")
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38|48)(?:;\d+)*m", screen.seen)
    assert colours == []
    screen.close()


def test_plain_prompts_write_no_escape_code(home: Path):
    screen = open_wizard(home, "--plain")
    screen.wait_for("Number [1] > ")
    screen.press("nothing\n")
    screen.wait_for("Type a number from 1 to 8.")
    screen.press("8\n")
    screen.wait_for("code 0 heavy [].")
    assert "\x1b" not in screen.seen
    screen.close()
