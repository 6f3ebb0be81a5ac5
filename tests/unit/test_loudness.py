"""Peak and loudness normalisation."""

from typing import Literal

import numpy as np
import pytest

from sidestep.data.loudness import integrated_loudness, normalize

RATE = 48000


def sine(amplitude: float, *, channels: int = 2, seconds: float = 3.0, hertz: float = 997.0) -> np.ndarray:
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)
    return np.tile(wave.astype(np.float32), (channels, 1))


def test_the_meter_agrees_with_the_reference_tone_of_the_standard() -> None:
    # BS.1770-4: a 997 Hz sine at 0 dBFS in one channel reads -3.01 LUFS, in two channels 0.
    assert integrated_loudness(sine(1.0), RATE) == pytest.approx(0.0, abs=0.05)
    assert integrated_loudness(np.concatenate([sine(1.0, channels=1), sine(0.0, channels=1)]), RATE) == pytest.approx(
        -3.01, abs=0.05
    )


def test_mono_is_as_loud_as_the_stereo_that_is_made_of_it() -> None:
    assert integrated_loudness(sine(0.3, channels=1), RATE) == pytest.approx(integrated_loudness(sine(0.3), RATE))


def test_peak_brings_the_highest_sample_to_the_target() -> None:
    result = normalize(sine(0.2), RATE, mode="peak", target_db=-1.0, target_lufs=-14.0)
    assert result.dtype == np.float32
    assert 20 * np.log10(np.abs(result).max()) == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize("amplitude", [0.05, 0.9])
def test_lufs_brings_the_loudness_to_the_target_up_and_down(amplitude: float) -> None:
    result = normalize(sine(amplitude), RATE, mode="lufs", target_db=-1.0, target_lufs=-14.0)
    assert integrated_loudness(result, RATE) == pytest.approx(-14.0, abs=0.02)


def test_lufs_never_lifts_the_peak_above_the_ceiling() -> None:
    samples = sine(0.01)
    samples[:, RATE] = 0.8
    result = normalize(samples, RATE, mode="lufs", target_db=-1.0, target_lufs=-14.0)
    assert 20 * np.log10(np.abs(result).max()) == pytest.approx(-1.0, abs=1e-3)
    assert integrated_loudness(result, RATE) < -14.0


@pytest.mark.parametrize("mode", ["none", "peak", "lufs"])
def test_silence_is_left_alone(mode: str) -> None:
    samples = sine(0.0)
    assert np.array_equal(normalize(samples, RATE, mode=mode, target_db=-1.0, target_lufs=-14.0), samples)


def test_none_changes_nothing_and_a_track_too_short_to_measure_keeps_its_level() -> None:
    samples = sine(0.3)
    assert normalize(samples, RATE, mode="none", target_db=-1.0, target_lufs=-14.0) is samples
    short = sine(0.3, seconds=0.2)
    assert np.array_equal(normalize(short, RATE, mode="lufs", target_db=-1.0, target_lufs=-14.0), short)


def test_the_input_is_not_changed() -> None:
    samples = sine(0.3)
    before = samples.copy()
    normalize(samples, RATE, mode="peak", target_db=-1.0, target_lufs=-14.0)
    assert np.array_equal(samples, before)


@pytest.mark.parametrize("mode", ["peak", "lufs"])
def test_what_fades_below_the_numbers_of_float32_is_silent(mode: Literal["peak", "lufs"]):
    samples = np.full((2, 48_000), 1e-42, np.float32)
    assert np.array_equal(normalize(samples, 48_000, mode=mode, target_db=-1.0, target_lufs=-14.0), samples)
