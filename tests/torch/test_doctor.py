"""The doctor with torch: the devices, and a step of a toy model on the one that would be chosen."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.doctor import compute
from sidestep.doctor.compute import build, devices, training
from sidestep.main import main
from sidestep.model import device as device_layer
from sidestep.model.attention import block_window
from sidestep.model.capabilities import CAPABILITIES
from sidestep.model.checkpoint import Checkpoint
from tests.torch.played import GIB, Module

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def doctor(*words: object) -> int:
    return main(["doctor", "--plain", *map(str, words)])


def test_a_machine_that_can_train_is_told_so(base: Checkpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert doctor("-c", base.root, "--device", "cpu") == 0
    said = capsys.readouterr().out.splitlines()
    levels = {line[9:20].strip(): line[:9].strip() for line in said if line[:9].strip()}
    assert {about: levels[about] for about in ("Models", "Parts", "Attention", "Step")} == dict.fromkeys(
        ("Models", "Parts", "Attention", "Step"), "ok"
    )
    assert any(f"base: all files are there ({base.root})." in line for line in said)
    assert said[-1] == "Training can work here."
    assert not (tmp_path / "output").exists()


def test_the_model_the_output_and_the_device_are_the_ones_that_were_typed(
    base: Checkpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "file").touch()
    assert doctor("-c", base.root, "-M", "sft", "-o", tmp_path / "file", "--device", "cuda:99") == 1
    said = capsys.readouterr().out
    assert f"{base.root} has no model 'sft'" in said
    assert f"{tmp_path / 'file'} cannot be written: Not a directory." in said
    assert "--device cuda:99 is not available here" in said
    assert "3 problems to mend" in said


@pytest.mark.parametrize(
    ("torch_is_for", "there", "gpus", "amd", "level", "sentence", "way_out"),
    [
        ("CUDA 13.0", ["cuda", "cpu"], ["RTX 3060, 12 GB"], False, "ok", "for CUDA 13.0.", ""),
        ("CUDA none", ["cpu"], ["RTX 3060, 12 GB"], False, "problem", "cannot use RTX 3060, 12 GB", "install"),
        ("ROCm 7.1", ["cpu"], ["RTX 3060, 12 GB"], False, "problem", "cannot use RTX 3060, 12 GB", "install"),
        ("CUDA 13.0", ["cpu"], ["RTX 3060, 12 GB"], False, "problem", "though the driver does", "Update NVIDIA's"),
        ("CUDA 13.0", ["cpu"], [], True, "note", "AMD GPU", "install"),
        ("ROCm 7.1", ["cuda", "cpu"], [], True, "ok", "for ROCm 7.1.", ""),
        ("CUDA none", ["mps", "cpu"], [], False, "ok", "for CUDA none.", ""),
        ("CUDA none", ["cpu"], [], False, "note", "no GPU was found", "GPU"),
    ],
)  # fmt: skip
def test_a_torch_that_does_not_fit_the_gpu_is_told_from_one_that_does(
    monkeypatch: pytest.MonkeyPatch, torch_is_for: str, there: list[str], gpus: list[str], amd: bool,
    level: str, sentence: str, way_out: str,
):  # fmt: skip
    monkeypatch.setattr(compute, "torch_build", lambda: torch_is_for)
    monkeypatch.setattr(compute, "available_devices", lambda: there)
    found = build(gpus, has_amd_driver=amd, wants_cpu=False)
    assert found.level == level
    assert build(gpus, has_amd_driver=amd, wants_cpu=True).level != "problem"
    assert sentence in found.text
    assert way_out in found.way_out


def test_devices_are_told_with_their_memory_and_what_of_them_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_layer, "_module", lambda device: Module())
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
    monkeypatch.setattr(device_layer.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(compute, "available_devices", lambda: ["cuda", "mps", "xpu", "cpu"])
    monkeypatch.setattr(
        compute, "why_not_compile", lambda device: "Triton is not installed" if device.type == "xpu" else ""
    )
    assert [(found.about, found.level, found.text) for found in devices()] == [
        ("CUDA", "note", "Made-up cuda, 16 GiB (6.0 free): bf16, graphs, compiled blocks. It has no units for bf16."),
        ("MPS", "ok", "arm64, 12 GiB: fp16, no graphs, no compiled blocks."),
        ("XPU", "note",
         "Made-up xpu, 16 GiB (6.0 free): bf16, no graphs, no compiled blocks. Triton is not installed."),
        ("CPU", "ok", "arm64: fp32, no graphs, no compiled blocks."),
    ]  # fmt: skip


def test_a_device_of_other_abilities_is_tried_in_its_own_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CAPABILITIES, "cpu", CAPABILITIES["mps"])
    parts, attention, step = training("cpu")
    assert parts.text == "MPS has no adamw8bit and no --quantize nf4; adafactor and int8 do instead."
    assert attention.text.startswith("block_window in fp16 differs")
    assert step.text.startswith("One step of a toy model on MPS in fp16: ")
    assert {found.level for found in (parts, attention, step)} == {"ok"}


def test_bitsandbytes_that_cannot_be_loaded_is_noted_with_what_does_instead(monkeypatch: pytest.MonkeyPatch):
    load = importlib.import_module

    def without(wanted: str, *more: Any) -> Any:
        if wanted == "bitsandbytes":
            raise ImportError("libcusparse.so.12: cannot open shared object file")
        return load(wanted, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    parts, *_ = training("cpu")
    assert parts.level == "note"
    assert "adamw8bit cannot be used" in parts.text and "libcusparse" in parts.text
    assert "adafactor" in parts.way_out and "int8" in parts.way_out


def wrong_kernel(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    def too_narrow(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        return block_window(query, key, value, window - 1)

    return too_narrow


def test_an_attention_kernel_that_computes_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "window_kernel_for", wrong_kernel)
    _, attention, _ = training("cpu")
    assert attention.level == "problem"
    assert "too_narrow in fp32 differs" in attention.text
    assert "--precision fp32" in attention.way_out


def test_a_step_that_changes_nothing_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    *_, step = training("cpu")
    assert (step.level, "on the CPU" in step.text) == ("problem", True)


def test_a_step_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(compute, "assemble", fail)
    *_, step = training("cpu")
    assert step.level == "problem"
    assert step.text.endswith("RuntimeError: CUDA error: no kernel image is available for execution on the device")
