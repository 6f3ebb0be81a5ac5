"""A run keeps its rank map: what becomes of the file it was given changes nothing for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sidestep.config.presets import read_run_config
from sidestep.config.rank_map import RANK_MAP_FILE, directions_file, open_rank_map, read_rank_map
from sidestep.listen.story import read_story
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.directions import read_directions
from tests.torch.command_line import NAME, Left, train
from tests.torch.estimating import songs
from tests.torch.tiny import adapter_tensors, assert_identical

__all__ = ["songs"]

SMALL = ["--device", "cpu", "--rank", "4", "--rank-min", "1", "--rank-max", "8", "--estimate-batches", "8", "--plain"]
CONSTANT = ["--scheduler-type", "constant"]


@pytest.fixture
def given(tmp_path: Path, base: Checkpoint, songs: Path) -> Path:
    """A map of the first seed, with its directions, where the next estimate may replace it."""
    return estimate(base, songs, tmp_path / "given.json", "--save-directions")


def estimate(base: Checkpoint, songs: Path, output: Path, *words: str) -> Path:
    paths = ["-c", str(base.root), "-M", "base", "-d", str(songs), "--output", str(output)]
    assert main(["estimate", *paths, *SMALL, *words]) == 0
    return output


def resume(run: Path, *words: str) -> int:
    return main(["fixed", "--resume-from", str(run), "--epochs", "2", "--device", "cpu", "--plain", *words])


def forget_the_copy(run: Path, given: Path) -> None:
    """Make a run one of an earlier Side-Step, which kept only the path of its map."""
    (run / RANK_MAP_FILE).unlink()
    for path in [run / "config.json", *run.glob("checkpoints/*/config.json")]:
        content = json.loads(path.read_text())
        content["settings"]["rank_map"] = str(given)
        path.write_text(json.dumps(content))


def replace_it(base: Checkpoint, songs: Path, given: Path) -> None:
    before = read_rank_map(given).ranks
    estimate(base, songs, given, "--rank", "2", "--rank-max", "2", "--seed", "9")
    assert read_rank_map(given).ranks != before


@pytest.mark.parametrize(
    "change",
    [{"name": "layers.99.self_attn.q_proj"}, {"name": "condition_embedder"}, {"cost": 5}, {"rank": 4000}],
    ids=str,
)
def test_a_map_that_was_changed_by_hand_trains_nothing(
    tmp_path: Path, base: Checkpoint, songs: Path, given: Path, capsys: pytest.CaptureFixture[str], change: Any
):
    content = json.loads(given.read_text())
    content["modules"][0].update(change)
    spent = sum(module["rank"] * module["cost"] for module in content["modules"])
    content["budget"].update(spent=spent, parameters=spent)
    given.write_text(json.dumps(content))
    words = ["-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(tmp_path / "run"), "--plain"]
    assert main(["fixed", *words, "--device", "cpu", "--rank-map", str(given)]) == 1
    assert "train.py estimate" in capsys.readouterr().err


def test_the_folder_of_a_map_stands_for_it_and_its_directions(tmp_path: Path, base: Checkpoint, songs: Path):
    rank_map = estimate(base, songs, tmp_path / "maps" / RANK_MAP_FILE, "--save-directions")
    by_file = train(base, songs, tmp_path / "file", "--rank-map", rank_map, "--rank-map-start")
    by_folder = train(base, songs, tmp_path / "folder", "--rank-map", rank_map.parent, "--rank-map-start")
    assert_identical(by_folder.tensors, by_file.tensors)
    assert by_folder.start["facts"]["Adapter"] == by_file.start["facts"]["Adapter"]
    assert read_directions(open_rank_map(by_folder.folder))


@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_a_run_goes_on_whatever_became_of_the_map_it_was_given(
    tmp_path: Path, base: Checkpoint, songs: Path, given: Path, fate: str
):
    words = [*CONSTANT, "--rank-map", given, "--rank-map-start"]
    whole = train(base, songs, tmp_path / "whole", *words, "--epochs", 2)
    train(base, songs, tmp_path / "begun", *words)
    assert (tmp_path / "begun" / RANK_MAP_FILE).read_bytes() == given.read_bytes()
    given.unlink()
    directions_file(given).unlink()
    if fate == "replaced":
        estimate(base, songs, given, "--rank", "2", "--rank-max", "2", "--seed", "9")
    (tmp_path / "begun").rename(tmp_path / "moved")
    (tmp_path / "moved/rank_map.safetensors").unlink()
    assert resume(tmp_path / "moved") == 0
    assert_identical(adapter_tensors(tmp_path / "moved" / NAME), adapter_tensors(whole.adapter))
    assert read_run_config(tmp_path / "moved/config.json")[1]["rank_map"] == tmp_path / "moved" / RANK_MAP_FILE


def test_another_run_starts_from_the_map_and_the_directions_that_a_run_keeps(
    tmp_path: Path, base: Checkpoint, songs: Path, given: Path
):
    first = train(base, songs, tmp_path / "first", "--rank-map", given, "--rank-map-start")
    replace_it(base, songs, given)
    first.folder.rename(tmp_path / "moved")
    assert read_story(tmp_path / "moved").rank_map == read_rank_map(tmp_path / "moved" / RANK_MAP_FILE)
    again = train(base, songs, tmp_path / "again", "--config", tmp_path / "moved/config.json")
    assert_identical(again.tensors, adapter_tensors(tmp_path / "moved" / NAME))
    assert (again.folder / RANK_MAP_FILE).read_bytes() == (tmp_path / "moved" / RANK_MAP_FILE).read_bytes()


def test_a_run_of_an_earlier_side_step_goes_on_with_the_map_it_was_given_and_no_other(
    tmp_path: Path, base: Checkpoint, songs: Path, given: Path, capsys: pytest.CaptureFixture[str]
):
    run = train(base, songs, tmp_path / "run", "--rank-map", given).folder
    forget_the_copy(run, given)
    shutil.copytree(run, tmp_path / "other")
    assert resume(run) == 0
    assert (run / RANK_MAP_FILE).read_bytes() == given.read_bytes()
    shutil.copy(given, tmp_path / "safe.json")
    replace_it(base, songs, given)
    capsys.readouterr()
    assert resume(tmp_path / "other") == 1
    assert f"{given} is not the rank map that this run was started with." in capsys.readouterr().err
    given.unlink()
    assert resume(tmp_path / "other") == 1
    assert f"The rank map of this run is gone: {given}." in capsys.readouterr().err
    assert resume(tmp_path / "other", "--rank-map", str(tmp_path / "safe.json")) == 0


def test_a_map_in_the_output_folder_is_no_runs_to_replace_unless_a_run_left_it(
    tmp_path: Path, base: Checkpoint, songs: Path, given: Path, capsys: pytest.CaptureFixture[str]
):
    other = estimate(base, songs, tmp_path / "run/rank_map.json", "--seed", "9")
    before = other.read_bytes()
    words = ["-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(tmp_path / "run"), "--plain"]
    assert main(["fixed", *words, "--device", "cpu", "--rank-map", str(given)]) == 2
    assert f"{other} is another rank map" in capsys.readouterr().err
    assert other.read_bytes() == before
    left = train(base, songs, tmp_path / "run", "--rank-map", other)
    assert isinstance(left, Left) and other.read_bytes() == before
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(base, songs, tmp_path / "run", "--rank-map", given, "--run-name", "second")
    assert other.read_bytes() == given.read_bytes()
