"""Datasets: scanned from a folder, written to and read from dataset.json, ours and other tools'."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sidestep.data.dataset_file import Dataset, Track, load_dataset, read_dataset, scan_folder, write_dataset
from sidestep.errors import DataError, RunError
from sidestep.events import Event, Notice, TrackSkipped


def song(path: Path, seconds: float = 1.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(size=round(8000 * seconds)) * 0.1, 8000)
    return path


def dataset_file(folder: Path, *samples: dict[str, Any], **metadata: object) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"metadata": metadata, "samples": samples}), encoding="utf-8")
    return path


def ignore(event: Event) -> None:
    """A sink for tests that look at the result only."""


def test_a_folder_becomes_tracks_in_a_fixed_order_with_their_sidecars(tmp_path: Path) -> None:
    for name in ("disc2/song.wav", "disc1/song.wav", "Ωmega.flac"):
        song(tmp_path / name)
    (tmp_path / "disc1/song.txt").write_text("caption: one\nbpm: 90\nlanguage: english\nlyrics:\nla", encoding="utf-8")
    (tmp_path / "disc2/song.caption.txt").write_text("two", encoding="utf-8")
    events: list[Event] = []
    dataset = scan_folder(tmp_path, emit=events.append)
    first, second, third = dataset.tracks
    assert [track.name for track in dataset.tracks] == ["disc1/song.wav", "disc2/song.wav", "Ωmega.flac"]
    assert (first.caption, first.bpm, first.language, first.lyrics, first.is_instrumental, first.duration) == (
        "one", 90, "en", "la", False, 1,
    )  # fmt: skip
    assert (second.caption, second.lyrics, second.is_instrumental) == ("two", "[Instrumental]", True)
    assert third.caption == ""
    assert first.audio_path == tmp_path.resolve() / "disc1/song.wav"
    assert len({track.id for track in dataset.tracks}) == 3
    assert all(len(track.id) == 8 and int(track.id, 16) >= 0 for track in dataset.tracks)
    assert events == []


def test_a_track_keeps_its_id_when_its_folder_moves(tmp_path: Path) -> None:
    song(tmp_path / "a/disc/é.wav")
    song(tmp_path / "b/disc/e\u0301.wav")
    ids = [scan_folder(tmp_path / name, emit=ignore).tracks[0].id for name in "ab"]
    assert ids[0] == ids[1]


def test_composed_and_decomposed_names_side_by_side_are_two_tracks(tmp_path: Path) -> None:
    song(tmp_path / "é.wav")
    song(tmp_path / "e\u0301.wav")
    (tmp_path / "é.caption.txt").write_text("composed", encoding="utf-8")
    (tmp_path / "e\u0301.caption.txt").write_text("decomposed", encoding="utf-8")
    tracks = scan_folder(tmp_path, emit=ignore).tracks
    assert {track.name: track.caption for track in tracks} == {"é.wav": "composed", "e\u0301.wav": "decomposed"}
    assert tracks[0].id != tracks[1].id


def test_songs_that_cannot_be_used_are_skipped_by_name(tmp_path: Path) -> None:
    for name in ("good.wav", "latin.wav", "broken.wav"):
        song(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"caption: caf\xe9")
    (tmp_path / "broken.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:2000])
    (tmp_path / "words.mp3").write_text("words")
    events: list[Event] = []
    assert [track.name for track in scan_folder(tmp_path, emit=events.append).tracks] == ["good.wav"]
    skipped = {event.name: event.reason for event in events if isinstance(event, TrackSkipped)}
    assert list(skipped) == ["broken.wav", "latin.wav", "words.mp3"]
    assert "latin.txt is not UTF-8" in skipped["latin.wav"]


def test_a_file_name_that_is_no_utf8_is_skipped(tmp_path: Path) -> None:
    song(tmp_path / "good.wav")
    shutil.copy(tmp_path / "good.wav", os.fsencode(tmp_path) + b"/caf\xe9.wav")
    events: list[Event] = []
    assert [track.name for track in scan_folder(tmp_path, emit=events.append).tracks] == ["good.wav"]
    assert [event.name for event in events if isinstance(event, TrackSkipped)] == ["caf?.wav"]


def test_songs_in_a_folder_whose_name_is_no_utf8_are_skipped(tmp_path: Path) -> None:
    song(tmp_path / "good/a.wav")
    (tmp_path / "good").rename(tmp_path / os.fsdecode(b"b\xe4nd"))
    events: list[Event] = []
    with pytest.raises(DataError, match="None of the 1 songs"):
        scan_folder(tmp_path / os.fsdecode(b"b\xe4nd"), emit=events.append)
    (event,) = events
    assert isinstance(event, TrackSkipped)
    assert event.reason.endswith("b?nd/a.wav is not valid UTF-8.")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_text("words")
    with pytest.raises(DataError, match="None of the 1 songs"):
        scan_folder(tmp_path, emit=ignore)


def test_odd_metadata_and_unread_formats_are_remarked_on(tmp_path: Path) -> None:
    song(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("bpm: fast\nmood: sad")
    (tmp_path / "b.m4a").touch()
    events: list[Event] = []
    assert scan_folder(tmp_path, emit=events.append).tracks[0].bpm is None
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "1 files (.m4a) are left out: convert them to FLAC to use them.",
        "a.wav: a.txt: the line 'mood: sad' belongs to no field and is left out.",
        "a.wav: bpm: 'fast' is not a number.",
    ]


def full_dataset(folder: Path) -> Dataset:
    described = Track(
        id="0123abcd",
        audio_path=song(folder / "disc 1/söng.wav"),
        name="disc 1/söng.wav",
        caption='a "quoted" caption',
        genre="rock, pop",
        lyrics="[Verse]\nlá",
        bpm=120,
        keyscale="A minor",
        timesignature="4",
        language="en",
        is_instrumental=False,
        custom_tag="own",
        prompt_override="genre",
        duration=1,
        repeat=3,
    )
    bare = Track(id="00000001", audio_path=song(folder / "b.wav"), name="b.wav", duration=1)
    return Dataset(
        folder=folder, tracks=(described, bare), name="mine", custom_tag="zzz", tag_position="append", genre_ratio=30
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    dataset = full_dataset(tmp_path.resolve())
    write_dataset(tmp_path / "dataset.json", dataset)
    assert read_dataset(tmp_path / "dataset.json") == dataset
    assert [path.name for path in tmp_path.iterdir() if path.is_file()].count("dataset.json") == 1
    assert not list(tmp_path.glob(".*"))


def test_the_file_is_as_the_official_tools_read_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset.json", full_dataset(tmp_path.resolve()))
    content = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    created = content["metadata"].pop("created_at")
    assert created[:2] == "20"
    assert content["metadata"] == {
        "name": "mine", "custom_tag": "zzz", "tag_position": "append", "num_samples": 2, "all_instrumental": False,
        "genre_ratio": 30,
    }  # fmt: skip
    first, second = content["samples"]
    assert first == {
        "id": "0123abcd", "audio_path": (tmp_path.resolve() / "disc 1/söng.wav").as_posix(), "filename": "söng.wav",
        "relative_path": "disc 1/söng.wav", "caption": 'a "quoted" caption', "genre": "rock, pop",
        "lyrics": "[Verse]\nlá", "raw_lyrics": "[Verse]\nlá", "formatted_lyrics": "", "bpm": 120, "keyscale": "A minor",
        "timesignature": "4", "duration": 1, "language": "en", "is_instrumental": False, "custom_tag": "own",
        "labeled": True, "prompt_override": "genre", "repeat": 3,
    }  # fmt: skip
    assert (second["labeled"], second["custom_tag"], second["lyrics"], second["bpm"]) == (
        False, "zzz", "[Instrumental]", None,
    )  # fmt: skip


def test_a_copied_folder_uses_its_own_songs(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a/dataset.json", full_dataset(tmp_path.resolve() / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    names = [track.audio_path for track in read_dataset(tmp_path / "b/dataset.json").tracks]
    assert names == [tmp_path.resolve() / "b/disc 1/söng.wav", tmp_path.resolve() / "b/b.wav"]


@pytest.mark.parametrize("form", ["official", "list", "without metadata"])
def test_the_forms_of_other_tools_are_read(tmp_path: Path, form: str) -> None:
    song(tmp_path / "a.wav")
    sample = {"audio_path": "./a.wav", "caption": "x", "bpm": "99", "timesignature": "4/4", "labeled": True, "mine": 1}
    content = {"official": {"metadata": {"name": "n"}, "samples": [sample]}, "list": [sample],
               "without metadata": {"samples": [sample]}}[form]  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (track,) = read_dataset(tmp_path / "dataset.json").tracks
    assert (track.name, track.caption, track.bpm, track.timesignature) == ("a.wav", "x", 99, "4")


@pytest.mark.parametrize("sample", [
    {"audio_path": "disc/a.wav"}, {"audio_path": "disc\\a.wav"}, {"filename": "disc/a.wav"},
    {"audio_path": "/gone/a.wav", "filename": "disc/a.wav"}, {"audio_path": "disc/../disc/a.wav"},
    {"audio_path": "C:\\gone\\x.wav", "filename": "disc/a.wav"},
])  # fmt: skip
def test_audio_is_found_however_the_path_is_written(tmp_path: Path, sample: dict[str, str]) -> None:
    path = song(tmp_path.resolve() / "disc/a.wav")
    (track,) = read_dataset(dataset_file(tmp_path, sample)).tracks
    assert (track.audio_path, track.name) == (path, "disc/a.wav")


def test_audio_beside_the_file_is_found_when_its_old_place_is_gone(tmp_path: Path) -> None:
    path = song(tmp_path.resolve() / "a.wav")
    for old in ("/gone/a.wav", "C:\\gone\\a.wav", "datasets/mine/a.wav"):
        assert read_dataset(dataset_file(tmp_path, {"audio_path": old})).tracks[0].audio_path == path


def test_a_name_in_another_unicode_form_is_found(tmp_path: Path) -> None:
    path = song(tmp_path.resolve() / "e\u0301.wav")
    assert read_dataset(dataset_file(tmp_path, {"audio_path": "é.wav"})).tracks[0].audio_path == path


@pytest.mark.parametrize("key", ["audio_path", "filename", "relative_path"])
def test_a_relative_path_may_not_leave_the_folder(tmp_path: Path, key: str) -> None:
    song(tmp_path / "a.wav")
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataError, match=r"points outside its folder: \.\./a\.wav"):
        read_dataset(dataset_file(tmp_path / "inner", {key: "../a.wav"}))


def test_absolute_paths_outside_are_the_users_own_and_get_names_that_differ(tmp_path: Path) -> None:
    paths = [song(tmp_path.resolve() / name) for name in ("x/song.wav", "y/song.wav", "y/other.wav")]
    (tmp_path / "inner").mkdir()
    dataset = read_dataset(dataset_file(tmp_path / "inner", *({"audio_path": str(path)} for path in paths)))
    assert [track.audio_path for track in dataset.tracks] == paths
    names = [track.name for track in dataset.tracks]
    assert [name.rsplit("/", 2)[-2:] for name in names] == [["x", "song.wav"], ["y", "song.wav"], ["other.wav"]]


def test_ids_that_are_no_plain_words_or_used_twice_are_replaced(tmp_path: Path) -> None:
    samples = [
        {"audio_path": f"{name}.wav", "id": identity} for name, identity in zip("abc", ("../x", "1", "1"), strict=True)
    ]
    ids = [track.id for track in read_dataset(dataset_file(tmp_path, *samples)).tracks]
    assert ids[1] == "1"
    assert len(set(ids)) == 3
    assert all(identity.isalnum() for identity in ids)


@pytest.mark.parametrize(("content", "reason"), [
    ("{", "not valid JSON"), ("3", 'needs a list "samples"'), ('{"samples": {}}', 'needs a list "samples"'),
    ('{"samples": []}', "lists no songs"), ("[" * 100000, "nested too deeply"), ("[1]", "sample 1 is not an object"),
    ('[{"audio_path": "\\ud800"}]', "surrogates not allowed"),
    ("[{}]", "sample 1 has no audio_path"), ('[{"audio_path": 3}]', "audio_path is not a path"),
    ('[{"audio_path": "a.wav", "bpm": "fast"}]', r"sample 1 \(a.wav\): bpm: 'fast' is not a number"),
    ('[{"audio_path": "a.wav"}, {"audio_path": "./a.wav"}]', "lists a.wav twice"),
    ('{"metadata": {"genre_ratio": 101}, "samples": [{"audio_path": "a.wav"}]}', "genre_ratio is 101"),
    ('{"metadata": {"tag_position": "middle"}, "samples": [{"audio_path": "a.wav"}]}', "tag_position is 'middle'"),
])  # fmt: skip
def test_a_wrong_dataset_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_dataset(tmp_path / "dataset.json")
    assert "dataset.json" in caught.value.message
    assert caught.value.hint


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    dataset = full_dataset(tmp_path.resolve())
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        write_dataset(tmp_path / "taken/dataset.json", dataset)
    (tmp_path / "out/dataset.json").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be written"):
        write_dataset(tmp_path / "out/dataset.json", dataset)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset.json"]


def test_without_a_dataset_file_the_folder_is_scanned(tmp_path: Path) -> None:
    song(tmp_path / "a.wav")
    assert [track.name for track in load_dataset(tmp_path, None, emit=ignore).tracks] == ["a.wav"]
    with pytest.raises(DataError, match="There is no dataset file"):
        load_dataset(tmp_path, tmp_path / "gone.json", emit=ignore)


def test_missing_songs_are_skipped_and_lengths_filled_in(tmp_path: Path) -> None:
    song(tmp_path / "a.wav", 2.9)
    dataset_file(tmp_path, {"audio_path": "a.wav"}, {"audio_path": "gone.wav"})
    events: list[Event] = []
    (track,) = load_dataset(tmp_path, None, emit=events.append).tracks
    assert (track.name, track.duration) == ("a.wav", 2)
    (event,) = events
    assert isinstance(event, TrackSkipped)
    assert event.name == "gone.wav"
    assert "not there" in event.reason


def test_a_song_that_was_replaced_since_is_as_long_as_it_is_now(tmp_path: Path) -> None:
    song(tmp_path / "a.wav")
    write_dataset(tmp_path / "dataset.json", scan_folder(tmp_path, emit=ignore))
    song(tmp_path / "a.wav", 4.2)
    assert load_dataset(tmp_path, None, emit=ignore).tracks[0].duration == 4


def test_a_dataset_file_that_points_nowhere_is_an_error(tmp_path: Path) -> None:
    path = dataset_file(tmp_path, {"audio_path": "gone.wav"}, {"audio_path": "/also/gone.wav"})
    with pytest.raises(DataError, match=r"None of the 2 songs in .*dataset\.json can be read, such as .*gone\.wav"):
        load_dataset(tmp_path, path, emit=ignore)


def test_a_folder_that_has_moved_on_since_is_warned_about(tmp_path: Path) -> None:
    song(tmp_path / "a.wav")
    write_dataset(tmp_path / "dataset.json", scan_folder(tmp_path, emit=ignore))
    events: list[Event] = []
    load_dataset(tmp_path, None, emit=events.append)
    assert events == []
    song(tmp_path / "new.wav")
    (tmp_path / "a.caption.txt").write_text("late")
    os.utime(tmp_path / "dataset.json", (1, 1))
    load_dataset(tmp_path, None, emit=events.append)
    first, second = (event.text for event in events if isinstance(event, Notice))
    assert "1 songs" in first
    assert "new.wav" in first
    assert "stay out" in first and "What it skips, it gives the reason for." in first
    assert "a.caption.txt was changed after dataset.json" in second


def test_a_dataset_elsewhere_finds_its_songs(tmp_path: Path) -> None:
    song(tmp_path / "songs/disc/a.wav")
    dataset = scan_folder(tmp_path / "songs", emit=ignore)
    write_dataset(tmp_path / "elsewhere/dataset.json", dataset)
    read = load_dataset(tmp_path / "songs", tmp_path / "elsewhere/dataset.json", emit=ignore)
    assert read.tracks == (replace(dataset.tracks[0], name="a.wav"),)
