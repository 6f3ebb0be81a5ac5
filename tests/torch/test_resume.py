"""A run that is stopped and gone on with ends as if it had never been stopped, bit for bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestep.config.runs import STATE_FILE
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import ConfigError, ModelError
from sidestep.events import CheckpointSaved, EpochDone, Metrics, RunStarted, Validated
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training.adapters import ADAPTERS
from sidestep.training.optimizers import OPTIMIZERS
from sidestep.training.run import carry_out
from sidestep.training.schedules import SCHEDULES
from sidestep.ui.metrics import MetricsFile
from tests.torch.tiny import (
    RUN_NAME,
    adapter_tensors,
    assert_identical,
    prepare,
    steps_of,
    tiny_config,
    train,
    write_songs,
)
from tests.unit.test_start import start

# Seven batches an epoch: an accumulation of 3 does not divide it.
FRAMES = (40, 52, 64, 40, 71, 52, 40)


def assert_resume_changes_nothing(
    tmp_path: Path, checkpoint: Checkpoint, *, stop_after: int, frames: tuple[int, ...] = FRAMES, **changes: Any
) -> None:
    """Train once through, and once stopped after some steps and gone on with; compare everything that is left."""
    songs = write_songs(tmp_path / "songs", checkpoint, frames, rows=(9, 12))
    config = tiny_config(**{"dropout": 0.1, "gradient_checkpointing": True, "gradient_accumulation": 3, **changes})
    whole = train(config, checkpoint, songs, tmp_path / "whole")
    stopped = train(config, checkpoint, songs, tmp_path / "parts", stop_after=stop_after)
    assert stopped.reason == "interrupted"
    assert stopped.run.state.step == stop_after
    resumed = train(replace(config, resume_from=tmp_path / "parts"), checkpoint, songs, tmp_path / "parts")

    assert whole.reason == resumed.reason == "finished"
    assert steps_of(stopped.events) + steps_of(resumed.events) == steps_of(whole.events)
    assert stopped.losses + resumed.losses == whole.losses
    assert len(set(whole.losses)) == len(whole.losses)
    epochs = [(event.epoch, event.loss) for part in (stopped, resumed) for event in part.all_of(EpochDone)]
    assert epochs == [(event.epoch, event.loss) for event in whole.all_of(EpochDone)]
    assert_identical(resumed.weights, whole.weights)
    assert_identical(resumed.state, whole.state)
    for kind in (RUN_NAME, f"{RUN_NAME}_ema") if config.ema_decay else (RUN_NAME,):
        assert_identical(adapter_tensors(tmp_path / "parts" / kind), adapter_tensors(tmp_path / "whole" / kind))


def test_resume_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=2)


def test_resume_after_the_last_step_of_an_epoch_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=3)


def test_resume_in_a_later_epoch_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=4)


def test_resume_from_the_checkpoint_of_an_epoch_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(epochs=3, save_every=1, dropout=0.1, gradient_accumulation=3)
    whole = train(config, base, songs, tmp_path / "run")
    names = [event.folder.name for event in whole.all_of(CheckpointSaved)]
    assert names == ["epoch_1", "epoch_2", "epoch_3"]
    resumed = train(replace(config, resume_from=whole.checkpoint("epoch_1")), base, songs, tmp_path / "again")
    assert steps_of(resumed.events) == [4, 5, 6, 7, 8, 9]
    assert resumed.losses == whole.losses[3:]
    assert_identical(resumed.state, whole.state)


def test_resume_with_windows_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=2, frames=(80, 120, 31), chunk_duration=1.6, batch_size=2)


def test_resume_with_a_moving_average_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=2, ema_decay=0.9)


def test_resume_with_reading_processes_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint):
    assert_resume_changes_nothing(tmp_path, base, stop_after=2, num_workers=2)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora"])
def test_resume_with_every_adapter_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint, adapter: str):
    assert_resume_changes_nothing(tmp_path, base, stop_after=4, adapter_type=adapter)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_with_every_optimizer_equals_an_uninterrupted_run(tmp_path: Path, base: Checkpoint, optimizer: str):
    rate = None if optimizer == "prodigy" else 1e-3
    # Rank 96 makes matrices of more than 4096 numbers, which adamw8bit does keep in eight bits.
    assert_resume_changes_nothing(tmp_path, base, stop_after=4, optimizer_type=optimizer, learning_rate=rate, rank=96)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_goes_on_with_the_learning_rate(tmp_path: Path, base: Checkpoint, schedule: str):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 20))
    config = tiny_config(epochs=3, scheduler_type=schedule)
    whole = train(config, base, songs, tmp_path / "whole")
    stopped = train(config, base, songs, tmp_path / "parts", stop_after=4)
    resumed = train(replace(config, resume_from=tmp_path / "parts"), base, songs, tmp_path / "parts")
    rates = [event.lr for part in (stopped, resumed) for event in part.all_of(Metrics)]
    assert rates == [event.lr for event in whole.all_of(Metrics)]


def test_resume_keeps_the_best_held_out_loss_and_the_patience(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    # A rate this low changes no output, so that only the first epoch is the best so far.
    config = tiny_config(epochs=12, val_split=0.3, early_stop_patience=2, learning_rate=1e-14)
    whole = train(config, base, songs, tmp_path / "whole")
    assert (whole.reason, whole.run.state.epoch) == ("early_stop", 3)
    stopped = train(config, base, songs, tmp_path / "parts", stop_after=11)
    resumed = train(replace(config, resume_from=tmp_path / "parts"), base, songs, tmp_path / "parts")
    assert resumed.reason == "early_stop"
    readings = [event for part in (stopped, resumed) for event in part.all_of(Validated)]
    assert readings == whole.all_of(Validated)
    assert_identical(resumed.state, whole.state)


def test_a_finished_run_says_that_there_is_nothing_left_to_do_until_it_gets_more_epochs(
    tmp_path: Path, base: Checkpoint
):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    config = tiny_config(resume_from=tmp_path / "run", scheduler_type="constant")
    train(replace(config, resume_from=None), base, songs, tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing left to do: 4 of 4 steps") as caught:
        prepare(config, base, songs, tmp_path / "run")
    assert "--epochs" in caught.value.hint and "its adapter" in caught.value.hint
    longer = train(replace(config, epochs=3), base, songs, tmp_path / "run")
    assert steps_of(longer.events) == [5, 6]
    assert longer.all_of(RunStarted)[0].first_step == 4


@pytest.mark.parametrize("lost", ["", "_ema"])
def test_a_run_that_ended_before_its_adapters_were_saved_saves_them_when_it_goes_on(
    tmp_path: Path, base: Checkpoint, lost: str
):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    config = tiny_config(ema_decay=0.9, resume_from=tmp_path / "run")
    whole = train(replace(config, resume_from=None), base, songs, tmp_path / "run")
    folder = tmp_path / "run" / f"{RUN_NAME}{lost}"
    before, state = adapter_tensors(folder), whole.state
    shutil.rmtree(folder)
    resumed = train(config, base, songs, tmp_path / "run")
    assert resumed.reason == "finished" and steps_of(resumed.events) == []
    assert_identical(adapter_tensors(folder), before)
    assert_identical(resumed.state, state)
    with pytest.raises(ConfigError, match="nothing left to do"):
        prepare(config, base, songs, tmp_path / "run")


def test_a_run_that_stopped_early_goes_on_with_more_patience_alone(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(epochs=12, val_split=0.3, early_stop_patience=2, learning_rate=1e-14)
    whole = train(config, base, songs, tmp_path / "run")
    resumed = replace(config, resume_from=tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing left to do: 2 epochs brought no better held-out loss") as caught:
        prepare(resumed, base, songs, tmp_path / "run")
    assert "--early-stop-patience" in caught.value.hint
    before = adapter_tensors(tmp_path / "run" / RUN_NAME)
    shutil.rmtree(tmp_path / "run" / RUN_NAME)
    again = train(resumed, base, songs, tmp_path / "run")
    assert (again.reason, steps_of(again.events)) == ("early_stop", [])
    assert_identical(adapter_tensors(tmp_path / "run" / RUN_NAME), before)
    assert_identical(again.state, whole.state)
    longer = train(replace(resumed, early_stop_patience=3), base, songs, tmp_path / "run")
    assert (longer.reason, longer.run.state.epoch) == ("early_stop", whole.run.state.epoch + 1)


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_there(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    config = tiny_config(scheduler_type="constant", max_steps=9)
    whole = train(config, base, songs, tmp_path / "whole")
    train(replace(config, max_steps=4), base, songs, tmp_path / "parts")
    resumed = train(replace(config, resume_from=tmp_path / "parts"), base, songs, tmp_path / "parts")
    assert steps_of(resumed.events) == [5, 6, 7, 8, 9]
    assert_identical(resumed.state, whole.state)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "one byte"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, base: Checkpoint, damage: str
):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    config = tiny_config(epochs=3, save_every=1)
    whole = train(config, base, songs, tmp_path / "run")
    path = whole.checkpoint("epoch_3") / STATE_FILE
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {"truncated": content[:-900], "emptied": b"", "overwritten": b"x" * 99, "one byte": bytes(flipped)}[damage]
    )
    resumed = train(replace(config, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
    (warning,) = resumed.warnings
    assert "epoch_3" in warning and "damaged" in warning and "Going on from epoch_2" in warning
    assert steps_of(resumed.events) == [5, 6]
    assert_identical(resumed.weights, whole.weights)


def test_a_run_with_no_good_checkpoint_is_an_error(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    trained = train(tiny_config(save_every=1), base, songs, tmp_path / "run")
    for name in ("epoch_1", "epoch_2"):
        (trained.checkpoint(name) / STATE_FILE).write_bytes(b"no archive")
    with pytest.raises(ModelError, match="epoch_2 is damaged"):
        prepare(tiny_config(resume_from=tmp_path / "run"), base, songs, tmp_path / "run")


def test_a_state_of_another_format_is_an_error(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    trained = train(tiny_config(), base, songs, tmp_path / "run")
    path = trained.checkpoint("epoch_2") / STATE_FILE
    torch.save({**trained.state, "format_version": 99}, path)
    with pytest.raises(ModelError, match="format 1"):
        prepare(tiny_config(resume_from=path.parent, epochs=3), base, songs, tmp_path / "run")


def test_other_songs_are_an_error(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    train(tiny_config(), base, songs, tmp_path / "run", stop_after=1)
    write_songs(tmp_path / "songs", base, (20, 21))
    with pytest.raises(ModelError, match="trained with other songs"):
        prepare(tiny_config(resume_from=tmp_path / "run"), base, songs, tmp_path / "run")


def test_another_model_is_an_error(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    train(tiny_config(), base, songs, tmp_path / "run", stop_after=1)
    other = find_checkpoint(build_toy_checkpoint(tmp_path / "other", variant="base", seed=7), "base")
    write_songs(tmp_path / "songs", other, (20, 20))
    with pytest.raises(ModelError, match="trained with other model"):
        prepare(tiny_config(resume_from=tmp_path / "run"), other, songs, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"rank": 8}, "8 x 48"), ({"attention_type": "self"}, "unknown"), ({"adapter_type": "dora"}, "missing")],
    ids=["rank", "attention type", "adapter type"],
)
def test_another_adapter_is_an_error(tmp_path: Path, base: Checkpoint, changes: dict[str, Any], sentence: str):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    train(tiny_config(), base, songs, tmp_path / "run", stop_after=1)
    with pytest.raises(ModelError, match="does not fit this adapter") as caught:
        prepare(tiny_config(resume_from=tmp_path / "run", **changes), base, songs, tmp_path / "run")
    assert sentence in caught.value.message


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_goes_on_without_the_adapter_it_once_started_from(tmp_path: Path, base: Checkpoint, kind: str):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    first = tmp_path / "first"
    train(tiny_config(adapter_type=kind), base, songs, first)
    config = tiny_config(adapter_type=kind, init_from=first / RUN_NAME)
    whole = train(config, base, songs, tmp_path / "whole")
    train(config, base, songs, tmp_path / "parts", stop_after=1)
    first.rename(tmp_path / "moved")
    resumed = train(replace(config, resume_from=tmp_path / "parts"), base, songs, tmp_path / "parts")
    assert_identical(resumed.weights, whole.weights)


def test_an_adapter_to_start_from_that_is_not_there_is_said_before_torch_is_loaded(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20,))
    flags = ["-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(tmp_path / "run")]
    last, _, errors = start("fixed", *flags, "--init-from", "nowhere", home=tmp_path)
    assert last == "1 []"
    assert errors.startswith("Error: There is no adapter nowhere: no such file or folder.")


def test_metrics_read_as_one_run(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 20))
    config = tiny_config(epochs=3, save_every=1)
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, first_step=0) as metrics:
        whole = train(config, base, songs, tmp_path / "run")
        for event in whole.events:
            metrics(event)
    once = path.read_text()
    run = prepare(replace(config, resume_from=whole.checkpoint("epoch_1")), base, songs, tmp_path / "again")
    with MetricsFile(path, first_step=run.first_step) as metrics:
        carry_out(run, emit=metrics, stop_requested=lambda: False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    readings = [(line["step"], line["loss"], line["lr"]) for line in lines if line["event"] == "metrics"]
    expected = [json.loads(line) for line in once.splitlines()]
    assert readings == [(line["step"], line["loss"], line["lr"]) for line in expected if line["event"] == "metrics"]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
