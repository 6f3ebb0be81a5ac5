"""From what was measured to scores: cross-fit, with intervals, and what of them is usable.

N draws, M modules, R directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
FALSE_ALARMS = 0.01  # The chance that anything stands out in pure noise.


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The score of each module and its 95 % interval over songs; NaN where one draw tells nothing of it."""

    score_M: Array
    low_M: Array
    high_M: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit(Scores):
    """Scores against chance: the standard error, whether a module stands out beyond chance, and what is usable.

    `gains_MR`: what the first, second, ... rank is worth, never negative or rising; zero where there is only noise.
    """

    error_M: Array
    stands_out_M: NDArray[np.bool_]
    gains_MR: Array


def cross_fit(values_MR: Array, parts_NMR: Array, songs_N: Sequence[int], *, seed: int) -> CrossFit:
    """Score each module by the loss that a step along the first half's gradient takes off, measured on the second half.

    `values_MR` are singular values of the mean gradient of the first half of the draws, `parts_NMR` the second half's
    gradients along its directions, u_i^T G v_i. Their product sigma_i u_i^T G v_i has mean zero for a direction that is
    only noise, whatever the size of the noise; its sum over i is the first-order loss drop. Intervals are from
    resampling songs, and their draws within them: how other songs of this kind might score. Whether a module stands out
    is asked of these songs: by Student's test, over draws, for all modules together.

    What a rank is worth is u_i^T G v_i itself, without sigma_i: Adam and its kin step about as far along a weak
    direction as along a strong one, so the loss drop within reach is the sum of singular values, not of their squares.
    """
    along_NM = (values_MR[None] * parts_NMR).sum(2)
    score_M = along_NM.mean(0)
    resampled_BM = _weights(songs_N, seed) @ along_NM
    low_M, high_M = np.percentile(resampled_BM, INTERVAL, axis=0)
    draws = len(along_NM)
    error_M = along_NM.std(0, ddof=1) / math.sqrt(draws) if draws > 1 else np.full(len(score_M), np.inf)
    if draws == 1:
        low_M, high_M = np.full((2, len(score_M)), np.nan)
    critical = stdtrit(max(1, draws - 1), 1 - FALSE_ALARMS / len(score_M))
    return CrossFit(
        score_M=score_M,
        low_M=low_M,
        high_M=high_M,
        error_M=error_M,
        stands_out_M=score_M > critical * error_M,
        gains_MR=_reliability(score_M, error_M)[:, None] * np.stack([_falling(row) for row in parts_NMR.mean(0)]),
    )


def mean_scores(values_NM: Array, songs_N: Sequence[int], *, seed: int) -> Scores:
    """Score each module by the mean of a number, as the gradient-norm ranking does.

    Nothing is tested against chance: a mean of norms is positive in pure noise as well.
    """
    score_M = values_NM.mean(0)
    resampled_BM = _weights(songs_N, seed) @ values_NM
    low_M, high_M = np.percentile(resampled_BM, INTERVAL, axis=0)
    return Scores(score_M=score_M, low_M=low_M, high_M=high_M)


def proportional(score_M: Array, width: int) -> Array:
    """Return gains whose best division gives ranks in proportion to the scores (times their cost)."""
    return score_M[:, None] / np.arange(1, width + 1)


def chance_limit(samples: int) -> float:
    """Return how many standard errors 95 % of chance stays within (Student's t), for the mean of so many samples."""
    return float(stdtrit(samples - 1, 0.975))


def _reliability(score_M: Array, error_M: Array) -> Array:
    """Return the share of each score that is no noise: max(0, 1 - (error / score)^2), after James and Stein."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share_M = 1 - np.square(error_M / score_M)
    return np.where(score_M > 0, np.clip(np.nan_to_num(share_M), 0, 1), 0)


def _falling(values_R: Array) -> Array:
    """Return the nearest sequence that never rises nor is negative: neighbours out of order become their mean."""
    pools: list[tuple[float, int]] = []
    for value in values_R:
        total, size = float(value), 1
        while pools and pools[-1][0] / pools[-1][1] < total / size:
            earlier, count = pools.pop()
            total, size = total + earlier, size + count
        pools.append((total, size))
    return np.maximum(0, np.concatenate([np.full(size, total / size) for total, size in pools]))


def _weights(songs_N: Sequence[int], seed: int) -> Array:
    """Return [resamples, N]: how much each draw counts in a mean when songs, and draws within songs, are drawn anew."""
    generator = np.random.default_rng(seed)
    draws_of = [np.flatnonzero(np.asarray(songs_N) == song) for song in sorted(set(songs_N))]
    count = len(draws_of)
    chosen_BS = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights_BN = np.zeros((RESAMPLES, len(songs_N)))
    for place, draws in enumerate(draws_of):
        even = np.full(len(draws), 1 / len(draws))
        weights_BN[:, draws] = generator.multinomial(chosen_BS[:, place] * len(draws), even)
    return weights_BN / weights_BN.sum(1, keepdims=True)
