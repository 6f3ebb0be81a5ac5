"""Which folder a run goes on in, however its checkpoint is named, and which folders it leaves alone."""

import shutil
from pathlib import Path

import pytest

from sidestep.config.runs import CHECKPOINTS, STATE_FILE, checkpoints_in
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from tests.torch.command_line import train
from tests.torch.tiny import read_state, write_songs


def go_on(path: Path | str, *words: str) -> int:
    return main(["fixed", "--resume-from", str(path), "--plain", *words])


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints_in(run)]


@pytest.fixture
def run(tmp_path: Path, base: Checkpoint) -> Path:
    """A run of two epochs, with a checkpoint of each."""
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    return train(base, songs, tmp_path / "run", "--epochs", "2", "--save-every", "1").folder


def test_a_run_goes_on_in_no_folder_that_holds_another_run(
    tmp_path: Path, base: Checkpoint, run: Path, capsys: pytest.CaptureFixture[str]
):
    other = train(base, tmp_path / "songs", tmp_path / "other", "--epochs", "3", "--seed", "7").folder
    before = {path: path.read_bytes() for path in other.rglob("*") if path.suffix in (".pt", ".json", ".jsonl")}
    capsys.readouterr()
    assert go_on(run, "--epochs", "3", "--output-dir", str(other)) == 2
    assert "other holds a run already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in other.rglob("*") if path.suffix in (".pt", ".json", ".jsonl")} == before


def test_a_run_goes_on_in_an_empty_folder_where_that_is_asked_for(tmp_path: Path, run: Path):
    assert go_on(run / CHECKPOINTS / "epoch_1", "--output-dir", str(tmp_path / "branch")) == 0
    assert names(tmp_path / "branch") == ["epoch_2"]


@pytest.mark.parametrize(
    ("folder", "named"),
    [("checkpoints", "epoch_1"), ("checkpoints/epoch_1", "."), ("checkpoints/epoch_2", "../epoch_1")],
)
def test_a_checkpoint_that_is_named_from_within_its_run_goes_on_in_that_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, folder: str, named: str
):
    monkeypatch.chdir(run / folder)
    assert go_on(named, "--epochs", "3") == 0
    assert names(run) == ["epoch_3", "epoch_2", "epoch_1"]
    assert not (run / CHECKPOINTS / "epoch_1" / CHECKPOINTS).exists()


def test_an_older_checkpoint_that_is_named_by_its_state_file_sets_the_newer_ones_aside(run: Path):
    assert go_on(run / CHECKPOINTS / "epoch_1" / STATE_FILE, "--epochs", "3", "--save-every", "9") == 0
    assert names(run) == ["epoch_3", "epoch_1"]
    assert (run / CHECKPOINTS / "superseded_epoch_2").is_dir()


def test_one_that_was_set_aside_is_gone_on_from_and_leaves_the_older_ones(run: Path):
    aside = (run / CHECKPOINTS / "epoch_2").rename(run / CHECKPOINTS / "superseded_epoch_2")
    assert go_on(aside, "--epochs", "3") == 0
    assert names(run) == ["epoch_3", "epoch_1"]


def test_a_checkpoint_that_was_copied_into_any_folder_called_checkpoints_goes_on_in_itself(tmp_path: Path, run: Path):
    copied = tmp_path / "home" / CHECKPOINTS / "epoch_1"
    shutil.copytree(run / CHECKPOINTS / "epoch_1", copied)
    assert go_on(copied, "--epochs", "2") == 0
    assert [path.name for path in (tmp_path / "home").iterdir()] == [CHECKPOINTS]
    assert names(copied) == ["epoch_2"]


def test_a_run_of_which_the_checkpoints_alone_are_left_goes_on_where_they_lie(tmp_path: Path, run: Path):
    left = tmp_path / "left"
    shutil.copytree(run / CHECKPOINTS, left / CHECKPOINTS)
    assert go_on(left, "--epochs", "3") == 0
    assert names(left) == ["epoch_3", "epoch_2", "epoch_1"]


def test_a_checkpoint_that_was_copied_out_of_its_run_is_gone_on_with_more_than_once(tmp_path: Path, run: Path):
    copied = tmp_path / "copied"
    shutil.copytree(run / CHECKPOINTS / "epoch_1", copied)
    assert go_on(copied, "--epochs", "2") == 0
    assert go_on(copied, "--epochs", "3", "--save-every", "9") == 0
    assert names(copied) == ["epoch_3", "epoch_2"]
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    assert sum('"first_step": 4' in line for line in lines) == 1
    assert read_state(checkpoints_in(copied)[0])["state"]["step"] == 6
