"""What makes a run faster or smaller without changing it: when it is chosen, and what it leaves alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, NoRoomError
from sidestep.events import Event, Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.training import accelerate, fit
from sidestep.training.accelerate import COMPILE_SECONDS, SAVED_MS, wants_compile, why_not_compile
from sidestep.training.assemble import Run
from sidestep.training.build import recomputed_blocks
from tests.torch.tiny import Trained, assert_identical, prepare, tiny_config, train, write_songs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILE = torch.compile


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have a GPU, Triton and a compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(accelerate.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerate.shutil, "which", lambda name: f"/usr/bin/{name}")


def decide(
    asked: bool | None, device: torch.device, music: float, recomputed: float = 0, kinds: int = 2
) -> tuple[bool, list[str]]:
    events: list[Event] = []
    wanted = wants_compile(asked, device, music_seconds=music, recomputed=recomputed, kinds=kinds, emit=events.append)
    return wanted, [event.text for event in events if isinstance(event, Notice)]


def test_long_runs_are_compiled_and_short_ones_are_not_unless_it_was_said(new_gpu: None):
    enough = COMPILE_SECONDS / SAVED_MS * 1000
    assert decide(None, CUDA, enough + 1) == (True, [])
    assert decide(None, CUDA, enough - 1) == (False, [])
    assert decide(None, CUDA, enough / 2 + 1, recomputed=1.0) == (True, [])
    assert decide(None, CUDA, enough * 11, kinds=24) == (False, [])
    assert decide(True, CUDA, 1) == (True, [])
    assert decide(False, CUDA, 10**6) == (False, [])


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        ("an old GPU", (torch.cuda, "get_device_capability", lambda device: (6, 1)), "too old for Triton"),
        ("no Triton", (accelerate.importlib.util, "find_spec", lambda name: None), "Triton is not installed"),
        ("no compiler", (accelerate.shutil, "which", lambda name: None), "C compiler"),
    ],
)
def test_what_is_missing_is_said_once_and_asking_for_it_is_an_error(
    new_gpu: None, monkeypatch: pytest.MonkeyPatch, what: str, change: tuple[Any, str, Any], reason: str
):
    monkeypatch.setattr(*change)
    wanted, (said,) = decide(None, CUDA, 10**6)
    assert not wanted and reason in said and "training is the same, and slower" in said
    with pytest.raises(ConfigError, match=f"--compile cannot be had here: .*{reason}"):
        decide(True, CUDA, 10**6)
    assert decide(False, CUDA, 10**6) == (False, [])


def test_on_the_cpu_it_is_an_error_to_ask_and_nothing_is_said_otherwise(tmp_path: Path, base: Checkpoint):
    assert "CUDA, ROCm or XPU, and this runs on CPU" in why_not_compile(CPU)
    assert decide(None, CPU, 10**6) == decide(False, CPU, 10**6) == (False, [])
    songs = write_songs(tmp_path / "songs", base, (20,))
    with pytest.raises(ConfigError, match="--compile cannot be had here: compiled blocks need CUDA") as caught:
        prepare(tiny_config(compile=True), base, songs, tmp_path / "run")
    assert "the numbers are the same" in caught.value.hint
    assert prepare(tiny_config(compile=False), base, songs, tmp_path / "run").stepper.model.compiled_blocks is None


def compiled_run(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, frames: tuple[int, ...], *, asked: bool
) -> Trained:
    """Train with compiled blocks on the CPU: torch.compile without a code generator."""
    torch._dynamo.reset()
    monkeypatch.setattr(accelerate, "why_not_compile", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda block: COMPILE(block, backend="eager"))
    songs = write_songs(tmp_path / "songs", checkpoint, frames)
    config = tiny_config(
        compile=asked,
        epochs=1,
        dropout=0.2,
        target_modules=("q_proj",),
        gradient_checkpointing=len(set(frames)) == 1,
        gradient_checkpointing_ratio=0.5,
    )
    return train(config, checkpoint, songs, tmp_path / f"compiled_{asked}")


@pytest.mark.parametrize("frames", [(30, 30), (20, 30)], ids=str)
def test_compiled_blocks_train_to_the_same_weights_dropout_included(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, frames: tuple[int, ...]
):
    eager, compiled = (compiled_run(tmp_path, base, monkeypatch, frames, asked=asked) for asked in (False, True))
    assert compiled.run.stepper.model.compiled_blocks is not None
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    for name, weight in eager.weights.items():
        torch.testing.assert_close(compiled.weights[name], weight, atol=1e-6, rtol=1e-4)


@given(st.integers(1, 40), st.floats(0, 1))
def test_as_many_blocks_are_recomputed_as_the_ratio_says_and_they_are_spread_evenly(blocks: int, ratio: float):
    recomputed = recomputed_blocks(blocks, ratio)
    assert len(recomputed) == blocks
    assert sum(recomputed) == round(blocks * ratio)
    # Any two stretches of the same length hold the same number of them, give or take one.
    for length in range(1, blocks + 1):
        counts = [sum(recomputed[at : at + length]) for at in range(blocks - length + 1)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
def test_a_part_of_the_blocks_is_recomputed_and_the_weights_are_the_same(
    tmp_path: Path, base: Checkpoint, ratio: float, expected: int
):
    songs = write_songs(tmp_path / "songs", base, (30,))
    config = tiny_config(dropout=0.2, epochs=1, gradient_checkpointing=True, gradient_checkpointing_ratio=ratio)
    run = prepare(config, base, songs, tmp_path / "run")
    calls = []
    for block in run.stepper.model.decoder.layers:
        block.mlp_norm.register_forward_hook(lambda *call: calls.append(1))
    (batch,) = run.batches.epoch(0)
    run.stepper([batch], lr=1e-3, seeds=[1])
    assert len(calls) == 4 + expected
    plain = prepare(replace(config, gradient_checkpointing=False), base, songs, tmp_path / "plain")
    plain.stepper([batch], lr=1e-3, seeds=[1])
    assert_identical(dict(run.adapter.parameters), dict(plain.adapter.parameters))


def measuring(monkeypatch: pytest.MonkeyPatch, *, room_for: str) -> None:
    """Pretend that a step fits the device once this flag has been set."""

    def measure(run: Any) -> None:
        if room_for not in fit.flags_between(tiny_config(), run.config):
            raise NoRoomError("A step does not fit.")

    monkeypatch.setattr(fit, "measure", measure)


def fitting(config: TrainConfig, checkpoint: Checkpoint, songs: Path, output: Path) -> tuple[Run, list[str]]:
    events: list[Event] = []
    parts = {"recipe_name": "fixed", "checkpoint": checkpoint, "dataset_dir": songs, "output_dir": output}
    run = fit.assemble_fitting(config, emit=events.append, run_name="tiny", version="0", **parts)
    return run, [event.text for event in events if isinstance(event, Notice)]


def test_with_auto_fit_settings_change_until_a_step_fits_and_each_change_is_said(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    measuring(monkeypatch, room_for="--quantize int8")
    asked = tiny_config(auto_fit=True, batch_size=2)
    run, said = fitting(asked, base, songs, tmp_path / "run")
    assert (run.config.batch_size, run.config.gradient_accumulation, run.config.quantize) == (1, 2, "int8")
    assert [text.split(" trying with ")[1] for text in said if "trying with" in text] == [
        "--gradient-checkpointing.", "--batch-size 1 --gradient-accumulation 2.", "--quantize int8."
    ]  # fmt: skip
    with pytest.raises(NoRoomError):
        fitting(replace(asked, auto_fit=False), base, songs, tmp_path / "other")


def test_blocks_are_of_as_many_kinds_as_a_compiler_sees(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30,))
    run = prepare(tiny_config(), base, songs, tmp_path / "run")
    assert run.stepper.model.kinds == 2  # With a window and without.
    block = run.stepper.model.decoder.layers[0]
    block.register_buffer("another", torch.zeros(3))
    assert run.stepper.model.kinds == 3


def test_nothing_is_read_for_an_epoch_that_will_not_be(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30, 30))
    run = prepare(tiny_config(epochs=2, num_workers=1), base, songs, tmp_path / "run")
    begun: list[int] = []
    for epoch in (0, 1):
        for _ in run.batches.epoch(epoch):
            pass
        begun.append(run.batches._begun is not None)
    run.batches.close()
    assert begun == [True, False]
