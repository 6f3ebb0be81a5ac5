"""The wizard in a real pseudo-terminal: it opens without torch, Escape goes back, and leaving leaves it clean."""

import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.ui.asker import forget_keys
from tests.pseudo_terminal import Screen
from tests.unit.stage import make_models

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    make_models(tmp_path / "models", "acestep-v15-base")
    return tmp_path


def open_wizard(home: Path, *arguments: str, **environment: str) -> Screen:
    return Screen(*arguments, home=home, SIDESTEP_CHECKPOINT_DIR=str(home / "models"), **environment)


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


def test_models_that_cannot_be_fetched_are_explained_without_a_traceback(tmp_path: Path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    screen = Screen(home=tmp_path, SIDESTEP_CHECKPOINT_DIR=str(tmp_path / "none"), **nowhere)
    screen.wait_for("Later")
    screen.press("\x1b[B\r")
    screen.wait_for("Models")
    screen.press("\r")
    screen.wait_for("Folder for them")
    screen.press(f"{tmp_path / 'here'}\r")
    screen.wait_for("Hugging Face cannot be reached")
    screen.wait_for("Where are the models?")
    screen.press("\x03")
    screen.wait_for("code 130")
    assert "Traceback" not in screen.seen
    screen.close()


def test_what_is_typed_during_an_action_answers_no_question(monkeypatch: pytest.MonkeyPatch):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        os.write(ours, b"y\n\nunfinished")
        assert select.select([stdin], [], [], 5.0)[0]
        forget_keys()
        os.write(ours, b"kept\n")
        assert stdin.readline() == "kept\n"
    os.close(ours)


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
    screen.wait_for("Type a number from 1 to 9.")
    screen.press("9\n")
    screen.wait_for("code 0 heavy [].")
    assert "\x1b" not in screen.seen
    screen.close()
