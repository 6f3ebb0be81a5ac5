"""What keeps this machine's GPU idle or slow: a torch that is not for it, or a format that it has no units for."""

from sidestep.config.shell import INSTALLER
from sidestep.errors import RunError
from sidestep.ui.console import Console
from sidestep.ui.machine import find_gpus


def torch_is_missing() -> RunError:
    """Return the error for a Python without torch, as `uv run` makes it on Windows before the installer ran."""
    return RunError(
        "torch is not installed here.",
        hint=f"Run {INSTALLER} in Side-Step's folder: it installs the torch that fits this machine's GPU.",
    )


def warn_of_slowness(device: str, precision: str, console: Console) -> None:
    """Say so where the GPU is left idle, or computes slowly in this precision; loads torch."""
    from sidestep.model.device import choose_device, choose_dtype, is_slow_in

    warn_of_idle_gpu(device, console)
    chosen = choose_device(device)
    if is_slow_in(choose_dtype(precision, chosen), chosen):
        console.warning("This GPU has units for float16 and none for bf16: try --precision fp16.")


def warn_of_idle_gpu(device: str, console: Console) -> None:
    """Say so when `--device auto` comes to the CPU although there is an NVIDIA GPU; loads torch."""
    import torch

    from sidestep.model.device import available_devices, has_cuda

    if device != "auto" or len(available_devices()) > 1:
        return
    gpus = find_gpus()
    if not gpus:
        return
    if has_cuda():
        why = f"its driver is too old for torch {torch.__version__}, or CUDA_VISIBLE_DEVICES hides it"
    else:
        why = f"torch {torch.__version__} has no CUDA"
    console.warning(
        f"The GPU ({gpus[0]}) cannot be used: {why}. This will be very slow. "
        f"{INSTALLER} in Side-Step's folder installs the torch that fits."
    )
