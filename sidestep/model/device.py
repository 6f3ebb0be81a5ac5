"""The device and the precision to compute in, and what is asked of a device: memory, waiting, random state, graphs.

Together with `capabilities.py` the one place that knows devices by name.
"""

import gc
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from sidestep.errors import ConfigError
from sidestep.model.capabilities import capabilities, check_precision

_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Graph = torch.cuda.CUDAGraph
Stream = torch.cuda.Stream
Mark = torch.cuda.Event


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
    if device.index is not None and device.index >= device_count(device.type):
        raise ConfigError(
            f"--device {name} is not available here: there are {device_count(device.type)} of that kind, "
            "counted from 0.",
            hint=choices,
        )
    return device


def choose_own_device(name: str, *, local_rank: int) -> torch.device:
    """Give the device called `name` for one of several processes of a machine: of what there are several, its own.

    `local_rank` counts the machine's processes from 0. ConfigError when there are too few of that kind.
    """
    device = choose_device(name)
    if capabilities(device).exchanges != "nccl":
        return device
    if device.index is None:
        there = device_count(device.type)
        if local_rank >= there:
            raise ConfigError(
                f"There are more processes than GPUs on this machine: {there} GPU{'s' if there > 1 else ''}.",
                hint=f"Start {there}: --nproc-per-node {there}.",
            )
        device = torch.device(device.type, local_rank)
    elif local_rank > 0:
        raise ConfigError(
            f"--device {name} is one GPU, and there are several processes on this machine.",
            hint="Leave --device out: each takes its own. CUDA_VISIBLE_DEVICES says which there are.",
        )
    _module(device).set_device(device)
    return device


def available_devices() -> list[str]:
    """List the kinds of device of this machine, best first; the CPU is always the last."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    return [kind for kind, is_there in found.items() if is_there] + ["cpu"]


def device_count(kind: str) -> int:
    """Return how many devices of an available kind there are."""
    if kind == "cuda":
        return torch.cuda.device_count()
    return torch.xpu.device_count() if kind == "xpu" else 1


def torch_build() -> str:
    """Return what the installed torch was built for: `CUDA 12.8`, `ROCm 6.4`, or neither: `CUDA none`."""
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"


def has_cuda() -> bool:
    """Say whether the installed torch was built for NVIDIA's GPUs."""
    return torch.version.cuda is not None


def _why_missing(kind: str) -> str:
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return " The installed torch was built without CUDA."
    return " Is its driver installed?" if kind in ("cuda", "xpu") else ""


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Give the dtype of `precision`: bf16, fp16, fp32, or auto: bf16 on CUDA and XPU, fp16 on MPS, fp32 on the CPU.

    Raises ConfigError when the device cannot compute in it.
    """
    if precision == "auto":
        precision = capabilities(device).precision
    check_precision(precision, device)
    return _DTYPES[precision]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype for what overflows in float16, the encoders and the stream through the decoder: float32 for it.

    The model was made in bfloat16. In float16 others got NaN on MPS and on CUDA, there as soon as a song has lyrics
    (github.com/ace-step/ACE-Step-1.5/issues/1243).
    """
    return torch.float32 if dtype == torch.float16 else dtype


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `dtype` inside this context; with float32 it changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def memory_gib(device: torch.device) -> float | None:
    """Give the most memory tensors took since `reset_memory_peak`, in GiB (MPS: what they take now; CPU: None)."""
    if capabilities(device).measures_peak:
        return _module(device).max_memory_allocated(device) / _GIB
    return torch.mps.current_allocated_memory() / _GIB if device.type == "mps" else None


def total_gib(device: torch.device) -> float | None:
    """Give the memory of a device in GiB (MPS: what Metal recommends to take at most; CPU: None)."""
    if capabilities(device).measures_peak:
        return _module(device).get_device_properties(device).total_memory / _GIB
    return torch.mps.recommended_max_memory() / _GIB if device.type == "mps" else None


def free_gib(device: torch.device) -> float | None:
    """Give the memory of a device that no program has taken, in GiB (MPS and CPU: None)."""
    return _module(device).mem_get_info(device)[0] / _GIB if capabilities(device).measures_peak else None


def device_name(device: torch.device) -> str:
    """Return the name a device was sold under; of MPS and the CPU the processor's kind."""
    return _module(device).get_device_name(device) if capabilities(device).measures_peak else platform.machine()


def reset_memory_peak(device: torch.device) -> None:
    """Start a new measurement for `memory_gib`."""
    if capabilities(device).measures_peak:
        _module(device).reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Give back what the part of the model that was just dropped took, before the next one is loaded."""
    # Modules refer to each other in circles; without this the dropped part would stay for a while.
    gc.collect()
    if device.type != "cpu":
        _module(device).empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type != "cpu":
        _module(device).synchronize()


def works_beside_the_cpu(device: torch.device) -> bool:
    """Say whether a device computes while the CPU does something else."""
    return device.type != "cpu"


def current_stream(device: torch.device) -> Stream:
    """Return the stream that work for a device with streams (CUDA, ROCm) is queued on now."""
    return torch.cuda.current_stream(device)


def queued_on(stream: Stream) -> AbstractContextManager[object]:
    """Queue work on this stream inside this context; nothing waits for it."""
    return torch.cuda.stream(stream)


def generation(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA or ROCm device: (8, 0) is NVIDIA's Ampere."""
    return torch.cuda.get_device_capability(device)


def is_slow_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether a GPU has units for float16 and none for this format: NVIDIA's Volta and Turing for bfloat16."""
    is_nvidia = capabilities(device).has_flash_window  # ROCm counts its generations otherwise.
    return dtype == torch.bfloat16 and is_nvidia and (7, 0) <= generation(device) < (8, 0)


def has_flash_window(device: torch.device) -> bool:
    """Say whether torch's own FlashAttention is there: in CUDA builds, on Ampere and newer."""
    if not capabilities(device).has_flash_window:
        return False
    return generation(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Put torch's random state back afterwards, the CPU's and the device's."""
    if device.type == "mps":
        # torch's fork_rng hands the device's number on, which MPS has no use for.
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.mps.set_rng_state(state)
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


@contextmanager
def full_memory_alike() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for a full memory on every device: MPS has but a sentence for it."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("MPS backend out of memory"):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


@contextmanager
def beside(stream: Stream) -> Iterator[None]:
    """Run on a stream that begins when the current one gets here, and that the current one then waits for."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capturing(graph: Graph, *, pool: Any) -> AbstractContextManager[None]:
    """Record what is done inside this context in `graph` instead of doing it; `pool` is another graph's memory."""
    # Threads that pin memory go on meanwhile, and are none of this recording.
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def _module(device: torch.device) -> Any:
    """Return torch's module for a kind of device."""
    return torch.get_device_module(device)
