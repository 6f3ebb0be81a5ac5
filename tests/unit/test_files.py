"""Files written whole, also where another program has one open for a moment, as on Windows."""

from pathlib import Path
from typing import Any

import pytest

from sidestep import files
from sidestep.commands.output import alone_in
from sidestep.config.runs import CHECKPOINTS
from sidestep.errors import RunError
from sidestep.files import WAITS, cannot_write, held_alone, write_whole


class HeldError(PermissionError):
    """What Windows raises for a file that another program has open."""

    winerror = 32


class OtherProgram:
    """Has the target open for so many attempts to replace it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, attempts: int, error: type[OSError] = HeldError) -> None:
        self.attempts, self.error = attempts, error
        self.waited: list[float] = []
        self._replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda source, target: self.replace(source, target))
        monkeypatch.setattr(files.time, "sleep", self.waited.append)

    def replace(self, source: Path, target: Path) -> Any:
        if self.attempts:
            self.attempts -= 1
            raise self.error(13, "The process cannot access the file", str(target))
        return self._replace(source, target)


def test_a_file_that_a_scanner_has_open_is_replaced_when_it_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.json"
    path.write_text("old")
    other = OtherProgram(monkeypatch, attempts=3)
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert other.waited == list(WAITS[:3])


def test_a_file_that_stays_open_elsewhere_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "song.flac"
    path.write_text("old")
    other = OtherProgram(monkeypatch, attempts=99)
    with pytest.raises(RunError, match="cannot be written: The process cannot access the file") as caught:
        write_whole(path, "new")
    assert "a player, an editor, OneDrive" in caught.value.hint
    assert sum(other.waited) == pytest.approx(6.35)
    assert [file.name for file in tmp_path.iterdir()] == ["song.flac"]
    assert path.read_text() == "old"


def test_a_folder_that_may_not_be_written_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = OtherProgram(monkeypatch, attempts=99, error=PermissionError)
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "song.flac", "new")
    assert other.waited == []


def test_two_processes_that_write_one_file_at_once_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, sync = tmp_path / "settings.json", files.os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(files.os, "fsync", sync)
        write_whole(path, "the other one's, which is longer")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    write_whole(path, "this one's")
    assert path.read_text() == "this one's"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_half_written_is_gone_when_the_next_one_starts(tmp_path: Path):
    left = [tmp_path / ".a1b2c3d4.writing", tmp_path / CHECKPOINTS / ".epoch_1_step_3.writing"]
    kept = [tmp_path / ".my book.writing", tmp_path / "epoch_1.writing", tmp_path / CHECKPOINTS / "epoch_1"]
    left[1].mkdir(parents=True)
    for folder in (kept[0], kept[2]):
        folder.mkdir()
    for path in (left[0], left[1] / "training_state.pt", kept[0] / "mine", kept[1]):
        path.write_text("half")
    with alone_in(tmp_path):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


def test_a_file_with_the_longest_name_there_is_is_written(tmp_path: Path):
    write_whole(tmp_path / ("a" * 255), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 255]


def test_a_path_that_is_too_long_for_windows_is_named_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    error = FileNotFoundError(2, "No such file or directory")
    short, long = tmp_path / "a", tmp_path / ("a" * 260)
    monkeypatch.setattr(files, "IS_WINDOWS", True)
    assert "its path is too long" in cannot_write(long, error).message
    assert "too long" not in cannot_write(short, error).message


def test_a_lock_keeps_others_out_until_its_block_ends(tmp_path: Path):
    path = tmp_path / "new" / ".lock"
    with (
        held_alone(path, taken=RunError("outer")),
        pytest.raises(RunError, match="inner"),
        held_alone(path, taken=RunError("inner")),
    ):
        pass
    with held_alone(path, taken=RunError("again")):
        assert path.read_bytes() == b""


def test_a_lock_that_cannot_be_made_is_said_in_words(tmp_path: Path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"), held_alone(tmp_path / "folder/.lock", taken=RunError("")):
        pass
