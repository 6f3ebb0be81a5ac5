"""TensorBoard's files, read back by TensorBoard's own reader."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.errors import RunError
from sidestep.events import EpochDone, LayerGradients, Metrics, StepDone, TimestepsDrawn, Validated
from sidestep.ui.tensorboard import TensorBoard


def reading(step: int, *, loss: float, memory_gib: float | None = None) -> Metrics:
    return Metrics(step=step, epoch=1, loss=loss, lr=1e-4, grad_norm=0.5, steps_per_second=2.0, memory_gib=memory_gib)


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 6)) for point in events.Scalars(tag)]


def test_every_measurement_becomes_a_curve(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "runs", first_step=0) as emit:
        emit(StepDone(step=1, epoch=1))
        emit(reading(1, loss=0.75, memory_gib=7.5))
        emit(reading(2, loss=0.5))
        emit(LayerGradients(step=2, norms={"layers.0.self_attn.q_proj": 0.25}))
        emit(EpochDone(step=2, epoch=1, loss=0.625))
        bands = {"0.0-0.2": 1.5, "0.2-0.4": 1.0}
        emit(Validated(step=2, epoch=1, loss=0.5, standard_error=0.125, bands=bands, is_best=True))
    events = read_back(tmp_path / "runs")
    assert {tag: curve(events, tag) for tag in events.Tags()["scalars"]} == {
        "loss": [(1, 0.75), (2, 0.5)],
        "lr": [(1, 1e-4), (2, 1e-4)],
        "grad_norm": [(1, 0.5), (2, 0.5)],
        "steps_per_second": [(1, 2.0), (2, 2.0)],
        "memory_gib": [(1, 7.5)],
        "layer_gradients/layers.0.self_attn.q_proj": [(2, 0.25)],
        "epoch_loss": [(2, 0.625)],
        "validation/loss": [(2, 0.5)],
        "validation/standard_error": [(2, 0.125)],
        "validation/bands/0.0-0.2": [(2, 1.5)],
        "validation/bands/0.2-0.4": [(2, 1.0)],
    }


def test_the_timesteps_become_a_histogram_of_fiftieths(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, first_step=0) as emit:
        emit(TimestepsDrawn(step=5, timesteps=[0.01, 0.01, 0.51, 0.99]))
        emit(TimestepsDrawn(step=10, timesteps=[]))
    (histogram,) = read_back(tmp_path).Histograms("timesteps")
    counts = dict(zip(histogram.histogram_value.bucket_limit, histogram.histogram_value.bucket, strict=True))
    assert histogram.step == 5
    assert {round(limit, 2): number for limit, number in counts.items() if number} == {0.02: 2, 0.52: 1, 1.0: 1}


def test_after_a_resume_the_curves_read_as_one_run(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, first_step=0) as emit:
        for step in range(1, 7):
            emit(reading(step, loss=1.0))
    with TensorBoard(tmp_path, first_step=4) as emit:
        emit(reading(5, loss=0.5))
    events = read_back(tmp_path)
    assert curve(events, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.5)]


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        TensorBoard(tmp_path / "file" / "runs", first_step=0)
