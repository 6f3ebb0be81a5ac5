"""Ctrl-C, SIGTERM and SIGHUP, as a terminal and a job manager send them: to the whole group of processes."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sidestep.commands.interrupts import Interrupts
from sidestep.config.runs import checkpoints_in
from sidestep.model.checkpoint import Checkpoint
from tests.torch.tiny import RUN_NAME, read_state, write_songs

REPOSITORY = Path(__file__).parents[2]
STEPS = 40


class Command:
    """Side-Step, or the launcher that starts it, in a process of its own, at the head of its own group."""

    def __init__(self, *arguments: str, home: Path, launcher: Sequence[str] = ()) -> None:
        # Plain lines on a pipe; the user's own settings are left alone.
        environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(REPOSITORY / "train.py"), "--plain", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment,
        )
        self.output = ""

    def read_until(self, words: str) -> None:
        """Read what it prints up to a line with these words."""
        for line in self._lines():
            self.output += line
            if words in line:
                return
        raise AssertionError(f"It ended without saying {words!r}:\n{self.output}")

    def send(self, number: int) -> None:
        """Send a signal to the whole group."""
        os.killpg(self.process.pid, number)

    def finish(self) -> int:
        """Read the rest and give the exit code."""
        with self.process:
            self.output += "".join(self._lines())
        return self.process.returncode

    def _lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        return iter(self.process.stdout)


def training(tmp_path: Path, checkpoint: Checkpoint, *more: str) -> Command:
    return Command(*training_words(tmp_path, checkpoint, *more), home=tmp_path / "home")


def training_words(tmp_path: Path, checkpoint: Checkpoint, *more: str) -> list[str]:
    songs = write_songs(tmp_path / "my songs", checkpoint, (250,) * 8)
    arguments = {
        "--checkpoint-dir": checkpoint.root,
        "--model-variant": checkpoint.variant,
        "--dataset-dir": songs,
        "--output-dir": tmp_path / "my run",
        "--run-name": RUN_NAME,
        "--device": "cpu",
        "--rank": 4,
        "--batch-size": 4,
        "--max-steps": STEPS,
        "--gradient-accumulation": 1,
        "--warmup-steps": 0,
        "--log-every": 1,
        "--num-workers": 2,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return ["fixed", *words, *more]


def resume_command(output: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if "--resume-from" in line]
    words = shlex.split(line[line.index("uv run train.py") :])
    assert words[:3] == ["uv", "run", "train.py"]
    return words[3:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_prints_the_command_that_goes_on(tmp_path: Path, base: Checkpoint, number: int):
    command = training(tmp_path, base)
    command.read_until("Step 2/")
    command.send(number)
    assert command.finish() == 130
    assert "Traceback" not in command.output
    assert command.output.count("Stopping: this step is finished and saved first.") == 1
    (saved,) = checkpoints_in(tmp_path / "my run")
    stopped_at = read_state(saved)["state"]["step"]
    assert 2 <= stopped_at < STEPS
    assert not (tmp_path / "my run" / RUN_NAME).exists()
    if number != signal.SIGINT:
        return

    again = Command(*resume_command(command.output), home=tmp_path / "home")
    assert again.finish() == 0, again.output
    assert read_state(checkpoints_in(tmp_path / "my run")[0])["state"]["step"] == STEPS
    assert (tmp_path / "my run" / RUN_NAME / "adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "metrics"] == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, base: Checkpoint):
    # A step of minutes, so that it cannot end in between.
    command = training(tmp_path, base, "--gradient-accumulation", "4096", "--dataset-repeats", "4096")
    command.read_until("samples a step")
    command.send(signal.SIGINT)
    command.read_until("Ctrl-C again stops at once")
    command.send(signal.SIGINT)
    assert command.finish() == 130
    assert "Stopped." in command.output
    assert "Traceback" not in command.output
    assert not checkpoints_in(tmp_path / "my run")


def test_a_second_ctrl_c_says_where_the_run_goes_on(tmp_path: Path, base: Checkpoint):
    command = training(tmp_path, base, "--save-every", "1", "--max-steps", "4000")
    command.read_until("Saved a checkpoint")
    command.send(signal.SIGSTOP)  # So that both are there before the step ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        command.send(number)
    assert command.finish() == 130
    newest = checkpoints_in(tmp_path / "my run")[0].name
    assert f"The last checkpoint is {newest}. Go on from there with:" in command.output
    again = Command(*resume_command(command.output), "--max-steps", "2", home=tmp_path / "home")
    assert again.finish() == 0, again.output


@pytest.mark.parametrize("screen", ["live", "plain"])
def test_a_terminal_that_is_closed_costs_no_finished_step(tmp_path: Path, base: Checkpoint, screen: str):
    ours, theirs = pty.openpty()
    # The terminal is that of the new session: its end is told with SIGHUP, and whatever is printed to it fails.
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    words = training_words(tmp_path, base, *(["--plain"] if screen == "plain" else []))
    process = subprocess.Popen(
        [sys.executable, "-c", take, sys.executable, str(REPOSITORY / "train.py"), *words],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "home"), "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    metrics = tmp_path / "my run" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 2,' in metrics.read_text()):
        os.read(ours, 65_536)
    os.close(ours)
    assert process.wait() == 130
    (saved,) = checkpoints_in(tmp_path / "my run")
    assert read_state(saved)["state"]["step"] < STEPS


def test_a_run_that_outlives_its_terminal_is_not_stopped_when_that_is_closed():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # What nohup does.
    try:
        with Interrupts(lambda event: None) as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.is_requested()
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_closed_terminal_that_is_told_twice_does_not_cut_off_the_saving():
    with Interrupts(lambda event: None) as interrupts:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert interrupts.is_requested()


def test_a_machine_that_is_shut_down_closes_the_terminal_and_does_not_cut_off_the_saving():
    with Interrupts(lambda event: None) as interrupts:
        try:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("It stopped at once.")
        assert interrupts.is_requested()
