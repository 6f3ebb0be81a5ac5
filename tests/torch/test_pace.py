"""The pace and the losses of a run that are shown and written down."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidestep.errors import DataError
from sidestep.events import Event, Metrics
from sidestep.model.checkpoint import Checkpoint
from sidestep.training import loop
from sidestep.training.loop import Hooks
from sidestep.training.run import carry_out
from sidestep.training.step import Stepper, StepReading
from tests.torch.tiny import prepare, tiny_config, train, write_songs


def test_the_pace_that_is_shown_is_that_of_steps_alone(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    seconds = [0.0]

    def spend(amount: float) -> bool:
        seconds[0] += amount
        return True

    def slow(self: Stepper, *arguments: Any, **named: Any) -> StepReading:
        spend(2)
        return step(self, *arguments, **named)

    step = Stepper.__call__
    monkeypatch.setattr(Stepper, "__call__", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    run = prepare(tiny_config(epochs=3, save_every=1), base, songs, tmp_path / "run")
    hooks = Hooks(
        save=lambda: spend(100), after_step=lambda: None, after_epoch=lambda: spend(1000), stop_requested=lambda: False
    )
    events: list[Event] = []
    parts = {"stepper": run.stepper, "batches": run.batches, "pace": run.pace}
    loop.train(run.state, hooks=hooks, emit=events.append, **parts)
    paces = [event.steps_per_second for event in events if isinstance(event, Metrics)]
    assert seconds[0] == 6 * 2 + 3 * 100 + 3 * 1000
    # The first reading counts from when the run was begun, by the real clock.
    assert paces[1:] == pytest.approx([0.5] * 5)


@pytest.mark.parametrize(("end", "steps"), [("interrupt", 5), ("error", 5), ("finished", 8)])
def test_every_loss_is_in_one_reading_however_the_run_ends(tmp_path: Path, base: Checkpoint, end: str, steps: int):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    config = tiny_config(log_every=3)
    each = train(replace(config, log_every=1), base, songs, tmp_path / "each").losses
    run = prepare(config, base, songs, tmp_path / "run")
    events: list[Event] = []

    def stop() -> bool:
        if end == "error" and run.state.step == 5:
            raise DataError("song_1.pt went bad.")
        return end == "interrupt" and run.state.step == 5

    with contextlib.suppress(DataError):
        carry_out(run, emit=events.append, stop_requested=stop)
    readings = {event.step: event.loss for event in events if isinstance(event, Metrics)}
    ends = sorted({*range(3, steps, 3), steps})
    assert list(readings) == ends
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        assert readings[last] == pytest.approx(sum(each[first:last]) / (last - first))
    if end != "finished":
        resumed = train(replace(config, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
        assert resumed.losses == pytest.approx([each[5], sum(each[6:]) / 2])
