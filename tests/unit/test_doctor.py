"""The doctor without torch: what it finds on the machine and in folders, also where torch cannot be loaded."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from sidestep.commands import doctor
from sidestep.config.places import PROJECT, product_version
from sidestep.config.shell import INSTALLER
from sidestep.config.tasks import DoctorConfig
from sidestep.doctor import machine
from sidestep.doctor.finding import Finding
from sidestep.doctor.folders import models, output
from sidestep.doctor.machine import FORMATS, processes, sound, versions
from sidestep.ui.console import open_console
from tests.unit.stage import make_models
from tests.unit.terminal import Terminal

GIB = 2**30


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_the_versions_are_those_that_run():
    (found,) = versions()
    assert found.level == "ok"
    assert found.text.startswith(f"{product_version()} on Python {sys.version_info.major}.{sys.version_info.minor}.")


def test_a_package_that_is_missing_is_a_problem_and_another_torch_a_note(monkeypatch: pytest.MonkeyPatch):
    def installed(name: str) -> str:
        if name in ("peft", "bitsandbytes"):
            raise PackageNotFoundError(name)
        return "2.110.1" if name == "torch" else version(name)

    monkeypatch.setattr(machine, "version", installed)
    _, missing, other = versions()
    # bitsandbytes is not for every system.
    assert (missing.level, missing.text) == ("problem", "These are not installed: peft.")
    assert (other.level, other.text) == ("note", "torch 2.110.1 is not the 2.11 that Side-Step was tested with.")
    assert INSTALLER in missing.way_out and INSTALLER in other.way_out


def test_every_format_that_songs_may_have_is_read():
    found = sound()
    assert found.level == "ok"
    assert all(name in found.text for name in ("wav", "flac", "mp3", "ogg", "opus"))


@pytest.mark.parametrize(
    ("unread", "level"), [(("mp3",), "note"), (("wav", "mp3"), "note"), (("wav", "flac"), "problem")]
)
def test_a_format_that_is_not_read_is_named(monkeypatch: pytest.MonkeyPatch, unread: tuple[str, ...], level: str):
    monkeypatch.setattr(machine, "FORMATS", {**FORMATS, **dict.fromkeys(unread, ("NO SUCH FORMAT", "NONE"))})
    found = sound()
    assert (found.level, found.text.split(" cannot")[0]) == (level, ", ".join(unread))
    assert "FLAC" in found.way_out


def test_little_shared_memory_is_noted_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk(monkeypatch, 64 * 2**20)
    small = processes(tmp_path)
    assert (small.level, f"{tmp_path}: 0.1 GiB free" in small.text) == ("note", True)
    assert "--num-workers 0" in small.way_out and "--shm-size" in small.way_out
    assert processes(tmp_path / "no such folder").level == "ok"
    disk(monkeypatch, GIB)
    assert processes(tmp_path).level == "ok"


def test_an_output_folder_is_tried_where_it_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk(monkeypatch, 100 * GIB)
    found = output(tmp_path / "runs" / "mine")
    assert found == Finding("Output", f"{tmp_path / 'runs' / 'mine'} can be written; 100 GiB free.")
    assert not list(tmp_path.iterdir())
    disk(monkeypatch, 2 * GIB)
    assert (output(tmp_path).level, "--save-every" in output(tmp_path).way_out) == ("note", True)
    (tmp_path / "file").touch()
    refused = output(tmp_path / "file" / "runs")
    assert (refused.level, refused.text) == ("problem", f"{tmp_path / 'file'} cannot be written: Not a directory.")
    assert refused.way_out


def test_an_output_folder_on_a_drive_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)  # As for E:\ without its stick.
    refused = output(Path("runs"))
    assert (refused.level, refused.text) == ("problem", f"There is no {Path.cwd().anchor} here.")


def test_without_models_the_doctor_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("SIDESTEP_CHECKPOINT_DIR", raising=False)
    (unknown,) = models(None, None)
    assert unknown.level == "problem" and "hf download" in unknown.way_out
    (gone,) = models(tmp_path / "nowhere", None)
    assert (gone.level, gone.text) == ("problem", f"There is no checkpoint folder {tmp_path / 'nowhere'}.")
    (tmp_path / "empty").mkdir()
    (empty,) = models(tmp_path / "empty", None)
    assert (empty.level, "No model is there." in empty.way_out) == ("problem", True)


def test_a_command_in_a_way_out_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    command = "uv run hf download ACE-Step/acestep-v15-base --local-dir checkpoints/acestep-v15-base"
    finding = Finding("Models", "None is there.", "problem", f"{'Fetch the models. ' * 4}\n  {command}")
    monkeypatch.setattr(doctor, "_examine", lambda config: [finding])
    stream = Terminal()
    assert doctor.run(DoctorConfig(), console=open_console(plain=False, stream=stream)) == 1
    assert command in stream.getvalue()
    assert "-> Fetch the models." in stream.getvalue()


def test_a_model_without_encoders_can_be_trained_and_a_broken_one_cannot(tmp_path: Path):
    root = make_models(tmp_path / "models", "acestep-v15-base", "acestep-v15-turbo")
    (root / "acestep-v15-base" / "model.safetensors").unlink()
    turbo, base = sorted(models(root, None), key=lambda found: found.text.startswith("base"))
    assert turbo.level == "note" and turbo.text.startswith("turbo can be trained on tensors, but songs cannot")
    assert base.level == "note" and base.text.startswith("base: ")
    (asked,) = models(root, "base")
    assert asked.level == "problem" and asked.way_out


def test_where_torch_cannot_be_loaded_all_that_needs_none_is_said_first(tmp_path: Path):
    broken = tmp_path / "packages" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    environment = {
        **os.environ,
        "PYTHONPATH": str(broken.parent),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    words = [sys.executable, str(PROJECT / "train.py"), "doctor", "--plain", "-o", str(tmp_path / "out")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    abouts = [line[9:20].strip() for line in lines if line[:9].strip() in ("ok", "note", "problem")]
    assert abouts == ["Side-Step", "Sound", "Readers", "Output", "Models", "torch"]
    assert "cannot be loaded: OSError: libcudart.so.13: cannot open shared object file" in done.stdout
    assert INSTALLER in done.stdout
    assert lines[-1] == "2 problems to mend before training can work here."
