"""The device and the precision to compute in, and how much memory they took."""

import gc
from contextlib import AbstractContextManager, nullcontext

import torch

from sidestep.errors import ConfigError

_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_AUTO_PRECISION = {"cuda": "bf16", "xpu": "bf16", "mps": "fp16", "cpu": "fp32"}


def choose_device(name: str) -> torch.device:
    """Give the device called `name`: auto, cuda, cuda:N, mps, xpu or cpu; auto takes CUDA (ROCm too), MPS, XPU, CPU.

    Raises ConfigError when it is not there.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    choices = f"This machine has: {', '.join(available)}. --device auto takes the first of them."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"There is no device called {name!r}.", hint=choices) from error
    if device.type not in available:
        raise ConfigError(f"--device {name} is not available here.", hint=f"{choices}{_why_missing(device.type)}")
    if device.index is not None and device.index >= _count(device.type):
        raise ConfigError(
            f"--device {name} is not available here: there are {_count(device.type)} of that kind, counted from 0.",
            hint=choices,
        )
    return device


def available_devices() -> list[str]:
    """List the kinds of device of this machine, best first; the CPU is always the last."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    return [kind for kind, is_there in found.items() if is_there] + ["cpu"]


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    return torch.xpu.device_count() if kind == "xpu" else 1


def _why_missing(kind: str) -> str:
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return " The installed torch was built without CUDA."
    return " Is its driver installed?" if kind in ("cuda", "xpu") else ""


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Give the dtype of `precision`: bf16, fp16, fp32, or auto: bf16 on CUDA and XPU, fp16 on MPS, fp32 on the CPU."""
    return _DTYPES[_AUTO_PRECISION[device.type] if precision == "auto" else precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `dtype` inside this context; with float32 it changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def memory_gib(device: torch.device) -> float | None:
    """Give the most memory tensors took since `reset_memory_peak`, in GiB (MPS: what they take now; CPU: None)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device) / _GIB
    return torch.mps.current_allocated_memory() / _GIB if device.type == "mps" else None


def reset_memory_peak(device: torch.device) -> None:
    """Start a new measurement for `memory_gib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "xpu":
        torch.xpu.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Give back what the part of the model that was just dropped took, before the next one is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
