"""Every kind of device by its row in the table; those that are not here are played by the CPU, with their abilities.

That proves what Side-Step decides for them, and that the way it then goes can be gone. It proves nothing of a device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch.nn import Parameter

from sidestep.commands import torch_build as builds
from sidestep.errors import ConfigError, NonFiniteError, NoRoomError
from sidestep.events import Metrics
from sidestep.listen.conditions import encode_prompts
from sidestep.listen.prompts import prompt_of_words
from sidestep.listen.render import Renderer, Sampling
from sidestep.main import main
from sidestep.model import device as device_layer
from sidestep.model import loading
from sidestep.model.attention import block_window, flash_window, window_kernel_for
from sidestep.model.capabilities import CAPABILITIES, capabilities
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import (
    available_devices,
    choose_device,
    choose_dtype,
    free_memory,
    full_memory_alike,
    is_slow_in,
    memory_gib,
    reset_memory_peak,
    same_random_state,
    synchronize,
    torch_build,
    total_gib,
    wide_dtype,
)
from sidestep.model.loading import load_decoder, widen_stream
from sidestep.preprocess.tensors import read_sample, sample_paths
from sidestep.training import accelerate, build
from sidestep.training.accelerate import can_capture, wants_compile
from sidestep.training.fit import measure
from sidestep.training.optimizers import make_optimizer
from sidestep.ui.console import open_console
from tests.torch.command_line import SMALL
from tests.torch.played import GIB, Module
from tests.torch.tiny import prepare, tiny_config, train, write_songs

CPU = torch.device("cpu")
Play = Callable[[str], torch.device]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Stands in for the module of whatever device is played."""
    played = Module()
    monkeypatch.setattr(device_layer, "_module", lambda device: played)
    return played


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, module: Module) -> Play:
    """Let the CPU play a kind of device."""

    def played(kind: str) -> torch.device:
        monkeypatch.setitem(CAPABILITIES, "cpu", CAPABILITIES[kind])
        return CPU

    return played


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Give a device of a kind by its own name: good for decisions, not for computing. A new GPU, with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(accelerate.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerate.shutil, "which", lambda name: f"/usr/bin/{name}")

    def device(kind: str) -> torch.device:
        monkeypatch.setattr(torch.version, "hip", "7.1" if kind == "rocm" else None)
        return torch.device("cuda" if kind == "rocm" else kind)

    return device


@pytest.mark.parametrize(
    ("kind", "dtype", "captures", "compiles", "fused", "kernel"),
    [
        ("cuda", torch.bfloat16, True, True, True, flash_window),
        ("rocm", torch.bfloat16, True, True, True, block_window),
        ("mps", torch.float16, False, False, False, block_window),
        ("xpu", torch.bfloat16, False, False, True, block_window),
        ("cpu", torch.float32, False, False, False, block_window),
    ],
)
def test_what_is_chosen_by_itself_follows_from_the_device(
    named: Play, kind: str, dtype: torch.dtype, captures: bool, compiles: bool, fused: bool, kernel: object
):
    device = named(kind)
    assert choose_dtype("auto", device) == dtype
    assert can_capture(device) is captures
    assert wants_compile(None, device, music_seconds=1e6, recomputed=0, kinds=2, emit=lambda event: None) is compiles
    weight = {"w": Parameter(torch.ones(2, 2))}
    assert make_optimizer("adamw", weight, lr=1, weight_decay=0, device=device).defaults["fused"] is fused
    assert window_kernel_for(device, dtype) is kernel


def test_torch_built_for_rocm_is_known_though_it_calls_its_devices_cuda(named: Play):
    assert capabilities(named("rocm")).name == "ROCm"
    assert torch_build() == "ROCm 7.1"
    assert capabilities(named("cuda")).name == "CUDA"
    assert torch_build().startswith("CUDA")


def test_on_xpu_blocks_are_compiled_when_that_is_asked_for(named: Play):
    assert wants_compile(True, named("xpu"), music_seconds=1, recomputed=0, kinds=2, emit=lambda event: None)


@pytest.mark.parametrize(
    ("kind", "settings", "sentence", "way_out"),
    [
        ("mps", {"optimizer_type": "adamw8bit"},
         "adamw8bit needs CUDA, ROCm, XPU or CPU, and this runs on MPS.", "adafactor"),
        ("mps", {"quantize": "nf4"}, "--quantize nf4 needs CUDA, ROCm, XPU or CPU, and this runs on MPS.", "int8"),
        ("mps", {"compile": True},
         "--compile cannot be had here: compiled blocks need CUDA, ROCm or XPU, and this runs on MPS.", "Leave it out"),
        ("xpu", {"precision": "fp16"},
         "--precision fp16 needs CUDA, ROCm, MPS or CPU, and this runs on XPU.", "--precision bf16"),
        ("cpu", {"compile": True},
         "--compile cannot be had here: compiled blocks need CUDA, ROCm or XPU, and this runs on CPU.", "Leave it out"),
    ],
)  # fmt: skip
def test_what_a_device_cannot_do_is_refused_with_a_way_out_before_anything_is_loaded(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch,
    kind: str, settings: dict[str, Any], sentence: str, way_out: str,
):  # fmt: skip
    monkeypatch.setattr(device_layer, "available_devices", lambda: [kind])
    loaded: list[str] = []
    monkeypatch.setattr(build, "load_decoder", lambda *_, **__: loaded.append("decoder"))
    songs = write_songs(tmp_path / "songs", base, (20,))
    with pytest.raises(ConfigError) as refused:
        prepare(tiny_config(device=kind, **settings), base, songs, tmp_path / "run")
    assert refused.value.message == sentence
    assert way_out in refused.value.hint
    assert not loaded


def test_a_device_refuses_nothing_else(named: Play):
    """What the table allows of all that can be asked for, device by device."""
    asked = [{"optimizer_type": name} for name in ("adamw", "adamw8bit", "adafactor", "prodigy")]
    asked += [{"quantize": name} for name in ("none", "int8", "nf4")]
    asked += [{"precision": name} for name in ("auto", "bf16", "fp16", "fp32")]
    refused: dict[str, list[Any]] = {kind: [] for kind in CAPABILITIES}
    for kind, found in refused.items():
        for settings in asked:
            try:
                accelerate.check_device(tiny_config(**settings), named(kind))
            except ConfigError:
                found.append(next(iter(settings.values())))
    assert refused == {"cuda": [], "rocm": [], "mps": ["adamw8bit", "nf4"], "xpu": ["fp16"], "cpu": []}


@pytest.mark.parametrize("more", [("--sample-every-n-epochs", "1"), ("--preprocess",)], ids=str)
def test_the_command_refuses_before_prompts_or_songs_are_encoded(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
):  # fmt: skip
    monkeypatch.setattr(device_layer, "available_devices", lambda: ["mps"])
    songs = write_songs(tmp_path / "tensors", base, (20,))
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", torch.zeros(9600, 2).numpy(), 48000)
    data = (
        ("--audio-dir", str(tmp_path / "audio"), "--tensor-output", str(tmp_path / "new"))
        if more == ("--preprocess",)
        else ("-d", str(songs))
    )
    small = [word for pair in ({**SMALL, "--device": "mps"}).items() for word in pair]
    words = ["-c", str(base.root), "-M", base.variant, "-o", str(tmp_path / "out"), *data, *more]
    assert main(["fixed", *words, *small, "--optimizer-type", "adamw8bit", "--plain"]) == 2
    said = capsys.readouterr()
    assert "adamw8bit needs CUDA, ROCm, XPU or CPU" in said.err
    assert "Pass 1" not in said.out and not list((tmp_path / "new").glob("*.pt"))


@pytest.mark.parametrize(("kind", "memory"), [("mps", None), ("xpu", 3.0)])
def test_a_run_goes_its_way_on_every_kind_that_captures_nothing(
    tmp_path: Path, base: Checkpoint, play: Play, monkeypatch: pytest.MonkeyPatch, kind: str, memory: float | None
):
    play(kind)
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    config = tiny_config(dropout=0.1, gradient_checkpointing=True, pin_memory=False)
    trained = train(config, base, songs, tmp_path / "run")
    model = trained.run.stepper.model
    assert model.dtype == choose_dtype("auto", CPU)
    assert trained.run.stepper.scaler.is_enabled() is (kind == "mps")
    assert len(trained.losses) == 4
    assert [event.memory_gib for event in trained.all_of(Metrics)] == [memory] * 4
    assert all(weight.abs().sum() > 0 for name, weight in trained.weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("generation", "precision", "said"),
    [
        ((7, 5), "auto", True),
        ((7, 5), "bf16", True),
        ((7, 5), "fp16", False),
        ((6, 1), "auto", False),
        ((8, 0), "auto", False),
    ],
)
def test_a_gpu_that_has_no_units_for_bf16_is_said_with_what_is_faster(
    monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int], precision: str, said: bool
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    monkeypatch.setattr(device_layer, "available_devices", lambda: ["cuda", "cpu"])
    assert is_slow_in(choose_dtype(precision, torch.device("cuda")), torch.device("cuda")) is said
    assert not is_slow_in(torch.bfloat16, torch.device("cpu"))
    lines: list[str] = []
    console = open_console(plain=True)
    monkeypatch.setattr(console, "warning", lines.append)
    builds.warn_of_slowness("auto", precision, console)
    assert lines == (["This GPU has units for float16 and none for bf16: try --precision fp16."] if said else [])


def test_samples_are_rendered_where_float16_is_widened(base: Checkpoint):
    decoder = load_decoder(base, device=CPU, dtype=torch.float16)
    widen_stream(decoder, dtype=torch.float16)
    prompts = [prompt_of_words({"caption": "a slow waltz"})]
    (wording,) = encode_prompts(base, prompts, seconds=1.0, seed=1, device=CPU, dtype=torch.float16)
    assert wording.rows_BLD.dtype == torch.float32
    renderer = Renderer(base, decoder, seconds=1.0, device=CPU, dtype=torch.float16)
    assert renderer.render(wording, Sampling(steps=2, guidance=1.0)).shape == (2, 48_000)


def loud(checkpoint: Checkpoint, songs: Path, output: Path) -> Any:
    """Put a float16 run together whose blocks add up to more than float16 can hold, though each alone stays inside."""
    run = prepare(tiny_config(precision="fp16", epochs=1), checkpoint, songs, output)
    decoder = run.stepper.model.decoder
    with torch.no_grad():
        decoder.proj_in_conv.bias.fill_(40_000.0)
        # The gate of the first MLP; the timestep adds about 1 to it or takes it away.
        decoder.layers[0].scale_shift_table[:, 5].fill_(2.0)
    fused = run.stepper.model.fused
    assert fused is not None
    fused.blocks[0].down.register_forward_hook(lambda layer, x, outputs: (torch.full_like(outputs[0], 20_000.0),))
    return run


def test_what_overflows_in_float16_is_computed_in_float32(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    songs = write_songs(tmp_path / "songs", base, (20,))
    assert [wide_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)] == [torch.float32, torch.bfloat16]
    wide = loud(base, songs, tmp_path / "wide")
    (batch,) = wide.batches.epoch(0)
    assert wide.stepper([batch], lr=1e-3, seeds=[1]).values[0].isfinite()
    monkeypatch.setattr(loading, "wide_dtype", lambda dtype: dtype)
    plain = loud(base, songs, tmp_path / "plain")
    with pytest.raises(NonFiniteError, match="loss is no longer a finite number"):
        plain.stepper([batch], lr=1e-3, seeds=[1])


def test_without_overflow_the_wider_stream_gives_the_same_loss(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    songs = write_songs(tmp_path / "songs", base, (20,))
    losses = []
    for name in ("wide", "plain"):
        run = prepare(tiny_config(precision="fp16"), base, songs, tmp_path / name)
        (batch,) = run.batches.epoch(0)
        losses.append(run.stepper([batch], lr=1e-3, seeds=[1]).values[0].item())
        monkeypatch.setattr(loading, "wide_dtype", lambda dtype: dtype)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_for_float16_songs_are_encoded_in_float32(tmp_path: Path, base: Checkpoint):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", torch.sin(torch.arange(24000) / 10).numpy(), 48000)
    words = ["fixed", "--preprocess", "-c", str(base.root), "-M", base.variant, "--audio-dir", str(tmp_path / "audio")]
    words += ["--tensor-output", str(tmp_path / "new"), "--device", "cpu", "--precision", "fp16", "--plain"]
    assert main(words) == 0
    assert read_sample(sample_paths(tmp_path / "new")[0]).target_latents.dtype == torch.float32


def test_a_device_that_can_measure_is_measured_before_a_run(tmp_path: Path, base: Checkpoint, play: Play):
    songs = write_songs(tmp_path / "songs", base, (20,))
    assert measure(prepare(tiny_config(), base, songs, tmp_path / "cpu")) is None
    play("xpu")
    fit = measure(prepare(tiny_config(), base, songs, tmp_path / "xpu"))
    assert fit is not None
    assert (fit.peak_gib, fit.device_gib) == (3.0, 16.0)


def test_measuring_in_float16_leaves_the_scale_of_the_loss_as_it_was(tmp_path: Path, base: Checkpoint, play: Play):
    songs = write_songs(tmp_path / "songs", base, (20,))
    run = prepare(tiny_config(precision="fp16"), base, songs, tmp_path / "run")
    play("xpu")
    for scale in (2.0, 2.0**40):  # One that steps are counted at, and one that overflows.
        run.stepper.scaler.load_state_dict({**run.stepper.scaler.state_dict(), "scale": scale})
        before = run.stepper.scaler.state_dict()
        assert measure(run) is not None
        assert run.stepper.scaler.state_dict() == before


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("cuda", ["reset_peak_memory_stats", "empty_cache", "synchronize"]),
        ("xpu", ["reset_peak_memory_stats", "empty_cache", "synchronize"]),
        ("mps", ["empty_cache", "synchronize"]),
        ("cpu", []),
    ],
)
def test_a_device_is_asked_only_what_it_knows(module: Module, kind: str, asked: list[str]):
    device = torch.device(kind)
    reset_memory_peak(device)
    free_memory(device)
    synchronize(device)
    assert module.calls == asked


def test_memory_is_read_as_each_device_gives_it(module: Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GIB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
    found = {kind: (memory_gib(torch.device(kind)), total_gib(torch.device(kind))) for kind in ("xpu", "mps", "cpu")}
    assert found == {"xpu": (3.0, 16.0), "mps": (2.0, 12.0), "cpu": (None, None)}


def test_the_random_state_of_mps_is_put_back_too(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    before = generator.get_state(), torch.get_rng_state()
    with same_random_state(torch.device("mps")):
        torch.rand(3)
        torch.rand(3, generator=generator)
    assert torch.equal(before[0], generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())


def test_a_full_memory_of_mps_is_said_like_any_other(tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="other"), full_memory_alike():
        raise ValueError("other")
    with pytest.raises(RuntimeError, match="shapes") as other, full_memory_alike():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(other.value, torch.OutOfMemoryError)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB, max allowed: 9.07 GB).")

    monkeypatch.setattr(build, "load_decoder", full)
    songs = write_songs(tmp_path / "songs", base, (20,))
    with pytest.raises(NoRoomError, match="does not fit into the free memory"):
        prepare(tiny_config(), base, songs, tmp_path / "run")


def test_every_row_of_the_table_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert {*available_devices(), "rocm"} == CAPABILITIES.keys()
    assert [choose_device(kind).type for kind in available_devices()] == ["cuda", "mps", "xpu", "cpu"]
    for row in CAPABILITIES.values():
        assert row.precision in row.precisions
