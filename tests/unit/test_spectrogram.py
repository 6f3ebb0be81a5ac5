"""The picture of a sound shows when and at which pitch it is loud."""

import numpy as np

from sidestep.data.spectrogram import colours, spectrogram

RATE = 48_000


def brightness(picture: np.ndarray) -> np.ndarray:
    return picture.astype(float).sum(axis=2)


def test_a_tone_is_a_bright_line_at_its_pitch():
    time = np.arange(RATE) / RATE
    low, high = (spectrogram(np.sin(2 * np.pi * hz * time)[None], RATE, width=60, height=80) for hz in (200, 5000))
    assert low.shape == (80, 60, 3) and low.dtype == np.uint8
    rows = [brightness(picture)[:, 10:50].mean(axis=1).argmax() for picture in (low, high)]
    # Log frequency from 40 Hz at the bottom to 16 kHz at the top.
    for row, hz in zip(rows, (200, 5000), strict=True):
        assert abs((79 - row) / 80 - np.log(hz / 40) / np.log(16_000 / 40)) < 0.03


def test_silence_and_an_empty_sound_are_dark():
    for samples in (np.zeros((2, RATE)), np.zeros((1, 1))):
        picture = spectrogram(samples, RATE)
        assert picture.shape == (96, 320, 3)
        assert (picture == colours(np.zeros(1))[0]).all()


def test_a_sound_that_begins_late_is_dark_before():
    noise = np.random.default_rng(0).normal(size=(2, RATE))
    noise[:, : RATE // 2] = 0
    picture = brightness(spectrogram(noise, RATE, width=100))
    assert picture[:, :40].max() < picture[:, 60:].min()
