"""The songs of a dataset folder: checked against the model, and divided into those to train on and those held out."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from sidestep.config.recipe import songs_held_out
from sidestep.errors import ConfigError, DataError, SidestepError
from sidestep.events import Emit, Notice
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint
from sidestep.preprocess.tensors import Header, checksum, read_header, sample_paths
from sidestep.training.batches import Song, leave_signals_to_the_main_process

# A header takes half a millisecond, whatever the song's length: fewer files are not worth the start of a process.
MANY_FILES = 2000
_FILES_AT_ONCE = 64
_CONTENT_KEYS = ("latents_key", "condition_key")
_READ_KEYS = frozenset({"encoder_fingerprint", "model_variant", *_CONTENT_KEYS})


def find_songs(folder: Path, checkpoint: Checkpoint, *, emit: Emit, num_workers: int = 0) -> list[Song]:
    """Return the songs of a tensor folder; DataError unless all of them were made for this model.

    Thousands of files are opened by `num_workers` processes.
    """
    fingerprint = encoder_fingerprint(checkpoint)
    songs, unknown = [], 0
    paths = sample_paths(folder)
    for path, header in zip(paths, _headers(paths, num_workers), strict=True):
        if header.condition_width != checkpoint.encoder_width:
            raise DataError(
                f"{path.name} has conditions of width {header.condition_width}; "
                f"the model {checkpoint.variant} reads {checkpoint.encoder_width}.",
                hint="Preprocess the songs with this model: --preprocess --model-variant " + checkpoint.variant,
            )
        made_by = header.metadata.get("encoder_fingerprint")
        unknown += made_by is None
        if made_by not in (None, fingerprint):
            raise DataError(
                f"{path.name} was preprocessed with another model ({header.metadata.get('model_variant', 'unknown')}) "
                f"than {checkpoint.variant}.",
                hint="Each model has its own condition encoder. Preprocess the songs with this one: "
                f"--preprocess --model-variant {checkpoint.variant}",
            )
        content = "".join(str(header.metadata.get(key, "")) for key in _CONTENT_KEYS)
        songs.append(Song(path, header.frames, header.repeat, header.rows, content))
    if unknown:
        emit(
            Notice(
                text=f"{unknown} of {len(songs)} tensor files do not say which model they were made with; "
                f"be sure that it was {checkpoint.variant}.",
                level="warning",
            )
        )
    return songs


@dataclass(frozen=True, slots=True)
class _Headers(Dataset["Header | SidestepError"]):
    """The headers of tensor files, as far as a run needs them; what is wrong with one comes in its place."""

    paths: Sequence[Path]

    def __getitem__(self, place: int) -> "Header | SidestepError":
        try:
            header = read_header(self.paths[place])
        except SidestepError as error:
            return error
        kept = {key: header.metadata[key] for key in _READ_KEYS & header.metadata.keys()}
        if kept.keys().isdisjoint(_CONTENT_KEYS):  # Another program's, or an older one.
            kept["latents_key"] = checksum(self.paths[place])
        return replace(header, metadata=kept)

    def __len__(self) -> int:
        return len(self.paths)


def _headers(paths: Sequence[Path], num_workers: int) -> Iterator[Header]:
    """Yield the header of every file; raises the DataError of the first one that cannot be read."""
    loader = DataLoader(
        _Headers(paths),
        batch_size=_FILES_AT_ONCE,
        num_workers=num_workers if len(paths) >= MANY_FILES else 0,
        collate_fn=list[Header | SidestepError],
        generator=torch.Generator(),  # Or it would draw from the one that seeds the adapter.
        worker_init_fn=leave_signals_to_the_main_process,
    )
    for headers in loader:
        for header in headers:
            if isinstance(header, SidestepError):
                raise header
            yield header


def hold_out(songs: Sequence[Song], share: float) -> tuple[list[Song], list[Song]]:
    """Divide songs into those to train on and `share` of them (one at least) held out, chosen by their names alone.

    The same songs are held out in every run on them, whatever its seed. ConfigError when nothing would be left.
    """
    if not share:
        return list(songs), []
    if len(songs) < 2:
        raise ConfigError("--val-split needs two songs at least: one to train on and one to hold out.")
    ranked = sorted(songs, key=lambda song: hashlib.sha256(song.path.stem.encode()).digest())
    held_out = {song.path for song in ranked[: songs_held_out(len(songs), share)]}
    return [s for s in songs if s.path not in held_out], [s for s in songs if s.path in held_out]


def dataset_fingerprint(songs: Sequence[Song]) -> str:
    """Identify which songs a run trains on, at which lengths and from which audio and words, for its resume."""
    listing = repr([(song.path.name, song.frames, song.repeat, song.content) for song in songs])
    return hashlib.sha256(listing.encode()).hexdigest()
