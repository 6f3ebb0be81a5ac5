"""The exact words the model is given about a song: its prompt and its lyrics, as inference writes them.

Source of both templates: ACE-Step's inference (and diffusers' ACE-Step pipeline); the prompt is pinned by the
reference case `prep_song_a_lora`.
"""

import random
from dataclasses import dataclass

from sidestep.data.dataset_file import Dataset, Track
from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE

INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"
NOT_GIVEN = "N/A"
# The seed of the official tools: the same songs are described by their genre there and here.
_GENRE_SEED = 42


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the text encoder reads of a song: `text` (instruction, caption, metas) and `lyrics` (with their header)."""

    text: str
    lyrics: str


def prompts_of(dataset: Dataset, *, max_duration: float = 0.0) -> list[Prompt]:
    """The prompts of the dataset's tracks, in their order.

    A track longer than `max_duration` seconds (0: no limit) is said to last that long, because that is what is encoded.
    """
    drawn = genre_indices(len(dataset.tracks), ratio=dataset.genre_ratio)
    return [
        Prompt(
            prompt_text(
                described(track, dataset, prefers_genre=index in drawn),
                bpm=track.bpm,
                timesignature=track.timesignature,
                keyscale=track.keyscale,
                seconds=int(min(track.duration, max_duration) if max_duration > 0 else track.duration),
            ),
            lyrics_text(track.lyrics, language=track.language),
        )
        for index, track in enumerate(dataset.tracks)
    ]


def genre_indices(count: int, *, ratio: int) -> frozenset[int]:
    """Which of `count` songs are described by their genre: `ratio` percent (0-100) of them, always the same ones."""
    indices = list(range(count))
    random.Random(_GENRE_SEED).shuffle(indices)
    return frozenset(indices[: int(count * ratio / 100)])


def described(track: Track, dataset: Dataset, *, prefers_genre: bool) -> str:
    """The words under `# Caption`: the caption, or the genre where it is wanted and there is one, with the tag.

    `prompt_override` beats `prefers_genre`; the track's own tag beats the dataset's.
    """
    wants_genre = prefers_genre if track.prompt_override is None else track.prompt_override == "genre"
    words = track.genre.strip() if wants_genre and track.genre.strip() else track.caption.strip()
    tag = track.custom_tag.strip() or dataset.custom_tag.strip()
    if not tag:
        return words
    if not words or dataset.tag_position == "replace":
        return tag
    return f"{tag}, {words}" if dataset.tag_position == "prepend" else f"{words}, {tag}"


def prompt_text(caption: str, *, bpm: int | None, timesignature: str, keyscale: str, seconds: int) -> str:
    """The whole prompt. `4/4` is written `4`, the model's vocabulary for time signatures; what is unknown is `N/A`."""
    beats = timesignature.split("/", 1)[0].strip()
    metas = (
        f"- bpm: {NOT_GIVEN if bpm is None else bpm}\n"
        f"- timesignature: {beats or NOT_GIVEN}\n"
        f"- keyscale: {keyscale.strip() or NOT_GIVEN}\n"
        f"- duration: {seconds} seconds\n"
    )
    return f"# Instruction\n{INSTRUCTION}\n\n# Caption\n{caption}\n\n# Metas\n{metas}<|endoftext|>\n"


def lyrics_text(lyrics: str, *, language: str) -> str:
    """The lyrics as the model is prompted with them: under a language header, `[Instrumental]` where there are none."""
    return (
        f"# Languages\n{language.strip() or UNKNOWN_LANGUAGE}\n\n# Lyric\n{lyrics.strip() or INSTRUMENTAL}<|endoftext|>"
    )
