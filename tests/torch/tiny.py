"""Tiny runs: random songs written as tensor files, short settings, training in this process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from sidestep.config.processes import ALONE, Processes
from sidestep.config.runs import CHECKPOINTS, STATE_FILE, checkpoints_in
from sidestep.config.train import TrainConfig
from sidestep.events import Event, Metrics, Notice, StepDone
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint
from sidestep.model.loading import load_silence_latent
from sidestep.preprocess.tensors import Sample, write_sample
from sidestep.training.assemble import Run, assemble
from sidestep.training.run import carry_out

Kind = TypeVar("Kind", bound=Event)
RUN_NAME = "tiny"


def write_songs(
    folder: Path,
    checkpoint: Checkpoint,
    frames: Sequence[int],
    *,
    rows: Sequence[int] = (9,),
    repeats: Sequence[int] = (1,),
    seed: int = 0,
) -> Path:
    """Write `song_0.pt`, ... of these lengths in latent frames and give the folder back.

    `rows` (of the condition) and `repeats` go round when there are more songs than entries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    silence_TC = load_silence_latent(checkpoint, frames=max(frames))[0]
    for place, length in enumerate(frames):
        sample = Sample(
            target_latents=torch.randn(length, 64, generator=generator),
            encoder_hidden_states=torch.randn(rows[place % len(rows)], checkpoint.encoder_width, generator=generator),
            context_latents=torch.cat([silence_TC[:length], torch.ones(length, 64)], dim=1),
            metadata={
                "encoder_fingerprint": encoder_fingerprint(checkpoint),
                "model_variant": checkpoint.variant,
                "repeat": repeats[place % len(repeats)],
            },
        )
        write_sample(folder / f"song_{place}.pt", sample)
    return folder


def tiny_config(**changes: Any) -> TrainConfig:
    """Give settings for a run of seconds on the CPU: rank 4, no dropout, a reading every step."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "run_name": RUN_NAME,
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "epochs": 2,
        "gradient_accumulation": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "num_workers": 0,
        "log_every": 1,
        "log_heavy_every": 0,
    }
    return TrainConfig(**{**settings, **changes})


@dataclass(frozen=True, slots=True)
class Trained:
    """What a tiny run left behind."""

    run: Run
    reason: str
    events: list[Event]

    def all_of(self, kind: type[Kind]) -> list[Kind]:
        """Give the events of one kind, in their order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [event.loss for event in self.all_of(Metrics)]

    @property
    def warnings(self) -> list[str]:
        """The warnings that were given."""
        return [event.text for event in self.all_of(Notice) if event.level == "warning"]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The adapter's weights as they are in memory."""
        return {name: parameter.detach().clone() for name, parameter in self.run.adapter.parameters.items()}

    @property
    def state(self) -> Mapping[str, Any]:
        """The newest resume state on disk."""
        return read_state(checkpoints_in(self.run.output_dir)[0])

    def checkpoint(self, name: str) -> Path:
        """Give a checkpoint's folder by its name."""
        return self.run.output_dir / CHECKPOINTS / name


def prepare(
    config: TrainConfig,
    checkpoint: Checkpoint,
    songs: Path,
    output: Path,
    *,
    recipe: str = "fixed",
    emit: Callable[[Event], None] = lambda event: None,
    processes: Processes = ALONE,
) -> Run:
    """Put a tiny run together."""
    return assemble(
        config,
        recipe_name=recipe,
        checkpoint=checkpoint,
        dataset_dir=songs,
        output_dir=output,
        run_name=RUN_NAME,
        version="0",
        emit=emit,
        processes=processes,
    )


def train(
    config: TrainConfig,
    checkpoint: Checkpoint,
    songs: Path,
    output: Path,
    *,
    recipe: str = "fixed",
    stop_after: int | None = None,
    processes: Processes = ALONE,
) -> Trained:
    """Put a tiny run together and carry it out, or stop it as Ctrl-C does once `stop_after` steps are done."""
    events: list[Event] = []
    run = prepare(config, checkpoint, songs, output, recipe=recipe, emit=events.append, processes=processes)

    def stop_requested() -> bool:
        return stop_after is not None and run.state.step >= stop_after

    reason = carry_out(run, emit=events.append, stop_requested=stop_requested)
    return Trained(run, reason, events)


def read_state(folder: Path) -> Mapping[str, Any]:
    """Read the resume state of a checkpoint folder."""
    return torch.load(folder / STATE_FILE, weights_only=True)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the one safetensors file of an adapter folder."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def steps_of(events: Sequence[Event]) -> list[int]:
    """Give the numbers of the steps that were made."""
    return [event.step for event in events if isinstance(event, StepDone)]


def assert_identical(left: Any, right: Any, at: str = "") -> None:
    """Assert that two nests of mappings, sequences, tensors and plain values are the same, bit for bit."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor), at
        assert left.dtype == right.dtype and torch.equal(left, right), f"{at} differs"
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), f"{at}: {sorted(set(left) ^ set(right), key=str)}"
        for key, value in left.items():
            assert_identical(value, right[key], f"{at}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), at
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_identical(a, b, f"{at}[{place}]")
    else:
        assert left == right, f"{at}: {left!r} is not {right!r}"
