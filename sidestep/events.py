"""What a run reports: a closed union of frozen dataclasses, and the sinks that receive them.

The engine calls `emit(event)` and knows no screen. A sink is any callable that takes an event; one that owns something
(a file, a live display) is a context manager as well. Sinks `match` on the events they care about.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A sentence for the user; `warning` when something is not as they may expect."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage that goes through `total` tracks begins: scanning, a pass of preprocessing. `unit` is what it counts."""

    title: str
    total: int
    unit: str = "song"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackDone:
    """One track of the stage is finished; `unchanged` when there was nothing to do; `seconds` of audio."""

    name: str
    seconds: float
    unchanged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackSkipped:
    """One track cannot be used; the stage goes on without it."""

    name: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """The stage is over: how many tracks it finished and skipped, in how many seconds of wall time.

    In `waited_seconds` of them nothing could be computed, because the next song was still being read.
    """

    title: str
    done: int
    skipped: int
    seconds: float
    unit: str = "song"
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """Training begins (or goes on: `first_step` > 0). `facts` are label and value, ready to show."""

    recipe: str
    facts: Mapping[str, str]
    epochs: int
    steps: int
    steps_per_epoch: int
    first_step: int
    output_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """An optimizer step is over; nothing in it has to wait for the GPU. `step` and `epoch` count from 1."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Read back every `log_every` steps, and of the rest where a run stops: mean `loss` since the last reading, last
    `grad_norm` before clipping."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    steps_per_second: float
    memory_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGradients:
    """Gradient norm of each adapted module by the original's name (`layers.0.self_attn.q_proj`)."""

    step: int
    norms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepsDrawn:
    """The timesteps in [0, 1] that were trained since the last reading."""

    step: int
    timesteps: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """The held-out loss, its standard error over songs (None for one song), and the loss per band ("0.4-0.6") of t."""

    step: int
    epoch: int
    loss: float
    standard_error: float | None
    bands: Mapping[str, float]
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDone:
    """An epoch is over; `loss` is its mean."""

    step: int
    epoch: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint that training can go on from lies in `folder`."""

    folder: Path
    step: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRendered:
    """A prompt was rendered into the FLAC file `path`, in `seconds` of wall time.

    `epoch` is None for the model without its adapter; `prompt` counts from 1.
    """

    step: int
    epoch: int | None
    prompt: int
    caption: str
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSaved:
    """The adapter lies in `folder`, as every consumer loads it; `kind` says which weights it holds."""

    folder: Path
    kind: Literal["final", "best", "ema"] = "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDone:
    """Training ended: all steps done, stopped early, or interrupted (then `resume_command` goes on from there)."""

    step: int
    epoch: int
    reason: Literal["finished", "early_stop", "interrupted"]
    resume_command: str = ""


Event = (
    Notice
    | StageStarted
    | TrackDone
    | TrackSkipped
    | StageDone
    | RunStarted
    | StepDone
    | Metrics
    | LayerGradients
    | TimestepsDrawn
    | Validated
    | EpochDone
    | CheckpointSaved
    | AdapterSaved
    | SampleRendered
    | RunDone
)
Emit = Callable[[Event], None]
