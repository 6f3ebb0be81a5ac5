"""Listen to a dataset's songs and say what it holds and what looks wrong."""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sidestep.data.audio import probe, stream_audio
from sidestep.data.dataset_file import Dataset, Track
from sidestep.data.fields import BPM_RANGE, LANGUAGES, TIME_SIGNATURES, UNKNOWN_LANGUAGE, has_words, is_known_keyscale
from sidestep.errors import DataError
from sidestep.events import Emit, StageDone, StageStarted, TrackDone, TrackSkipped

# Peak below -60 dBFS: nothing one would hear.
SILENCE_PEAK = 1e-3
# A clipped top is flat: four samples in a row at full scale. A thousandth of a song is beyond what limiters leave.
FULL_SCALE = 0.999
CLIPPED_RUN = 4
CLIPPED_SHARE = 1e-3
# Below this rate (Hz) the highs that the model works with (48 kHz) are missing.
LOW_RATE = 32000


@dataclass(frozen=True, slots=True)
class Sound:
    """What one song sounds like: seconds, Hz, highest sample (1.0 is full scale), share of clipped samples, sha256."""

    seconds: float
    sample_rate: int
    peak: float
    clipped: float
    content: str  # of the decoded samples: equal for a WAV and its FLAC, whatever their tags


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that looks wrong, and the songs it is true of."""

    what: str
    songs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a dataset holds: songs, hours, how many songs have each kind of metadata, and what looks wrong."""

    songs: int
    hours: float
    coverage: Mapping[str, int]
    findings: tuple[Finding, ...]


def listen_to(track: Track) -> Sound:
    """Decode a whole song and measure it. Raises DataError when it cannot be decoded to its end."""
    info = probe(track.audio_path)
    digest = hashlib.sha256()
    peak, samples, clipped, positions = 0.0, 0, 0, 0
    for block in stream_audio(track.audio_path):
        digest.update(block.astype("<f4", copy=False).tobytes())
        level = np.abs(block)
        peak = max(peak, float(level.max()))
        clipped += _clipped_samples(level >= FULL_SCALE)
        samples += len(block)
        positions += block.size
    digest.update(f"{info.sample_rate} {min(info.channels, 2)}".encode())
    return Sound(samples / info.sample_rate, info.sample_rate, peak, clipped / positions, digest.hexdigest())


def listen_to_all(dataset: Dataset, *, emit: Emit) -> dict[str, Sound]:
    """Listen to every song, by name; one that cannot be decoded is reported as TrackSkipped and left out."""
    title, started = "Listening to the songs", time.monotonic()
    emit(StageStarted(title=title, total=len(dataset.tracks)))
    sounds: dict[str, Sound] = {}
    for track in dataset.tracks:
        try:
            sounds[track.name] = listen_to(track)
            emit(TrackDone(name=track.name, seconds=sounds[track.name].seconds))
        except DataError as error:
            emit(TrackSkipped(name=track.name, reason=error.message, hint=error.hint))
    skipped = len(dataset.tracks) - len(sounds)
    emit(StageDone(title=title, done=len(sounds), skipped=skipped, seconds=time.monotonic() - started))
    return sounds


def report_on(dataset: Dataset, sounds: Mapping[str, Sound], *, max_seconds: float) -> Report:
    """Sum a dataset up; `sounds` holds every track by name, `max_seconds` is where preprocessing cuts a song."""
    tracks = dataset.tracks
    coverage = {
        "caption": sum(bool(track.caption) for track in tracks),
        "genre": sum(bool(track.genre) for track in tracks),
        "lyrics": sum(has_words(track.lyrics) for track in tracks),
        "language": sum(track.language != UNKNOWN_LANGUAGE for track in tracks),
        "bpm": sum(track.bpm is not None for track in tracks),
        "key": sum(bool(track.keyscale) for track in tracks),
        "time signature": sum(bool(track.timesignature) for track in tracks),
    }
    findings = [*_sound_findings(sounds, max_seconds), *_metadata_findings(tracks)]
    hours = sum(sounds[track.name].seconds for track in tracks) / 3600
    return Report(len(tracks), hours, coverage, tuple(finding for finding in findings if finding.songs))


def _clipped_samples(is_full: np.ndarray) -> int:
    """Count the samples [samples, channels] that begin a run of four at full scale."""
    runs = is_full
    for _ in range(CLIPPED_RUN - 1):
        runs = runs[:-1] & is_full[len(is_full) - len(runs) + 1 :]
    return int(np.count_nonzero(runs))


def _sound_findings(sounds: Mapping[str, Sound], max_seconds: float) -> Iterable[Finding]:
    copies: dict[str, list[str]] = {}
    for name, sound in sounds.items():
        copies.setdefault(sound.content, []).append(name)
    yield Finding("silent", tuple(name for name, sound in sounds.items() if sound.peak < SILENCE_PEAK))
    clipped = {name: sound.clipped for name, sound in sounds.items() if sound.clipped > CLIPPED_SHARE}
    yield Finding("clipped", tuple(f"{name} ({share:.1%} of its samples)" for name, share in clipped.items()))
    for names in copies.values():
        yield Finding("the same sound", tuple(names) if len(names) > 1 else ())
    long = {name: sound.seconds for name, sound in sounds.items() if sound.seconds > max_seconds}
    what = f"longer than {max_seconds:g} s, the rest is cut unless --max-duration is raised"
    yield Finding(what, tuple(f"{name} ({seconds:.0f} s)" for name, seconds in long.items()))
    low = {name: sound.sample_rate for name, sound in sounds.items() if sound.sample_rate < LOW_RATE}
    yield Finding("low sample rate, no highs", tuple(f"{name} ({rate} Hz)" for name, rate in low.items()))


def _metadata_findings(tracks: Iterable[Track]) -> Iterable[Finding]:
    tracks = tuple(tracks)
    slowest, fastest = BPM_RANGE
    yield Finding("no caption", tuple(track.name for track in tracks if not track.caption))
    odd = [(t.name, t.bpm) for t in tracks if t.bpm is not None and not slowest <= t.bpm <= fastest]
    yield Finding(f"tempo outside {slowest} to {fastest} bpm", tuple(f"{name} ({bpm})" for name, bpm in odd))
    odd = [(t.name, t.language) for t in tracks if t.language not in LANGUAGES and t.language != UNKNOWN_LANGUAGE]
    yield Finding("a language code the model does not know", tuple(f"{name} ({code})" for name, code in odd))
    odd = [(t.name, t.keyscale) for t in tracks if t.keyscale and not is_known_keyscale(t.keyscale)]
    yield Finding('a key unlike "C# minor"', tuple(f"{name} ({key})" for name, key in odd))
    odd = [(t.name, t.timesignature) for t in tracks if t.timesignature and t.timesignature not in TIME_SIGNATURES]
    what = f"a time signature that is none of {', '.join(TIME_SIGNATURES)}"
    yield Finding(what, tuple(f"{name} ({signature})" for name, signature in odd))
    with_words = {track.name: track for track in tracks if has_words(track.lyrics)}
    instrumental = {track.name for track in tracks if track.is_instrumental}
    yield Finding("instrumental, but with lyrics", tuple(name for name in with_words if name in instrumental))
    wordless = (track.name for track in tracks if track.name not in instrumental and track.name not in with_words)
    yield Finding("sung, but without lyrics", tuple(wordless))
    unknown = (name for name, track in with_words.items() if track.language == UNKNOWN_LANGUAGE)
    yield Finding("lyrics without a language", tuple(unknown))
