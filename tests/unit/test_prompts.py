"""The words the model is given about a song."""

from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.data.dataset_file import Dataset, Track
from sidestep.data.prompts import described, genre_indices, lyrics_text, prompt_text, prompts_of

TRACK = Track(
    id="0123abcd",
    audio_path=Path("/songs/a.wav"),
    name="a.wav",
    caption="slow piano",
    genre="classical",
    lyrics="[Verse]\nla la",
    bpm=120,
    keyscale="C major",
    timesignature="4",
    language="en",
    is_instrumental=False,
    duration=200,
)
DATASET = Dataset(folder=Path("/songs"), tracks=(TRACK,))


def test_the_prompt_is_the_one_of_inference_to_the_letter() -> None:
    (prompt,) = prompts_of(DATASET)
    assert prompt.text == (
        "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n"
        "# Caption\nslow piano\n\n"
        "# Metas\n- bpm: 120\n- timesignature: 4\n- keyscale: C major\n- duration: 200 seconds\n<|endoftext|>\n"
    )
    assert prompt.lyrics == "# Languages\nen\n\n# Lyric\n[Verse]\nla la<|endoftext|>"


def test_what_is_unknown_is_not_available() -> None:
    text = prompt_text("", bpm=None, timesignature="", keyscale=" ", seconds=0)
    assert text.endswith(
        "# Caption\n\n\n# Metas\n- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n"
        "- duration: 0 seconds\n<|endoftext|>\n"
    )


def test_empty_lyrics_are_instrumental_in_an_unknown_language() -> None:
    assert lyrics_text(" \n", language="") == "# Languages\nunknown\n\n# Lyric\n[Instrumental]<|endoftext|>"


@pytest.mark.parametrize(("written", "given"), [("4/4", "4"), ("6/8", "6"), ("3", "3"), ("", "N/A")])
def test_time_signatures_are_in_the_models_vocabulary(written: str, given: str) -> None:
    assert f"- timesignature: {given}\n" in prompt_text("x", bpm=90, timesignature=written, keyscale="", seconds=1)


@pytest.mark.parametrize(("longest", "seconds"), [(0.0, 200), (240.0, 200), (90.5, 90)])
def test_a_cropped_song_is_said_to_last_as_long_as_what_is_encoded(longest: float, seconds: int) -> None:
    assert f"- duration: {seconds} seconds\n" in prompts_of(DATASET, max_duration=longest)[0].text


@pytest.mark.parametrize(
    ("position", "own_tag", "words"),
    [
        ("prepend", "", "band, slow piano"),
        ("append", "", "slow piano, band"),
        ("replace", "", "band"),
        ("prepend", "solo", "solo, slow piano"),
        ("replace", "solo", "solo"),
    ],
)
def test_the_tag_joins_the_caption_where_it_is_wanted(position: str, own_tag: str, words: str) -> None:
    dataset = replace(DATASET, custom_tag="band", tag_position=position)
    assert described(replace(TRACK, custom_tag=own_tag), dataset, prefers_genre=False) == words


def test_a_tag_stands_alone_where_there_is_no_caption() -> None:
    dataset = replace(DATASET, custom_tag="band", tag_position="append")
    assert described(replace(TRACK, caption=" "), dataset, prefers_genre=False) == "band"


@pytest.mark.parametrize(
    ("override", "drawn", "genre", "words"),
    [
        (None, False, "classical", "slow piano"),
        (None, True, "classical", "classical"),
        ("caption", True, "classical", "slow piano"),
        ("genre", False, "classical", "classical"),
        ("genre", False, "", "slow piano"),
        (None, True, "", "slow piano"),
    ],
)
def test_genre_or_caption(override: str | None, drawn: bool, genre: str, words: str) -> None:
    assert described(replace(TRACK, prompt_override=override, genre=genre), DATASET, prefers_genre=drawn) == words


def test_the_drawn_songs_are_those_of_the_official_tools() -> None:
    # random.Random(42) shuffles range(10) into 7 3 2 8 5 6 9 4 0 1.
    assert genre_indices(10, ratio=30) == {7, 3, 2}
    assert genre_indices(10, ratio=0) == frozenset()
    assert genre_indices(10, ratio=100) == set(range(10))
    assert genre_indices(3, ratio=50) == {1}
