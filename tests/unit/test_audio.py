"""Audio files: found, probed, read, and refused with their name when they cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.data.audio import find_audio, probe, read_audio
from sidestep.errors import DataError

RATE = 48000


def tone(seconds: float, *, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """A sine that differs from channel to channel, [samples, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (220 + 110 * channel) * time) for channel in range(channels)], axis=1)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"}
    soundfile.write(path, samples, rate, **options)
    return path


def cut(path: Path, share: float) -> Path:
    """Shorten a file to a share of its bytes, as an interrupted download does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def without_length_header(path: Path) -> Path:
    """Remove the first frame of an MP3 (MPEG 1, layer III, 48 kHz), which counts the others."""
    data = path.read_bytes()
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[2] >> 4]
    path.write_bytes(data[144 * kbps * 1000 // RATE + (data[2] >> 1 & 1) :])
    return path


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus"])
def test_every_format_is_read_at_its_own_rate_and_length(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"song{suffix}", tone(2.0))
    samples, rate = read_audio(path, max_seconds=0)
    assert (samples.shape, samples.dtype, rate) == ((2, 2 * RATE), np.float32, RATE)
    assert np.abs(samples - tone(2.0).T)[:, 2000:-2000].max() < 0.05
    info = probe(path)
    assert (info.seconds, info.sample_rate, info.channels) == (2.0, RATE, 2)


@pytest.mark.parametrize(("rate", "channels", "kept"), [(8000, 1, 1), (192000, 2, 2), (44100, 8, 2)])
def test_odd_rates_and_channels_are_kept_down_to_the_first_two(
    tmp_path: Path, rate: int, channels: int, kept: int
) -> None:
    written = tone(0.5, rate=rate, channels=channels)
    samples, read_rate = read_audio(write(tmp_path / "a.wav", written, rate), max_seconds=0)
    assert (samples.shape, read_rate) == ((kept, rate // 2), rate)
    assert np.abs(samples - written.T[:kept]).max() < 1e-4
    assert probe(tmp_path / "a.wav").channels == channels


def test_a_rate_that_nothing_small_resamples_is_refused_before_decoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(0.5, rate=44101), 44101)
    with pytest.raises(DataError, match=r"a\.flac has a sample rate of 44101 Hz") as caught:
        probe(path)
    assert "song.flac -ar 48000 converted.flac" in caught.value.hint


def test_a_track_is_cut_at_the_maximum(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(2.0))
    assert read_audio(path, max_seconds=0.5)[0].shape == (2, RATE // 2)
    assert read_audio(path, max_seconds=9)[0].shape == (2, 2 * RATE)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_a_truncated_file_is_refused_by_name(
    tmp_path: Path, suffix: str, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path = cut(write(tmp_path / f"song{suffix}", tone(3.0)), share)
    with pytest.raises(DataError, match=f"song{suffix} .*cut off") as caught:
        read_audio(path, max_seconds=0)
    assert "Get the file again" in caught.value.hint
    assert capfd.readouterr().err == ""


def test_a_constant_bitrate_mp3_without_length_header_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(3.0), RATE, bitrate_mode="CONSTANT", compression_level=0.5)
    assert probe(without_length_header(path)).seconds == pytest.approx(3.0, abs=0.1)
    with pytest.raises(DataError, match="ends in the middle of a frame"):
        probe(cut(path, 0.501))


def test_an_mp3_whose_length_would_be_misread_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).normal(size=(3 * RATE, 2)) * 0.1
    fading = np.linspace(1, 0, 3 * RATE)[:, None] ** 8
    for name, samples in (("fades_in.mp3", noise * fading[::-1]), ("fades_out.mp3", noise * fading)):
        soundfile.write(tmp_path / name, samples, RATE, bitrate_mode="VARIABLE", compression_level=0.5)
        with pytest.raises(DataError, match=rf"{name} has no length header or a wrong one.* in place of 3\.\d s"):
            probe(without_length_header(tmp_path / name))
    twice = write(tmp_path / "twice.mp3", tone(2.0))
    twice.write_bytes(twice.read_bytes() * 2)
    with pytest.raises(DataError, match=r"twice\.mp3 has no length header or a wrong one"):
        probe(twice)
    assert capfd.readouterr().err == ""


def test_mp3_files_strung_together_with_their_tags_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.mp3", tone(2.0))
    id3v2 = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + bytes(1024)
    path.write_bytes((id3v2 + path.read_bytes()) * 2)
    with pytest.raises(DataError, match=r"twice\.mp3 has no length header or a wrong one"):
        probe(path)


@pytest.mark.parametrize("suffix", [".ogg", ".opus"])
@pytest.mark.parametrize("seconds", [2.0, 3.0])
def test_ogg_files_strung_together_are_refused(tmp_path: Path, suffix: str, seconds: float) -> None:
    first = write(tmp_path / f"first{suffix}", tone(2.0))
    both = tmp_path / f"both{suffix}"
    both.write_bytes(first.read_bytes() + write(tmp_path / f"second{suffix}", tone(seconds)).read_bytes())
    with pytest.raises(DataError, match=rf"both{suffix} holds several recordings one after the other") as caught:
        probe(both)
    assert f"ffmpeg -i song{suffix} converted.flac" in caught.value.hint


def test_what_follows_an_ogg_file_without_sound_does_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ogg", tone(2.0))
    begins_and_ends = b"OggS\0" + bytes([2 | 4]) + bytes(8) + b"next" + bytes(8) + bytes([1, 7]) + b"nothing"
    path.write_bytes(path.read_bytes() + begins_and_ends + b"TAG" + bytes(125))
    assert probe(path).seconds == 2.0


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + bytes(1024)])
def test_an_mp3_of_another_name_is_looked_at_as_closely(tmp_path: Path, tag: bytes) -> None:
    noise = np.random.default_rng(0).normal(size=(3 * RATE, 2)) * 0.1
    fading = noise * np.linspace(1, 0, 3 * RATE)[::-1, None] ** 8
    soundfile.write(tmp_path / "a.mp3", fading, RATE, bitrate_mode="VARIABLE", compression_level=0.5)
    path = tmp_path / "a.wav"
    path.write_bytes(tag + without_length_header(tmp_path / "a.mp3").read_bytes())
    with pytest.raises(DataError, match=r"a\.wav has no length header or a wrong one"):
        probe(path)


def test_tags_around_an_mp3_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp3", tone(2.0))
    id3v2 = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + b"\xff\xfb" * 512
    path.write_bytes(id3v2 + path.read_bytes() + b"TAG" + bytes(125))
    assert probe(path).seconds == 2.0


def test_a_wav_whose_encoder_did_not_know_the_length_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(1.0))
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert probe(path).seconds == 1.0


def test_a_flac_without_a_length_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(1.0))
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(DataError, match="does not say how long it is") as caught:
        probe(path)
    assert "ffmpeg -i song.flac converted.flac" in caught.value.hint


@pytest.mark.parametrize(
    ("samples", "reason"),
    [(np.zeros((0, 1)), "holds no sound"), (np.zeros((1, 1)), "too short"), (np.zeros((1919, 2)), "too short")],
)
def test_less_than_one_latent_frame_is_refused(tmp_path: Path, samples: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=f"a.wav {reason}|a.wav is {reason}"):
        probe(write(tmp_path / "a.wav", samples))
    assert probe(write(tmp_path / "b.wav", np.zeros((1920, 2)))).seconds == pytest.approx(0.04)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    samples = tone(1.0)
    samples[RATE // 2, 1] = value
    with pytest.raises(DataError, match=r"a\.wav holds samples that are not finite"):
        read_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"), max_seconds=0)


@pytest.mark.parametrize("name", ["notes.mp3", "notes.wav", "notes.flac", "notes.ogg"])
@pytest.mark.parametrize("content", [b"", b"These are words, not music.\n" * 200])
def test_a_text_file_named_like_audio_is_refused(
    tmp_path: Path, name: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        probe(path)
    assert caught.value.hint
    assert capfd.readouterr().err == ""


def test_a_wav_named_mp3_is_read_for_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(1.0)).rename(tmp_path / "a.mp3")
    assert probe(path).seconds == 1.0


def test_a_missing_file_and_a_dead_link_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.wav is not there"):
        probe(tmp_path / "gone.wav")
    (tmp_path / "dead.wav").symlink_to(tmp_path / "gone.wav")
    with pytest.raises(DataError, match=r"dead\.wav is a link to a file that is not there"):
        probe(tmp_path / "dead.wav")


def test_audio_is_found_in_subfolders_whatever_its_case_and_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.WAV", "a/z.Flac", "a/é.mp3", "c d/ö.ogg", ".hidden.wav", ".cache/x.wav", "._b.wav", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_audio(tmp_path)]
    assert found == ["a/z.Flac", "a/é.mp3", "b.WAV", "c d/ö.ogg"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    songs, elsewhere = tmp_path / "songs", tmp_path / "elsewhere"
    songs.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.wav").touch()
    (songs / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(songs)
    (songs / "b.wav").symlink_to(elsewhere / "a.wav")
    assert [path.relative_to(songs).as_posix() for path in find_audio(songs)] == ["b.wav", "linked/a.wav"]


def test_no_folder_no_audio_and_unread_formats_are_errors_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_audio(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt is not a folder"):
        find_audio(tmp_path / "a.txt")
    with pytest.raises(DataError, match="There is no audio in"):
        find_audio(tmp_path)
    (tmp_path / "a.m4a").touch()
    with pytest.raises(DataError) as caught:
        find_audio(tmp_path)
    assert caught.value.hint == "Convert the .m4a files to FLAC first."
