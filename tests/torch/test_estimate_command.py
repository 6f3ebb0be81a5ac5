"""`train.py estimate` as it is typed: what is shown, what is written, and how it goes on to training."""

import shlex
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.config.rank_map import read_rank_map
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from tests.torch.tiny import write_songs

SMALL = ["--device", "cpu", "--rank", "4", "--rank-min", "1", "--rank-max", "8", "--estimate-batches", "8"]


def typed(base: Checkpoint, songs: Path, *more: str) -> list[str]:
    return ["estimate", "-c", str(base.root), "-M", "base", "-d", str(songs), *SMALL, *more]


def test_the_map_lies_beside_the_songs_with_its_picture_and_the_command_that_uses_it(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    songs = write_songs(tmp_path / "songs", base, (40, 44, 48, 40))
    assert main(typed(base, songs, "--log-dir", str(tmp_path / "board"), "--top-k", "3", "--save-directions")) == 0
    shown = capsys.readouterr().out
    rank_map = read_rank_map(songs / "rank_map.json")
    assert f"{rank_map.budget.spent:,} of {rank_map.budget.parameters:,}" in shown
    assert "captures of what is usable" in shown
    assert shown.count("layers.") == 3
    with Image.open(songs / "rank_map.png") as image:
        assert image.size[0] > 300
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert board.Tags()["images"] == ["rank_map"]

    (line,) = (line for line in shown.splitlines() if "train.py fixed" in line)
    assert "--rank " not in line  # It was the budget's; the map has its own.
    words = shlex.split(line.replace("OUTPUT", str(tmp_path / "out")))[3:]
    assert main([*words, "--rank-map-start", "--max-steps", "2", "--num-workers", "0"]) == 0
    assert f"{len(rank_map.ranks)} modules" in capsys.readouterr().out


def test_verify_ends_with_a_sentence_that_claims_no_more_than_was_seen(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    songs = write_songs(tmp_path / "songs", base, (40, 44, 48, 40))
    proof = ["--verify", "--verify-steps", "2", "--verify-runs", "2", "--val-split", "0.5", "--batch-size", "1"]
    assert main(typed(base, songs, *proof)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("Held-out loss"))
    assert [line.split()[0] for line in lines[at + 2 : at + 5]] == ["uniform", "cross-fit", "eva"]
    assert lines[-1] == "No difference beyond chance between the map and the uniform adapter."


def test_what_cannot_be_is_said_before_anything_is_computed(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(typed(base, tmp_path / "nowhere")) == 1
    assert "There is no folder" in capsys.readouterr().err
    songs = write_songs(tmp_path / "songs", base, (40, 44))
    assert main(typed(base, songs, "--parameters", "10")) == 2
    said = capsys.readouterr()
    assert "does not pay for any module" in said.err
    assert "Estimating" not in said.out  # Refused before anything is measured.
    assert main(typed(base, songs, "--timestep-focus", "0.31,0.32", "--timestep-mode", "discrete")) == 2
    assert "trains no timestep from 0.31 to 0.32" in capsys.readouterr().err
    assert main(typed(base, songs, "--output", str(songs))) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("no folder")
    assert main(typed(base, songs, "--output", str(tmp_path / "file" / "map.json"))) == 1
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert "Estimating" not in said.out + said.err
    assert not (songs / "rank_map.json").exists()
