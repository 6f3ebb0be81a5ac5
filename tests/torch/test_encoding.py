"""Encoding one song: tiles equal the whole file, levels and rates are right, what is cut is counted."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderOobleck

from sidestep.data.prompts import Prompt
from sidestep.errors import DataError
from sidestep.model.checkpoint import find_checkpoint
from sidestep.model.loading import load_text_encoder
from sidestep.preprocess.encode_audio import Loudness, Reach, encode_wave, load_wave, reach_of, tiles
from sidestep.preprocess.encode_text import encode_prompt, truncation_notices

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "reference" / "checkpoints"
UNCHANGED = Loudness(mode="none", target_db=-1.0, target_lufs=-14.0)


def make_vae(ratios: list[int]) -> AutoencoderOobleck:
    """An Oobleck autoencoder with few channels and random weights."""
    torch.manual_seed(5)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=ratios,
        channel_multiples=[1] * len(ratios),
        decoder_channels=2,
        decoder_input_channels=4,
        sampling_rate=48000,
    )
    return vae.eval().requires_grad_(False)


def noise(samples: int) -> torch.Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(1)) * 0.3


def sine(seconds: float, rate: int, *, hertz: float = 440.0, level: float = 0.25) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("ratios", [[2, 4, 4, 6, 10], [4, 6, 8, 10], [3, 5, 4]])
@pytest.mark.parametrize("tile_frames", [1, 7, 16])
def test_tiles_equal_the_whole_file(ratios: list[int], tile_frames: int) -> None:
    vae = make_vae(ratios)
    hop = int(np.prod(ratios))
    wave = noise(hop * 37 + hop // 3)
    with torch.inference_mode():
        whole = vae.encode(wave[None]).latent_dist.mode()[0].T
        tiled = encode_wave(vae, wave, tile_frames=tile_frames)
    assert tiled.shape == whole.shape == (37, 4)
    error = float((tiled - whole).abs().max())
    print(f"largest difference between tiled and whole-file latents: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("ratios", [[2, 4, 4, 6, 10], [3, 5, 4]])
def test_the_receptive_field_is_that_of_the_encoder(ratios: list[int]) -> None:
    vae = make_vae(ratios)
    reach = reach_of(vae.encoder)
    assert reach.hop == np.prod(ratios)
    frame = 20
    wave = noise(reach.hop * 41).requires_grad_()
    vae.encoder(wave[None])[0, :, frame].square().sum().backward()
    touched = torch.nonzero(wave.grad.abs().sum(0))
    assert int(touched.min()) == frame * reach.hop + reach.first
    assert int(touched.max()) == frame * reach.hop + reach.last


def test_the_real_vae_needs_few_frames_around_a_tile() -> None:
    reach = reach_of(make_vae([2, 4, 4, 6, 10]).encoder)
    assert (reach.hop, reach.frames_before, reach.frames_after) == (1920, 7, 7)


def test_tiles_read_no_more_than_they_keep_and_their_surroundings() -> None:
    planned = list(tiles(10, 1055, reach=Reach(100, -150, 250), tile_frames=4))
    assert planned == [(0, 4, 0, 600), (4, 8, 200, 1000), (8, 10, 600, 1055)]


def test_less_than_a_frame_is_an_error() -> None:
    with pytest.raises(DataError, match=r"0\.001 s of audio"):
        encode_wave(make_vae([4, 6, 8, 10]), noise(50))


def test_an_end_shorter_than_a_frame_has_no_frame_of_its_own() -> None:
    vae = make_vae([4, 6, 8, 10])
    with torch.inference_mode():
        assert encode_wave(vae, noise(1920 * 3 + 1919)).shape[0] == 3


def test_mono_becomes_stereo_and_more_channels_their_first_two(tmp_path: Path) -> None:
    left, right = sine(0.5, 48000), sine(0.5, 48000, hertz=330.0)
    soundfile.write(tmp_path / "mono.wav", left, 48000, subtype="FLOAT")
    soundfile.write(tmp_path / "many.wav", np.stack([left, right, *[right * 0] * 6], axis=1), 48000, subtype="FLOAT")
    mono = load_wave(tmp_path / "mono.wav", max_seconds=0.0, loudness=UNCHANGED)
    many = load_wave(tmp_path / "many.wav", max_seconds=0.0, loudness=UNCHANGED)
    assert torch.equal(mono, torch.from_numpy(np.stack([left, left])))
    assert torch.equal(many, torch.from_numpy(np.stack([left, right])))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 192000])
def test_every_rate_becomes_48_khz(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "song.wav", sine(1.0, rate), rate, subtype="FLOAT")
    wave = load_wave(tmp_path / "song.wav", max_seconds=0.0, loudness=UNCHANGED)
    assert wave.shape == (2, 48000)
    inside = slice(2000, 46000)
    np.testing.assert_allclose(wave[0, inside].numpy(), sine(1.0, 48000)[inside], atol=2e-3)


def test_songs_are_cropped(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "song.wav", sine(2.0, 44100), 44100)
    assert load_wave(tmp_path / "song.wav", max_seconds=1.5, loudness=UNCHANGED).shape == (2, 72000)


def test_the_peak_is_that_of_the_resampled_signal(tmp_path: Path) -> None:
    # A square wave overshoots when it is resampled, so a peak set before that would not be the one the VAE hears.
    square = np.sign(sine(1.0, 44100, hertz=441.3)).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "song.wav", square, 44100, subtype="FLOAT")
    peak = Loudness(mode="peak", target_db=-1.0, target_lufs=-14.0)
    wave = load_wave(tmp_path / "song.wav", max_seconds=0.0, loudness=peak)
    assert float(wave.abs().max()) == pytest.approx(10 ** (-1 / 20), rel=1e-5)


def test_mono_and_the_same_song_in_stereo_come_to_the_same_loudness(tmp_path: Path) -> None:
    mono = sine(1.0, 48000)
    soundfile.write(tmp_path / "mono.wav", mono, 48000, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([mono, mono], axis=1), 48000, subtype="FLOAT")
    lufs = Loudness(mode="lufs", target_db=-1.0, target_lufs=-20.0)
    waves = [load_wave(tmp_path / name, max_seconds=0.0, loudness=lufs) for name in ("mono.wav", "stereo.wav")]
    assert torch.equal(*waves)


def test_what_is_cut_is_counted_and_reported() -> None:
    checkpoint = find_checkpoint(CHECKPOINTS, "turbo")
    tokenizer, encoder = load_text_encoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    words = " ".join(["river"] * 3000)
    whole = len(tokenizer(words)["input_ids"])
    with torch.inference_mode():
        encoded = encode_prompt(tokenizer, encoder, Prompt(text=words, lyrics=words))
    assert encoded.text.shape[:2] == (1, 256)
    assert encoded.lyrics.shape[:2] == (1, 2048)
    assert encoded.counts["caption_truncated"] == whole - 256
    assert encoded.counts["lyrics_truncated"] == whole - 2048
    notices = truncation_notices("song.wav", encoded.counts)
    assert [notice.level for notice in notices] == ["warning", "warning"]
    assert all(notice.text.startswith("song.wav: the ") for notice in notices)
    assert f"{whole - 2048} tokens longer than the 2048" in notices[1].text
