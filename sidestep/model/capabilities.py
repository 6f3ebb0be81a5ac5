"""What each kind of device can do: one table, which every decision that hangs on the device reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sidestep.errors import ConfigError

_EVERY_PRECISION = frozenset({"bf16", "fp16", "fp32"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a kind of device can do."""

    name: str
    """What people call it."""
    precision: str
    """What `--precision auto` means."""
    precisions: frozenset[str]
    captures: bool
    """Passes can be recorded once and replayed as a graph."""
    compiles: Literal["itself", "asked", "never"]
    """Blocks are compiled by themselves in long runs, only when it is asked for, or cannot be."""
    has_flash_window: bool
    """torch's own FlashAttention takes a window here (on GPUs that are new enough)."""
    fused_adamw: bool
    adamw8bit: bool
    nf4: bool
    pins_memory: bool
    has_float64: bool
    measures_peak: bool
    """The most memory that was taken, and all there is, can be read."""
    exchanges: Literal["nccl", "gloo", "never"]
    """How several processes add up numbers that lie on their devices."""


_CUDA = Capabilities(
    name="CUDA",
    precision="bf16",
    precisions=_EVERY_PRECISION,
    captures=True,
    compiles="itself",
    has_flash_window=True,
    fused_adamw=True,
    adamw8bit=True,
    nf4=True,
    pins_memory=True,
    has_float64=True,
    measures_peak=True,
    exchanges="nccl",
)

CAPABILITIES = {
    "cuda": _CUDA,
    # torch built for HIP calls its devices cuda; its FlashAttention is another one and knows no window.
    "rocm": replace(_CUDA, name="ROCm", has_flash_window=False),
    # torch 2.11 needs macOS 14, with which bf16 came. Its DataLoader refuses to pin memory for MPS, and its compiler is
    # a prototype there. Its fused AdamW is left alone: whether that heeds float16's loss scaling has not been seen.
    # bitsandbytes has no 8-bit update for MPS, and is not installed on macOS.
    "mps": Capabilities(
        name="MPS",
        precision="fp16",
        precisions=_EVERY_PRECISION,
        captures=False,
        compiles="never",
        has_flash_window=False,
        fused_adamw=False,
        adamw8bit=False,
        nf4=False,
        pins_memory=False,
        has_float64=False,
        measures_peak=False,
        exchanges="never",
    ),
    # Not every XPU has float64, and torch's loss scaling for float16 needs it.
    "xpu": Capabilities(
        name="XPU",
        precision="bf16",
        precisions=_EVERY_PRECISION - {"fp16"},
        captures=False,
        compiles="asked",
        has_flash_window=False,
        fused_adamw=True,
        adamw8bit=True,
        nf4=True,
        pins_memory=True,
        has_float64=False,
        measures_peak=True,
        exchanges="never",
    ),
    "cpu": Capabilities(
        name="CPU",
        precision="fp32",
        precisions=_EVERY_PRECISION,
        captures=False,
        compiles="never",
        has_flash_window=False,
        fused_adamw=False,
        adamw8bit=True,
        nf4=True,
        pins_memory=False,
        has_float64=True,
        measures_peak=False,
        exchanges="gloo",
    ),
}


def capabilities(device: torch.device) -> Capabilities:
    """Return what a device can do."""
    is_rocm = device.type == "cuda" and torch.version.hip is not None
    return CAPABILITIES["rocm" if is_rocm else device.type]


def those_with(ability: Callable[[Capabilities], object]) -> str:
    """Return the names of the devices that have an ability: `CUDA, ROCm or XPU`."""
    *first, last = [each.name for each in CAPABILITIES.values() if ability(each)]
    return f"{', '.join(first)} or {last}" if first else last


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError for a precision the device cannot compute in."""
    able = capabilities(device)
    if precision not in able.precisions:
        raise ConfigError(
            f"--precision {precision} needs {those_with(lambda each: precision in each.precisions)}, "
            f"and this runs on {able.name}.",
            hint=f"Use --precision {able.precision}, or leave it out.",
        )


def check_training(*, optimizer_type: str, quantize: str, device: torch.device) -> None:
    """Raise ConfigError for an optimizer or a quantization that the device cannot do."""
    able = capabilities(device)
    if optimizer_type == "adamw8bit" and not able.adamw8bit:
        raise ConfigError(
            f"adamw8bit needs {those_with(lambda each: each.adamw8bit)}, and this runs on {able.name}.",
            hint="Use --optimizer-type adafactor, which takes little memory too, or adamw.",
        )
    if quantize == "nf4" and not able.nf4:
        raise ConfigError(
            f"--quantize nf4 needs {those_with(lambda each: each.nf4)}, and this runs on {able.name}.",
            hint="Use --quantize int8, which runs everywhere.",
        )
