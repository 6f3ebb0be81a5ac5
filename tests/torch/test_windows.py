"""What differs on Windows, as far as another system can show it: spawned processes, its encoding, Ctrl-Break."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sidestep.commands import torch_build
from sidestep.commands.interrupts import Interrupts
from sidestep.config.places import PROJECT
from sidestep.model.checkpoint import Checkpoint
from sidestep.ui.console import open_console
from sidestep.ui.machine import Gpu
from tests.torch.command_line import NAME, SMALL, train
from tests.torch.tiny import adapter_tensors, assert_identical, write_songs

# Windows has no fork: a reading process starts from nothing and is sent what it needs.
SPAWNING = """
import multiprocessing, sys
from sidestep.main import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main())
"""


def test_training_with_spawned_readers_and_a_narrow_encoding_gives_the_same_adapter(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "夜に駆ける", base, (50, 60))
    start = tmp_path / "start.py"
    start.write_text(SPAWNING)
    output = tmp_path / "spawned é夜"
    words = [
        *("fixed", "--yes", "--plain", "-c", base.root, "-M", base.variant, "-d", songs, "-o", output),
        *(word for flag, value in {**SMALL, "--num-workers": "1"}.items() for word in (flag, value)),
    ]
    done = subprocess.run(
        [sys.executable, start, *words],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "cp1252", "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("cp1252")
    assert "spawned é?" in text
    assert not {"\x1b", "\r"} & set(text)
    train(base, songs, tmp_path / "read in the main process")
    assert_identical(adapter_tensors(output / NAME), adapter_tensors(tmp_path / "read in the main process" / NAME))


def test_ctrl_break_stops_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    said = []
    earlier = signal.getsignal(signal.SIGUSR1)
    with Interrupts(said.append) as interrupts:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.is_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == earlier
    assert len(said) == 1


@pytest.fixture
def idle_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def warned(device: str = "auto", *, cuda: str | None = None, gpus: tuple[Gpu, ...] = (Gpu("RTX 3060", 12),)) -> str:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch_build, "find_gpus", lambda: list(gpus))
        torch_build.warn_of_idle_gpu(device, open_console(plain=True))
        return capsys.readouterr().out

    return warned


def test_a_gpu_that_torch_cannot_use_is_said_with_the_way_out(idle_gpu: Callable[..., str]):
    assert f"The GPU (RTX 3060, 12 GB) cannot be used: torch {torch.__version__} has no CUDA." in idle_gpu()
    assert "install.sh in Side-Step's folder installs the torch that fits." in idle_gpu()
    assert "its driver is too old for torch" in idle_gpu(cuda="13.0")


def test_nothing_is_said_where_the_cpu_was_asked_for_or_is_all_there_is(idle_gpu: Callable[..., str]):
    assert idle_gpu("cpu") == ""
    assert idle_gpu(gpus=()) == ""
