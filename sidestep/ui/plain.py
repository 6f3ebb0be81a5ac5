"""Events as plain lines, and the sentences that every screen and the log share."""

import time
from types import TracebackType
from typing import Self

from sidestep.events import (
    AdapterSaved,
    CheckpointSaved,
    EpochDone,
    Event,
    Metrics,
    Notice,
    RunDone,
    RunStarted,
    SampleRendered,
    StageDone,
    StageStarted,
    StepDone,
    TrackDone,
    TrackSkipped,
    Validated,
)
from sidestep.ui.console import Console
from sidestep.ui.pace import Clock, Pace
from sidestep.ui.wording import count, duration, one_line, speed


class PlainLines:
    """A sink that prints a line for each song, reading, epoch and checkpoint: fit for pipes and log files."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._stage = StageCount(StageStarted(title="", total=0), clock=clock)
        self._training: TrainingCount | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is held: every line was flushed when it was printed."""

    def __call__(self, event: Event) -> None:
        """Print what the event says, if it says anything."""
        self._stage.follow(event)
        if self._training:
            self._training.follow(event)
        match event:
            case StageStarted():
                self._stage = StageCount(event, clock=self._clock)
                self._console.print(f"{event.title}: {count(event.total, event.unit)}")
            case TrackDone() | TrackSkipped():
                self._console.print(f"{self._stage.place()}{track_line(event)}")
            case RunStarted():
                self._training = TrainingCount(event, clock=self._clock)
                announce(self._console, event)
            case Metrics() if self._training:
                self._console.print(metrics_line(event, self._training))
            case EpochDone() if self._training:
                self._console.print(f"Epoch {event.epoch}/{self._training.run.epochs} done  loss {event.loss:.4f}")
            case _:
                say(self._console, event)


class StageCount:
    """Where a stage over songs is."""

    def __init__(self, stage: StageStarted, *, clock: Clock) -> None:
        self.stage = stage
        self.finished = 0
        self._pace = Pace(clock)

    def follow(self, event: Event) -> None:
        """Count a finished song. Unchanged songs cost next to nothing, so they tell nothing about the pace."""
        match event:
            case TrackDone(unchanged=True):
                self.finished += 1
                if not self._pace.finished:
                    self._pace.begin()
            case TrackDone() | TrackSkipped():
                self.finished += 1
                self._pace.count()

    def place(self) -> str:
        """The number of the song that was just finished, as "[3/20] "; empty outside a stage."""
        return f"[{self.finished}/{self.stage.total}] " if self.stage.total else ""

    def time_left(self) -> float | None:
        """Seconds until the last song is done, None while unknown."""
        return self._pace.time_left(max(0, self.stage.total - self.finished))


class TrainingCount:
    """Where a run is, and how long it still takes: measured since this session's first step, also after a resume."""

    def __init__(self, run: RunStarted, *, clock: Clock) -> None:
        self.run = run
        self.step = run.first_step
        self.epoch = min(run.epochs, run.first_step // max(1, run.steps_per_epoch) + 1)
        self._steps_per_second = 0.0
        self._pace = Pace(clock)

    def follow(self, event: Event) -> None:
        """Count a step. The first one is left out of the pace: it compiles, allocates and fills caches."""
        match event:
            case StepDone():
                if self.step == self.run.first_step:
                    self._pace.begin()
                else:
                    self._pace.count()
                self.step, self.epoch = event.step, event.epoch
            case Metrics():
                self._steps_per_second = event.steps_per_second

    def time_left(self) -> float | None:
        """Seconds until the last step is done, None while unknown."""
        remaining = max(0, self.run.steps - self.step)
        measured = self._pace.time_left(remaining)
        if measured is None and self._steps_per_second > 0:
            return remaining / self._steps_per_second
        return measured


def announce(console: Console, event: RunStarted) -> None:
    """Print what is about to be trained."""
    length = f"{count(event.epochs, 'epoch')}, {count(event.steps, 'step')}"
    if event.first_step:
        length += f", going on after step {event.first_step}"
    console.table(event.recipe, [*event.facts.items(), ("Length", length), ("Output", str(event.output_dir))])
    console.print()


def metrics_line(event: Metrics, training: TrainingCount) -> str:
    """A reading as one line."""
    left = training.time_left()
    parts = [
        f"Step {event.step}/{training.run.steps}",
        f"epoch {event.epoch}/{training.run.epochs}",
        f"loss {event.loss:.4f}",
        f"lr {event.lr:.2e}",
        f"grad norm {event.grad_norm:.3g}",
        speed(event.steps_per_second),
        "" if left is None else f"{duration(left)} left",
        "" if event.memory_gib is None else f"{event.memory_gib:.1f} GiB",
    ]
    return "  ".join(filter(None, parts))


def track_line(event: TrackDone | TrackSkipped) -> str:
    """What became of a song, as one line."""
    match event:
        case TrackDone():
            return f"{one_line(event.name)} ({event.seconds:.1f} s{', unchanged' if event.unchanged else ''})"
        case TrackSkipped():
            return " ".join(filter(None, [f"Skipped {one_line(event.name)}: {event.reason}", event.hint]))


def sentence(event: Event) -> str:
    """The event as a sentence that stands alone; empty for those that only move a display."""
    match event:
        case Notice(text=text, level=level):
            return f"Warning: {text}" if level == "warning" else text
        case TrackSkipped():
            return track_line(event)
        case StageDone(title=title, done=done, skipped=skipped, seconds=seconds, unit=unit):
            skips = f", {skipped} skipped" if skipped else ""
            return f"{title}: {count(done, unit)} in {duration(seconds)}{skips}."
        case Validated(epoch=epoch, loss=loss, standard_error=standard_error, is_best=is_best):
            best = ", the best so far" if is_best else ""
            error = "" if standard_error is None else f" (standard error {standard_error:.4f})"
            return f"Held-out songs after epoch {epoch}: loss {loss:.4f}{error}{best}."
        case CheckpointSaved(epoch=epoch, step=step, folder=folder):
            return f"Saved a checkpoint at epoch {epoch}, step {step}: {folder}"
        case AdapterSaved(folder=folder, kind=kind):
            name = {"final": "adapter", "best": "best adapter", "ema": "averaged (EMA) adapter"}[kind]
            return f"Saved the {name}: {folder}"
        case SampleRendered(epoch=epoch, path=path, seconds=seconds):
            what = "the model without its adapter" if epoch is None else f"epoch {epoch}"
            return f"Sample of {what} in {duration(seconds)}: {path}"
        case RunDone():
            return _ending(event)
        case _:
            return ""


def _ending(event: RunDone) -> str:
    at = f"at epoch {event.epoch}, step {event.step}"
    match event.reason:
        case "finished":
            return f"Training finished {at}."
        case "early_stop":
            return f"Training stopped early {at}: the loss on held-out songs no longer improves."
        case "interrupted":
            return f"Training stopped {at}."


def say(console: Console, event: Event) -> None:
    """Print the event's sentence, if it has one; a command to copy stands on a line of its own."""
    text = sentence(event)
    if not text:
        return
    is_warning = isinstance(event, TrackSkipped) or (isinstance(event, Notice) and event.level == "warning")
    console.print(text, style="magenta" if is_warning else "")
    if isinstance(event, RunDone) and event.resume_command:
        console.print("Go on from there with:")
        console.print(f"  {event.resume_command}", wrap=False)
