"""The console: plain and rich output, names as they are, narrow and odd terminals."""

import errno
import io
import os
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from sidestep.ui.console import Console, open_console
from sidestep.ui.tables import review
from sidestep.ui.wording import duration, one_line, sparkline, speed
from tests.unit.terminal import Terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def fill(console: Console) -> None:
    console.heading("Songs")
    console.table("", [["日本語の歌.mp3", "2:10"], ["[red]x[/red].wav", "12:00"]], columns=["Name", "Length"])
    console.warning("two songs are the same")
    console.print(":smile: [bold]not markup[/bold] 3.14")


def test_a_pipe_and_the_plain_flag_get_text_without_escape_codes_or_boxes(terminal: Terminal) -> None:
    for console, stream in [
        (open_console(plain=True, stream=terminal), terminal),
        (open_console(plain=False, stream=(pipe := io.StringIO())), pipe),
    ]:
        fill(console)
        assert console.is_plain
        assert stream.getvalue().split("\n") == [
            "",
            "Songs",
            "  Name              Length",
            "  日本語の歌.mp3    2:10",
            "  [red]x[/red].wav  12:00",
            "Warning: two songs are the same",
            ":smile: [bold]not markup[/bold] 3.14",
            "",
        ]


class Lost(io.TextIOWrapper):
    """A stream whose system refuses what is written, once."""

    reason: int = 0

    def flush(self) -> None:
        if self.reason:
            error, self.reason = self.reason, 0
            raise OSError(error, os.strerror(error))
        super().flush()


# Windows says of a pipe whose reader has gone that the argument is invalid.
@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (errno.EPIPE, ""),
        (errno.EINVAL, ""),
        (errno.ENOSPC, "Warning: The output can no longer be written ([Errno 28] No space left on device).\n"),
    ],
)
def test_output_that_can_no_longer_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: int, said: str
) -> None:
    with Lost((tmp_path / "run.log").open("wb"), encoding="utf-8") as stream:
        console = open_console(plain=True, stream=stream)
        console.print("read")
        stream.reason = reason
        console.print("lost")
        console.print("lost too")
    assert (tmp_path / "run.log").read_bytes().splitlines()[:1] == [b"read"]
    assert capsys.readouterr().err == said


def test_two_streams_that_cannot_be_written_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only = [os.open(tmp_path / name, os.O_RDONLY | os.O_CREAT) for name in ("out", "err")]
    with os.fdopen(read_only[0], "w") as out, os.fdopen(read_only[1], "w", buffering=1) as err:
        monkeypatch.setattr("sys.stderr", err)
        for stream in (out, err):
            open_console(plain=True, stream=stream).print("lost")


def test_a_terminal_gets_colour_but_no_markup_from_names(terminal: Terminal) -> None:
    console = open_console(plain=False, stream=terminal)
    fill(console)
    assert not console.is_plain
    assert "\x1b[35mWarning: two songs are the same\x1b[0m" in terminal.getvalue()
    assert "[red]x[/red].wav" in terminal.getvalue()
    assert ":smile: [bold]not markup[/bold] 3.14\n" in terminal.getvalue()


def test_no_color_takes_the_colour_away(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    open_console(plain=False, stream=terminal).warning("careful")
    assert terminal.getvalue() == "Warning: careful\n"


def test_a_dumb_terminal_is_plain(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert open_console(plain=False, stream=terminal).is_plain


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_text_and_tables_fit_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    console = open_console(plain=False, stream=terminal)
    console.print("日本語 and many other words " * 12)
    console.table("Songs", [["夜に駆ける" * 10, "a caption that is rather long " * 4]], columns=["Name", "Caption"])
    lines = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).split("\n")
    assert max(map(cell_len, lines)) <= columns
    assert terminal.getvalue().count("日本語") == 12


def test_a_command_and_a_long_path_stay_in_one_piece(terminal: Terminal) -> None:
    console = open_console(plain=False, stream=terminal)
    command = "  uv run train.py fixed " + "--some-flag value " * 8
    console.print(command, wrap=False)
    console.print("Saved: " + "folder/" * 20)
    assert terminal.getvalue() == f"{command}\nSaved:\n{'folder/' * 20}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_the_encoding_lacks_becomes_a_question_mark(encoding: str) -> None:
    raw = io.BytesIO()
    console = open_console(plain=True, stream=io.TextIOWrapper(raw, encoding=encoding))
    console.print("夜.mp3 \udcff.mp3")
    assert raw.getvalue().decode(encoding).splitlines() == ["?.mp3 ?.mp3"]


def test_a_reader_that_has_gone_does_not_stop_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = open_console(plain=True, stream=stream)
        console.print("one")
        console.print("two")


def test_a_name_can_neither_steer_the_terminal_nor_leave_its_line() -> None:
    assert one_line("a\x1b[31m\r\n\tb\x9b\u2028\u202e.wav") == "a\ufffd[31m\ufffd b\ufffd\ufffd\ufffd.wav"
    assert one_line("שלום\u2069.wav") == "\u2068שלום.wav\u2069"
    assert one_line("日本語.wav") == "日本語.wav"


def test_lengths_of_time_read_as_people_say_them() -> None:
    seconds = [0, 59.4, 59.6, 192, 3540, 3590, 3900, 86_399, 97_200, 1e6]
    words = "0 s, 59 s, 1 min 0 s, 3 min 12 s, 59 min, 1 h 0 min, 1 h 5 min, 1 d 0 h, 1 d 3 h, 11 d 14 h"
    assert ", ".join(map(duration, seconds)) == words


def test_slow_steps_are_given_in_seconds_a_step() -> None:
    assert [speed(2.5), speed(0.25), speed(0.0), speed(float("nan"))] == ["2.50 it/s", "4.00 s/it", "", ""]


def test_a_sparkline_spans_the_values_it_is_given() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 8], ascii_only=True) == "_#"
    assert sparkline([3, 3]) == "▄▄"
    assert sparkline([1, float("nan"), 2]) == "▁ █"
    assert sparkline([]) == ""


def test_the_review_marks_what_differs_from_the_default() -> None:
    stream = io.StringIO()
    groups = {"Model": [("model-variant", "base", True)], "Training": [("lr", "0.0001", False)], "Nothing": []}
    review(open_console(plain=True, stream=stream), groups)
    assert stream.getvalue().split("\n") == [
        "",
        "Model",
        "  model-variant  base  *",
        "",
        "Training",
        "  lr  0.0001",
        "",
        "* differs from the default",
        "",
    ]
