"""Where a run's checkpoints are found again, and how older ones win when they are asked for."""

from pathlib import Path

from sidestep.config.runs import CHECKPOINTS, STATE_FILE, checkpoints_in, resume_candidates, set_aside_newer


def make(run: Path, *names: str) -> list[Path]:
    folders = [run / CHECKPOINTS / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text("state")
    return folders


def test_the_newest_checkpoint_comes_first_also_within_an_epoch(tmp_path: Path):
    make(tmp_path, "epoch_2", "epoch_10", "epoch_10_step_43", "epoch_9_step_99")
    names = [folder.name for folder in checkpoints_in(tmp_path)]
    assert names == ["epoch_10_step_43", "epoch_10", "epoch_9_step_99", "epoch_2"]
    assert resume_candidates(tmp_path) == checkpoints_in(tmp_path)


def test_going_on_from_an_older_checkpoint_keeps_the_newer_ones_out_of_the_way(tmp_path: Path):
    older, newer, newest = make(tmp_path, "epoch_2", "epoch_4", "epoch_6")
    aside = set_aside_newer(tmp_path, older)
    assert [folder.name for folder in aside] == ["superseded_epoch_6", "superseded_epoch_4"]
    assert checkpoints_in(tmp_path) == [older]
    assert not newer.exists() and not newest.exists()
    assert resume_candidates(aside[0]) == [aside[0]], "what was set aside can still be resumed by name"
    make(tmp_path, "epoch_4")
    assert [folder.name for folder in set_aside_newer(tmp_path, older)] == ["superseded_epoch_4_1"]


def test_the_newest_checkpoint_sets_nothing_aside(tmp_path: Path):
    _, newest = make(tmp_path, "epoch_2", "epoch_4")
    assert set_aside_newer(tmp_path, newest) == []
