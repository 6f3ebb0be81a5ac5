"""Whose songs a folder of tensors holds: what stays in it, what leaves, and what is refused."""

import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.data.dataset_file import Dataset
from sidestep.errors import DataError
from sidestep.events import Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.preprocess.plan import tensor_name
from sidestep.preprocess.run import LOCK_NAME, PreprocessResult
from sidestep.preprocess.tensors import sample_paths
from tests.torch.test_preprocess import checkpoint, contents, make_dataset, run, write_song

__all__ = ["checkpoint"]


def test_vanished_songs_leave_the_manifest_and_foreign_files_stay(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    (tmp_path / "tensors" / "notes.txt").write_text("mine")
    (tmp_path / "tensors" / "foreign.pt").write_text("not ours")
    result, events = run(replace(dataset, tracks=dataset.tracks[1:]), tmp_path / "tensors", checkpoint)
    assert result == PreprocessResult(done=0, unchanged=1, skipped=0, removed=1)
    assert sample_paths(tmp_path / "tensors") == [tmp_path / "tensors" / tensor_name("b.wav")]
    names = {path.name for path in (tmp_path / "tensors").iterdir()} - {LOCK_NAME}
    assert names == {tensor_name("b.wav"), "foreign.pt", "notes.txt", "manifest.json", "preprocess_meta.json"}
    assert any(isinstance(event, Notice) and "foreign.pt" in event.text for event in events)


def test_what_an_official_manifest_lists_stays_listed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    output = tmp_path / "tensors"
    output.mkdir()
    (output / "0123abcd.pt").write_bytes(b"official")
    (output / "manifest.json").write_text(json.dumps({"samples": ["0123abcd.pt", "gone.pt"]}))
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    for _ in range(2):
        _, events = run(dataset, output, checkpoint)
        assert sample_paths(output) == [output / tensor_name("a.wav"), output / "0123abcd.pt"]
        assert any(isinstance(event, Notice) and "0123abcd.pt" in event.text for event in events)
    assert (output / "0123abcd.pt").read_bytes() == b"official"


def test_a_folder_of_another_dataset_is_left_alone_but_a_moved_one_goes_on(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    before = contents(tmp_path / "tensors")
    with pytest.raises(DataError, match="holds the tensors of other songs"):
        run(make_dataset(tmp_path / "others", "b.wav"), tmp_path / "tensors", checkpoint)
    assert contents(tmp_path / "tensors") == before
    album = make_dataset(tmp_path / "album", "a.wav", "b.wav")  # Its first song only has the other one's name.
    (tmp_path / "album" / "a.wav").write_bytes((tmp_path / "album" / "b.wav").read_bytes()[:-400])
    with pytest.raises(DataError, match="holds the tensors of other songs"):
        run(album, tmp_path / "tensors", checkpoint)
    assert contents(tmp_path / "tensors") == before
    shutil.copytree(tmp_path / "songs", tmp_path / "copied")
    track = replace(dataset.tracks[0], audio_path=tmp_path / "copied" / "a.wav")
    copied = Dataset(folder=tmp_path / "copied", tracks=(track,), name="songs")
    assert run(copied, tmp_path / "tensors", checkpoint)[0].unchanged == 1
    run(dataset, tmp_path / "tensors", checkpoint)
    (tmp_path / "songs").rename(tmp_path / "renamed")
    track = replace(dataset.tracks[0], audio_path=tmp_path / "renamed" / "a.wav")
    moved = Dataset(folder=tmp_path / "renamed", tracks=(track,), name="songs")
    assert run(moved, tmp_path / "tensors", checkpoint)[0].unchanged == 1


def test_songs_that_may_not_be_read_are_not_taken_for_the_same(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_dataset(tmp_path / "songs", "a.wav"), tmp_path / "tensors", checkpoint)
    shutil.copytree(tmp_path / "songs", tmp_path / "copied")

    def refuse(*_paths: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filecmp, "cmp", refuse)
    with pytest.raises(DataError, match="holds the tensors of other songs"):
        run(make_dataset(tmp_path / "copied", "a.wav"), tmp_path / "tensors", checkpoint)


def test_a_copied_folder_goes_on_after_one_of_its_songs_was_mended(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    shutil.copytree(tmp_path / "songs", tmp_path / "copied")
    write_song(tmp_path / "copied" / "a.wav", hertz=550.0)
    tracks = tuple(replace(track, audio_path=tmp_path / "copied" / track.name) for track in dataset.tracks)
    copied = Dataset(folder=tmp_path / "copied", tracks=tracks, name="songs")
    assert run(copied, tmp_path / "tensors", checkpoint)[0] == PreprocessResult(1, 1, 0, 0)


def test_a_folder_in_which_no_song_of_another_dataset_became_a_tensor_is_free(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    unusable = make_dataset(tmp_path / "songs", "a.wav")
    unusable.tracks[0].audio_path.write_bytes(b"not audio")
    with pytest.raises(DataError, match="None of the 1 songs could be preprocessed"):
        run(unusable, tmp_path / "tensors", checkpoint)
    run(make_dataset(tmp_path / "others", "b.wav"), tmp_path / "tensors", checkpoint)
    assert sample_paths(tmp_path / "tensors") == [tmp_path / "tensors" / tensor_name("b.wav")]
