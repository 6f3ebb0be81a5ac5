"""From a dataset to a folder of tensor files, in two passes that hold one part of the model at a time.

Pass 1 encodes the audio with the VAE, then the words with the text encoder, and keeps both in `.pass1/`. Pass 2 encodes
the condition and writes the tensor files. What still holds from an earlier run, finished or not, is not done again.
On a GPU songs are read while others are encoded, and words are encoded for several songs at once (`stage.Flow`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from sidestep.data.audio import probe
from sidestep.data.dataset_file import Dataset, Track
from sidestep.errors import DataError, RunError
from sidestep.events import Emit
from sidestep.files import clear_unfinished, held_alone
from sidestep.model.checkpoint import Checkpoint, check_encoders
from sidestep.model.device import free_memory, full_memory_alike, wide_dtype
from sidestep.model.loading import load_condition_encoder, load_silence_latent, load_text_encoder, load_vae, silence_of
from sidestep.preprocess.encode_audio import Loudness, encode_wave, load_wave
from sidestep.preprocess.encode_condition import context_latents, encode_conditions, encode_timbre
from sidestep.preprocess.encode_text import (
    COUNTS,
    EncodedText,
    PromptTokens,
    encode_tokens,
    tokenize_prompt,
    truncation_notices,
)
from sidestep.preprocess.parts import has_part, make_parts_folder, read_part, remove_parts, write_part
from sidestep.preprocess.plan import TIMBRE_FRAMES, Draft, Recipe, Song, draft_songs, make_recipe, plan_song
from sidestep.preprocess.records import claim_folder
from sidestep.preprocess.stage import Flow, Work, Written, finite, run_stage
from sidestep.preprocess.tensors import Sample, read_sample, write_sample

LOCK_NAME = ".preprocess.lock"


@dataclass(frozen=True, slots=True)
class PreprocessResult:
    """How many songs were written, needed nothing, could not be used, and were taken out with their file."""

    done: int
    unchanged: int
    skipped: int
    removed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every stage needs to know."""

    checkpoint: Checkpoint
    output: Path
    max_duration: float
    loudness: Loudness
    device: torch.device
    encoder_device: torch.device
    dtype: torch.dtype
    emit: Emit
    flow: Flow
    """How songs overlap where the audio is computed."""
    encoder_flow: Flow
    """How they do where the words and the condition are."""


def preprocess(
    dataset: Dataset,
    *,
    checkpoint: Checkpoint,
    output: Path,
    max_duration: float,
    normalize: Literal["none", "peak", "lufs"],
    target_db: float,
    target_lufs: float,
    device: torch.device,
    dtype: torch.dtype,
    emit: Emit,
    encoder_device: torch.device | None = None,
    flow: Flow | None = None,
) -> PreprocessResult:
    """Turn the dataset's songs into tensor files in `output`, computed and stored in `dtype`; for float16, in which
    the encoders overflow, in float32.

    `encoder_device` (`device` if not given) computes the words and the condition, `device` the audio. `flow` says how
    songs overlap; without it the devices do.

    A song that cannot be used is reported as TrackSkipped and left out. Raises DataError when that is so for all of
    them or `output` belongs to another dataset, ModelError when the checkpoint lacks a part, RunError when memory or
    the disk is full or another process is at work in `output`. Never leaves a partial file; after an interruption the
    same call goes on where it was.
    """
    if not dataset.tracks:
        raise DataError("The dataset has no songs.", hint="Point --audio-dir at the folder that holds them.")
    check_encoders(checkpoint)
    run = _Run(
        checkpoint=checkpoint,
        output=output,
        max_duration=max_duration,
        loudness=Loudness(mode=normalize, target_db=target_db, target_lufs=target_lufs),
        device=device,
        encoder_device=encoder_device or device,
        dtype=wide_dtype(dtype),
        emit=emit,
        flow=flow or Flow.on(device),
        encoder_flow=flow or Flow.on(encoder_device or device),
    )
    try:
        with _alone_in(output), torch.inference_mode(), full_memory_alike():
            clear_unfinished(output)
            make_parts_folder(output)
            return _preprocess(run, dataset)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"The memory of {device} is full.",
            hint="Close other programs that use it, or add --device cpu; finished songs are not done again.",
        ) from error


def _alone_in(output: Path) -> AbstractContextManager[None]:
    """Keep a second process out: it would clear away what the first pass keeps, and mix its tensors with these."""
    taken = RunError(
        f"Another Side-Step is preprocessing into {output}.",
        hint="Wait until it has ended, or choose another --tensor-output.",
    )
    return held_alone(output / LOCK_NAME, taken=taken)


def _preprocess(run: _Run, dataset: Dataset) -> PreprocessResult:
    timbre_frames = int(run.checkpoint.config.get("timbre_fix_frame", TIMBRE_FRAMES))
    silence = load_silence_latent(run.checkpoint)
    timbre = silence_of(silence, timbre_frames)
    recipe = make_recipe(
        run.checkpoint, timbre=timbre, max_duration=run.max_duration, loudness=run.loudness, dtype=run.dtype
    )
    dataset = replace(dataset, tracks=tuple(_with_duration(track) for track in dataset.tracks))
    folder = claim_folder(run.output, dataset, emit=run.emit)
    songs = _plan(run, dataset, recipe)
    unchanged = [song for song in songs if song.is_unchanged]
    ready = _encode_audio(run, [song for song in songs if not song.is_unchanged])
    free_memory(run.device)
    ready = _encode_texts(run, ready)
    free_memory(run.device)
    done = _write_tensors(run, ready, timbre=timbre, silence=silence)
    free_memory(run.device)
    remove_parts(run.output)
    if not done and not unchanged:
        raise DataError(
            f"None of the {len(dataset.tracks)} songs could be preprocessed.",
            hint="The reasons are given song by song.",
        )
    finished = {song.file for song in (*unchanged, *done)}
    skipped = len(dataset.tracks) - len(finished)
    facts = {**_facts(run, recipe), "total": len(dataset.tracks), "processed": len(finished), "failed": skipped}
    removed = folder.close(
        dataset,
        listed=[song.file for song in songs if song.file in finished],
        written=[s.file for s in done],
        facts=facts,
    )
    return PreprocessResult(done=len(done), unchanged=len(unchanged), skipped=skipped, removed=removed)


def _facts(run: _Run, recipe: Recipe) -> dict[str, str | float]:
    return {
        "model_variant": recipe.model_variant,
        "encoder_fingerprint": recipe.encoder_fingerprint,
        "precision": str(run.dtype).removeprefix("torch."),
        "max_duration": run.max_duration,
        "normalize": run.loudness.mode,
        "target_db": run.loudness.target_db,
        "target_lufs": run.loudness.target_lufs,
    }


def _with_duration(track: Track) -> Track:
    """The track with a duration for its prompt, from the file where the dataset gives none."""
    if track.duration > 0:
        return track
    try:
        return replace(track, duration=int(probe(track.audio_path).seconds))
    except DataError:
        # The first pass meets the same file and reports it.
        return track


def _plan(run: _Run, dataset: Dataset, recipe: Recipe) -> list[Song]:
    """Compare every song with what is there."""
    # The prompts of all songs come first, because the genre ratio is counted over all of them.
    drafts = draft_songs(dataset, max_duration=run.max_duration)
    songs: dict[str, Song] = {}

    def keep(compared: Sequence[Song]) -> Sequence[Song]:
        (song,) = compared
        if song.file in songs:
            raise DataError(f"{song.name} is in the dataset more than once.", hint="Set its repeat instead.")
        songs[song.file] = song
        return compared

    work: Work[Draft, Song, Song] = Work(
        read=lambda draft: plan_song(draft, recipe=recipe, output=run.output),
        encode=keep,
        write=lambda draft, song: Written(unchanged=song.is_unchanged),
    )
    run_stage("Looking for what changed", drafts, work, flow=run.flow, emit=run.emit)
    return list(songs.values())


def _encode_audio(run: _Run, songs: list[Song]) -> list[Song]:
    """Keep the latents of the songs that need them; returns the songs that can go on."""
    missing = [s for s in songs if not s.keeps_latents and not has_part(run.output, s.latents_part, key=s.latents_key)]
    if not missing:
        return songs
    vae = load_vae(run.checkpoint, device=run.device, dtype=run.dtype)

    def write(song: Song, latents: Tensor) -> Written:
        write_part(run.output, song.latents_part, {"latents": finite(latents, "latents")}, key=song.latents_key)
        return Written()

    work: Work[Song, Tensor, Tensor] = Work(
        read=lambda song: load_wave(song.track.audio_path, max_seconds=run.max_duration, loudness=run.loudness),
        encode=lambda waves: [encode_wave(vae, wave) for wave in waves],
        write=write,
    )
    return _without(songs, missing, run_stage("Pass 1: audio", missing, work, flow=run.flow, emit=run.emit))


def _encode_texts(run: _Run, songs: list[Song]) -> list[Song]:
    """Keep the text encoder's rows of the songs that need them; returns the songs that can go on."""
    missing = [s for s in songs if not s.keeps_condition and not has_part(run.output, s.text_part, key=s.condition_key)]
    if not missing:
        return songs
    tokenizer, encoder = load_text_encoder(run.checkpoint, device=run.encoder_device, dtype=run.dtype)
    one_at_a_time = Lock()

    def read(song: Song) -> PromptTokens:
        with one_at_a_time:  # A tokenizer must not be used by two threads at once.
            return tokenize_prompt(tokenizer, song.prompt)

    def write(song: Song, encoded: EncodedText) -> Written:
        rows = {"text": finite(encoded.text, "text rows"), "lyrics": finite(encoded.lyrics, "lyrics rows")}
        write_part(run.output, song.text_part, rows, key=song.condition_key, facts=encoded.counts)
        return Written()

    work: Work[Song, PromptTokens, EncodedText] = Work(
        read=read,
        encode=lambda prompts: encode_tokens(encoder, prompts),
        write=write,
        rows=lambda prompt: prompt.text.ids.shape[1],
    )
    return _without(songs, missing, run_stage("Pass 1: text", missing, work, flow=run.encoder_flow, emit=run.emit))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a song's tensor file is made of: its latents, and its words or the condition they once came to."""

    latents: Tensor
    counts: Mapping[str, int]
    words: tuple[Tensor, Tensor] | None
    condition: Tensor | None = None


def _write_tensors(run: _Run, songs: list[Song], *, timbre: Tensor, silence: Tensor) -> list[Song]:
    """Pass 2: encode the condition where it changed and write the tensor files; returns the songs written."""

    def write(song: Song, parts: _Parts) -> Written:
        assert parts.condition is not None  # Read from its file, or encoded.
        context = context_latents(silence_of(silence, parts.latents.shape[0]).to(run.dtype))
        sample = Sample(parts.latents, parts.condition, context, {**song.metadata, **parts.counts})
        write_sample(run.output / song.file, sample)
        remove_parts(run.output, song.latents_part)
        remove_parts(run.output, song.text_part)
        return Written(notices=truncation_notices(song.name, parts.counts))

    encode: Callable[[Sequence[_Parts]], Sequence[_Parts]] = list
    if not all(song.keeps_condition for song in songs):
        encode = _condition_encoding(run, timbre)
    work: Work[Song, _Parts, _Parts] = Work(
        read=lambda song: _read_parts(run, song),
        encode=encode,
        write=write,
        rows=lambda parts: parts.words[1].shape[1] if parts.words else 0,
    )
    return run_stage("Pass 2: conditions and tensor files", songs, work, flow=run.encoder_flow, emit=run.emit)


def _condition_encoding(run: _Run, timbre: Tensor) -> Callable[[Sequence[_Parts]], Sequence[_Parts]]:
    """Load the condition encoder; returns what gives songs with words their conditions."""
    encoder = load_condition_encoder(run.checkpoint, device=run.encoder_device, dtype=run.dtype)
    timbre_row = encode_timbre(encoder, timbre)

    def encode(songs: Sequence[_Parts]) -> Sequence[_Parts]:
        words = [song.words for song in songs if song.words is not None]
        conditions = iter(encode_conditions(encoder, words, timbre_row=timbre_row) if words else ())
        return [song if song.words is None else replace(song, condition=next(conditions)) for song in songs]

    return encode


def _read_parts(run: _Run, song: Song) -> _Parts:
    """What the first pass kept of a song, and what still holds of the file that is there."""
    stored = read_sample(run.output / song.file) if song.keeps_latents or song.keeps_condition else None
    if stored is not None and song.keeps_latents:
        latents = stored.target_latents
    else:
        latents = read_part(run.output, song.latents_part)[0]["latents"]
    if stored is not None and song.keeps_condition:
        counts = {key: stored.metadata[key] for key in COUNTS}
        return _Parts(latents, counts, None, stored.encoder_hidden_states)
    rows, counts = read_part(run.output, song.text_part)
    return _Parts(latents, counts, (rows["text"], rows["lyrics"]))


def _without(songs: list[Song], tried: list[Song], done: list[Song]) -> list[Song]:
    failed = {song.file for song in tried} - {song.file for song in done}
    return [song for song in songs if song.file not in failed]
