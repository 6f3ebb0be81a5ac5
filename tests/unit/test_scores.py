"""Scores against chance: what two halves agree on counts, and noise of any size does not."""

import numpy as np
import pytest

from sidestep.estimate.scores import chance_limit, cross_fit, mean_scores

DRAWS, SONGS, RANKS = 48, 6, 8


def parts(signals: list[float], noises: list[float], *, seed: int) -> np.ndarray:
    """Draw [draws, modules, directions]: a signal along the first direction, and noise of each module's size."""
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(DRAWS, len(signals), RANKS)) * np.array(noises)[None, :, None]
    drawn[:, :, 0] += np.array(signals)
    return drawn


def values(noises: list[float]) -> np.ndarray:
    return np.repeat(np.array(noises)[:, None], RANKS, axis=1)


SONG_OF = [draw % SONGS for draw in range(DRAWS)]


def test_a_signal_stands_out_and_larger_noise_does_not():
    noises = [1.0, 30.0, 30.0, 30.0]
    found = cross_fit(values(noises), parts([4.0, 0, 0, 0], noises, seed=0), SONG_OF, seed=0)
    assert found.stands_out_M.tolist() == [True, False, False, False]
    assert found.low_M[0] > 0
    assert all(found.low_M[1:] < 0) and all(found.high_M[1:] > 0)
    assert found.gains_MR[0, 0] > 0


@pytest.mark.parametrize(("draws", "songs"), [(1, 1), (2, 2), (4, 4), (8, 2), (16, 1), (16, 16), (48, 6)])
def test_in_pure_noise_hardly_anything_stands_out_however_few_the_draws(draws: int, songs: int):
    alarms, modules = 0, 40
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(size=(draws, modules, RANKS))
        song_of = [draw % songs for draw in range(draws)]
        found = cross_fit(values([1.0] * modules), noise, song_of, seed=seed)
        alarms += bool(found.stands_out_M.any())
        assert draws == 1 or np.mean(found.gains_MR.sum(1) == 0) > 0.4
    assert alarms <= 3  # Of 60 less than one is expected.


def test_what_one_draw_shows_is_not_beyond_chance_nor_usable():
    found = cross_fit(values([1.0]), np.ones((1, 1, RANKS)), [0], seed=0)
    assert np.isnan(found.low_M).all() and np.isnan(found.high_M).all()
    assert not found.stands_out_M.any() and not found.gains_MR.any()


def test_gains_are_shrunk_by_the_share_of_the_score_that_is_noise():
    drawn = np.array([1.0, 3.0, 1.0, 3.0])[:, None, None] * np.ones((1, 1, 2))
    found = cross_fit(np.ones((1, 2)), drawn, [0, 1, 2, 3], seed=0)
    # Scores 2, 6, 2, 6: a mean of 4 with a variance of 16 / 3, a fourth of it for the mean.
    assert found.gains_MR[0] == pytest.approx([2 * (1 - (4 / 3) / 16)] * 2)


def test_gains_never_rise_and_are_never_negative():
    noises = [1.0] * 10
    found = cross_fit(values(noises), parts([2.0] * 10, noises, seed=3), SONG_OF, seed=0)
    assert (np.diff(found.gains_MR, axis=1) <= 1e-12).all()
    assert (found.gains_MR >= 0).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        found = cross_fit(np.ones((1, RANKS)), parts([1.0], [1.0], seed=seed), SONG_OF, seed=seed)
        covered += found.low_M[0] <= 1.0 <= found.high_M[0]
    assert covered >= 90


def test_songs_that_differ_widen_the_interval():
    drawn = parts([1.0], [0.1], seed=0)
    alike = cross_fit(np.ones((1, RANKS)), drawn, SONG_OF, seed=0)
    unlike = drawn.copy()
    unlike[:, 0, 0] += np.array([3.0 if song == 0 else -0.6 for song in SONG_OF])
    apart = cross_fit(np.ones((1, RANKS)), unlike, SONG_OF, seed=0)
    assert apart.high_M[0] - apart.low_M[0] > 3 * (alike.high_M[0] - alike.low_M[0])


def test_the_same_seed_gives_the_same_interval():
    drawn = parts([1.0, 0.5], [1.0, 1.0], seed=0)
    first, second = (cross_fit(np.ones((2, RANKS)), drawn, SONG_OF, seed=7) for _ in range(2))
    assert np.array_equal(first.low_M, second.low_M) and np.array_equal(first.gains_MR, second.gains_MR)


def test_a_single_song_has_an_interval_as_well():
    found = cross_fit(np.ones((1, RANKS)), parts([1.0], [1.0], seed=0), [0] * DRAWS, seed=0)
    assert found.low_M[0] < found.score_M[0] < found.high_M[0]


def test_a_mean_of_norms_is_ranked_without_a_test():
    norms = np.abs(np.random.default_rng(0).normal(size=(DRAWS, 3))) + np.array([0, 5, 1])
    found = mean_scores(norms, SONG_OF, seed=0)
    assert found.score_M.argmax() == 1
    assert (found.low_M < found.score_M).all() and (found.score_M < found.high_M).all()


@pytest.mark.parametrize(("samples", "limit"), [(2, 12.706), (10, 2.262), (11, 2.228), (31, 2.042)])
def test_few_samples_leave_chance_more_room(samples: int, limit: float):
    assert chance_limit(samples) == pytest.approx(limit, abs=5e-4)
