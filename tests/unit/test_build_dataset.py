"""The command build-dataset: the file it writes, the report it ends with, and what it does about bad songs."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.commands.build_dataset import run
from sidestep.config.tasks import BuildDatasetConfig
from sidestep.data.dataset_file import read_dataset
from sidestep.errors import ConfigError, DataError
from sidestep.events import Event, TrackDone, TrackSkipped
from sidestep.ui.console import Console

RATE = 48000


def noise(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(round(seconds * RATE), 2)) * 0.1


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def build(folder: Path, **settings: object) -> tuple[int, str, list[Event]]:
    """Run the command; return its exit code, what it printed with single spaces, and its events."""
    values = {"output": None, "name": "", "tag": "", "tag_position": "prepend", "genre_ratio": 0, **settings}
    stream, events = io.StringIO(), list[Event]()
    code = run(BuildDatasetConfig(input=folder, **values), emit=events.append, console=Console(stream, is_plain=True))
    return code, "\n".join(" ".join(line.split()) for line in stream.getvalue().splitlines()), events


def test_a_good_folder_becomes_a_file_and_a_report(tmp_path: Path) -> None:
    write(tmp_path / "disc1/song.wav", noise(1.0, 1))
    write(tmp_path / "disc2/song.flac", noise(2.0, 2))
    (tmp_path / "disc1/song.txt").write_text("caption: rock\nbpm: 120\nkey: Am\nlanguage: en\nlyrics: la la")
    (tmp_path / "disc2/song.caption.txt").write_text("piano")
    code, text, events = build(tmp_path, tag="zzz", tag_position="append", genre_ratio=20, name="mine")
    dataset = read_dataset(tmp_path / "dataset.json")
    assert code == 0
    assert (dataset.name, dataset.custom_tag, dataset.tag_position, dataset.genre_ratio) == (
        "mine",
        "zzz",
        "append",
        20,
    )
    assert [track.caption for track in dataset.tracks] == ["rock", "piano"]
    for line in ("songs 2", "length 0.00 hours (0 min 3 s)", "with caption 2 of 2", "with lyrics 1 of 2",
                 "with language 1 of 2", "with bpm 1 of 2", "with key 1 of 2"):  # fmt: skip
        assert line in text.splitlines()
    assert "What looks wrong" not in text
    assert text.endswith(f"Wrote {tmp_path / 'dataset.json'}.")
    assert [event.name for event in events if isinstance(event, TrackDone)] == ["disc1/song.wav", "disc2/song.flac"]


def test_what_looks_wrong_is_named(tmp_path: Path) -> None:
    write(tmp_path / "silent.wav", np.zeros((RATE, 2)))
    write(tmp_path / "loud.wav", np.clip(noise() * 30, -1, 1))
    write(tmp_path / "one.wav", noise(1.0, 3))
    write(tmp_path / "sub/copy.flac", soundfile.read(tmp_path / "one.wav", dtype="int16")[0])
    write(tmp_path / "long.wav", np.random.default_rng(4).normal(size=8000 * 241) * 0.1, 8000)
    (tmp_path / "one.txt").write_text(
        "caption: x\nbpm: 999\nlanguage: xx\nkey: H dur\nsignature: 7/8\nis_instrumental: yes\nlyrics: la"
    )
    code, text, _ = build(tmp_path)
    lines = text.splitlines()
    assert code == 0
    assert "silent silent.wav" in lines
    assert any(line.startswith("clipped loud.wav (") for line in lines)
    assert "the same sound one.wav, sub/copy.flac" in lines
    assert "longer than 240 s, the rest is cut unless --max-duration is raised long.wav (241 s)" in lines
    assert "low sample rate, no highs long.wav (8000 Hz)" in lines
    assert "no caption long.wav, loud.wav, silent.wav, sub/copy.flac" in lines
    assert "tempo outside 30 to 300 bpm one.wav (999)" in lines
    assert "a language code the model does not know one.wav (xx)" in lines
    assert 'a key unlike "C# minor" one.wav (H dur)' in lines
    assert "a time signature that is none of 2, 3, 4, 6 one.wav (7/8)" in lines
    assert "instrumental, but with lyrics one.wav" in lines


def test_a_full_scale_song_that_is_not_clipped_is_no_finding(tmp_path: Path) -> None:
    samples = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    write(tmp_path / "a.wav", samples)
    assert "clipped" not in build(tmp_path)[1]


def test_bad_songs_are_skipped_named_and_make_the_exit_code_1(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise())
    flac = write(tmp_path / "cut.flac", noise())
    flac.write_bytes(flac.read_bytes()[:-5000])
    (tmp_path / "words.mp3").write_text("words")
    broken = noise()
    broken[5] = np.nan
    write(tmp_path / "nan.wav", broken, subtype="FLOAT")
    code, text, events = build(tmp_path)
    skipped = sorted(event.name for event in events if isinstance(event, TrackSkipped))
    assert (code, skipped) == (1, ["cut.flac", "nan.wav", "words.mp3"])
    assert [track.name for track in read_dataset(tmp_path / "dataset.json").tracks] == ["good.wav"]
    assert "Skipped" in text
    assert all(name in text for name in skipped)


def test_nothing_usable_writes_nothing(tmp_path: Path) -> None:
    broken = noise()
    broken[5] = np.inf
    write(tmp_path / "inf.wav", broken, subtype="FLOAT")
    with pytest.raises(DataError, match="None of the songs"):
        build(tmp_path)
    assert not (tmp_path / "dataset.json").exists()


def test_remarks_about_sidecars_are_in_the_report(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise())
    (tmp_path / "a.txt").write_text("caption: x\nbpm: fast")
    assert "Warning: a.wav: bpm: 'fast' is not a number." in build(tmp_path)[1]


def test_captions_made_elsewhere_are_kept_aside_and_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise())
    for caption in ("first", "second"):
        samples = [{"audio_path": "a.wav", "caption": caption}]
        (tmp_path / "dataset.json").write_text(json.dumps({"samples": samples}))
        assert "it is kept as dataset.json.bak" in build(tmp_path)[1]
    kept = [json.loads((tmp_path / f"dataset.json.bak{n}").read_text())["samples"][0]["caption"] for n in ("", "1")]
    assert kept == ["first", "second"]
    build(tmp_path)
    assert not (tmp_path / "dataset.json.bak2").exists()


def test_a_caption_corrected_in_the_file_is_kept_aside_but_one_changed_beside_the_song_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise())
    sidecar, output = tmp_path / "a.caption.txt", tmp_path / "dataset.json"
    sidecar.write_text("first")
    build(tmp_path)
    os.utime(output, (1, 1))
    sidecar.write_text("second")
    build(tmp_path)
    assert not list(tmp_path.glob("*.bak"))
    os.utime(sidecar, (1, 1))
    output.write_text(output.read_text().replace("second", "corrected"))
    assert "it is kept as dataset.json.bak" in build(tmp_path)[1]
    assert read_dataset(tmp_path / "dataset.json.bak").tracks[0].caption == "corrected"


def test_a_tag_that_was_not_given_again_is_named_with_the_flag_for_it(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise())
    build(tmp_path, tag="my band", tag_position="append", genre_ratio=30)
    build(tmp_path, tag="other", genre_ratio=20)
    assert not list(tmp_path.glob("*.bak"))
    said = build(tmp_path)[1]
    flags = "--tag other --tag-position prepend --genre-ratio 20"
    assert f"The previous dataset.json, kept as dataset.json.bak, was built with {flags}; this one is not." in said
    assert read_dataset(tmp_path / "dataset.json.bak").custom_tag == "other"


def test_the_output_may_lie_elsewhere_but_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "songs/a.wav", noise())
    assert build(tmp_path / "songs", output=tmp_path / "out/mine.json")[0] == 0
    assert read_dataset(tmp_path / "out/mine.json").tracks[0].audio_path == tmp_path.resolve() / "songs/a.wav"
    with pytest.raises(ConfigError, match="is a folder"):
        build(tmp_path / "songs", output=tmp_path / "out")


def test_a_missing_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build(tmp_path / "nowhere")
    with pytest.raises(DataError, match="There is no audio"):
        build(tmp_path)


def test_many_songs_with_one_problem_take_one_line(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"{number}.wav", noise(0.5, number))
    assert "no caption 0.wav, 1.wav, 2.wav, 3.wav, 4.wav and 3 more" in build(tmp_path)[1].splitlines()
