"""What the proof by training claims: the sign and the error of a comparison, and the sentence about it."""

from collections.abc import Sequence

import pytest

from sidestep.commands.estimate import _verdict
from sidestep.estimate.verify import Trained
from sidestep.training.validation import HeldOutLoss


def trained(losses: Sequence[Sequence[float]]) -> Trained:
    """An adapter with these held-out losses, a row of songs for each run."""
    found = [HeldOutLoss(sum(songs) / len(songs), None, {}, songs) for songs in losses]
    return Trained(name="it", parameters=1, before=found[0], after=found)


UNIFORM = trained([[1.0, 2.0, 3.0], [1.2, 2.2, 3.2]])


def test_a_lower_loss_is_a_gain_and_what_all_songs_share_is_no_error_of_it():
    gain, error = trained([[0.9, 1.9, 2.9], [1.1, 2.1, 3.1]]).gain_over(UNIFORM)
    assert gain == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-12)


def test_the_error_takes_in_that_of_the_runs_and_that_of_the_songs():
    # Means of the runs 2 and 2.2, of the songs 1.1, 2.1 and 3.1: standard errors 0.1 and 1 / sqrt(3).
    assert UNIFORM.loss == pytest.approx(2.1)
    assert UNIFORM.error == pytest.approx((0.1**2 + 1 / 3) ** 0.5)


@pytest.mark.parametrize("losses", [[[1.0, 2.0]], [[1.0], [2.0]]], ids=["one run", "one song"])
def test_one_run_or_one_song_has_no_error(losses: list[list[float]]):
    assert trained(losses).error is None


@pytest.mark.parametrize(
    ("gain", "error", "said"),
    [(0.3, 0.1, "better"), (-0.3, 0.1, "worse"), (0.19, 0.1, "No difference"), (0.3, None, "tells nothing")],
)
def test_the_sentence_says_which_is_better(gain: float, error: float | None, said: str):
    assert said in _verdict(gain, error, limit=2.0)
