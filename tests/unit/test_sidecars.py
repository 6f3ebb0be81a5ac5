"""Sidecars of both conventions, their traps, JSON and CSV."""

import unicodedata
from pathlib import Path

import pytest

from sidestep.data.fields import parse_fields
from sidestep.data.sidecars import assign_rows, companions, read_fields_or_lyrics, read_rows, read_sidecars, read_text
from sidestep.errors import DataError


def read(folder: Path, audio: str = "song.wav") -> tuple[dict[str, object], list[str]]:
    """Read the sidecars of a song in `folder`, the CSVs there included."""
    table_rows, left_out = read_rows(folder)
    rows, odd = assign_rows(table_rows, [audio])
    fields, remarks = read_sidecars(folder / audio, companions(folder.iterdir()), rows.get(audio, ()))
    return fields, [*left_out, *odd, *remarks]


def put(folder: Path, **files: str) -> Path:
    """Write files; in their names `__` stands for a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def test_the_official_convention(tmp_path: Path) -> None:
    put(tmp_path, song__caption__txt="slow piano\n", song__lyrics__txt="[Verse]\nla: la\n", song__json='{"bpm": 92}')
    assert read(tmp_path) == ({"caption": "slow piano", "lyrics": "[Verse]\nla: la", "bpm": 92}, [])


def test_a_bare_txt_is_lyrics_in_the_official_convention(tmp_path: Path) -> None:
    put(tmp_path, song__caption__txt="rock", song__txt="[Verse]\nHello: you\ncaption: not one")
    assert read(tmp_path)[0] == {"caption": "rock", "lyrics": "[Verse]\nHello: you\ncaption: not one"}


def test_the_side_step_convention(tmp_path: Path) -> None:
    put(
        tmp_path,
        song__txt="Caption: synth pop\n  with strings\nBPM: 120\nkey: C minor\nsignature: 4/4\nlanguage: en\n"
        "custom_tag: zzz\nrepeat: 2\nprompt_override: genre\ngenre: pop\nis_instrumental: false\n"
        "lyrics:\n[Verse]\nbpm: 3\n# not a comment",
    )
    fields, remarks = read(tmp_path)
    assert remarks == []
    assert fields == {
        "caption": "synth pop\n  with strings",
        "bpm": "120",
        "keyscale": "C minor",
        "timesignature": "4/4",
        "language": "en",
        "custom_tag": "zzz",
        "repeat": "2",
        "prompt_override": "genre",
        "genre": "pop",
        "is_instrumental": "false",
        "lyrics": "[Verse]\nbpm: 3\n# not a comment",
    }


def test_keys_without_a_caption_are_still_keys(tmp_path: Path) -> None:
    put(tmp_path, song__txt="bpm: 120\nkey: Am\n")
    assert read(tmp_path)[0] == {"bpm": "120", "keyscale": "Am"}


def test_comments_are_comments_until_the_lyrics_begin() -> None:
    fields, remarks = read_fields_or_lyrics("# my song\n\ncaption: rock\n# more\nbpm: 90\nlyrics: one\n# two")
    assert (fields, remarks) == ({"caption": "rock", "bpm": "90", "lyrics": "one\n# two"}, [])


def test_a_line_that_fits_nowhere_is_named() -> None:
    fields, remarks = read_fields_or_lyrics("bpm: 90\nmood: happy\ncaption: rock\nStyle: hard")
    assert fields == {"bpm": "90", "caption": "rock\nStyle: hard"}
    assert remarks == ["the line 'mood: happy' belongs to no field and is left out"]


@pytest.mark.parametrize(("alias", "field"), [
    ("tempo", "bpm"), ("scale", "keyscale"), ("sig", "timesignature"), ("lang", "language"), ("trigger", "custom_tag"),
    ("tags", "genre"), ("Time Signature", "timesignature"), ("time-signature", "timesignature"),
    ("Key Scale", "keyscale"), ("custom tag", "custom_tag"), ("Bpm ", "bpm"),
])  # fmt: skip
def test_aliases(alias: str, field: str) -> None:
    assert read_fields_or_lyrics(f"{alias}: 7")[0] == {field: "7"}


@pytest.mark.parametrize("space", ["", " ", "\t", "\u00a0"])
def test_the_colon_may_stand_apart_from_the_name_of_a_field(space: str) -> None:
    fields = {"bpm": "120", "caption": "soft"}
    assert read_fields_or_lyrics(f"bpm{space}: 120\ncaption{space}: soft") == (fields, [])


def test_one_line_that_may_be_a_caption_is_remarked_on(tmp_path: Path) -> None:
    put(tmp_path, song__txt="a warm lofi beat with vinyl crackle")
    fields, remarks = read(tmp_path)
    assert fields == {"lyrics": "a warm lofi beat with vinyl crackle"}
    assert remarks == ["song.txt is read as lyrics; if it is a caption, name it song.caption.txt"]


def test_names_of_fields_may_be_written_with_spaces_in_json_and_csv_too(tmp_path: Path) -> None:
    put(tmp_path, song__json='{"Time Signature": "3/4"}', songs__csv="file,Key Scale\nsong.wav,Am\n")
    assert read(tmp_path) == ({"timesignature": "3/4", "keyscale": "Am"}, [])


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbfcaption: caf\xc3\xa9\r\nbpm: 90\r\n",
    "caption: café\r\nbpm: 90\r\n".encode("utf-16"),
    "caption: café\rbpm: 90".encode(),
])  # fmt: skip
def test_boms_and_line_ends_of_other_systems_are_understood(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "song.txt").write_bytes(data)
    assert read(tmp_path)[0] == {"caption": "café", "bpm": "90"}


@pytest.mark.parametrize("data", ["café".encode("latin-1"), "歌".encode("shift-jis"), "caption".encode("utf-16-le")])
def test_another_encoding_is_an_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "song.lyrics.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"song\.lyrics\.txt is not UTF-8") as caught:
        read_text(tmp_path / "song.lyrics.txt")
    assert "UTF-8" in caught.value.hint


def test_composed_and_decomposed_names_find_each_other(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Café Ålesund")
    (tmp_path / "Café Ålesund.caption.txt").write_text("jazz", encoding="utf-8")
    (tmp_path / "songs.csv").write_text("file,bpm\nCafé Ålesund.wav,88\n", encoding="utf-8")
    assert read(tmp_path, f"{decomposed}.wav")[0] == {"caption": "jazz", "bpm": "88"}


def test_the_later_source_wins_and_a_difference_is_remarked_on(tmp_path: Path) -> None:
    put(
        tmp_path,
        song__txt="caption: one\nbpm: 90\nkey: Am",
        song__caption__txt="two",
        song__json='{"caption": "three", "bpm": "90", "keyscale": "", "language": null}',
        songs__csv="File;BPM;Key;Artist\nsong.wav;91;;me\n",
    )
    fields, remarks = read(tmp_path)
    assert fields == {"caption": "three", "bpm": "91", "keyscale": "Am"}
    assert remarks == [
        "song.txt and song.caption.txt differ in caption; song.caption.txt is used",
        "song.caption.txt and song.json differ in caption; song.json is used",
        "song.json and songs.csv differ in bpm; songs.csv is used",
    ]


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_a_broken_json_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    put(tmp_path, song__json=content)
    with pytest.raises(DataError, match=r"song\.json"):
        read(tmp_path)


def test_a_dataset_file_is_no_sidecar(tmp_path: Path) -> None:
    put(tmp_path, dataset__json='{"metadata": {}, "samples": []}')
    assert read(tmp_path, "dataset.wav") == ({}, [])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_delimiters(tmp_path: Path, delimiter: str) -> None:
    rows = [["Title", "FILE", "bpm", "caption"], ["x", "song.wav", "127.99", '"loud, fast; hard"']]
    (tmp_path / "a.csv").write_text("\r\n".join(delimiter.join(row) for row in rows), encoding="utf-8-sig")
    assert read(tmp_path) == ({"bpm": "127.99", "caption": "loud, fast; hard"}, [])


def test_what_several_csv_files_say_of_a_song_adds_up(tmp_path: Path) -> None:
    put(tmp_path, a__csv="file,bpm,key\nsong.wav,90,Am\n", b__csv="file,caption,key\nsong.wav,slow,Cm\n")
    fields, remarks = read(tmp_path)
    assert fields == {"bpm": "90", "caption": "slow", "keyscale": "Cm"}
    assert remarks == ["a.csv and b.csv differ in keyscale; b.csv is used"]


def test_a_csv_of_something_else_is_none_of_our_business(tmp_path: Path) -> None:
    put(tmp_path, budget__csv="year,money\n2024,1\n", empty__csv="")
    assert read(tmp_path) == ({}, [])


def test_a_csv_that_describes_songs_but_does_not_name_their_files_is_remarked_on(tmp_path: Path) -> None:
    put(tmp_path, songs__csv="name; Caption ;BPM\nsong.wav;a waltz;90\n")
    assert read(tmp_path) == ({}, ["songs.csv is left out: it has caption, bpm, but no column named file"])


def test_equal_file_names_in_different_folders_need_their_folder_in_a_csv(tmp_path: Path) -> None:
    put(tmp_path, a__csv="file,bpm\nd1/song.wav,90\nd2\\song.wav,100\nsong.wav,110\ngone.wav,120\n")
    rows, remarks = assign_rows(read_rows(tmp_path)[0], ["d1/song.wav", "d2/song.wav"])
    assert {name: row.fields for name, (row,) in rows.items()} == {
        "d1/song.wav": {"bpm": "90"},
        "d2/song.wav": {"bpm": "100"},
    }
    assert remarks == [
        "a.csv: song.wav may be any of d1/song.wav, d2/song.wav; write the path with its folder",
        "a.csv: there is no song gone.wav",
    ]


@pytest.mark.parametrize(("field", "written", "meant"), [
    ("bpm", "127.99", 128), ("bpm", 90.0, 90), ("bpm", "120 BPM", 120), ("bpm", "N/A", None), ("bpm", 0, None),
    ("bpm", float("nan"), None), ("bpm", "120,7", 121), ("keyscale", "Am", "A minor"), ("keyscale", "F#m", "F# minor"),
    ("keyscale", "C", "C major"), ("keyscale", "CM", "C major"), ("keyscale", "bb minor", "Bb minor"),
    ("keyscale", "E♭ Major", "E♭ major"), ("keyscale", "g sharp min", "G# minor"), ("keyscale", "8A", "8A"),
    ("timesignature", "4/4", "4"), ("timesignature", "6/8", "6"), ("timesignature", 3, "3"),
    ("timesignature", "7/8", "7/8"), ("language", "English", "en"), ("language", "EN", "en"),
    ("language", "pt-BR", "pt"), ("language", "cantonese", "yue"), ("language", "klingon", "klingon"),
    ("language", "instrumental", "unknown"), ("prompt_override", "Genre", "genre"), ("repeat", "3", 3),
    ("genre", ["rock", "pop"], "rock, pop"), ("is_instrumental", "No", False),
])  # fmt: skip
def test_values_become_the_ones_the_model_knows(field: str, written: object, meant: object) -> None:
    fields, remarks = parse_fields({field: written})
    assert (fields[field], remarks) == (meant, [])


@pytest.mark.parametrize(("field", "written"), [
    ("bpm", "fast"), ("bpm", "inf"), ("bpm", "120,130"), ("bpm", [120, 5]), ("bpm", {"x": 1}),
    ("prompt_override", "both"), ("repeat", "0"), ("repeat", "1.5"), ("is_instrumental", "maybe"),
])  # fmt: skip
def test_values_without_a_meaning_are_left_out_and_named(field: str, written: object) -> None:
    fields, remarks = parse_fields({field: written})
    assert [remark.split(":")[0] for remark in remarks] == [field]
    assert field not in fields or field == "is_instrumental"


@pytest.mark.parametrize(("raw", "lyrics", "is_instrumental"), [
    ({}, "[Instrumental]", True),
    ({"lyrics": "[instrumental]"}, "[instrumental]", True),
    ({"lyrics": "la\n[Instrumental]\nla"}, "la\n[Instrumental]\nla", False),
    ({"language": "instrumental", "lyrics": "la"}, "la", True),
    ({"is_instrumental": "false"}, "[Instrumental]", False),
])  # fmt: skip
def test_lyrics_and_the_instrumental_flag_complete_each_other(
    raw: dict[str, object], lyrics: str, is_instrumental: bool
) -> None:
    fields, _ = parse_fields(raw)
    assert (fields["lyrics"], fields["is_instrumental"]) == (lyrics, is_instrumental)
