"""Captured passes against eager ones, with a graph that is played: it runs again what was recorded."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestep.model.checkpoint import Checkpoint
from sidestep.training import accelerate, passes
from sidestep.training.passes import CapturedPasses
from tests.torch.tiny import Trained, prepare, tiny_config, train, write_songs


class PlayedGraph:
    """Runs the pass again on the tensors that it was captured with, and puts the loss where the first one was."""

    def __init__(self) -> None:
        self.passes: CapturedPasses | None = None

    def pool(self) -> object:
        """Give the pool that all graphs share."""
        return self

    def replay(self) -> None:
        """Read the inputs as they are now."""
        assert self.passes is not None
        (captured,) = [one for one in self.passes._captured.values() if one.graph is self]
        captured.loss.copy_(self.passes._pass(captured.task, captured.share))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes be captured on the CPU."""

    @contextmanager
    def anything(*_: Any, **__: Any) -> Iterator[None]:
        yield

    def make_passes(model: Any, parameters: Any, scaler: Any) -> Any:
        made = make(model, parameters, scaler)
        monkeypatch.setattr(passes, "Graph", lambda: graph_of(made))
        return made

    def graph_of(made: Any) -> Any:
        graph = PlayedGraph()
        graph.passes = made
        return graph

    make = accelerate.make_passes
    monkeypatch.setattr("sidestep.training.build.make_passes", make_passes)
    monkeypatch.setattr(accelerate, "can_capture", lambda device: True)
    monkeypatch.setattr(passes, "Stream", lambda: None)
    monkeypatch.setattr(passes, "beside", anything)
    monkeypatch.setattr(passes, "capturing", anything)


def trained(folder: Path, base: Checkpoint, songs: Path, precision: str) -> Trained:
    config = tiny_config(precision=precision, dropout=0.1, gradient_accumulation=3, epochs=3)
    return train(config, base, songs, folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_passes_train_to_the_same_weights(
    tmp_path: Path, base: Checkpoint, request: pytest.FixtureRequest, precision: str
):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 24, 24))
    eager = trained(tmp_path / "eager", base, songs, precision)
    request.getfixturevalue("played")
    captured = trained(tmp_path / "captured", base, songs, precision)
    assert isinstance(captured.run.stepper.passes, CapturedPasses)
    assert captured.run.stepper.scaler.is_enabled() is (precision == "fp16")
    assert captured.losses == pytest.approx(eager.losses, rel=1e-6)
    for name, weight in eager.weights.items():
        torch.testing.assert_close(captured.weights[name], weight, atol=1e-7, rtol=1e-5)


def test_a_captured_pass_scales_by_what_the_scale_has_become(tmp_path: Path, base: Checkpoint, played: None):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 24, 24))
    run = prepare(tiny_config(precision="fp16"), base, songs, tmp_path / "run")
    batch = next(iter(run.batches.epoch(0)))
    run.stepper.passes.prepare([batch])
    sums = []
    for scale in (2.0, 8.0):
        run.stepper.scaler.load_state_dict({**run.stepper.scaler.state_dict(), "scale": scale})
        run.stepper._numbers.zero_()
        run.stepper.passes(batch, share=1.0, seed=1)
        sums.append(run.stepper._numbers.double().norm().item())
    assert sums[1] / sums[0] == pytest.approx(4, rel=1e-3)


def test_an_overflow_costs_a_captured_step_its_update_and_not_the_run(tmp_path: Path, base: Checkpoint, played: None):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 24, 24))
    run = prepare(tiny_config(precision="fp16", epochs=10), base, songs, tmp_path / "run")
    scaler = run.stepper.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**28})
    batch = next(iter(run.batches.epoch(0)))
    readings = [run.stepper([batch], lr=1e-3, seeds=[1]) for _ in range(12)]
    skipped = [not math.isfinite(reading.values[1].item()) for reading in readings]
    assert skipped[0] and not skipped[-1]
    assert scaler.get_scale() == 2.0 ** (28 - sum(skipped))
    assert next(iter(run.stepper.optimizer.state.values()))["step"] == len(readings) - sum(skipped)
