"""The songs of a dataset folder: checked against the model, and divided into those to train on and those held out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sidestep.errors import ConfigError, DataError
from sidestep.events import Emit, Notice
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint
from sidestep.preprocess.tensors import read_header, sample_paths
from sidestep.training.batches import Song


def find_songs(folder: Path, checkpoint: Checkpoint, *, emit: Emit) -> list[Song]:
    """Return the songs of a tensor folder; DataError unless all of them were made for this model."""
    fingerprint = encoder_fingerprint(checkpoint)
    songs, unknown = [], 0
    for path in sample_paths(folder):
        header = read_header(path)
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
        content = "".join(str(header.metadata.get(key, "")) for key in ("latents_key", "condition_key"))
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


def hold_out(songs: Sequence[Song], share: float) -> tuple[list[Song], list[Song]]:
    """Divide songs into those to train on and `share` of them (one at least) held out, chosen by their names alone.

    The same songs are held out in every run on them, whatever its seed. ConfigError when nothing would be left.
    """
    if not share:
        return list(songs), []
    if len(songs) < 2:
        raise ConfigError("--val-split needs two songs at least: one to train on and one to hold out.")
    count = min(max(1, round(len(songs) * share)), len(songs) - 1)
    ranked = sorted(songs, key=lambda song: hashlib.sha256(song.path.stem.encode()).digest())
    held_out = {song.path for song in ranked[:count]}
    return [s for s in songs if s.path not in held_out], [s for s in songs if s.path in held_out]


def dataset_fingerprint(songs: Sequence[Song]) -> str:
    """Identify which songs a run trains on, at which lengths and from which audio and words, for its resume."""
    listing = repr([(song.path.name, song.frames, song.repeat, song.content) for song in songs])
    return hashlib.sha256(listing.encode()).hexdigest()
