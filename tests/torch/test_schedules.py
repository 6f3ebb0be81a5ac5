"""The learning rate over a run."""

from dataclasses import replace

import pytest

from sidestep.events import Metrics, Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.schedules import RESTARTS, SCHEDULES, lr_factor
from tests.torch.tiny import tiny_config, train, write_songs

WARM = [name for name in SCHEDULES if name != "constant"]


def factors(schedule: str, *, warmup: int = 0, total: int = 100) -> list[float]:
    return [lr_factor(step, schedule=schedule, warmup_steps=warmup, total_steps=total) for step in range(total)]


@pytest.mark.parametrize("schedule", WARM)
def test_the_warm_up_rises_evenly_from_a_tenth_to_the_whole(schedule: str):
    rates = factors(schedule, warmup=9)
    assert rates[:10] == pytest.approx([0.1 + 0.1 * step for step in range(10)])


def test_constant_has_no_warm_up_and_constant_with_warmup_stays_after_it():
    assert factors("constant", warmup=50) == [1.0] * 100
    assert factors("constant_with_warmup", warmup=50)[50:] == [1.0] * 50


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine_and_linear_fall_to_nothing_and_are_at_half_in_the_middle(warmup: int):
    middle = warmup + (100 - warmup) // 2
    for schedule in ("cosine", "linear"):
        rates = factors(schedule, warmup=warmup)
        assert rates[warmup] == 1
        assert rates[middle] == pytest.approx(0.5)
        assert all(later < earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
        assert 0 < rates[-1] < 0.02
    assert factors("linear")[75] == pytest.approx(0.25)
    assert factors("cosine")[75] == pytest.approx(0.1464, abs=1e-4)


def test_cosine_restarts_begins_anew_at_the_whole_in_every_cycle():
    rates = factors("cosine_restarts")
    cycle = 100 // RESTARTS
    assert [step for step, rate in enumerate(rates) if rate == 1] == list(range(0, 100, cycle))
    for start in range(0, 100, cycle):
        assert rates[start : start + cycle] == pytest.approx(rates[:cycle])
    assert rates[cycle - 1] < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (100, 3), (0, 2)])
def test_a_run_of_any_length_has_a_rate_above_nothing_at_every_step(schedule: str, warmup: int, total: int):
    assert all(0 < rate <= 1 for rate in factors(schedule, warmup=warmup, total=total))


def test_a_run_reports_the_rate_that_each_step_was_made_with(tmp_path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20,) * 5)
    config = tiny_config(warmup_steps=4, epochs=2, learning_rate=0.01, scheduler_type="linear")
    rates = [event.lr for event in train(config, base, songs, tmp_path / "run").all_of(Metrics)]
    expected = [0.1, 0.325, 0.55, 0.775, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([0.01 * factor for factor in expected])


def test_a_warm_up_longer_than_the_run_is_a_warning(tmp_path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20,) * 2)
    (warning,) = train(tiny_config(warmup_steps=4, epochs=2), base, songs, tmp_path / "run").warnings
    assert "warm-up takes 4 steps and the run has 4" in warning
    assert warning.endswith("Set --warmup-steps lower.")
    longer = tiny_config(warmup_steps=6, epochs=3, resume_from=tmp_path / "long")
    train(replace(longer, epochs=2, resume_from=None), base, songs, tmp_path / "long")
    (warning,) = train(longer, base, songs, tmp_path / "long").warnings
    assert warning.endswith("Raise --epochs (or --max-steps).")  # The warm-up stays as it was.
    constant = tiny_config(warmup_steps=4, epochs=2, scheduler_type="constant")
    assert not train(constant, base, songs, tmp_path / "constant").all_of(Notice)
