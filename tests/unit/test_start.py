"""Starting up: help, wrong flags and missing folders answer without torch."""

import io
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.config.places import PROJECT
from sidestep.main import main
from sidestep.ui.problems import close_log

# Runs train.py as a user does, then says on the last line which heavy modules were imported on the way.
PROBE = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as left:
    code = left.code
heavy = {"torch", "torchaudio", "transformers", "diffusers", "peft", "lycoris"} & set(sys.modules)
print(f"\\n{code} {sorted(heavy)}")
"""


def start(*arguments: str, home: Path, **settings: str) -> tuple[str, str, str]:
    """Return the last line of the probe, and what was printed on stdout and stderr."""
    environment = {"PATH": "", "HOME": str(home), "XDG_CONFIG_HOME": str(home), "APPDATA": str(home), **settings}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=PROJECT, env=environment, capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    *shown, last = done.stdout.rstrip().split("\n")
    return last, "\n".join(shown), done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fixed", "--help"], ["vanilla", "--help"], ["build-dataset", "--help"]]
)
def test_help_loads_no_torch(arguments: list[str], tmp_path: Path):
    last, shown, _ = start(*arguments, home=tmp_path)
    assert last == "0 []"
    assert "usage: train.py" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fixed", "--rnk", "8"], 2, "fixed has no flag --rnk (did you mean --rank?)."),
        (["fixed", "--rank", "0", "-d", "a", "-o", "b"], 2, "--rank takes a whole number from 1 to 4096, not 0."),
        (["fixed", "--dropout", "1.5", "-d", "a", "-o", "b"], 2, "--dropout takes a number from 0 to 0.5, not 1.5."),
        (["fixed", "--lr", "nan", "-d", "a", "-o", "b"], 2, "--learning-rate takes a number above 0, not nan."),
        (["fixed", "--target-modules", "qproj", "-d", "a", "-o", "b"], 2, "(did you mean q_proj?)"),
        (["vanilla", "--cfg-ratio", "0.2"], 2, "vanilla trains with 0"),
        (["fixed", "-a", "lokr", "--use-rslora", "-d", "a", "-o", "b"], 2, "--use-rslora counts only with"),
        (["fixed", "-a", "lora", "--lokr-factor", "4", "-d", "a", "-o", "b"], 2, "--lokr-factor counts only with"),
        (["fixed"], 2, "--dataset-dir is required to train"),
        (["fixed", "--preprocess"], 2, "--preprocess needs --audio-dir"),
        (["fixed", "-d", "a", "-o", "b"], 2, "Where are the ACE-Step checkpoints?"),
        (["fixed", "-c", "nowhere", "-d", "a", "-o", "b"], 1, "There is no checkpoint folder nowhere."),
        (["fixed", "--resume-from", "nowhere"], 1, "There is no folder nowhere to resume from."),
        (["fixed", "--preset", "recomended", "-d", "a", "-o", "b"], 2, "There is no preset 'recomended'"),
        (["fixed", "-d", "a", "-o", "b", "--run-name", "Checkpoints"], 2, "keeps other files in a folder of that name"),
        (["fixed", "-d", "a", "-o", "b", "--run-name", "Con"], 2, "Windows has no folder of that name"),
        (["fixed", "-d", "a", "-o", "b", "--run-name", "song "], 2, "Windows has no folder of that name"),
        (["fixed", "-d", "a", "-o", "b", "--run-name", "x" * 201], 2, "it is longer than 200 bytes"),
        (["build-dataset", "--input", "nowhere"], 1, "nowhere"),
        (["build-dataset", "--input", "x" * 300], 2, "that name is too long for this system."),
        (["fixed", "-d", "a", "-o", "b" * 300], 2, "--output-dir takes a path, not bbb"),
        (["build-dataset", "--input", "~nobody-here/x"], 2, "--input takes a path, not ~nobody-here/x."),
        (["build-dataset"], 2, "--input is required"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_torch_is_loaded(arguments: list[str], code: int, message: str, tmp_path: Path):
    last, shown, errors = start(*arguments, home=tmp_path)
    assert last == f"{code} []"
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors + shown


def test_without_a_terminal_and_without_a_command_there_is_a_short_help(tmp_path: Path):
    last, shown, errors = start(home=tmp_path)
    assert last == "2 []"
    assert "fixed" in shown and "build-dataset" in shown
    assert errors.strip() == "The wizard asks questions and needs a terminal; without one, name a COMMAND."


def test_a_name_that_the_console_cannot_show_stops_neither_help_nor_a_message(tmp_path: Path):
    last, _, errors = start("fixed", "--夜", "-d", "a", home=tmp_path, PYTHONIOENCODING="cp1252")
    assert last == "2 []"
    assert "fixed has no flag --?." in errors


def test_a_python_without_torch_is_told_how_to_get_it(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    last, _, errors = start("--version", home=tmp_path, PYTHONPATH=str(tmp_path))
    assert last == "1 []"
    assert "torch is not installed here." in errors and "install" in errors.split("\n")[1]


def test_a_current_folder_that_was_deleted_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr("platformdirs.user_log_path", lambda *names, **more: tmp_path)
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["doctor"]) == 1
    close_log()
    error = capsys.readouterr().err
    assert "The current folder was deleted." in error and "cd" in error


def test_an_error_of_our_own_is_told_as_one_and_exits_with_70(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("sidestep.main.parse", lambda words: 1 / 0)
    monkeypatch.setattr("platformdirs.user_log_path", lambda *names, **more: tmp_path)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    code = main(["fixed"])
    close_log()
    assert code == 70
    assert stream.getvalue().startswith("This is a bug in Side-Step: ZeroDivisionError: division by zero\n")
    assert "ZeroDivisionError" in (tmp_path / "sidestep.log").read_text(encoding="utf-8")


def test_ctrl_c_while_the_program_leaves_is_no_traceback(tmp_path: Path):
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    done = subprocess.run(
        [sys.executable, "-c", late + PROBE.partition("try:")[0] + "runpy.run_path('train.py', run_name='__main__')",
         "--version"],
        cwd=PROJECT, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("Side-Step")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(("arguments", "code"), [(["build-dataset", "--input", "songs"], 0), (["fixed"], 2), ([], 2)])
def test_streams_that_are_closed_are_not_missed(arguments: list[str], code: int, tmp_path: Path):
    (tmp_path / "songs").mkdir()
    soundfile.write(tmp_path / "songs" / "a.wav", np.zeros((48_000, 2)), 48_000)
    line = shlex.join([sys.executable, str(PROJECT / "train.py"), *arguments])
    done = subprocess.run(["bash", "-c", f"{line} <&- >&- 2>&-"], cwd=tmp_path, check=False)
    assert done.returncode == code
