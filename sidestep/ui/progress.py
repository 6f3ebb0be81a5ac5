"""The live view on a terminal: a few lines at the bottom that follow the run, and everything said above them."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from sidestep.events import Event, Metrics, RunDone, RunStarted, StageDone, StageStarted, TrackDone, Validated
from sidestep.ui.console import Console
from sidestep.ui.pace import Clock
from sidestep.ui.plain import StageCount, TrainingCount, announce, say
from sidestep.ui.wording import count, duration, one_line, sparkline, speed

READINGS = 40
MARGIN = 2
ECHO = 4  # The terminal echoes ^C after the last line; were that full, the echo would wrap and displace the view.
BAR_WIDTH = 64
REFRESHES_PER_SECOND = 4  # Enough to look alive; each one takes Python's lock from the training loop for a moment.


class LiveScreen:
    """A sink that shows where training or a stage over songs is, and prints sentences above that.

    A context manager: however it is left, the terminal is as it was. Only plain values that are replaced as a whole
    are shared with the thread that draws.
    """

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._view: StageView | TrainingView | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hide()

    def __call__(self, event: Event) -> None:
        """Follow an event."""
        match event:
            case StageStarted():
                self._show(StageView(event, clock=self._clock))
            case RunStarted():
                self._hide()
                announce(self._console, event)
                self._show(TrainingView(event, clock=self._clock))
            case StageDone() | RunDone():
                self._hide()
        if self._view:
            self._view.follow(event)
        if not isinstance(event, Validated):
            say(self._console, event)

    def render(self) -> RenderableType:
        """The lines that follow the run, as they are now."""
        if self._view is None:
            return ""
        width = self._console.rich.width - MARGIN - ECHO
        return self._view.render(width, ascii_only=self._console.rich.options.ascii_only)

    def _show(self, view: "StageView | TrainingView") -> None:
        self._hide()
        self._view = view
        self._live = Live(
            get_renderable=self.render,
            console=self._console.rich,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)

    def _hide(self) -> None:
        if self._live:
            self._live.stop()
        self._live = self._view = None


class StageView:
    """A stage over songs: how many are done, the latest one, the time left."""

    def __init__(self, stage: StageStarted, *, clock: Clock) -> None:
        self._count = StageCount(stage, clock=clock)
        self._latest = ""

    def follow(self, event: Event) -> None:
        """Take in what the view shows of the event."""
        self._count.follow(event)
        if isinstance(event, TrackDone):
            self._latest = one_line(event.name)

    def render(self, width: int, *, ascii_only: bool) -> RenderableType:
        """Three lines of at most `width` cells."""
        stage, finished = self._count.stage, self._count.finished
        progress = labelled(stage.title, f"{finished} of {count(stage.total, stage.unit)}")
        facts = [progress, _left(self._count.time_left())]
        latest = _cut(Text(self._latest, style="dim"), width)
        return _indented(*flow(facts, width), _bar(finished, stage.total, width), latest)


class TrainingView:
    """A training run: epoch, step, loss and its course, learning rate, gradient norm, speed, memory, time left."""

    def __init__(self, run: RunStarted, *, clock: Clock) -> None:
        self._count = TrainingCount(run, clock=clock)
        self._losses: tuple[float, ...] = ()
        self._reading: Metrics | None = None
        self._validated: Validated | None = None

    def follow(self, event: Event) -> None:
        """Take in what the view shows of the event."""
        self._count.follow(event)
        match event:
            case Metrics():
                self._reading = event
                self._losses = (*self._losses, event.loss)[-READINGS:]
            case Validated():
                self._validated = event

    def render(self, width: int, *, ascii_only: bool) -> RenderableType:
        """About five lines of at most `width` cells, more of them where they are narrow."""
        run, step = self._count.run, self._count.step
        progress = [
            labelled("Epoch", f"{self._count.epoch} of {run.epochs}"),
            labelled("Step", f"{step} of {run.steps}"),
            _left(self._count.time_left()),
        ]
        lines = [*flow(progress, width), _bar(step, run.steps, width)]
        if self._reading:
            lines += flow(self._loss(width, ascii_only=ascii_only), width)
            lines += flow(_machine(self._reading), width)
        return _indented(*lines, _cut(Text("Ctrl-C saves a checkpoint and stops.", style="dim"), width))

    def _loss(self, width: int, *, ascii_only: bool) -> Iterable[Text]:
        if self._reading:
            course = sparkline(self._losses[-width:], ascii_only=ascii_only)
            yield labelled("Loss", f"{self._reading.loss:.4f}", style="bold")
            yield Text(course, style="cyan")
        if self._validated:
            best = " (best)" if self._validated.is_best else ""
            yield labelled("Held-out loss", f"{self._validated.loss:.4f}{best}")


def labelled(label: str, value: str, *, style: str = "") -> Text:
    """A value after its dim label."""
    return Text.assemble((f"{label} ", "dim"), (value, style))


def flow(pieces: Iterable[Text], width: int) -> list[Text]:
    """Pieces side by side, on as few lines of `width` cells as they need; a piece is never broken, at most cut."""
    lines: list[Text] = []
    for piece in pieces:
        if not piece.cell_len:
            continue
        if lines and lines[-1].cell_len + 3 + piece.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", piece)
        else:
            lines.append(_cut(piece, width))
    return lines


def _cut(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def _machine(reading: Metrics) -> Iterable[Text]:
    yield labelled("Learning rate", f"{reading.lr:.2e}")
    yield labelled("Gradient norm", f"{reading.grad_norm:.3g}")
    yield Text(speed(reading.steps_per_second))
    if reading.memory_gib is not None:
        yield labelled("Memory", f"{reading.memory_gib:.1f} GiB")


def _left(seconds: float | None) -> Text:
    return Text("" if seconds is None else f"{duration(seconds)} left")


def _bar(done: int, total: int, width: int) -> RenderableType:
    width = min(width, BAR_WIDTH)
    bar = ProgressBar(total=max(1, total), completed=done, width=width, complete_style="cyan", finished_style="cyan")
    return Padding(bar, 0)  # By itself the bar does not end its line.


def _indented(*lines: RenderableType) -> RenderableType:
    return Padding(Group(*lines), (0, 0, 0, MARGIN), expand=False)
