"""What a sound looks like: loudness over time and pitch, as a picture."""

import numpy as np
from numpy.typing import NDArray

_WINDOW = 4096
_LOWEST_HZ, _HIGHEST_HZ = 40.0, 16_000.0
_RANGE_DB = 80.0
# Dark to bright, each step as far from the last to the eye: black, blue, violet, red, orange, pale yellow.
_COLOURS = np.array(
    [[5, 5, 16], [34, 17, 84], [104, 31, 121], [181, 54, 101], [239, 107, 60], [252, 180, 55], [252, 253, 191]],
    dtype=np.float64,
)


def spectrogram(samples: np.ndarray, rate: int, *, width: int = 320, height: int = 96) -> NDArray[np.uint8]:
    """Return a picture [height, width, RGB] of a sound [channels, n]: time to the right, log frequency upwards.

    From 40 Hz to 16 kHz; the brightest is the loudest place, black is 80 dB below it and less.
    """
    mono = np.asarray(samples, dtype=np.float64).mean(axis=0)
    padded = np.pad(mono, (_WINDOW // 2, _WINDOW))
    starts = np.linspace(0, max(0, mono.size - 1), width).astype(int)
    frames = padded[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(_LOWEST_HZ, min(_HIGHEST_HZ, rate / 2), height + 1) * _WINDOW / rate
    first = np.clip(edges[:-1].astype(int), 0, power.shape[1] - 1)
    last = np.clip(np.maximum(edges[1:].astype(int), first + 1), 1, power.shape[1])
    totals = np.concatenate([np.zeros((width, 1)), np.cumsum(power, axis=1)], axis=1)
    bands = (totals[:, last] - totals[:, first]) / (last - first)
    loudest = bands.max()
    if loudest <= 0:
        return np.tile(_COLOURS[0].astype(np.uint8), (height, width, 1))
    decibels = 10 * np.log10(np.maximum(bands / loudest, 1e-12))
    return colours(np.clip(1 + decibels / _RANGE_DB, 0, 1).T[::-1])


def colours(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the colours [..., RGB] of values from 0 (dark) to 1 (bright)."""
    places = values * (len(_COLOURS) - 1)
    below = np.minimum(places.astype(int), len(_COLOURS) - 2)
    share = (places - below)[..., None]
    return np.round(_COLOURS[below] * (1 - share) + _COLOURS[below + 1] * share).astype(np.uint8)
