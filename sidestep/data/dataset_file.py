"""Tracks and datasets: found in a folder, read from and written to `dataset.json`.

The file is the one of the official ACE-Step tools and of Side-Step: `{"metadata": {...}, "samples": [...]}`. Where the
audio is, each sample says three times, because its readers differ:
- `relative_path`, posix, from the JSON's folder: what we go by first, so that a moved or copied folder works. The other
  tools ignore it.
- `audio_path`, absolute with forward slashes: the official tools resolve a relative one against the folder they were
  started in, which is never the songs'; they take an absolute one wherever it lies below that folder.
- `filename`, the bare name: what Side-Step looks for beside the JSON when `audio_path` is gone, and so do we.
A relative path may not leave the JSON's folder; an absolute `audio_path` is the user's own and taken as it is.
`labeled` is true for tracks with a caption, since the official tools preprocess no others, and `custom_tag` of each
sample is the tag in effect, since they look nowhere else.
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, cast

from sidestep.data.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES, find_audio, find_files, probe
from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE, canonical, has_words, parse_fields
from sidestep.data.sidecars import assign_rows, companions, is_sidecar, normalized, read_json, read_rows, read_sidecars
from sidestep.errors import DataError
from sidestep.events import Emit, Notice, TrackSkipped
from sidestep.files import write_whole

DATASET_FILE = "dataset.json"
TAG_POSITIONS = ("prepend", "append", "replace")
REBUILD = "Build it again with build-dataset."

TagPosition = Literal["prepend", "append", "replace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One song and what is known about it. `duration` is in whole seconds, rounded down; 0 when not known."""

    id: str  # 8 hex digits from the name: the same wherever the folder lies
    audio_path: Path  # absolute
    name: str  # posix path relative to the dataset's folder, unique; for audio outside of it the end of its path
    caption: str = ""
    genre: str = ""
    lyrics: str = INSTRUMENTAL
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    language: str = UNKNOWN_LANGUAGE
    is_instrumental: bool = True
    custom_tag: str = ""  # empty: the dataset's
    prompt_override: Literal["caption", "genre"] | None = None
    duration: int = 0
    repeat: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Tracks in a fixed order, and how tag and genre go into their prompts. `genre_ratio` is in percent."""

    folder: Path
    tracks: tuple[Track, ...]
    name: str = "untitled_dataset"
    custom_tag: str = ""
    tag_position: TagPosition = "prepend"
    genre_ratio: int = 0


def scan_folder(folder: Path, *, emit: Emit) -> Dataset:
    """Find the songs below `folder` with their sidecars; a song that cannot be used is reported as TrackSkipped.

    Only headers are read: damage further in shows when the song is decoded. What is odd about the metadata is emitted
    as warnings. Raises DataError when the folder is missing, holds no audio or none that can be used, or has a CSV that
    cannot be read.
    """
    folder = folder.resolve()
    audio = find_audio(folder)
    files: dict[Path, list[Path]] = {}
    for path in find_files(folder):
        files.setdefault(path.parent, []).append(path)
    _warn_of_unread(files, emit)
    beside = {parent: companions(paths) for parent, paths in files.items()}
    names = [path.relative_to(folder).as_posix() for path in audio]
    table_rows, remarks = read_rows(folder)
    rows, unclear_rows = assign_rows(table_rows, names)
    remarks += unclear_rows
    tracks: list[Track] = []
    taken: set[str] = set()
    for path, name in zip(audio, names, strict=True):
        try:
            _check_storable(name)
            raw, odd = read_sidecars(path, beside[path.parent], rows.get(name, ()))
            fields, unclear = parse_fields(raw)
            fields["duration"] = int(probe(path).seconds)
            tracks.append(Track(id=_track_id(name, taken), audio_path=path, name=name, **fields))
            remarks += [f"{name}: {sentence}" for sentence in (*odd, *unclear)]
        except DataError as error:
            emit(TrackSkipped(name=printable(name), reason=error.message, hint=error.hint))
    for sentence in remarks:
        emit(Notice(text=f"{sentence}.", level="warning"))
    if not tracks:
        raise DataError(f"None of the {len(audio)} songs in {folder} can be used.", hint="See the reasons above.")
    return Dataset(folder=folder, tracks=tuple(tracks), name=folder.name)


def read_dataset(path: Path) -> Dataset:
    """Read a dataset.json: ours, the official tools', Side-Step's, or a bare list of samples.

    Whether the audio is there is not checked. Raises DataError naming the file, and the sample, that is wrong.
    """
    if not path.is_file():
        raise DataError(f"There is no dataset file {path}.", hint=REBUILD)
    content = read_json(path)
    metadata = content.get("metadata") or {} if isinstance(content, dict) else {}
    samples = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(samples, list) or not isinstance(metadata, dict):
        raise DataError(f'{path} is not a dataset file: it needs a list "samples".', hint=REBUILD)
    if not samples:
        raise DataError(f"{path} lists no songs.", hint=REBUILD)
    folder = path.parent.resolve()
    settings = _read_metadata(metadata, path)
    taken: set[str] = set()
    tracks = [_read_sample(sample, number, folder, path, taken) for number, sample in enumerate(samples, start=1)]
    tracks = [replace(t, custom_tag="") if t.custom_tag == settings["custom_tag"] else t for t in tracks]
    return Dataset(folder=folder, tracks=tuple(_with_unique_names(tracks, path)), **settings)


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write a dataset.json, whole or not at all; see the module's head for what it says and why.

    Raises RunError when the file cannot be written.
    """
    folder = path.parent.resolve()
    content = {
        "metadata": {
            "name": dataset.name,
            "custom_tag": dataset.custom_tag,
            "tag_position": dataset.tag_position,
            "created_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "num_samples": len(dataset.tracks),
            "all_instrumental": all(track.is_instrumental for track in dataset.tracks),
            "genre_ratio": dataset.genre_ratio,
        },
        "samples": [_write_sample(track, dataset, folder) for track in dataset.tracks],
    }
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def load_dataset(audio_dir: Path, dataset_json: Path | None, *, emit: Emit) -> Dataset:
    """Read `dataset_json`, else `{audio_dir}/dataset.json` if it is there, else scan the folder.

    How long a track is, its audio says. One whose audio is missing or unreadable is reported as TrackSkipped;
    DataError when that is all of them. Warns of audio in `audio_dir` that the file does not list, and of sidecars that
    were changed after it was written.
    """
    path = dataset_json or audio_dir / DATASET_FILE
    if dataset_json is None and not path.is_file():
        return scan_folder(audio_dir, emit=emit)
    dataset = read_dataset(path)
    tracks: list[Track] = []
    for track in dataset.tracks:
        try:
            # Not the file's: the song may have been cut or replaced since, and the prompt says how long it is.
            tracks.append(replace(track, duration=int(probe(track.audio_path).seconds)))
        except DataError as error:
            reason = (
                error.message if track.audio_path.exists() else f"{path.name} points to {track.audio_path}: not there."
            )
            emit(TrackSkipped(name=track.name, reason=reason, hint=error.hint))
    if not tracks:
        raise DataError(
            f"None of the {len(dataset.tracks)} songs in {path} can be read, such as {dataset.tracks[0].audio_path}.",
            hint=f"Paths are taken as they are, or from {dataset.folder}. {REBUILD}",
        )
    if audio_dir.is_dir():
        _warn_of_changes(audio_dir, dataset, path, emit)
    return replace(dataset, tracks=tuple(tracks))


def printable(name: str) -> str:
    """Return a file name for the screen: bytes that are no UTF-8 as `?`."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _check_storable(name: str) -> None:
    if printable(name) != name:
        raise DataError(f"The file name {printable(name)} is not valid UTF-8.", hint="Rename the file.")


def _track_id(name: str, taken: set[str]) -> str:
    """Return 8 hex digits, not in `taken`, that depend on the name in composed Unicode; adds them to `taken`."""
    for attempt in range(1 << 16):
        text = normalized(name) if attempt == 0 else f"{name}\n{attempt}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        if digest not in taken:
            taken.add(digest)
            return digest
    raise AssertionError("more names than 8 hex digits can tell apart")


def _warn_of_unread(files: Mapping[Path, Sequence[Path]], emit: Emit) -> None:
    unread = [path for paths in files.values() for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]
    if unread:
        suffixes = " ".join(sorted({path.suffix.lower() for path in unread}))
        text = f"{len(unread)} files ({suffixes}) are left out: convert them to FLAC to use them."
        emit(Notice(text=text, level="warning"))


def _warn_of_changes(audio_dir: Path, dataset: Dataset, path: Path, emit: Emit) -> None:
    """Warn when the folder has moved on since the dataset file was written."""
    files = find_files(audio_dir)
    listed = {track.audio_path.resolve() for track in dataset.tracks}
    unlisted = [file for file in files if file.suffix.lower() in AUDIO_SUFFIXES and file.resolve() not in listed]
    if unlisted:
        example = printable(unlisted[0].name)
        text = (
            f"{len(unlisted)} songs in {audio_dir} are not in {path.name} and stay out, such as {example}. "
            f"{REBUILD} What it skips, it gives the reason for."
        )
        emit(Notice(text=text, level="warning"))
    written = path.stat().st_mtime
    songs = {track.audio_path.stem for track in dataset.tracks}
    sidecars = [file for file in files if is_sidecar(file.name, songs) and file.is_file()]
    newer = [file for file in sidecars if file.stat().st_mtime > written]
    if newer:
        text = f"{printable(newer[0].name)} was changed after {path.name} was written, which is what counts. {REBUILD}"
        emit(Notice(text=text, level="warning"))


def _read_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check and return the settings of a dataset."""

    def value(key: str, default: object, is_right: Callable[[Any], bool], what: str) -> Any:
        found = default if metadata.get(key) is None else metadata[key]
        if not is_right(found):
            raise DataError(f"{path}: {key} is {found!r}, but must be {what}.", hint=REBUILD)
        return found

    def is_text(found: object) -> bool:
        return isinstance(found, str)

    def is_percentage(found: object) -> bool:
        return isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= 100

    return {
        "name": value("name", "untitled_dataset", is_text, "text"),
        "custom_tag": value("custom_tag", "", is_text, "text").strip(),
        "tag_position": value("tag_position", "prepend", TAG_POSITIONS.__contains__, " or ".join(TAG_POSITIONS)),
        "genre_ratio": value("genre_ratio", 0, is_percentage, "a whole number from 0 to 100"),
    }


def _read_sample(sample: object, number: int, folder: Path, path: Path, taken: set[str]) -> Track:
    if not isinstance(sample, dict):
        raise DataError(f"{path}: sample {number} is not an object.", hint=REBUILD)
    sample = cast("dict[str, Any]", sample)
    audio_path = _locate(sample, number, folder, path)
    fields, remarks = parse_fields(canonical(sample))
    if remarks:
        raise DataError(f"{path}: sample {number} ({audio_path.name}): {'; '.join(remarks)}.", hint="Correct it there.")
    real = audio_path.parent.resolve() / audio_path.name
    below = next((each for each in (audio_path, real) if each.is_relative_to(folder)), None)
    name = below.relative_to(folder).as_posix() if below else audio_path.name
    identity = sample.get("id")
    # Files are named by it, so it must be a plain word, and no other track's.
    if not (isinstance(identity, str) and re.fullmatch(r"[0-9A-Za-z]{1,64}", identity) and identity not in taken):
        identity = _track_id(name, taken)
    taken.add(identity)
    return Track(id=identity, audio_path=audio_path, name=name, **fields)


def _locate(sample: Mapping[str, Any], number: int, folder: Path, path: Path) -> Path:
    """Return the absolute path of a sample's audio: the first of its three that exists, else the one it asks for."""
    candidates: list[Path] = []
    for key in ("relative_path", "audio_path", "filename"):
        text = sample.get(key)
        if text is None or text == "":
            continue
        if not isinstance(text, str) or "\0" in text:
            raise DataError(f"{path}: sample {number}: {key} is not a path.", hint=REBUILD)
        may_be_absolute = key == "audio_path"
        if may_be_absolute and Path(text).is_absolute():
            candidates.append(Path(os.path.normpath(text)))
        elif not PureWindowsPath(text).drive:
            candidates += [_inside(folder, variant, path) for variant in dict.fromkeys((text, text.replace("\\", "/")))]
        if may_be_absolute:
            candidates.append(folder / PureWindowsPath(text).name)
    if not candidates:
        raise DataError(f"{path}: sample {number} has no audio_path.", hint=REBUILD)
    return next((found for candidate in candidates if (found := _on_disk(candidate))), candidates[0])


def _on_disk(path: Path) -> Path | None:
    """Return the file at `path`, or the one whose name differs only in Unicode form; None where there is none."""
    try:
        if path.exists():
            return path
        if path.parent.is_dir():
            return next(
                (each for each in path.parent.iterdir() if normalized(each.name) == normalized(path.name)), None
            )
    except OSError:  # A name too long or a folder that may not be read: nothing is found there.
        return None
    return None


def _inside(folder: Path, text: str, path: Path) -> Path:
    """Resolve a path of the file against its folder, which it may not leave."""
    resolved = Path(os.path.normpath(folder / text))
    if not resolved.is_relative_to(folder):
        raise DataError(
            f"{path} points outside its folder: {text}.", hint="Write the absolute path if that is what you want."
        )
    return resolved


def _with_unique_names(tracks: Sequence[Track], path: Path) -> list[Track]:
    """Give tracks outside the folder that share a file name more of their path; refuse the same file twice."""
    seen: set[Path] = set()
    for track in tracks:
        if track.audio_path in seen:
            raise DataError(f"{path} lists {track.name} twice.", hint="Remove one of the two samples.")
        seen.add(track.audio_path)
    counts: dict[str, int] = {}
    for track in tracks:
        counts[track.name] = counts.get(track.name, 0) + 1
    return [
        replace(track, name="/".join(track.audio_path.parts[1:])) if counts[track.name] > 1 else track
        for track in tracks
    ]


def _write_sample(track: Track, dataset: Dataset, folder: Path) -> dict[str, Any]:
    has_lyrics = has_words(track.lyrics)
    sample: dict[str, Any] = {
        "id": track.id,
        "audio_path": track.audio_path.as_posix(),
        "filename": track.audio_path.name,
        "caption": track.caption,
        "genre": track.genre,
        "lyrics": track.lyrics,
        "raw_lyrics": track.lyrics if has_lyrics else "",
        "formatted_lyrics": "",
        "bpm": track.bpm,
        "keyscale": track.keyscale,
        "timesignature": track.timesignature,
        "duration": track.duration,
        "language": track.language,
        "is_instrumental": track.is_instrumental,
        "custom_tag": track.custom_tag or dataset.custom_tag,
        "labeled": bool(track.caption),
        "prompt_override": track.prompt_override,
        "repeat": track.repeat,
    }
    if track.audio_path.is_relative_to(folder):
        sample["relative_path"] = track.audio_path.relative_to(folder).as_posix()
    return sample
