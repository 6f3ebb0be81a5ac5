"""Commands to be copied: for the launcher that started Side-Step, and for the system's shell."""

from pathlib import Path

import pytest

from sidestep.config.shell import download_line, program_words, shell_line, start_words


def test_the_launcher_of_an_installation_is_named_in_the_commands_it_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIDESTEP_START", raising=False)
    assert start_words() == ("uv", "run", "train.py")
    monkeypatch.setenv("SIDESTEP_START", r".\Side-Step.bat")
    assert start_words() == (r".\Side-Step.bat",)


def test_so_are_the_programs_that_were_installed_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIDESTEP_START", raising=False)
    assert program_words("hf") == ("uv", "run", "hf")
    line = download_line("ACE-Step/x", Path("my models"), without=["lm-*"])
    assert line.startswith("uv run hf download ACE-Step/x --local-dir ") and "my models" in line and "lm-*/*" in line
    # There uv would put another torch in the place of the one that was chosen.
    monkeypatch.setenv("SIDESTEP_START", "./side-step")
    (path,) = program_words("hf")
    assert Path(path).parts[0] == ".venv" and Path(path).stem == "hf"


@pytest.mark.parametrize(
    ("word", "posix", "windows"),
    [
        ("plain", "plain", "plain"),
        (r"C:\my songs", r"'C:\my songs'", r'"C:\my songs"'),
        ("Tom&Jerry", "'Tom&Jerry'", '"Tom&Jerry"'),
        ("it's", "'it'\"'\"'s'", '"it\'s"'),
        ("", "''", '""'),
    ],
)
def test_a_word_is_quoted_as_its_shell_reads_it(word: str, posix: str, windows: str):
    assert shell_line(["fixed", word], is_windows=False) == f"fixed {posix}"
    assert shell_line(["fixed", word], is_windows=True) == f"fixed {windows}"
