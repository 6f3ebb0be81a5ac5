"""Bring tracks to the same level: by their peak, or by their loudness."""

import warnings
from typing import Literal

import numpy as np
import pyloudnorm

# ITU-R BS.1770-4 measures in blocks of 400 ms; a shorter track has no loudness.
BLOCK_SECONDS = 0.4
# What fades below the smallest normal number of float32 is silent; the gain for it would be none that float32 has.
SILENCE = float(np.finfo(np.float32).tiny)


def integrated_loudness(samples: np.ndarray, rate: int) -> float:
    """Measure loudness in LUFS (ITU-R BS.1770-4) of float [channels, samples]; -inf for silence and below 0.4 s.

    One channel is measured as the two equal channels it will be played and encoded as, 3 LU above its own loudness.
    """
    if samples.shape[1] < BLOCK_SECONDS * rate:
        return float("-inf")
    stereo = np.repeat(samples, 2, axis=0) if samples.shape[0] == 1 else samples
    with warnings.catch_warnings():
        # For a silent track pyloudnorm takes the mean of no blocks on its way to -inf.
        warnings.simplefilter("ignore", RuntimeWarning)
        loudness = float(pyloudnorm.Meter(rate).integrated_loudness(stereo.T.astype(np.float64)))
    return loudness if np.isfinite(loudness) else float("-inf")


def gain_for(
    samples: np.ndarray, rate: int, *, mode: Literal["none", "peak", "lufs"], target_db: float, target_lufs: float
) -> float:
    """Return the linear gain that brings float [channels, samples] to the target.

    `peak` brings the highest sample to `target_db` (dBFS). `lufs` brings the loudness to `target_lufs`, but never the
    peak above `target_db`: a track with high peaks stays quieter rather than being clipped or compressed. Silence, and
    for `lufs` a track below 0.4 s, has no level to go by: its gain is 1.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if mode == "none" or peak < SILENCE:
        return 1.0
    to_ceiling = 10 ** (target_db / 20) / peak
    if mode == "peak":
        return to_ceiling
    loudness = integrated_loudness(samples, rate)
    if loudness == float("-inf"):
        return 1.0
    return min(10 ** ((target_lufs - loudness) / 20), to_ceiling)


def normalize(
    samples: np.ndarray, rate: int, *, mode: Literal["none", "peak", "lufs"], target_db: float, target_lufs: float
) -> np.ndarray:
    """Return float32 [channels, samples] times the gain of `gain_for`; `none` returns the samples as they are."""
    gain = gain_for(samples, rate, mode=mode, target_db=target_db, target_lufs=target_lufs)
    return samples if gain == 1.0 else (samples * np.float32(gain)).astype(np.float32, copy=False)
