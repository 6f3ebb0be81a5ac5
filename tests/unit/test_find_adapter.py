"""Which file of a path is the adapter; nothing of it is read."""

import json
from pathlib import Path

import pytest

from sidestep.config.runs import CHECKPOINTS, LORA_FILE, RUN_CONFIG, STATE_FILE
from sidestep.errors import ModelError
from sidestep.exports.find import find_adapter


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def make_run(folder: Path) -> Path:
    """Make the output folder of a run with one checkpoint and the directions of its rank map."""
    touch(folder / CHECKPOINTS / "epoch_3" / STATE_FILE)
    touch(folder / CHECKPOINTS / "epoch_3" / LORA_FILE)
    touch(folder / "rank_map.safetensors")
    (folder / RUN_CONFIG).write_text(json.dumps({"settings": {"run_name": "mine"}}))
    return folder


def test_an_adapter_is_found_by_its_file_its_folder_or_its_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    file = touch(run / "mine" / LORA_FILE)
    for path in (file, file.parent, run):
        assert find_adapter(path) == file
    assert find_adapter(run / CHECKPOINTS / "epoch_3").name == LORA_FILE
    only = touch(tmp_path / "downloaded" / "blues.safetensors")
    assert find_adapter(only.parent) == only


def test_a_run_without_its_final_adapter_names_the_newest_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ModelError, match="has not come to its final adapter") as caught:
        find_adapter(run)
    assert str(run / CHECKPOINTS / "epoch_3") in caught.value.hint


def test_where_there_is_none_or_more_than_one_that_is_said(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("one", "two"):
        touch(tmp_path / "several" / f"{name}.safetensors")
    for path, sentence in (
        ("no", "no such file"), ("empty", "holds no safetensors file"), ("several", "holds 2 safetensors files")
    ):  # fmt: skip
        with pytest.raises(ModelError, match=sentence):
            find_adapter(tmp_path / path)
