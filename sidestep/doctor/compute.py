"""What torch can compute with here, and whether a step of training goes through."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sidestep.config.shell import INSTALLER
from sidestep.config.train import TrainConfig
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.doctor.finding import Finding
from sidestep.errors import ConfigError, SidestepError
from sidestep.model.attention import window_kernel_for
from sidestep.model.capabilities import capabilities
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint, find_checkpoint
from sidestep.model.device import (
    available_devices,
    choose_device,
    choose_dtype,
    device_name,
    free_gib,
    is_slow_in,
    torch_build,
    total_gib,
)
from sidestep.model.loading import load_silence_latent
from sidestep.model.quantize import Nf4
from sidestep.preprocess.tensors import Sample, write_sample
from sidestep.training.accelerate import why_not_compile
from sidestep.training.assemble import Run, assemble
from sidestep.training.optimizers import make_optimizer

FRAMES = 60
WINDOW = 32
# Relative differences that rounding explains.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
LOSS_ROUNDING = 0.05
SCALINGS = 8  # By half each.
GET_TORCH = f"{INSTALLER} in Side-Step's folder installs the torch that fits."
CPU = torch.device("cpu")


def build(gpus: Sequence[str], *, has_amd_driver: bool, wants_cpu: bool) -> Finding:
    """Compare what torch was built for with the NVIDIA cards that their driver's tool lists, and with AMD's driver.

    A card that cannot be used is no problem where the CPU was asked for.
    """
    name = f"torch {torch.__version__} for {torch_build()}"
    if available_devices() != [CPU.type]:
        return Finding("torch", f"{name}.")
    level = "note" if wants_cpu else "problem"
    is_for_nvidia = torch_build().startswith("CUDA") and not torch_build().endswith("none")
    if gpus and is_for_nvidia:
        text = f"{name} does not find {', '.join(gpus)}, though the driver does."
        return Finding("torch", text, level, "Update NVIDIA's driver: it is older than this torch needs.")
    if gpus:
        return Finding("torch", f"{name} cannot use {', '.join(gpus)}.", level, GET_TORCH)
    if has_amd_driver:
        return Finding("torch", f"{name} cannot use the AMD GPU whose driver is here.", "note", GET_TORCH)
    text = f"{name}; no GPU was found. The demo goes on the CPU; a real model takes days on it."
    return Finding("torch", text, "note", "Train on a machine with a GPU of 8 GB or more.")


def devices() -> Iterator[Finding]:
    """Say of every device what it is, its memory, and what of it is used."""
    for kind in available_devices():
        device = torch.device(kind)
        able = capabilities(device)
        total, free = total_gib(device), free_gib(device)
        memory = "" if total is None else f", {total:.0f} GiB" + ("" if free is None else f" ({free:.1f} free)")
        lacks = "" if able.compiles == "never" else why_not_compile(device)
        graphs = "graphs" if able.captures else "no graphs"
        compiles = "no compiled blocks" if lacks or able.compiles == "never" else "compiled blocks"
        text = f"{device_name(device)}{memory}: {able.precision}, {graphs}, {compiles}."
        if is_slow_in(choose_dtype("auto", device), device):
            yield Finding(able.name, f"{text} It has no units for bf16.", "note", "Try --precision fp16.")
        elif lacks:
            yield Finding(able.name, f"{text} {lacks}.", "note", "Training is the same without it, and slower.")
        else:
            yield Finding(able.name, text)


def training(name: str) -> Iterator[Finding]:
    """Try the device that would be chosen: bitsandbytes' parts, an attention kernel, and one step of a toy model."""
    try:
        device = choose_device(name)
    except ConfigError as error:
        yield Finding("Device", error.message, "problem", error.hint)
        return
    yield _parts(device)
    try:
        dtype = choose_dtype("auto", device)
        yield _attention(device, dtype)
        yield _step(device, dtype)
    except SidestepError as error:
        yield Finding("Step", error.message, "problem", error.hint)
    except Exception as error:  # The examination is there for what nobody foresaw.
        yield Finding("Step", f"A step of a toy model fails: {_first_line(error)}", "problem", "Try --device cpu.")


def _parts(device: torch.device) -> Finding:
    """Try what bitsandbytes is for: an 8-bit optimizer and 4-bit weights, where the device has them."""
    able = capabilities(device)
    tries: dict[str, Callable[[], object]] = {}
    if able.adamw8bit:
        tries["adamw8bit"] = lambda: _step_in_8_bits(device)
    if able.nf4:
        tries["--quantize nf4"] = lambda: Nf4().pack(torch.ones(64, 64, device=device))
    for name, attempt in tries.items():
        try:
            attempt()
        except Exception as error:  # Whatever a library that does not fit the driver raises is what is to be told.
            text = f"{name} cannot be used: {_first_line(error)}"
            return Finding(
                "Parts", text, "note", f"Use --optimizer-type adafactor and --quantize int8, or run {INSTALLER}."
            )
    if not tries:
        return Finding("Parts", f"{able.name} has no adamw8bit and no --quantize nf4; adafactor and int8 do instead.")
    return Finding("Parts", f"{' and '.join(tries)} can be used.")


def _step_in_8_bits(device: torch.device) -> None:
    # bitsandbytes keeps what has fewer than 4096 numbers in 32 bits.
    weight = Parameter(torch.ones(64, 128, device=device))
    weight.grad = torch.ones_like(weight)
    make_optimizer("adamw8bit", {"weight": weight}, lr=0.1, weight_decay=0.0, device=device).step()
    if not bool((weight < 1).all()):
        raise RuntimeError("a step in 8 bits changes no weight")


def _attention(device: torch.device, dtype: torch.dtype) -> Finding:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4 * WINDOW + 5, heads, 64, generator=generator) for heads in (4, 2, 2))
    kernel = window_kernel_for(device, dtype)
    found = kernel(query.to(device, dtype), key.to(device, dtype), value.to(device, dtype), WINDOW).float().cpu()
    difference = ((found - _plain_attention(query, key, value)).norm() / found.norm()).item()
    text = f"{kernel.__name__} in {_short(dtype)} differs from plain float32 arithmetic by {difference:.0e}."
    if difference < ROUNDING[dtype]:
        return Finding("Attention", text)
    return Finding("Attention", text, "problem", "Try --precision fp32, or --device cpu; update the driver.")


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    places = torch.arange(query.shape[1])
    mask = (places[:, None] - places).abs() <= WINDOW
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _step(device: torch.device, dtype: torch.dtype) -> Finding:
    with tempfile.TemporaryDirectory(prefix="sidestep-doctor-") as folder:
        checkpoint = find_checkpoint(build_toy_checkpoint(Path(folder, "model")), "base")
        songs = _song(Path(folder, "songs"), checkpoint)
        started = time.perf_counter()
        loss, has_learned = _loss(_toy_run(checkpoint, songs, device=str(device), precision=_short(dtype)))
        seconds = time.perf_counter() - started
        wanted, _ = _loss(_toy_run(checkpoint, songs, device=str(CPU), precision="fp32"))
    text = (
        f"One step of a toy model on {capabilities(device).name} in {_short(dtype)}: {seconds:.1f} s, loss {loss:.3f}"
    )
    if has_learned and abs(loss - wanted) < LOSS_ROUNDING * wanted:
        return Finding("Step", f"{text}.")
    return Finding("Step", f"{text}; on the CPU {wanted:.3f}.", "problem", "Try --precision fp32, or --device cpu.")


def _song(folder: Path, checkpoint: Checkpoint) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    silence_TC = load_silence_latent(checkpoint, frames=FRAMES)[0]
    sample = Sample(
        target_latents=torch.randn(FRAMES, 64, generator=generator),
        encoder_hidden_states=torch.randn(9, checkpoint.encoder_width, generator=generator),
        context_latents=torch.cat([silence_TC, torch.ones(FRAMES, 64)], dim=1),
        metadata={"encoder_fingerprint": encoder_fingerprint(checkpoint), "model_variant": checkpoint.variant},
    )
    write_sample(folder / "song.pt", sample)
    return folder


def _toy_run(checkpoint: Checkpoint, songs: Path, *, device: str, precision: str) -> Run:
    settings = TrainConfig(
        device=device,
        precision=precision,  # pyright: ignore[reportArgumentType]
        rank=8,
        dropout=0.0,
        gradient_accumulation=1,
        compile=False,
        num_workers=min(1, TrainConfig().num_workers),
    )
    return assemble(
        settings,
        recipe_name="fixed",
        checkpoint=checkpoint,
        dataset_dir=songs,
        output_dir=songs,
        run_name="doctor",
        version="",
        emit=lambda event: None,
    )


def _loss(run: Run) -> tuple[float, bool]:
    """Make a step; returns its loss, and whether the adapter was changed by it, or by one of the next.

    In float16 the first ones are left out until the loss is scaled by what its gradients can bear.
    """
    batches = list(run.batches.epoch(0))
    trained = [value for name, value in run.adapter.parameters.items() if "lora_B" in name]
    first = run.stepper(batches, lr=1e-3, seeds=[0])
    for _ in range(SCALINGS):
        if all(bool(value.any()) for value in trained):
            return first.values[0].item(), True
        run.stepper(batches, lr=1e-3, seeds=[0])
    return first.values[0].item(), False


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _first_line(error: BaseException) -> str:
    text = error.message if isinstance(error, SidestepError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0]
