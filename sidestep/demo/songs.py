"""Makes a few short songs from a seed, with the captions and lyrics that people put beside theirs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

_RATE = 48_000  # Hz
_MINOR = (0, 2, 3, 5, 7, 8, 10)  # Semitones above the root.
_MAJOR = (0, 2, 4, 5, 7, 9, 11)
_PEAK = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class _Song:
    name: str
    caption: str
    genre: str
    bpm: int
    key: str
    root: float  # Hz
    scale: tuple[int, ...]
    language: str
    lyrics: str
    is_long: bool
    has_side_step_sidecar: bool  # One song.txt with `key: value` lines; else the official song.caption.txt and others.


_SONGS = (
    _Song(
        name="first light",
        caption="a bright plucked melody over a warm bass and a steady beat",
        genre="synth pop",
        bpm=120,
        key="C major",
        root=261.63,
        scale=_MAJOR,
        language="en",
        lyrics="[Verse]\nMorning comes over the roofs\n[Chorus]\nFirst light, first light",
        is_long=False,
        has_side_step_sidecar=True,
    ),
    _Song(
        name="harbour",
        caption="a slow minor tune with a deep bass and soft drums",
        genre="ballad",
        bpm=80,
        key="A minor",
        root=220.0,
        scale=_MINOR,
        language="en",
        lyrics="[Verse]\nBoats are asleep on the water\n[Chorus]\nHold the line till day",
        is_long=True,
        has_side_step_sidecar=False,
    ),
    _Song(
        name="night train",
        caption="a driving instrumental with hard drums and a restless lead",
        genre="electronic",
        bpm=140,
        key="E minor",
        root=164.81,
        scale=_MINOR,
        language="unknown",
        lyrics="",
        is_long=False,
        has_side_step_sidecar=True,
    ),
    _Song(
        name="mañana",
        caption="a cheerful dance with a light bass and hand drums",
        genre="latin",
        bpm=105,
        key="G major",
        root=196.0,
        scale=_MAJOR,
        language="es",
        lyrics="[Verse]\nMañana canta el sol\n[Chorus]\nBaila, baila, corazón",
        is_long=True,
        has_side_step_sidecar=False,
    ),
)


def write_toy_songs(folder: Path, *, seed: int = 0, seconds: tuple[float, float] = (4.0, 5.0)) -> list[Path]:
    """Write four stereo 48 kHz songs with their sidecars into `folder` and give their paths.

    Two last `seconds[0]` and two `seconds[1]`. Two have sidecars of Side-Step's kind, two of the official kind; one
    is instrumental. The same seed gives the same samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for song in _SONGS:
        path = folder / f"{song.name}.wav"
        samples = _synthesize(song, seconds[song.is_long], random)
        soundfile.write(path, samples.T, _RATE, subtype="PCM_16")
        _write_sidecars(folder, song)
        paths.append(path)
    return paths


def _write_sidecars(folder: Path, song: _Song) -> None:
    if song.has_side_step_sidecar:
        fields = {
            "caption": song.caption,
            "genre": song.genre,
            "bpm": song.bpm,
            "key": song.key,
            "signature": "4",
            "is_instrumental": str(not song.lyrics).lower(),
            "language": song.language,
        }
        lines = [f"{key}: {value}" for key, value in fields.items()]
        if song.lyrics:
            lines += ["lyrics:", song.lyrics]
        _write(folder / f"{song.name}.txt", "\n".join(lines))
        return
    _write(folder / f"{song.name}.caption.txt", song.caption)
    _write(folder / f"{song.name}.lyrics.txt", song.lyrics)
    facts = {"bpm": song.bpm, "keyscale": song.key, "timesignature": "4", "language": song.language}
    _write(folder / f"{song.name}.json", json.dumps(facts, indent=2))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _synthesize(song: _Song, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Give melody, bass and drums as float64 [2, samples] with a peak of 0.7."""
    beat = 60 / song.bpm
    length = round(seconds * _RATE)
    mix = np.zeros((2, length))
    for index in range(int(np.ceil(seconds / beat))):
        start = index * beat
        for half in (0.0, 0.5):
            degree = int(random.integers(len(song.scale)))
            note = song.root * 2 ** (song.scale[degree] / 12 + 1)
            _add(mix, start + half * beat, _tone(note, beat / 2, decay=6), pan=0.3 + 0.4 * random.random())
        bass_degree = song.scale[(0, 3, 4, 0)[index // 4 % 4]]
        _add(mix, start, _tone(song.root / 2 * 2 ** (bass_degree / 12), beat, decay=2), pan=0.5)
        _add(mix, start, 0.8 * _drum(random, 0.15, decay=30), pan=0.5)
        _add(mix, start + beat / 2, 0.4 * _drum(random, 0.05, decay=80), pan=0.7)
    return mix * (_PEAK / np.abs(mix).max())


def _tone(frequency: float, seconds: float, *, decay: float) -> np.ndarray:
    time = np.arange(round(seconds * _RATE)) / _RATE
    overtones = sum(np.sin(2 * np.pi * frequency * number * time) / number**2 for number in range(1, 6))
    attack = np.minimum(1, time / 0.005)
    return overtones * attack * np.exp(-decay * time)


def _drum(random: np.random.Generator, seconds: float, *, decay: float) -> np.ndarray:
    time = np.arange(round(seconds * _RATE)) / _RATE
    return random.standard_normal(time.size) * np.exp(-decay * time)


def _add(mix: np.ndarray, start: float, sound: np.ndarray, *, pan: float) -> None:
    """Mix a mono sound in at `start` seconds, cut at the end; `pan` goes from 0 (left) to 1 (right)."""
    first = round(start * _RATE)
    sound = sound[: max(0, mix.shape[1] - first)]
    mix[0, first : first + sound.size] += np.cos(pan * np.pi / 2) * sound
    mix[1, first : first + sound.size] += np.sin(pan * np.pi / 2) * sound
