"""TensorBoard: curves of a run, also across resumes."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from sidestep.data.audio import read_audio
from sidestep.data.spectrogram import spectrogram
from sidestep.events import EpochDone, Event, LayerGradients, Metrics, SampleRendered, TimestepsDrawn, Validated
from sidestep.files import cannot_write

FLUSH_SECONDS = 30
TIMESTEP_EDGES = np.linspace(0.0, 1.0, 51)


class TensorBoard:
    """A sink that writes curves under the events' own names; what was written after `first_step` is hidden.

    `loss`, `lr`, `grad_norm`, `steps_per_second`, `memory_gib`, `epoch_loss`, `layer_gradients/<module>`, the histogram
    `timesteps`, `validation/loss`, `validation/standard_error`, `validation/bands/<band>`, and `sample_N/base` and
    `sample_N/adapter` to hear and see. Raises RunError where the files cannot be written.
    """

    def __init__(self, log_dir: Path, *, first_step: int) -> None:
        self._log_dir = log_dir
        try:
            self._writer = SummaryWriter(str(log_dir), purge_step=first_step + 1, flush_secs=FLUSH_SECONDS)
        except OSError as error:
            raise cannot_write(log_dir, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._writer.close()
        except OSError as failure:
            # A full disk was already reported by the event that met it; closing only meets it again.
            if error is None:
                raise cannot_write(self._log_dir, failure) from failure

    def __call__(self, event: Event) -> None:
        """Write what the event measures."""
        try:
            self._write(event)
        except OSError as error:
            raise cannot_write(self._log_dir, error) from error

    def _write(self, event: Event) -> None:
        match event:
            case Metrics():
                values = {name: getattr(event, name) for name in ("loss", "lr", "grad_norm", "steps_per_second")}
                if event.memory_gib is not None:
                    values["memory_gib"] = event.memory_gib
                self._scalars(values, event.step)
            case EpochDone():
                self._scalars({"epoch_loss": event.loss}, event.step)
            case LayerGradients():
                self._scalars({f"layer_gradients/{name}": norm for name, norm in event.norms.items()}, event.step)
            case TimestepsDrawn() if event.timesteps:
                timesteps = np.asarray(event.timesteps, dtype=np.float32)
                # Annotated as text in torch, but the edges go to numpy.histogram as they are.
                bins: Any = TIMESTEP_EDGES
                self._writer.add_histogram("timesteps", timesteps, event.step, bins=bins)
            case Validated():
                values = {"loss": event.loss}
                if event.standard_error is not None:
                    values["standard_error"] = event.standard_error
                values |= {f"bands/{band}": loss for band, loss in event.bands.items()}
                self._scalars({f"validation/{name}": value for name, value in values.items()}, event.step)
            case SampleRendered():
                self._sample(event)

    def _sample(self, event: SampleRendered) -> None:
        """Write a sample's sound, in mono as TensorBoard plays it, and its spectrogram."""
        samples, rate = read_audio(event.path, max_seconds=0)
        name = f"sample_{event.prompt}/{'base' if event.epoch is None else 'adapter'}"
        self._writer.add_audio(name, samples.mean(axis=0, keepdims=True), event.step, sample_rate=rate)
        self._writer.add_image(f"{name}/spectrogram", spectrogram(samples, rate), event.step, dataformats="HWC")

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def write_image(log_dir: Path, name: str, image: NDArray[np.uint8]) -> None:
    """Write one image [height, width, 3]; RunError where the files cannot be written."""
    try:
        with SummaryWriter(str(log_dir)) as writer:
            writer.add_image(name, image, dataformats="HWC")
    except OSError as error:
        raise cannot_write(log_dir, error) from error
