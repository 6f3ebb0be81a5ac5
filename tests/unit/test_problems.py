"""Errors as users read them, and the log that keeps the rest."""

import io
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from sidestep.errors import DataError, RunError
from sidestep.ui import problems
from sidestep.ui.problems import close_log, log_traceback, open_log, quiet_libraries, show_bug, show_error
from tests.unit.terminal import Terminal


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield
    close_log()
    logging.captureWarnings(False)
    logging.setLoggerClass(logging.Logger)


def caught(error: Exception) -> Exception:
    """The error with a traceback, as an except clause has it."""
    with pytest.raises(type(error)) as failure:
        raise error
    return failure.value


def test_an_error_is_its_message_then_its_hint() -> None:
    stream = io.StringIO()
    show_error(DataError("[red]a.pt[/red] is damaged.\nSo is b.pt.", hint="Run preprocessing again."), stream=stream)
    assert stream.getvalue() == "Error: [red]a.pt[/red] is damaged.\n  So is b.pt.\n  Run preprocessing again.\n"


def test_an_error_without_a_hint_is_its_message_alone() -> None:
    stream = io.StringIO()
    show_error(DataError("a.pt is damaged."), stream=stream)
    assert stream.getvalue() == "Error: a.pt is damaged.\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_an_error_is_wrapped_to_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    show_error(DataError("夜に駆ける is a name " * 9, hint="Choose another name. " * 9), stream=stream)
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert first.startswith("Error: 夜に駆ける")
    assert all(line.startswith("  ") for line in rest)
    assert max(map(cell_len, [first, *rest])) <= columns


def test_a_command_in_a_hint_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    command = "uv run hf download ACE-Step/acestep-v15-base --local-dir checkpoints/acestep-v15-base"
    show_error(DataError("No model.", hint=f"{'Fetch the model. ' * 5}\n  {command}\nThen go on."), stream=stream)
    lines = stream.getvalue().split("\n")
    assert f"    {command}" in lines
    assert "  Then go on." in lines


def test_plain_errors_have_no_colour_on_a_terminal() -> None:
    stream = Terminal()
    show_error(DataError("a.pt is damaged."), stream=stream, plain=True)
    assert stream.getvalue() == "Error: a.pt is damaged.\n"


def test_a_bug_is_two_lines_that_name_the_log_with_the_traceback(tmp_path: Path) -> None:
    open_log(tmp_path / "sidestep.log")
    stream = io.StringIO()
    show_bug(caught(ValueError("no such thing\nat all")), stream=stream)
    assert stream.getvalue().splitlines() == [
        "This is a bug in Side-Step: ValueError: no such thing",
        f"  Please report it with the details in {tmp_path / 'sidestep.log'}",
    ]
    log = (tmp_path / "sidestep.log").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log
    assert "raise error\nValueError: no such thing" in log


def test_a_bug_before_the_log_is_open_gets_a_log_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems.platformdirs, "user_log_path", lambda *names, **options: tmp_path / "logs")
    stream = io.StringIO()
    show_bug(caught(ValueError("too early")), stream=stream)
    assert stream.getvalue().endswith(f"the details in {tmp_path / 'logs' / 'sidestep.log'}\n")
    assert "ValueError: too early" in (tmp_path / "logs" / "sidestep.log").read_text(encoding="utf-8")


def test_the_log_is_added_to_and_holds_what_came_before_it_was_open(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sidestep.log"
    quiet_libraries()
    log_traceback(caught(DataError("a song named 夜 \udcff is damaged.")))
    open_log(path)
    open_log(path)
    logging.getLogger("sidestep.training").info("step 1")
    text = path.read_text(encoding="utf-8")
    assert "a song named 夜 \\udcff is damaged." in text
    assert text.count("Traceback") == 1
    assert text.endswith(" INFO sidestep.training: step 1\n")


def test_a_log_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"sidestep\.log cannot be written") as failure:
        open_log(tmp_path / "file" / "sidestep.log")
    assert failure.value.hint


def test_a_log_on_a_full_disk_ends_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    open_log(tmp_path / "sidestep.log")
    handler = next(each for each in logging.getLogger().handlers if isinstance(each, problems.LogFile))
    handler.stream.close()
    handler.stream = FullDisk()  # type: ignore[assignment]
    logging.getLogger("sidestep").info("one")
    logging.getLogger("sidestep").info("two")
    logging.getLogger("torch").warning("not for the screen")
    said = capsys.readouterr().err
    assert said.count("can no longer be written") == 1
    assert "not for the screen" not in said


def test_library_messages_and_python_warnings_go_to_the_log_not_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet_libraries()
    library = logging.getLogger("some.library")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    open_log(tmp_path / "sidestep.log")
    library.warning("you should probably train this model")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("this is deprecated", stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""
    log = (tmp_path / "sidestep.log").read_text(encoding="utf-8")
    assert "WARNING some.library: you should probably train this model" in log
    assert "this is deprecated" in log
    assert "ZeroDivisionError" in log


def test_a_library_that_sets_up_its_logger_on_import_stays_quiet_and_nothing_here_needs_torch(tmp_path: Path) -> None:
    script = f"""
import logging, sys
from pathlib import Path
from sidestep.ui import console, metrics, plain, problems, progress, sinks, tables
assert not {{"torch", "transformers", "diffusers", "peft"}} & set(sys.modules)
problems.quiet_libraries()
for name in ("transformers", "transformers.models"):
    library = logging.getLogger(name)
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    library.setLevel(logging.WARNING)
logging.getLogger("transformers.models").warning("some weights were not used")
problems.open_log(Path({str(tmp_path / "sidestep.log")!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    log = (tmp_path / "sidestep.log").read_text(encoding="utf-8")
    assert log.endswith("WARNING transformers.models: some weights were not used\n")


def test_what_is_logged_of_a_refused_command_waits_for_the_next_log_and_is_not_printed(tmp_path: Path) -> None:
    script = f"""
import warnings
from pathlib import Path
from sidestep.commands.output import log_in
from sidestep.errors import DataError
from sidestep.ui.problems import log_traceback, quiet_libraries
quiet_libraries()
try:
    with log_in(Path({str(tmp_path / "refused")!r})):
        raise DataError("The song is broken.")
except DataError as error:
    log_traceback(error)
warnings.warn("this is deprecated")
with log_in(Path({str(tmp_path / "next")!r})):
    pass
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "refused").exists()
    log = (tmp_path / "next" / "sidestep.log").read_text(encoding="utf-8")
    assert "Traceback" in log and "The song is broken." in log and "this is deprecated" in log
