"""Where a run's checkpoints are found again, and how older ones win when they are asked for."""

from pathlib import Path

import pytest

from sidestep.config.runs import (
    CHECKPOINTS,
    LORA_CONFIG,
    STATE_FILE,
    check_adapter_folders,
    checkpoints_in,
    resume_candidates,
    set_aside_newer,
)
from sidestep.errors import ConfigError


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
    aside = set_aside_newer(tmp_path, older, place=(2, 0))
    assert [folder.name for folder in aside] == ["superseded_epoch_6", "superseded_epoch_4"]
    assert checkpoints_in(tmp_path) == [older]
    assert not newer.exists() and not newest.exists()
    assert resume_candidates(aside[0]) == [aside[0]], "what was set aside can still be resumed by name"
    make(tmp_path, "epoch_4")
    assert [folder.name for folder in set_aside_newer(tmp_path, older, place=(2, 0))] == ["superseded_epoch_4_1"]


def test_going_on_from_one_that_was_set_aside_keeps_those_before_it(tmp_path: Path):
    make(tmp_path, "epoch_4", "epoch_20", "epoch_20_step_99", "epoch_3_step_9", "superseded_epoch_20")
    chosen = tmp_path / CHECKPOINTS / "superseded_epoch_20"
    aside = set_aside_newer(tmp_path, chosen, place=(20, 0))
    assert [folder.name for folder in aside] == ["superseded_epoch_20_step_99", "superseded_epoch_20_1"]
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["epoch_4", "epoch_3_step_9"]


def test_the_newest_checkpoint_sets_nothing_aside(tmp_path: Path):
    _, newest = make(tmp_path, "epoch_2", "epoch_4")
    assert set_aside_newer(tmp_path, newest, place=(4, 0)) == []


@pytest.mark.parametrize("ending", ["", "_best", "_ema"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_adapter_never_takes_the_place_of_other_files(tmp_path: Path, ending: str, goes_on: bool):
    (tmp_path / f"songs{ending}").mkdir()
    check_adapter_folders(tmp_path, "songs", goes_on=goes_on)
    (tmp_path / f"songs{ending}" / "song.wav").write_text("sound")
    with pytest.raises(ConfigError, match="something else is there"):
        check_adapter_folders(tmp_path, "songs", goes_on=goes_on)


def test_an_adapter_is_replaced_by_the_run_that_made_it_and_by_no_other(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LORA_CONFIG).write_text("{}")
    check_adapter_folders(tmp_path, "mine", goes_on=True)
    with pytest.raises(ConfigError, match="an adapter is there already") as caught:
        check_adapter_folders(tmp_path, "mine", goes_on=False)
    assert "--run-name" in caught.value.hint
