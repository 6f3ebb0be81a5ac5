"""The sinks: one recorded run, replayed into plain lines, the live view, the metrics file and the log."""

import errno
import io
import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from sidestep.errors import RunError
from sidestep.events import (
    AdapterSaved,
    CheckpointSaved,
    EpochDone,
    Event,
    LayerGradients,
    Metrics,
    Notice,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
    StepDone,
    TimestepsDrawn,
    TrackDone,
    TrackSkipped,
    Validated,
)
from sidestep.ui.console import open_console
from sidestep.ui.metrics import MetricsFile
from sidestep.ui.plain import PlainLines
from sidestep.ui.problems import close_log, open_log
from sidestep.ui.progress import LiveScreen
from sidestep.ui.sinks import combine, open_screen, write_log
from tests.unit.terminal import Terminal

SONGS: list[Event] = [
    StageStarted(title="Encoding audio", total=3),
    TrackDone(name="disc1/a.wav", seconds=12.34, unchanged=True),
    TrackSkipped(name="[red]b[/red].mp3", reason="it is a text file.", hint="Remove it."),
    TrackDone(name="c.wav", seconds=200),
    StageDone(title="Encoding audio", done=2, skipped=1, seconds=192),
]


def reading(step: int, *, loss: float = 0.7, memory_gib: float | None = None) -> Metrics:
    epoch = (step + 1) // 2
    return Metrics(
        step=step, epoch=epoch, loss=loss, lr=1e-4, grad_norm=0.5, steps_per_second=2.0, memory_gib=memory_gib
    )


def started(*, first_step: int = 0) -> RunStarted:
    return RunStarted(
        recipe="fixed: trains as the model itself was trained.",
        facts={"Songs": "2"},
        epochs=5,
        steps=10,
        steps_per_epoch=2,
        first_step=first_step,
        output_dir=Path("output"),
    )


TRAINING: list[Event] = [
    started(),
    StepDone(step=1, epoch=1),
    TimestepsDrawn(step=1, timesteps=[0.5]),
    LayerGradients(step=1, norms={"layers.0.self_attn.q_proj": 0.1}),
    StepDone(step=2, epoch=1),
    reading(2, memory_gib=7.41),
    Notice(text="The file [b]x[/b] was cut.", level="warning"),
    EpochDone(step=2, epoch=1, loss=0.71),
    CheckpointSaved(folder=Path("output/checkpoints/epoch_1"), step=2, epoch=1),
    Validated(step=2, epoch=1, loss=0.69, standard_error=0.01, bands={"0.0-0.2": 0.9}, is_best=True),
    AdapterSaved(folder=Path("output/adapter")),
    RunDone(step=2, epoch=1, reason="interrupted", resume_command="train.py fixed --resume-from output"),
]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def shown(screen: LiveScreen) -> list[str]:
    """The live view's lines as they are now."""
    console = screen._console.rich
    return ["".join(part.text for part in line).rstrip() for line in console.render_lines(screen.render(), pad=False)]


def plain_lines(events: list[Event]) -> list[str]:
    stream = io.StringIO()
    with open_screen(open_console(plain=True, stream=stream)) as emit:
        for event in events:
            emit(event)
    return stream.getvalue().split("\n")


def test_plain_lines_name_each_song_as_it_is_done() -> None:
    assert plain_lines(SONGS) == [
        "Encoding audio: 3 songs",
        "[1/3] disc1/a.wav (12.3 s, unchanged)",
        "[2/3] Skipped [red]b[/red].mp3: it is a text file. Remove it.",
        "[3/3] c.wav (200.0 s)",
        "Encoding audio: 2 songs in 3 min 12 s, 1 skipped.",
        "",
    ]


def test_plain_lines_follow_a_training_run() -> None:
    lines = plain_lines(TRAINING)
    assert lines[:6] == [
        "",
        "fixed: trains as the model itself was trained.",
        "  Songs   2",
        "  Length  5 epochs, 10 steps",
        "  Output  output",
        "",
    ]
    assert lines[6].startswith("Step 2/10  epoch 1/5  loss 0.7000  lr 1.00e-04  grad norm 0.5  2.00 it/s  ")
    assert lines[6].endswith(" left  7.4 GiB")
    assert lines[7:] == [
        "Warning: The file [b]x[/b] was cut.",
        "Epoch 1/5 done  loss 0.7100",
        f"Saved a checkpoint at epoch 1, step 2: {Path('output/checkpoints/epoch_1')}",
        "Held-out songs after epoch 1: loss 0.6900 (standard error 0.0100), the best so far.",
        f"Saved the adapter: {Path('output/adapter')}",
        "Training stopped at epoch 1, step 2.",
        "Go on from there with:",
        "  train.py fixed --resume-from output",
        "",
    ]


def test_a_song_skipped_outside_a_stage_is_named_without_a_number() -> None:
    assert plain_lines([TrackSkipped(name="b.mp3", reason="it is empty.")]) == ["Skipped b.mp3: it is empty.", ""]


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_view(terminal: Terminal) -> None:
    assert isinstance(open_screen(open_console(plain=False, stream=io.StringIO())), PlainLines)
    assert isinstance(open_screen(open_console(plain=False, stream=terminal)), LiveScreen)


def test_the_live_view_shows_where_training_is(terminal: Terminal) -> None:
    clock = Clock()
    with LiveScreen(open_console(plain=False, stream=terminal), clock=clock) as screen:
        for event in TRAINING[:-1]:
            screen(event)
            clock.now += 1.0 if isinstance(event, StepDone) else 0.0
        bar, *others = [line for line in shown(screen) if "━" in line], *shown(screen)
        assert len(bar) == 1
        assert [line.strip() for line in others if "━" not in line] == [
            "Epoch 1 of 5   Step 2 of 10   7 s left",
            "Loss 0.7000   ▄   Held-out loss 0.6900 (best)",
            "Learning rate 1.00e-04   Gradient norm 0.5   2.00 it/s   Memory 7.4 GiB",
            "Ctrl-C saves a checkpoint and stops.",
        ]
        screen(TRAINING[-1])
        assert shown(screen) == [""]
    assert "Go on from there with:\n  train.py fixed --resume-from output\n" in terminal.getvalue()


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_the_live_view_leaves_room_at_the_end_of_its_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with LiveScreen(open_console(plain=False, stream=terminal)) as screen:
        for event in [*TRAINING[:-1], *(reading(step) for step in range(3, 60))]:
            screen(event)
        assert max(map(len, shown(screen))) <= columns - 4
        screen(StageStarted(title="Encoding audio", total=9))
        screen(TrackDone(name="夜に駆ける" * 50, seconds=1))
        assert shown(screen)[-1].endswith("…")
        assert max(map(cell_len, shown(screen))) <= columns - 4


def test_the_time_left_after_a_resume_counts_only_the_steps_of_this_session(terminal: Terminal) -> None:
    clock = Clock()
    with LiveScreen(open_console(plain=False, stream=terminal), clock=clock) as screen:
        screen(started(first_step=6))
        assert shown(screen)[0] == "  Epoch 4 of 5   Step 6 of 10"
        clock.now += 50
        screen(StepDone(step=7, epoch=4))
        screen(reading(7))
        assert shown(screen)[0] == "  Epoch 4 of 5   Step 7 of 10   2 s left"
        clock.now += 3
        screen(StepDone(step=8, epoch=4))
        assert shown(screen)[0] == "  Epoch 4 of 5   Step 8 of 10   6 s left"
        clock.now += 2
        assert shown(screen)[0] == "  Epoch 4 of 5   Step 8 of 10   4 s left"


def test_the_time_left_for_songs_ignores_those_that_were_unchanged(terminal: Terminal) -> None:
    clock = Clock()
    with LiveScreen(open_console(plain=False, stream=terminal), clock=clock) as screen:
        screen(StageStarted(title="Encoding audio", total=6))
        clock.now += 10
        screen(TrackDone(name="a.wav", seconds=1, unchanged=True))
        screen(TrackDone(name="b.wav", seconds=1, unchanged=True))
        assert shown(screen)[0] == "  Encoding audio 2 of 6 songs"
        clock.now += 4
        screen(TrackDone(name="[b]c.wav", seconds=1))
        assert shown(screen)[0] == "  Encoding audio 3 of 6 songs   12 s left"
        assert shown(screen)[2] == "  [b]c.wav"
    assert terminal.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_the_terminal_is_restored_however_the_live_view_is_left(
    terminal: Terminal, failure: type[BaseException]
) -> None:
    with pytest.raises(failure), LiveScreen(open_console(plain=False, stream=terminal)) as screen:
        screen(started())
        assert terminal.getvalue().count("\x1b[?25l") == 1
        raise failure
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_skipped_songs_and_warnings_stand_above_the_live_view(terminal: Terminal) -> None:
    with LiveScreen(open_console(plain=False, stream=terminal)) as screen:
        for event in SONGS:
            screen(event)
    assert "Skipped [red]b[/red].mp3: it is a text file. Remove it.\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("Encoding audio: 2 songs in 3 min 12 s, 1 skipped.\n")


def test_combined_sinks_all_receive_each_event_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    emit = combine(lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event)))
    emit(SONGS[0])
    assert seen == [("a", SONGS[0]), ("b", SONGS[0])]


def test_the_log_keeps_what_the_user_was_told(tmp_path: Path) -> None:
    open_log(tmp_path / "sidestep.log")
    for event in [*SONGS, *TRAINING]:
        write_log(event)
    close_log()
    text = (tmp_path / "sidestep.log").read_text(encoding="utf-8")
    assert "Skipped [red]b[/red].mp3: it is a text file. Remove it." in text
    assert "step 2: loss 0.700000, grad norm 0.5" in text


def metrics_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_metrics_file_has_a_line_for_each_event_people_plot(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    with MetricsFile(path, first_step=0) as emit:
        for event in TRAINING:
            emit(event)
            # Flushed line by line: whoever follows the file is never behind.
            assert path.read_bytes().endswith(b"\n")
    lines = metrics_of(path)
    names = ["run_started", "metrics", "notice", "epoch_done", "checkpoint_saved", "validated", "run_done"]
    assert [line["event"] for line in lines] == names
    assert [line["step"] for line in lines] == [0, 2, 2, 2, 2, 2, 2]
    time = lines[1].pop("time")
    assert isinstance(time, str) and time.endswith("+00:00")
    assert lines[1] == {
        "event": "metrics",
        "step": 2,
        "epoch": 1,
        "loss": 0.7,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "steps_per_second": 2.0,
        "memory_gib": 7.41,
    }
    assert lines[0]["output_dir"] == "output"
    assert lines[5]["bands"] == {"0.0-0.2": 0.9}


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl", first_step=0) as emit:
        emit(reading(1, loss=float("nan")))
    assert metrics_of(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_after_a_resume_the_metrics_file_reads_as_one_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, first_step=0) as emit:
        emit(started())
        for step in range(1, 7):
            emit(reading(step))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "metrics", "step": 3, "lo')
    with MetricsFile(path, first_step=4) as emit:
        emit(started(first_step=4))
        emit(Notice(text="Going on."))
        emit(reading(5, loss=0.5))
    lines = metrics_of(path)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("run_started", 0),
        *(("metrics", step) for step in range(1, 5)),
        ("run_started", 4),
        ("notice", 4),
        ("metrics", 5),
    ]
    assert lines[-1]["loss"] == 0.5
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_the_metrics_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsFile(path, first_step=0) as emit:
            emit(started())
    assert [line["event"] for line in metrics_of(path)] == ["run_started"]


def test_a_full_disk_is_a_run_error_that_names_the_metrics_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.flush()

    monkeypatch.setattr(Path, "open", lambda *arguments, **options: FullDisk())
    with pytest.raises(RunError) as caught, MetricsFile(tmp_path / "metrics.jsonl", first_step=0) as emit:
        emit(reading(1))
    assert caught.value.message == f"The disk is full: {tmp_path / 'metrics.jsonl'} cannot be written."
    assert caught.value.hint


def test_a_metrics_file_in_an_impossible_place_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", first_step=0)
