"""What is to be done for each song: all its tensors depend on, hashed, and compared with the file that is there."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sidestep.data.dataset_file import Dataset, Track
from sidestep.data.prompts import Prompt, prompts_of
from sidestep.errors import DataError
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint
from sidestep.model.weights import read_weights
from sidestep.preprocess.encode_audio import Loudness
from sidestep.preprocess.tensors import read_metadata

# Counted up when the same song and settings come to give other numbers.
LATENTS_VERSION = 1
CONDITION_VERSION = 1
TIMBRE_FRAMES = 750
_FINGERPRINT_VALUES = 1024
_LONGEST_STEM = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all songs of a run have in common, as far as their tensors depend on it."""

    latents: tuple[Any, ...]
    """The VAE's fingerprint, the level, the cropping, the precision."""
    condition: tuple[Any, ...]
    """The fingerprints of text encoder, tokenizer, condition encoder and timbre, and the precision."""
    encoder_fingerprint: str
    model_variant: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A track, its prompt, and how many seconds of it are encoded."""

    track: Track
    prompt: Prompt
    seconds: float

    @property
    def name(self) -> str:
        """What the user calls the song: its path relative to the dataset."""
        return self.track.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Song:
    """A track, the file its tensors go to, and the hashes that say whether what is there still holds."""

    track: Track
    prompt: Prompt
    seconds: float
    file: str
    latents_key: str
    condition_key: str
    metadata: Mapping[str, Any] = field(repr=False)
    """All of the tensor file's metadata but the token counts."""
    stored: Mapping[str, Any] = field(repr=False)
    """The metadata of the tensor file that is there; empty without one."""

    @property
    def name(self) -> str:
        """What the user calls the song: its path relative to the dataset."""
        return self.track.name

    @property
    def latents_part(self) -> str:
        """Where the first pass keeps the song's latents."""
        return f"{self.file}.latents"

    @property
    def text_part(self) -> str:
        """Where the first pass keeps the rows of the song's prompt and lyrics."""
        return f"{self.file}.text"

    @property
    def is_unchanged(self) -> bool:
        """Whether the file that is there is the one that would be written."""
        return self.stored.get("settings") == self.metadata["settings"]

    @property
    def keeps_latents(self) -> bool:
        """Whether the latents in the file that is there still hold."""
        return self.stored.get("latents_key") == self.latents_key

    @property
    def keeps_condition(self) -> bool:
        """Whether the condition rows in the file that is there still hold."""
        return self.stored.get("condition_key") == self.condition_key


def make_recipe(
    checkpoint: Checkpoint, *, timbre: Tensor, max_duration: float, loudness: Loudness, dtype: torch.dtype
) -> Recipe:
    """Gather what a run's tensors depend on besides the songs. Reads headers and the first values of the weights."""
    level: dict[str, tuple[float, ...]] = {
        "none": (),
        "peak": (loudness.target_db,),
        "lufs": (loudness.target_db, loudness.target_lufs),
    }
    encoder = encoder_fingerprint(checkpoint)
    return Recipe(
        latents=(
            LATENTS_VERSION,
            weights_fingerprint(checkpoint.vae, "diffusion_pytorch_model"),
            loudness.mode,
            level[loudness.mode],
            max_duration,
            str(dtype),
        ),
        condition=(
            CONDITION_VERSION,
            weights_fingerprint(checkpoint.text_encoder, "model"),
            hashlib.sha256((checkpoint.tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
            encoder,
            hashlib.sha256(timbre.numpy().tobytes()).hexdigest(),
            str(dtype),
        ),
        encoder_fingerprint=encoder,
        model_variant=checkpoint.variant,
    )


def draft_songs(dataset: Dataset, *, max_duration: float) -> list[Draft]:
    """The dataset's songs with their prompts, in its order."""
    drafts = []
    for track, prompt in zip(dataset.tracks, prompts_of(dataset, max_duration=max_duration), strict=True):
        seconds = min(track.duration, max_duration) if max_duration > 0 else track.duration
        drafts.append(Draft(track, prompt, float(seconds)))
    return drafts


def plan_song(draft: Draft, *, recipe: Recipe, output: Path) -> Song:
    """Hash a song and everything that goes into its tensors. Raises DataError when the audio cannot be read."""
    track, prompt = draft.track, draft.prompt
    content = hash_file(track.audio_path)
    latents_key = hash_of([content, *recipe.latents])
    condition_key = hash_of([prompt.text, prompt.lyrics, *recipe.condition])
    metadata = {
        "audio_path": track.name,
        "filename": PurePosixPath(track.name).name,
        "caption": track.caption,
        "genre": track.genre,
        "lyrics": track.lyrics,
        "duration": track.duration,
        "bpm": track.bpm,
        "keyscale": track.keyscale,
        "timesignature": track.timesignature,
        "language": track.language,
        "is_instrumental": track.is_instrumental,
        "custom_tag": track.custom_tag,
        "prompt_override": track.prompt_override,
        "repeat": track.repeat,
        "preprocess_mode": "lora",
        "prompt": prompt.text,
        "lyrics_prompt": prompt.lyrics,
        "model_variant": recipe.model_variant,
        "encoder_fingerprint": recipe.encoder_fingerprint,
        "content": content,
        "latents_key": latents_key,
        "condition_key": condition_key,
    }
    file = tensor_name(track.name)
    return Song(
        track=track,
        prompt=prompt,
        seconds=draft.seconds,
        file=file,
        latents_key=latents_key,
        condition_key=condition_key,
        metadata=metadata | {"settings": hash_of(metadata)},
        stored=_stored_metadata(output / file),
    )


def tensor_name(name: str) -> str:
    """The tensor file of the song at relative path `name`: readable, and another one for every other path.

    The hash keeps `a.wav` and `a.flac`, `x/y.wav` and `x__y.wav`, and on any file system `a.wav` and `A.wav` apart.
    """
    stem = unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix(""))).replace("/", "__")
    readable = re.sub(r'[\x00-\x1f<>:"\\|?*]', "_", stem).strip(". ")
    while len(readable.encode()) > _LONGEST_STEM:
        readable = readable[:-1]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.pt"


def weights_fingerprint(folder: Path, stem: str) -> str:
    """Identify the weights `{stem}.safetensors` (or its shards): names, shapes, first 1024 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(folder, stem).items()):
        digest.update(json.dumps([name, tensor.shape, tensor.dtype]).encode())
        digest.update(tensor.first_values(_FINGERPRINT_VALUES).tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.") from error


def hash_of(values: Iterable[Any] | Mapping[str, Any]) -> str:
    """The sha256 of plain values, written as JSON."""
    return hashlib.sha256(json.dumps(values, allow_nan=False).encode()).hexdigest()


def _stored_metadata(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_metadata(path)
    except DataError:
        # Damaged, or of another format: it is written anew, which is all that could be said about it.
        return {}
