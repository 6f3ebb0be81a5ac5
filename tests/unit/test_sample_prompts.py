"""Prompts of samples: from text, from JSON, from songs."""

from pathlib import Path

import pytest

from sidestep.data.prompts import prompt_text
from sidestep.errors import DataError
from sidestep.listen.prompts import SamplePrompt, evenly_spaced, prompt_of_song, read_prompts


def test_a_text_file_has_a_caption_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffwarm synths\n\n  a fast polka \n", encoding="utf-8")
    assert read_prompts(path) == [SamplePrompt(caption="warm synths"), SamplePrompt(caption="a fast polka")]


def test_json_says_as_much_as_it_likes(tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text('["polka", {"caption": "synths", "lyrics": "la", "bpm": 90, "seed": 3, "duration": 12.5}]')
    assert read_prompts(path) == [
        SamplePrompt(caption="polka"),
        SamplePrompt(caption="synths", lyrics="la", bpm=90, seed=3, duration=12.5),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "holds no prompts"),
        ("{", "not valid JSON"),
        ("[1]", "neither text nor an object"),
        ('[{"caption": "x", "tempo": 3}]', "no field 'tempo'"),
        ('[{"caption": "x", "bpm": "fast"}]', "bpm cannot be 'fast', it is a whole number from 30 to 300"),
        ('[{"caption": "x", "bpm": -5}]', "bpm cannot be -5"),
        ('[{"caption": "  "}]', "a caption cannot be blank"),
        ('[""]', "needs a caption"),
        ('[{"caption": "\\ud800 x"}]', "caption holds half a character"),
        ('[{"caption": "x", "keyscale": ["C"]}]', "keyscale cannot be"),
        ('[{"caption": "x", "duration": NaN}]', "duration cannot be nan, it is a number from 1 to 600"),
        ('[{"caption": "x", "duration": Infinity}]', "duration cannot be inf"),
        ('[{"caption": "x", "duration": 1e9}]', "duration cannot be 1000000000.0"),
        ('[{"caption": "x", "seed": -1}]', "seed cannot be -1"),
        ('[{"caption": "x", "seed": 99999999999999999999999}]', "seed cannot be 9999"),
        ("[" * 100_000, "not valid JSON"),
        ('[{"lyrics": "la"}]', "needs a caption"),
        ('[{"caption": "x", "duration": 0}]', "duration cannot be 0"),
        ('[{"caption": "x", "seed": true}]', "seed cannot be True"),
    ],
)
def test_what_no_prompt_has_is_an_error(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_prompts(path)


def test_keys_and_signatures_become_the_models_words(tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text('{"caption": "x", "keyscale": "Am", "timesignature": 4, "language": "English", "bpm": null}')
    assert read_prompts(path) == [SamplePrompt(caption="x", keyscale="A minor", timesignature="4", language="en")]


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(DataError) as failure:
        read_prompts(tmp_path / "none.txt")
    assert failure.value.message == f"The prompts in {tmp_path / 'none.txt'} cannot be read: No such file or directory."


def test_a_file_in_another_encoding_is_an_error_with_a_way_out(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Bläser".encode("latin-1"))
    with pytest.raises(DataError, match="are not UTF-8 text") as failure:
        read_prompts(path)
    assert failure.value.hint == "Save the file again with the encoding UTF-8."


def test_a_song_is_prompted_as_it_was_trained():
    text = prompt_text("mytag, warm\n\nsynths", bpm=90, timesignature="4", keyscale="", seconds=200)
    metadata = {"prompt": text, "caption": "warm", "lyrics": "la", "bpm": 90, "language": "de", "timesignature": "4"}
    wanted = SamplePrompt(caption="mytag, warm\n\nsynths", lyrics="la", language="de", bpm=90, timesignature="4")
    assert prompt_of_song(metadata) == wanted
    assert prompt_of_song({"caption": "warm", "bpm": "N/A"}) == SamplePrompt(caption="warm")


def test_songs_are_chosen_evenly():
    assert evenly_spaced(10, 2) == [0, 5]
    assert evenly_spaced(7, 3) == [0, 2, 4]
    assert evenly_spaced(1, 2) == [0]
