"""The installers: install.sh with stand-ins for every program; what install_windows.bat must hold to work.

`scripts/test-windows-installer` runs the latter under Wine.
"""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from sidestep.config.places import PROJECT

BATCH = (PROJECT / "install_windows.bat").read_bytes().decode("ascii").replace("\r\n", "\n")
TOOLS = ("bash", "sh", "env", "dirname", "uname", "cat", "chmod", "mkdir", "cp", "rm", "readlink", "sleep")

# What each program does beside noting how it was called; $FAILS is a part of the call that does not work.
STAND_IN = """#!/bin/bash
call="${0##*/} $*"
echo "$call" >>"$CALLS"
if [ -n "$FAILS" ] && [[ "$call" == *"$FAILS"* ]]; then echo "stand-in: ${0##*/} does not work" >&2; exit 1; fi
"""
PROGRAMS = {
    "uv": """
case "$1" in
  venv) venv=${4:-${UV_PROJECT_ENVIRONMENT:-.venv}}; mkdir -p "$venv/bin"; cp "$PROGRAMS/../python" "$venv/bin" ;;
  export) echo "numpy==2" >.venv/locked.txt ;;
  pip) case "$*" in *--torch-backend*) echo "$*" >"$PROGRAMS/../other-build" ;; esac ;;
esac
""",
    # $CUDA: the torch builds that can use the GPU.
    "python": """
build=index; [ -e "$PROGRAMS/../other-build" ] && build=other
case "$*" in
  *cuda*) [[ "$CUDA" == *$build* ]] ;;
  *importlib.metadata*) [ $build = other ] ;;
  *train.py\\ fixed*) echo "started by $SIDESTEP_START"; exit 130 ;;
esac
""",
    # A line a GPU, each written at once.
    "nvidia-smi": 'echo "NVIDIA H100, 580.65"; sleep 0.2; echo "NVIDIA A100, 580.65"\n',
    "git": "",
    "curl": """
echo 'to=${UV_INSTALL_DIR:-${XDG_BIN_HOME:-$HOME/.local/bin}}; mkdir -p "$to"; cp "$PROGRAMS/../uv" "$to"'
""",
}


class Linux:
    """A machine to install on: what is on its PATH, its folder of Side-Step, and what happened there."""

    def __init__(self, root: Path) -> None:
        self.root, self.programs, self.tools = root, root / "programs", root / "tools"
        self.folder = root / "Böse Büßer" / "Side-Step"
        for folder in (self.programs, self.tools, self.folder):
            folder.mkdir(parents=True)
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or "")
        for name, does in PROGRAMS.items():
            self._write(root / name, STAND_IN + does)
        for name in ("install.sh", "pyproject.toml", "uv.lock"):
            shutil.copy(PROJECT / name, self.folder)
        self.have("uv", "git")
        self.output = ""
        self.calls: list[str] = []

    def have(self, *programs: str) -> None:
        """Have these programs on the PATH, and no others but the system's tools."""
        for path in self.programs.iterdir():
            path.unlink()
        for name in programs:
            shutil.copy(self.root / name, self.programs)

    def run(self, *arguments: str, file: str = "install.sh", fails: str = "", cuda: str = "", **more: str) -> int:
        """Run a script of the folder from another folder; give its exit code."""
        log = self.root / "calls"
        log.write_text("")
        environment = {
            **{"PATH": f"{self.programs}:{self.tools}", "HOME": str(self.root / "home")},
            **{"PROGRAMS": str(self.programs), "CALLS": str(log), "FAILS": fails, "CUDA": cuda, **more},
        }
        done = subprocess.run(
            [self.folder / file, *arguments],
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            check=False,
        )  # fmt: skip
        self.output = done.stdout
        self.calls = log.read_text().splitlines()
        return done.returncode

    def installs(self) -> list[str]:
        """The torch build that each of uv's calls asked for."""
        calls = [call.split() for call in self.calls if call.startswith("uv pip install")]
        return [call[call.index("--torch-backend") + 1] if "--torch-backend" in call else "index" for call in calls]

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def linux(tmp_path: Path) -> Linux:
    if os.name == "nt":
        pytest.fail("install.sh is for Linux and macOS; test it there.")
    return Linux(tmp_path)


def test_without_a_gpu_torch_gets_the_build_that_uv_chooses(linux: Linux):
    assert linux.run("--yes") == 0, linux.output
    assert linux.installs() == ["auto"]
    assert "--reinstall-package" not in "".join(linux.calls)
    assert "No NVIDIA GPU answers here" in linux.output
    assert "python train.py doctor" in linux.calls
    assert "Side-Step is installed. Start it with ./side-step\n  and not with uv run" in linux.output


def test_with_a_new_driver_torch_is_the_one_that_uv_run_keeps(linux: Linux):
    linux.have("uv", "nvidia-smi")
    assert linux.run("--yes", cuda="index") == 0, linux.output
    assert linux.installs() == ["index"]
    assert "NVIDIA GPU and its driver: NVIDIA H100, 580.65\n" in linux.output
    assert "and not with uv run" not in linux.output


def test_with_an_older_driver_another_torch_is_looked_for(linux: Linux):
    linux.have("uv", "nvidia-smi")
    assert linux.run("--yes", cuda="other") == 0, linux.output
    assert linux.installs() == ["index", "auto"]
    index, other = (call for call in linux.calls if call.startswith("uv pip install"))
    assert "--reinstall-package" not in index
    assert "--reinstall-package torch --reinstall-package torchaudio" in other
    assert "torch cannot use the GPU" not in linux.output


def test_a_driver_that_is_too_old_for_every_torch_is_said_and_side_step_is_there(linux: Linux):
    linux.have("uv", "nvidia-smi")
    assert linux.run("--yes") == 0, linux.output
    assert "torch cannot use the GPU. Its driver is probably too old" in linux.output
    assert (linux.folder / "side-step").is_file()


def test_a_torch_build_can_be_chosen(linux: Linux):
    assert linux.run("--yes", "--torch", "rocm6.4") == 0, linux.output
    assert linux.installs() == ["rocm6.4"]
    assert linux.run("--yes", UV_TORCH_BACKEND="cpu") == 0, linux.output
    assert linux.installs() == ["cpu"]


def test_an_environment_that_uv_was_told_to_use_for_projects_is_left_alone(linux: Linux):
    assert linux.run("--yes", UV_PROJECT_ENVIRONMENT=str(linux.root / "elsewhere")) == 0, linux.output
    assert not (linux.root / "elsewhere").exists()


def test_uv_is_fetched_where_there_is_none(linux: Linux):
    linux.have("curl")
    assert linux.run("--yes") == 0, linux.output
    assert linux.calls[0] == "curl -LsSf https://astral.sh/uv/install.sh"
    assert linux.installs() == ["auto"]


@pytest.mark.parametrize("variable", ["XDG_BIN_HOME", "UV_INSTALL_DIR"])
def test_uv_is_found_where_its_installer_put_it(linux: Linux, variable: str):
    linux.have("curl")
    assert linux.run("--yes", **{variable: str(linux.root / "of its own")}) == 0, linux.output


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("curl", "uv could not be installed: there is no internet connection"),
        ("uv venv", "Python could not be installed into the folder .venv"),
        ("uv export", "Side-Step's list of packages could not be read"),
        ("uv pip", "The packages could not be installed"),
        ("python train.py --version", "torch is installed but does not start"),
    ],
)
def test_what_fails_is_explained_in_a_sentence(linux: Linux, fails: str, why: str):
    linux.have("curl" if fails == "curl" else "uv")
    assert linux.run("--yes", fails=fails) == 1
    assert f"stand-in: {fails.split()[0]} does not work" in linux.output
    assert f"\nError: {why}" in linux.output
    assert linux.output.split("\n")[-2].startswith("  "), "no way out is said"
    assert not (linux.folder / "side-step").exists()


def test_what_the_check_finds_is_left_to_be_mended(linux: Linux):
    assert linux.run("--yes", fails="python train.py doctor") == 0, linux.output
    assert "Note: training waits for what is called a problem above. The wizard fetches the models." in linux.output
    assert (linux.folder / "side-step").is_file()


def test_an_argument_it_does_not_know_starts_nothing(linux: Linux):
    assert linux.run("--cuda") == 1
    assert "takes only --yes and --torch NAME" in linux.output
    assert linux.calls == []


@pytest.mark.parametrize("words", [["--torch"], ["--torch", ""], ["--torch", "--yes"], ["--yes", "--torch", "-y"]])
def test_a_torch_build_without_a_name_starts_nothing(linux: Linux, words: list[str]):
    assert linux.run(*words) == 1
    assert "Error: --torch needs a name.\n  For instance: ./install.sh --torch cu126" in linux.output
    assert linux.calls == []


def test_run_again_in_a_clone_it_updates_side_step_first(linux: Linux):
    (linux.folder / ".git").mkdir()
    linux.run("--yes")
    assert not [call for call in linux.calls if call.startswith("git")]
    assert linux.run("--yes", "--torch", "cpu") == 0, linux.output
    assert linux.calls[:2] == ["git checkout --quiet -- uv.lock", "git pull --ff-only"]
    assert linux.installs() == ["cpu"]
    assert not [call for call in linux.calls if call.startswith("uv venv")]
    assert linux.run("--yes", fails="git pull") == 0, linux.output
    assert "could not be updated, for the reason above" in linux.output


def test_run_again_in_an_unpacked_archive_it_says_how_to_update(linux: Linux):
    linux.run("--yes")
    assert linux.run("--yes") == 0, linux.output
    assert "this folder came as an archive" in linux.output


def test_the_launcher_hands_on_its_arguments_and_the_exit_code(linux: Linux):
    linux.run("--yes")
    assert linux.run("fixed", "--audio-dir", "my songs", file="side-step") == 130
    assert linux.output == f"started by {linux.folder}/side-step\n"
    assert linux.calls == [f"python {linux.folder}/train.py fixed --audio-dir my songs"]


def test_the_launcher_can_be_linked_to_from_elsewhere(linux: Linux):
    linux.run("--yes")
    bin_, alias = linux.root / "my bin", linux.root / "alias"
    bin_.mkdir()
    alias.symlink_to(linux.folder / "side-step")
    (bin_ / "side-step").symlink_to(Path("..", "alias"))
    assert linux.run("fixed", file=str(bin_ / "side-step")) == 130, linux.output
    assert linux.output == f"started by {bin_}/side-step\n"
    assert linux.calls == [f"python {linux.folder}/train.py fixed"]


def test_the_batch_file_reaches_windows_as_it_reads_them():
    shown = subprocess.run(
        ["git", "check-attr", "eol", "install_windows.bat"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "install_windows.bat: eol: crlf\n"


def test_every_jump_of_the_batch_file_has_its_label():
    labels = re.findall(r"^:(\w+)", BATCH, re.MULTILINE)
    assert len(labels) == len(set(labels))
    jumps = set(re.findall(r"\bgoto (\w+)", BATCH)) | set(re.findall(r"\bcall :(\w+)", BATCH))
    assert jumps <= set(labels)
    assert jumps == set(labels), "a label that nothing jumps to"


def test_every_failure_of_the_batch_file_has_a_reason_and_a_way_out_and_keeps_the_window_open():
    lines = BATCH.split("\n")
    failures = [at for at, line in enumerate(lines) if line.endswith("goto failed")]
    assert len(failures) > 10
    for at in failures:
        before = "\n".join(lines[max(0, at - 8) : at])
        assert 'set "WHY=' in before and 'set "WAY=' in before, lines[at]
    assert BATCH.endswith("echo Error: %WHY%\necho   %WAY%\nif not defined YES pause\nexit /b 1\n")


def test_sentences_of_the_batch_file_hold_no_sign_that_cmd_takes_for_its_own():
    for name, sentence in re.findall(r'set "(WHY|WAY)=(.*)"\n', BATCH):
        assert not set(sentence) & set('&|<>^%!"'), f"{name}: {sentence}"
