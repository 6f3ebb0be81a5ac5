"""manifest.json and preprocess_meta.json: what a folder of tensors holds, and which of its files we wrote.

A folder may hold tensor files of other tools. They are never touched; those that a manifest.json listed stay listed.
Only files named in our preprocess_meta.json are ever deleted, when their song is no longer in the dataset.
"""

import filecmp
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sidestep.data.dataset_file import Dataset
from sidestep.errors import DataError, RunError
from sidestep.events import Emit, Notice
from sidestep.files import write_whole
from sidestep.preprocess.plan import tensor_name
from sidestep.preprocess.tensors import FORMAT_VERSION, MANIFEST_NAME, listed_path, read_manifest

META_NAME = "preprocess_meta.json"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Record:
    """What an earlier run said about the folder: the folder of its songs, our files and their songs, their md5."""

    audio_dir: str
    songs: Mapping[str, str]
    checksums: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """An output folder, claimed for a dataset."""

    path: Path
    songs: Mapping[str, str]
    """The files that are ours: those of earlier runs and those of this one, and their songs."""
    gone: Sequence[str]
    """Our files whose songs are no longer in the dataset."""
    foreign: Sequence[str]
    """Files of other tools that the manifest lists."""
    checksums: Mapping[str, str]

    def close(
        self, dataset: Dataset, *, listed: Sequence[str], written: Iterable[str], facts: Mapping[str, Any]
    ) -> int:
        """Write manifest.json with the files `listed`, delete what is gone, and write preprocess_meta.json.

        `written` are the files of this run, `facts` what it was. Returns how many files were deleted.
        """
        write_manifest(self.path, dataset, [*listed, *self.foreign])
        removed = _remove_files(self.path, self.gone)
        kept = {file: self.checksums[file] for file in set(listed) - set(written) if file in self.checksums}
        sums = {file: kept.get(file) or _checksum(self.path / file) for file in listed}
        songs = {file: name for file, name in self.songs.items() if file not in self.gone}
        _write_record(self.path, dataset, songs=songs, checksums=sums, facts=facts)
        return removed


def claim_folder(path: Path, dataset: Dataset, *, emit: Emit) -> Folder:
    """Note in `path` which files the dataset's songs will have, and find out what else lies there.

    Raises DataError when the folder holds the tensors of another dataset that is still there, or its lists are damaged.
    """
    record = _read_record(path)
    planned = {tensor_name(track.name): track.name for track in dataset.tracks}
    gone = sorted(record.songs.keys() - planned.keys())
    _check_same_dataset(path, dataset, record, gone)
    ours = {**record.songs, **planned}
    kept, lost = _foreign_entries(path, ours)
    unlisted = sorted({file.name for file in path.glob("*.pt")} - ours.keys() - set(kept))
    _warn(emit, kept, "were written by another tool and stay in manifest.json, so they are trained on too")
    _warn(emit, lost, "are listed in manifest.json but not there, and leave it")
    _warn(emit, unlisted, "are of another tool and not listed in manifest.json, so they are not trained on")
    _write_record(path, dataset, songs=ours, checksums=record.checksums, facts={})
    return Folder(path=path, songs=ours, gone=gone, foreign=kept, checksums=record.checksums)


def _check_same_dataset(path: Path, dataset: Dataset, record: _Record, gone: Sequence[str]) -> None:
    """A folder whose songs were moved or copied is the same dataset; one whose songs lie elsewhere still is another."""
    if not record.audio_dir or record.audio_dir == _audio_dir(dataset) or not Path(record.audio_dir).is_dir():
        return
    if not any((path / file).is_file() for file in record.songs):
        return  # None of its songs could be used, or it was stopped before: nothing would be lost.
    if gone or _has_namesakes_alone(Path(record.audio_dir), dataset):
        raise DataError(
            f"{path} holds the tensors of other songs: those in {record.audio_dir}.",
            hint="Choose another --tensor-output, or delete the tensor files there first.",
        )


def _has_namesakes_alone(folder: Path, dataset: Dataset) -> bool:
    """Whether songs in `folder` have names of the dataset's and all are others: in a copy some were only mended.

    One song that is the same settles it: a copy of a large folder is not read as a whole.
    """
    namesakes = [(folder / track.name, track.audio_path) for track in dataset.tracks if (folder / track.name).is_file()]
    return bool(namesakes) and not any(_are_same(*pair) for pair in namesakes)


def _are_same(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other)
    except OSError:  # What may not be read is not known to be the same.
        return False


def _warn(emit: Emit, files: Sequence[str], what: str) -> None:
    if files:
        shown = ", ".join(files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
        emit(Notice(text=f"{len(files)} tensor files {what}: {shown}.", level="warning"))


def _foreign_entries(folder: Path, ours: Iterable[str]) -> tuple[list[str], list[str]]:
    """What the folder's manifest lists besides `ours`: files that are there, and entries that lead nowhere.

    Raises DataError when the manifest is malformed.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return [], []
    own, kept, lost = set(ours), [], []
    for entry in read_manifest(folder):
        try:
            file = listed_path(folder, entry).relative_to(folder).as_posix()
        except DataError:
            if Path(entry).name not in own:
                lost.append(entry)
            continue
        if file not in own:
            kept.append(file)
    return kept, lost


def _remove_files(folder: Path, files: Iterable[str]) -> int:
    """Delete these tensor files of ours; returns how many were there. Raises RunError when one cannot be deleted."""
    removed = 0
    for path in (folder / file for file in files):
        try:
            if path.is_file():
                path.unlink()
                removed += 1
        except OSError as error:
            raise RunError(f"{path} could not be deleted: {error.strerror or error}.") from error
    return removed


def _checksum(path: Path) -> str:
    """The md5 of a file, the sum that other tools' records of a folder hold."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read_record(folder: Path) -> _Record:
    """The record of the last run into `folder`; empty when there is none or it is another tool's.

    Raises DataError when the file is damaged.
    """
    path = folder / META_NAME
    empty = _Record("", {}, {})
    if not path.is_file():
        return empty
    hint = "Delete it; the tensor files are recognised without it."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint=hint) from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        return empty
    audio_dir, songs, checksums = content.get("audio_dir"), content.get("songs"), content.get("checksums")
    if not isinstance(audio_dir, str) or not isinstance(songs, dict) or not isinstance(checksums, dict):
        raise DataError(f"{path} is damaged.", hint=hint)
    ours = {file: str(name) for file, name in songs.items() if Path(file).name == file and file.endswith(".pt")}
    return _Record(audio_dir, ours, checksums)


def _write_record(
    folder: Path, dataset: Dataset, *, songs: Mapping[str, str], checksums: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "audio_dir": _audio_dir(dataset),
        **facts,
        "custom_tag": dataset.custom_tag,
        "tag_position": dataset.tag_position,
        "genre_ratio": dataset.genre_ratio,
        "songs": dict(sorted(songs.items())),
        "checksums": dict(sorted(checksums.items())),
    }
    write_whole(folder / META_NAME, _as_json(content))


def write_manifest(folder: Path, dataset: Dataset, entries: Sequence[str]) -> None:
    """Write manifest.json as the official tools read it: `entries` are relative to the folder, with forward slashes."""
    content = {
        "metadata": {
            "name": dataset.name,
            "custom_tag": dataset.custom_tag,
            "tag_position": dataset.tag_position,
            "num_samples": len(dataset.tracks),
            "all_instrumental": all(track.is_instrumental for track in dataset.tracks),
            "genre_ratio": dataset.genre_ratio,
        },
        "samples": list(entries),
        "num_samples": len(entries),
    }
    write_whole(folder / MANIFEST_NAME, _as_json(content))


def _audio_dir(dataset: Dataset) -> str:
    return str(dataset.folder.resolve())
