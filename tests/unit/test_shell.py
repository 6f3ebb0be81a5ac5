"""Commands to be copied: for the launcher that started Side-Step, and for the system's shell."""

import sys
from pathlib import Path

import pytest

from sidestep.commands.train import check_tensors
from sidestep.config.shell import SCRIPT, download_line, program_words, shell_line, start_words
from sidestep.errors import DataError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have an environment as the installers leave it, and be in the folder that it lies in."""
    monkeypatch.delenv("SIDESTEP_START", raising=False)
    environment = tmp_path / "Side-Step" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "locked.txt").write_text("numpy==2\n")
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(sys, "executable", str(environment / "bin" / "python"))
    monkeypatch.setattr("sidestep.config.shell.SCRIPT", tmp_path / "Side-Step" / "train.py")
    monkeypatch.chdir(environment.parent)
    return environment


@pytest.fixture
def not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an environment that uv made, and be in Side-Step's folder."""
    monkeypatch.delenv("SIDESTEP_START", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.chdir(SCRIPT.parent)


@pytest.mark.usefixtures("not_installed")
def test_without_an_installer_uv_starts_everything():
    assert start_words() == ("uv", "run", "train.py")
    assert shell_line(start_words(processes=4)) == "uv run torchrun --standalone --nproc-per-node 4 train.py"
    line = download_line("ACE-Step/x", Path("my models"), without=["lm-*"])
    assert line.startswith("uv run hf download ACE-Step/x --local-dir ") and "my models" in line and "lm-*/*" in line


@pytest.mark.usefixtures("not_installed")
def test_uv_is_named_only_where_it_finds_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    bin_ = Path("environment", "bin")
    assert start_words() == (str(bin_ / "python"), str(SCRIPT))
    assert start_words(processes=2)[0] == str(bin_ / "torchrun")
    assert download_line("ACE-Step/x", Path("models")).startswith(f"{bin_ / 'hf'} download ")


@pytest.mark.usefixtures("not_installed")
def test_missing_tensors_are_made_by_a_command_that_can_be_typed(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        check_tensors(tmp_path / "nowhere")
    assert "uv run train.py fixed --preprocess --audio-dir SONGS --tensor-output TENSORS" in caught.value.hint
    songs = tmp_path / "my songs"
    songs.mkdir()
    (songs / "song.mp3").touch()
    with pytest.raises(DataError) as caught:
        check_tensors(songs)
    command = f"uv run train.py fixed --preprocess --audio-dir {shell_line([songs])} --tensor-output TENSORS"
    assert command in caught.value.hint


@pytest.mark.usefixtures("not_installed")
def test_the_folder_one_is_in_is_named_when_it_holds_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        check_tensors(Path())
    assert caught.value.message == f"There are no tensor files (.pt) in {tmp_path}."


@pytest.mark.usefixtures("installed")
def test_the_launcher_that_started_it_is_named_in_the_commands_it_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIDESTEP_START", r".\Side-Step.bat")
    assert start_words() == (r".\Side-Step.bat",)
    assert program_words("hf") == (str(Path(".venv", "bin", "hf")),)


# There `uv run` would put another torch in the place of the one that was chosen.
@pytest.mark.usefixtures("installed")
def test_started_without_the_launcher_an_installation_is_not_touched():
    bin_ = Path(".venv", "bin")
    assert start_words() == (str(bin_ / "python"), "train.py")
    assert start_words(processes=2) == (
        *(str(bin_ / "torchrun"), "--standalone", "--nproc-per-node"),
        *("2", "train.py"),
    )


@pytest.mark.parametrize("launcher", [None, "/somewhere/side-step"])
def test_from_any_folder_programs_are_found(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str | None
):
    monkeypatch.chdir(tmp_path)
    assert program_words("hf") == (str(Path("Side-Step", ".venv", "bin", "hf")),)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if launcher:
        monkeypatch.setenv("SIDESTEP_START", launcher)
    assert program_words("hf") == (str(installed / "bin" / "hf"),)
    words = start_words(processes=2)
    assert (words[0], words[-1]) == (str(installed / "bin" / "torchrun"), str(installed.parent / "train.py"))


def test_commands_name_whole_paths_where_the_current_folder_was_deleted(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert start_words() == (str(installed / "bin" / "python"), str(installed.parent / "train.py"))


def test_an_image_that_names_its_launcher_has_the_programs_beside_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIDESTEP_START", "side-step")
    (path,) = program_words("torchrun")
    assert Path(path).absolute() == Path(sys.executable).with_name("torchrun")
    assert SCRIPT.is_file()


@pytest.mark.parametrize(
    ("word", "posix", "windows"),
    [
        ("plain", "plain", "plain"),
        (r"C:\my songs", r"'C:\my songs'", r'"C:\my songs"'),
        ("Tom&Jerry", "'Tom&Jerry'", '"Tom&Jerry"'),
        ("it's", "'it'\"'\"'s'", '"it\'s"'),
        ("#1-{live}", "'#1-{live}'", '"#1-{live}"'),
        ("@home", "@home", '"@home"'),
        ("", "''", '""'),
    ],
)
def test_a_word_is_quoted_as_its_shell_reads_it(word: str, posix: str, windows: str):
    assert shell_line(["fixed", word], is_windows=False) == f"fixed {posix}"
    assert shell_line(["fixed", word], is_windows=True) == f"fixed {windows}"
