"""The held-out loss is a number that can be compared: between epochs, between runs, between adapters."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import ConfigError
from sidestep.events import AdapterSaved, Validated
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training.assemble import Run
from sidestep.training.batches import Song
from sidestep.training.run import carry_out
from sidestep.training.songs import hold_out
from sidestep.training.timesteps import Continuous
from sidestep.training.validation import STRATA, held_out_loss
from tests.torch.tiny import RUN_NAME, adapter_tensors, assert_identical, prepare, tiny_config, train, write_songs

FRAMES = (40, 52, 64, 47, 71)


@dataclass(frozen=True)
class Always:
    """A law that knows one timestep."""

    timestep: float

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.full((count,), self.timestep)

    def quantiles(self, levels: torch.Tensor) -> torch.Tensor:
        return torch.full_like(levels, self.timestep)


def measure(run: Run):
    return held_out_loss(run.stepper.model, run.held_out, run.law)


def test_the_same_weights_give_the_same_number_in_every_run(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(val_split=0.4)
    expected = measure(prepare(config, base, songs, tmp_path / "run"))
    for changes in (
        {"seed": 7},
        {"batch_size": 2, "chunk_duration": 1.0},
        {"cfg_ratio": 1.0},
        {"loss_weighting": "min_snr"},
        {"timestep_mode": "discrete"},
        {"dropout": 0.5},
        {"rank": 8},
    ):
        # An adapter that was not trained changes nothing.
        assert measure(prepare(replace(config, **changes), base, songs, tmp_path / "run")) == expected


def test_measuring_is_repeatable_and_leaves_training_as_it_was(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(dropout=0.5, epochs=1)
    trained = train(replace(config, val_split=0.4), base, songs, tmp_path / "run")
    first, second = measure(trained.run), measure(trained.run)
    assert first == second
    assert first.mean == trained.all_of(Validated)[-1].loss
    assert trained.run.stepper.model.decoder.training

    unmeasured = train(config, base, songs_without(songs, trained.run.held_out, tmp_path), tmp_path / "other")
    assert_identical(unmeasured.weights, trained.weights)


def songs_without(songs: Path, left_out: list[Song], tmp_path: Path) -> Path:
    folder = tmp_path / "fewer"
    folder.mkdir()
    for path in songs.glob("*.pt"):
        if path not in {song.path for song in left_out}:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_every_held_out_song_is_measured_whole_at_the_strata_of_the_models_law(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    run = prepare(tiny_config(val_split=0.4, chunk_duration=1.0), base, songs, tmp_path / "run")
    asked: list[tuple[int, float]] = []
    losses = type(run.stepper.model).losses

    class Listening(type(run.stepper.model)):
        __slots__ = ()

        def losses(self, task, **more):
            assert not task.is_dropped_B.any()
            assert not self.decoder.training
            asked.append((task.latents_BTC.shape[1], task.timesteps_B.item()))
            return losses(self, task, **more)

    run.stepper.model.__class__ = Listening
    found = measure(run)
    middles = (torch.arange(STRATA, dtype=torch.float64) + 0.5) / STRATA
    timesteps = Continuous(base.timestep_mu, base.timestep_sigma).quantiles(middles).float().tolist()
    assert asked == [(song.frames, t) for song in run.held_out for t in timesteps]
    assert list(found.bands) == ["0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"]


def test_turbo_is_measured_at_its_eight_timesteps_whatever_it_is_trained_on(tmp_path: Path):
    turbo = find_checkpoint(build_toy_checkpoint(tmp_path / "turbo", variant="turbo"), "turbo")
    songs = write_songs(tmp_path / "songs", turbo, (30, 30))
    run = prepare(tiny_config(val_split=0.5, shift=1.0), turbo, songs, tmp_path / "run")
    middles = (torch.arange(STRATA, dtype=torch.float64) + 0.5) / STRATA
    official = [0.3, 0.5, 0.642857, 0.75, 0.833333, 0.9, 0.954545, 1.0]
    assert run.law.quantiles(middles).tolist() == pytest.approx(official, abs=1e-6)
    assert list(measure(run).bands) == ["0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"]


def test_each_band_holds_the_timesteps_that_its_name_says(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    run = prepare(tiny_config(val_split=0.2), base, songs, tmp_path / "run")
    for timestep, band in ((0.0, "0.0-0.2"), (0.39, "0.2-0.4"), (0.41, "0.4-0.6"), (1.0, "0.8-1.0")):
        assert list(held_out_loss(run.stepper.model, run.held_out, Always(timestep)).bands) == [band]


def test_the_standard_error_is_that_of_the_mean_over_songs(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    run = prepare(tiny_config(val_split=0.5), base, songs, tmp_path / "run")
    together = measure(run)
    assert len(run.held_out) == 2
    one, two = (held_out_loss(run.stepper.model, [song], run.law) for song in run.held_out)
    assert together.mean == pytest.approx((one.mean + two.mean) / 2)
    # The standard deviation of two values is their distance over the root of two; of their mean, half the distance.
    assert together.standard_error == pytest.approx(abs(one.mean - two.mean) / 2)
    assert one.standard_error is None
    for band, loss in together.bands.items():
        assert loss == pytest.approx((one.bands[band] + two.bands[band]) / 2)


def test_held_out_songs_are_chosen_by_their_names_and_never_trained_on(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    runs = [prepare(tiny_config(val_split=0.4, seed=seed), base, songs, tmp_path / "run") for seed in (1, 2)]
    assert runs[0].held_out == runs[1].held_out
    assert len(runs[0].held_out) == 2
    assert not set(runs[0].held_out) & set(runs[0].batches.plan.songs)
    assert len(runs[0].batches.plan.songs) == 3


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.01, 1), (2, 0.5, 1), (10, 0.1, 1), (10, 0.25, 2)])
def test_at_least_one_song_is_held_out_and_at_least_one_is_left(count: int, share: float, expected: int):
    songs = [Song(Path(f"{at}.pt"), 50) for at in range(count)]
    trained_on, held_out = hold_out(songs, share)
    assert len(held_out) == expected
    assert sorted((*trained_on, *held_out), key=lambda song: song.path) == sorted(songs, key=lambda song: song.path)


def test_a_single_song_cannot_be_held_out(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,))
    with pytest.raises(ConfigError, match="needs two songs at least"):
        prepare(tiny_config(val_split=0.1), base, songs, tmp_path / "run")


def test_the_untrained_model_and_every_epoch_are_measured(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    trained = train(tiny_config(val_split=0.4, epochs=3), base, songs, tmp_path / "run")
    readings = trained.all_of(Validated)
    assert [(reading.step, reading.epoch) for reading in readings] == [(0, 0), (3, 1), (6, 2), (9, 3)]
    assert not readings[0].is_best
    best = float("inf")
    for reading in readings[1:]:
        assert reading.is_best == (reading.loss < best)
        best = min(best, reading.loss)
    assert trained.run.state.best_loss == best


def test_the_best_adapter_is_kept_and_not_the_last(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(val_split=0.4, epochs=1, learning_rate=0.01)
    best = train(config, base, songs, tmp_path / "run")
    assert [event.kind for event in best.all_of(AdapterSaved)] == ["best", "final"]
    kept = adapter_tensors(tmp_path / "run" / f"{RUN_NAME}_best")
    assert_identical(kept, adapter_tensors(tmp_path / "run" / RUN_NAME))
    run = prepare(replace(config, epochs=2, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
    run.state.best_loss = 0.1  # As if the first epoch had been better than any other can be.
    events = []
    carry_out(run, emit=events.append, stop_requested=lambda: False)
    assert [event.is_best for event in events if isinstance(event, Validated)] == [False]
    assert_identical(adapter_tensors(tmp_path / "run" / f"{RUN_NAME}_best"), kept)


def test_the_best_adapter_is_not_kept_when_that_is_turned_off(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    trained = train(tiny_config(val_split=0.4, save_best=False), base, songs, tmp_path / "run")
    assert [event.kind for event in trained.all_of(AdapterSaved)] == ["final"]
    assert not (tmp_path / "run" / f"{RUN_NAME}_best").exists()


def test_patience_ends_a_run_that_learns_nothing_more(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    # A rate this low changes no output.
    config = tiny_config(val_split=0.4, epochs=9, early_stop_patience=3, learning_rate=1e-14)
    trained = train(config, base, songs, tmp_path / "run")
    assert trained.reason == "early_stop"
    assert [reading.is_best for reading in trained.all_of(Validated)] == [False, True, False, False, False]
    assert (tmp_path / "run" / RUN_NAME).is_dir()


def test_a_run_that_ends_within_an_epoch_is_measured_and_has_a_best(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(val_split=0.4, max_steps=1, gradient_accumulation=1, learning_rate=1e-3)
    trained = train(config, base, songs, tmp_path / "run")
    assert trained.run.state.batch > 0
    assert [event.step for event in trained.all_of(Validated)] == [0, 1]
    assert [event.kind for event in trained.all_of(AdapterSaved)] == ["best", "final"]
